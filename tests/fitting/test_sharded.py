"""A model that is divided among ranks: its file is as good as that of a whole one, and answers alike."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, ask, store
from nectar_mlx.mlxlm.geometry import Geometry
from nectar_mlx.store import sharding
from tests import launching, toys
from tests.fitting.toy_fit import TEXT

QUESTION = "Who sees fox number 3?"
FEW = ["--queries", "600", "--steps", "60", "--context-tokens", "300", "--budget", "0.4"]


@pytest.mark.parametrize("make", [toys.exact, lambda *rest: toys.picked(*rest, 12)])
def test_a_file_in_parts_is_the_file(make):
    whole = make(toys.toy("llama"), toys.random_tokens(50))
    parts = [sharding.part(whole.tensors, whole.metadata, rank=rank, size=2) for rank in range(2)]
    for rank, (tensors, metadata) in enumerate(parts):
        nectar = Nectar(tensors, metadata)
        assert nectar.geometry.n_kv_heads == 1 and nectar.geometry.n_heads == 2
        for own, bank in zip(nectar.banks, whole.banks, strict=True):
            mine, theirs = own.unstack()[0], bank.unstack()[rank]
            assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    tensors, metadata = sharding.whole([tensors for tensors, _ in parts], parts[0][1])
    assert store.digest(tensors) == whole.digest
    assert Geometry.from_dict(metadata["geometry"]) == whole.geometry and metadata["layout"] == whole.metadata["layout"]


def test_what_cannot_be_divided():
    whole = toys.exact(toys.toy("llama"), toys.random_tokens(30))
    with pytest.raises(NectarError, match="3 ranks cannot share"):
        sharding.part(whole.tensors, whole.metadata, rank=0, size=3)
    window = toys.exact(toys.toy("gemma3_text"), toys.random_tokens(30))
    with pytest.raises(NectarError, match="full attention"):
        sharding.part(window.tensors, window.metadata, rank=0, size=1)


def test_a_process_by_itself_has_nothing_to_divide(tmp_path, capsys):
    assert ask.main([str(tmp_path / "x.nectar"), QUESTION, "--shard"]) == 2
    assert "mlx.launch" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("positions, chunks, closed", [(4096, 1, 0.9), (1200, 2, 0.7)])  # as one process reaches
def test_two_ranks_with_half_a_model_each(tmp_path, tokenizer, capsys, positions, chunks, closed):
    model = toys.toy("llama", max_position_embeddings=positions)
    toys.save_model(model, tmp_path / "model", tokenizer)
    (tmp_path / "book.txt").write_text(TEXT)
    output = str(tmp_path / "book.nectar")
    named = ["--model", str(tmp_path / "model")]
    given = [*named, "--context", str(tmp_path / "book.txt"), "--output", output, *FEW]
    said = launching.said(launching.start("-m", "nectar_mlx.fit", *given, "--shard"))
    assert Path(output).exists(), said
    nectar = Nectar.load(output, model, tokenizer)  # the file is one of the whole model
    assert nectar.report["gap_closed"] > closed, said
    assert len(nectar.report["sizes"]) == 6 and len(nectar.report["error"]) == chunks * 6
    assert max(1, len(nectar.chunks)) == chunks
    tokens = nectar.prompt(tokenizer, QUESTION)
    if chunks == 1:
        full = model(mx.array([nectar.prefix + tokens]))[0, -1]
        ours = model(mx.array([tokens]), cache=nectar.make_cache())[0, -1]
        assert float(mx.abs(mx.softmax(full) - mx.softmax(ours)).sum()) < 0.5
    asked = ["--max-tokens", "12", "--temp", "0", "--json"]
    said = launching.said(launching.start("-m", "nectar_mlx.ask", output, QUESTION, *named, *asked, "--shard"))
    together = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    capsys.readouterr()
    assert ask.main([output, QUESTION, *named, *asked]) == 0
    assert together["answer"] == json.loads(capsys.readouterr().out)["answer"] != ""
