"""A .gguf file from anyone becomes a model that works, or one line. All 1,500 cases: `tests/models/hostile_gguf.py`."""

import pytest

from nectar_mlx import NectarError
from nectar_mlx.models import gguf_file
from tests.models import hostile_gguf as hostile


def test_the_files_they_are_made_of_are_good(tmp_path):
    for kind in ("gpt2", "llama"):
        path, folder = tmp_path / f"{kind}.gguf", tmp_path / kind
        path.write_bytes(hostile.written(hostile.settings(kind), hostile.tensors()))
        folder.mkdir()
        assert hostile.outcome(path, folder) == "converted"


def test_some_of_every_kind(tmp_path):
    found = []
    for i, (name, data) in enumerate(hostile.cases(90)):
        path, folder = tmp_path / "case.gguf", tmp_path / str(i)
        path.write_bytes(data)
        folder.mkdir()
        try:
            found.append(hostile.outcome(path, folder))
        except BaseException as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")
    assert found.count("refused") > 20 and len(set(found)) > 1


@pytest.mark.parametrize("what", hostile.HEADS_OF_FILE)
def test_counts_are_not_believed(tmp_path, what):
    data = hostile.written(hostile.settings(), hostile.tensors(), head=hostile.HEADS_OF_FILE[what])
    (tmp_path / "x.gguf").write_bytes(data)
    if what == "none":
        assert gguf_file.read(tmp_path / "x.gguf") == ({}, {})
        return
    with pytest.raises(NectarError, match="not a whole GGUF file"):
        gguf_file.read(tmp_path / "x.gguf")


def test_tensors_that_share_their_bytes_are_refused(tmp_path):
    """A thousand tensors of the same megabyte would be a gigabyte of weights."""
    arrays = hostile.tensors()
    changes = {"blk.0.attn_v.weight": {"offset": 0}}
    (tmp_path / "x.gguf").write_bytes(hostile.written(hostile.settings(), arrays, changes))
    with pytest.raises(NectarError, match="lies in another"):
        gguf_file.read(tmp_path / "x.gguf")
