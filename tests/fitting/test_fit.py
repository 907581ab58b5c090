import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, adapter, fit, prompts, store
from nectar_mlx.fitting import capture, checkpoint, dialogue, reading, settling
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.dialogue import Conversation
from nectar_mlx.fitting.fitter import Fitter
from nectar_mlx.fitting.study import DeviceStudy, Study
from tests import toys

TEXT = " ".join(f"The {a} dog sees fox number {i}, and the {b} fox runs." for i, (a, b) in enumerate(
    (a, b) for a in ("quick", "lazy", "brown", "old") for b in ("red", "sly", "young", "tired")
))  # fmt: skip
FAST = {
    "queries": 600,
    "conversations": 8,
    "steps": 30,
    "scout_steps": 5,
    "answer_tokens": 16,
    "checks": 2,
    "batch": 128,
    "samples": 400,
}


@pytest.fixture(scope="module")
def tokenizer():
    return toys.tokenizer()


def fitted(model, tokenizer, **options):
    return toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST | options))


def logits(model, nectar, tokens):
    return model(mx.array([tokens]), cache=nectar.make_cache())


@pytest.mark.parametrize("kind", ["quadrature", "mlp", "corrected"])
def test_a_fitted_context_is_near_the_full_cache_and_within_its_budget(tokenizer, kind):
    model = toys.toy("llama")
    nectar = fitted(model, tokenizer, kind=kind, budget=0.5, steps=120, context_tokens=500)
    assert nectar.nbytes <= 0.5 * nectar.cache_nbytes
    assert (nectar.bits == 8) if kind != "quadrature" else (3.5 < nectar.bits < 5)
    context = reading.read(model, nectar.prefix, adapter.route(model))
    tokens = nectar.prompt(tokenizer, "Who runs?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    none = model(mx.array([tokens]))
    ours = logits(model, nectar, tokens)
    assert mx.abs(ours - full).mean() < 0.4 * mx.abs(none - full).mean()
    assert nectar.report["kl"] >= 0 and len(nectar.report["error"]) == 6
    assert context.prefix == nectar.prefix


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3", "phi3", "mistral", "granite"])
def test_every_architecture_can_be_fitted(tokenizer, architecture):
    model = toys.toy(architecture)
    nectar = fitted(model, tokenizer, budget=0.6, context_tokens=200)
    tokens = nectar.prompt(tokenizer, "Who?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    assert mx.isfinite(logits(model, nectar, tokens)).all()
    assert mx.abs(logits(model, nectar, tokens) - full).mean() < mx.abs(model(mx.array([tokens])) - full).mean()


def test_a_seed_decides_every_bit(tokenizer):
    model = toys.toy("qwen2")
    first, second, other = (fitted(model, tokenizer, budget=0.5, context_tokens=150, seed=s) for s in (1, 1, 2))
    assert store.digest(first._tensors) == store.digest(second._tensors) != store.digest(other._tensors)


def test_exact_reproduces_the_stock_model(tokenizer):
    model = toys.toy("llama")
    nectar = fitted(model, tokenizer, kind="exact", context_tokens=300)
    tokens = nectar.prompt(tokenizer, "Who runs, and why?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    np.testing.assert_allclose(logits(model, nectar, tokens), full, atol=2e-4 * float(mx.abs(full).max()))


def test_an_interrupted_fit_continues_where_it_stopped(tokenizer, tmp_path, monkeypatch):
    model = toys.toy("llama")
    config = FitConfig(**FAST | {"budget": 0.5, "context_tokens": 150, "queries": 2500})
    whole = toys.fit(model, tokenizer, TEXT, config=config)
    asked = []
    converse = dialogue.converse

    def interrupted(*arguments, **options):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        converse(*arguments, **options)

    monkeypatch.setattr(dialogue, "converse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toys.fit(model, tokenizer, TEXT, config=config, checkpoint=checkpoint.Checkpoint(tmp_path / "part"))
    monkeypatch.setattr(dialogue, "converse", converse)
    resumed = toys.fit(model, tokenizer, TEXT, config=config, checkpoint=checkpoint.Checkpoint(tmp_path / "part"))
    assert store.digest(resumed._tensors) == store.digest(whole._tensors)


def test_fitted_heads_are_not_fitted_again(tokenizer, tmp_path, monkeypatch):
    model = toys.toy("llama")
    config = FitConfig(**FAST | {"budget": 0.5, "context_tokens": 150})
    first = toys.fit(model, tokenizer, TEXT, config=config, checkpoint=checkpoint.Checkpoint(tmp_path))
    monkeypatch.setattr("nectar_mlx.fitting.regression.train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(dialogue, "converse", lambda *a, **k: pytest.fail("asked again"))
    second = toys.fit(model, tokenizer, TEXT, config=config, checkpoint=checkpoint.Checkpoint(tmp_path))
    assert store.digest(second._tensors) == store.digest(first._tensors)


def test_resuming_with_other_settings_is_refused(tokenizer, tmp_path):
    model = toys.toy("llama")
    toys.fit(
        model,
        tokenizer,
        TEXT,
        config=FitConfig(**FAST | {"budget": 0.5, "context_tokens": 150}),
        checkpoint=checkpoint.Checkpoint(tmp_path),
    )
    with pytest.raises(NectarError, match="other settings"):
        toys.fit(
            model,
            tokenizer,
            TEXT,
            config=FitConfig(**FAST | {"budget": 0.6, "context_tokens": 150}),
            checkpoint=checkpoint.Checkpoint(tmp_path),
        )


def test_as_many_conversations_side_by_side_as_are_needed_and_fit(tokenizer):
    model = toys.toy("llama")
    geometry = adapter.route(model)
    context = reading.read(model, toys.random_tokens(20), geometry)
    each = geometry.cache_bytes(2 * FAST["answer_tokens"])

    def together(**options):
        return Fitter(model, tokenizer, context, geometry, FitConfig(**FAST | options))._together()

    group = geometry.n_heads // geometry.n_kv_heads
    assert together(queries=50 * group * 16, conversations=1000) == 51
    assert together(queries=50 * group * 16, conversations=30) == 30
    assert together(queries=10**6, conversations=1000, memory=400 * each) == 100
    assert together(queries=10**6, conversations=1000, memory=1) == 16


def heads_of_two_sizes(tokenizer):
    """Every other one has room for all 60 keys."""
    model = toys.toy("llama")
    geometry = adapter.route(model)
    context = reading.read(model, toys.random_tokens(60), geometry)
    fitter = Fitter(model, tokenizer, context, geometry, FitConfig(**FAST))
    fitter.converse()
    fitter.hear()
    fitter.prepare()
    heads = fitter.regress([(60,) if i % 2 else (9,) for i in range(fitter.n_heads)])
    return fitter, heads


def test_a_head_with_room_for_every_key_keeps_them(tokenizer, monkeypatch):
    monkeypatch.setattr(settling, "settled", lambda bank, rows, **options: bank)
    fitter, heads = heads_of_two_sizes(tokenizer)
    for i, head in enumerate(heads):
        layer, k = divmod(i, fitter.geometry.n_kv_heads)
        keys = fitter.context.banks[layer].parameters["keys"][k]
        assert head["keys"].shape[0] == (60 if i % 2 else 9)
        if i % 2:
            assert mx.array_equal(head["keys"], keys) and not mx.any(head["bias"])
        else:
            nearest = mx.abs(head["keys"][:, None] - keys[None]).max(-1).min(1)
            assert nearest.max() > 1e-3, "a smaller head is trained"


def test_a_head_that_keeps_every_key_is_rounded_and_not_trained(tokenizer, monkeypatch):
    told, settled = set(), settling.settled

    def watched(bank, rows, *, steps, **options):
        told.update((count, steps > 0) for (count,) in bank.sizes)
        return settled(bank, rows, steps=steps, **options)

    monkeypatch.setattr(settling, "settled", watched)
    heads_of_two_sizes(tokenizer)
    assert told >= {(9, True), (60, False)} and (60, True) not in told


def test_nodes_are_fitted_as_they_will_be_stored(tokenizer):
    fitter, heads = heads_of_two_sizes(tokenizer)
    stored = store.unpack(fitter.layout, store.pack(fitter.layout, heads))
    for head, kept in zip(heads, [h for bank in stored for h in bank.unstack()], strict=True):
        assert mx.array_equal(head["keys"], kept["keys"]) and mx.array_equal(head["values"], kept["values"])


def test_progress_is_told_while_a_batch_is_sampled(tokenizer):
    model = toys.toy("llama")
    geometry, told = adapter.route(model), []
    context = reading.read(model, toys.random_tokens(20), geometry)
    config = FitConfig(**FAST | {"queries": 5000, "conversations": 12})
    fitter = Fitter(model, tokenizer, context, geometry, config, progress=lambda *of: nullcontext(told.append))
    fitter.converse()
    batches = len(fitter.conversations) / 12
    assert told == sorted(told) and told[-1] == min(fitter._rows(), 5000)
    assert len(set(told)) > 8 * batches > 8


@pytest.mark.parametrize("queries", [1, 30, 90])
def test_a_fit_that_needs_few_conversations_ends(tokenizer, queries):
    """The first one of a batch is held out: were it alone, it would give no rows."""
    model = toys.toy("llama")
    geometry = adapter.route(model)
    context = reading.read(model, toys.random_tokens(20), geometry)
    fitter = Fitter(model, tokenizer, context, geometry, FitConfig(**FAST | {"queries": queries, "conversations": 1}))
    fitter.converse()
    assert fitter._rows() >= 0.9 * queries and any(c.split == "held_out" for c in fitter.conversations)


def test_where_rows_are_kept_changes_nothing(tokenizer, tmp_path, monkeypatch):
    """In memory, on disk beyond the memory bound, and where a GPU computes."""
    model = toys.toy("llama")
    options = FAST | {"budget": 0.5, "context_tokens": 150}
    kept = toys.fit(model, tokenizer, TEXT, config=FitConfig(**options))
    spilled = toys.fit(
        model,
        tokenizer,
        TEXT,
        config=FitConfig(**options, memory=1, layerwise=False),
        checkpoint=checkpoint.Checkpoint(tmp_path),
    )
    assert list(tmp_path.glob("study.rows/*.npy"))
    monkeypatch.setattr(Fitter, "_empty", lambda self, rows, folder: DeviceStudy(rows))
    near = toys.fit(model, tokenizer, TEXT, config=FitConfig(**options))
    assert store.digest(kept._tensors) == store.digest(spilled._tensors) == store.digest(near._tensors)


def test_what_is_captured_is_exact_attention(tokenizer):
    model = toys.toy("llama")
    geometry = adapter.route(model)
    context = reading.read(model, toys.random_tokens(50), geometry)
    K, D, G = geometry.n_kv_heads, geometry.head_dim, geometry.n_heads // geometry.n_kv_heads
    studies = [Study(geometry.n_layers * K, 4000, D, folder=None) for _ in range(2)]
    splits = ("train", "train", "held_out", "train")
    batch = [Conversation(toys.random_tokens(5 + i % 3, seed=i), split=split) for i, split in enumerate(splits)]
    dialogue.converse(model, context, batch, stop={3}, max_tokens=20, temperature=1.0, key=mx.random.key(0))
    kept = {"train": studies[0], "held_out": studies[1]}
    capture.hear(model, context, batch, kept, n_heads=geometry.n_heads)
    # the last token of an answer is kept but never fed, so nothing is captured for it
    expected = [
        sum(len(c.prompt) + len(c.answer) - 1 for c in batch if c.split == split) * G for split in ("train", "held_out")
    ]
    assert [s.rows for s in studies] == expected
    for layer, bank in enumerate(context.banks):
        rows = studies[0].heads(range(layer * K, layer * K + K))
        part = bank(rows.queries.astype(mx.float32))
        np.testing.assert_allclose(rows.output, part.output, atol=2e-2)
        np.testing.assert_allclose(rows.log_normalizer, part.log_normalizer, atol=2e-2)


def test_answers_sampled_in_a_batch_follow_the_full_model(tokenizer):
    """At a temperature near zero, batched sampling is greedy decoding of prefix + prompt."""
    model = toys.toy("llama")
    prefix = toys.random_tokens(40)
    context = reading.read(model, prefix, adapter.route(model))
    batch = [Conversation(toys.random_tokens(4 + 3 * i, seed=i)) for i in range(3)]
    dialogue.converse(model, context, batch, stop=set(), max_tokens=6, temperature=1e-4, key=mx.random.key(0))
    for conversation in batch:
        tokens = prefix + conversation.prompt
        for token in conversation.answer:
            assert token == model(mx.array([tokens]))[0, -1].argmax().item()
            tokens = [*tokens, token]
        assert len(conversation.answer) == 6


def test_sampling_follows_the_distribution():
    logits = mx.array([[0.0, 1.0, 2.0, -50.0]] * 4000)
    drawn = np.bincount(np.array(dialogue.sample(logits, temperature=0.5, key=mx.random.key(0))), minlength=4) / 4000
    truth = np.exp([0.0, 2.0, 4.0, -100.0]) / np.exp([0.0, 2.0, 4.0, -100.0]).sum()
    np.testing.assert_allclose(drawn, truth, atol=0.03)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("command")
    toys.save_model(toys.toy("llama"), folder / "model", tokenizer)
    (folder / "book.txt").write_text(TEXT)
    return folder


def command(folder, *arguments, **replaced):
    named = {"model": folder / "model", "context": folder / "book.txt", "output": folder / "out.nectar"} | replaced
    options = [x for name, value in named.items() for x in (f"--{name}", str(value))]
    small = ["--queries", "400", "--steps", "10", "--context-tokens", "200", "--budget", "0.5"]
    return [*options, *(arguments or small)]


def test_the_command_writes_a_file_that_answers(folder, capsys):
    (folder / "out.nectar.partial").mkdir()  # of a fit that is not gone on with
    assert fit.main([*command(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "starting anew" in err
    told = json.loads(out)
    assert told["bytes"] == (folder / "out.nectar").stat().st_size
    assert told["seconds"].keys() >= {"read", "study", "budgets", "regression", "check"}
    assert not (folder / "out.nectar.partial").exists()
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(folder / "model"))
    nectar = Nectar.load(folder / "out.nectar", model, tokenizer)
    assert len(nectar.prefix) == told["tokens"]


def test_the_output_is_named_after_the_context(folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = command(folder)
    del arguments[4:6]
    assert fit.main(arguments) == 0
    assert (folder / "book.nectar").is_file()


def fault(capsys, arguments, *words):
    """Exit code 2, one line on stderr with these words, nothing on stdout."""
    assert fit.main(arguments) == 2
    told = capsys.readouterr()
    line = told.err.strip().splitlines()[-1]
    assert told.out == "" and "Traceback" not in told.err
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("name, content, words", [
    ("none.txt", None, ["none.txt", "no such file"]),
    ("empty.txt", b"", ["empty"]),
    ("blank.txt", b" \n\t ", ["no text"]),
    ("binary.txt", bytes(range(256)) * 20, ["binary.txt"]),
])  # fmt: skip
def test_a_bad_context_is_one_line(folder, capsys, name, content, words):
    if content is not None:
        (folder / name).write_bytes(content)
    fault(capsys, command(folder, context=folder / name, output=folder / "bad.nectar"), *words)
    assert not (folder / "bad.nectar").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--budget", "0"], ["budget", "(0, 1]"]),
    (["--budget", "4%", "--size", "1M"], ["--budget", "--size", "one of them"]),
    (["--budget", "1.5"], ["budget", "(0, 1]"]),
    (["--budget", "1e-6"], ["too small", "at least"]),
    (["--kind", "magic"], ["magic"]),
    (["--bits", "3"], ["3 bits", "4, 5, 6, 7, 8, 16"]),
    (["--queries", "0"], ["queries"]),
    (["--steps", "-1"], ["steps"]),
    (["--memory", "lots"], ["lots"]),
])  # fmt: skip
def test_a_bad_choice_is_one_line(folder, capsys, arguments, words):
    fault(capsys, command(folder, *arguments, output=folder / "bad.nectar"), *words)
    assert not (folder / "bad.nectar").exists()


def test_a_text_longer_than_the_window_says_how_many_tokens_fit(folder, capsys):
    (folder / "long.txt").write_text(TEXT * 12)
    long = command(folder, "--budget", "0.1", "--kind", "mlp", context=folder / "long.txt")
    fault(capsys, long, "4,096", "--context-tokens")


def test_a_file_that_is_not_ours_is_not_overwritten(folder, capsys):
    letter = folder / "letter.txt"
    letter.write_text("dear reader")
    fault(capsys, command(folder, output=letter), "not a .nectar")
    assert letter.read_text() == "dear reader"


def test_an_output_in_no_folder_and_a_folder_as_output(folder, capsys):
    fault(capsys, command(folder, output=folder / "nowhere" / "x.nectar"), "no such folder")
    fault(capsys, command(folder, output=folder), "is a folder")


def test_an_unsupported_architecture_is_named(folder, capsys, tokenizer):
    import mlx_lm.models.stablelm as stablelm

    arguments = {"model_type": "stablelm", "vocab_size": 320, "hidden_size": 32, "num_attention_heads": 2,
                 "num_hidden_layers": 1, "num_key_value_heads": 2, "intermediate_size": 32, "rope_theta": 1e4,
                 "use_qkv_bias": False, "partial_rotary_factor": 1.0, "layer_norm_eps": 1e-5}  # fmt: skip
    toys.save_model(stablelm.Model(stablelm.ModelArgs.from_dict(arguments)), folder / "stable", tokenizer)
    fault(capsys, command(folder, model=folder / "stable"), "stablelm", "not supported")


def test_ctrl_c_keeps_the_work_and_resume_finishes_it(folder):
    output = folder / "interrupted.nectar"
    arguments = command(
        folder, "--queries", "100000", "--steps", "10", "--context-tokens", "200", "--budget", "0.5", output=output
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fit.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "nectar_mlx.fit", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    partial = output.with_name("interrupted.nectar.partial")
    deadline = time.time() + 90
    while not (partial / "fit.json").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(3)  # into the conversations
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in told and "Traceback" not in told
    assert not output.exists() and (partial / "conversations.json").exists()


def test_the_head_of_the_template_and_the_document_are_the_prefix(tokenizer):
    ids = prompts.prefix(tokenizer, "one two three", max_tokens=2)
    assert ids[: len(prompts.prefix(tokenizer, "", max_tokens=0))] == prompts.prefix(tokenizer, "", max_tokens=0)
    assert len(ids) == len(prompts.prefix(tokenizer, "", max_tokens=0)) + 2
