import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, fit, store
from nectar_mlx.core.progress import no_update
from nectar_mlx.fitting import pipeline, prefill, sizes
from nectar_mlx.fitting.checkpoint import Checkpoint
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.kinds import kind_fit
from nectar_mlx.fitting.samples import capture, recording, sampling, self_study
from nectar_mlx.fitting.samples.conversation import Conversation, count_samples
from nectar_mlx.fitting.samples.sample_store import DeviceSampleStore, SampleStore
from nectar_mlx.fitting.solve import quantization
from nectar_mlx.fitting.solve.node_training import NodeTraining
from nectar_mlx.fitting.train import train_heads
from nectar_mlx.mlxlm import attention_patch, prompts
from tests import toys
from tests.fitting.toy_fit import FAST, TEXT, fit_run, read, shallow

SHORT = {"budget": 0.5, "context_tokens": 150}


def logits(model, nectar, tokens):
    return model(mx.array([tokens]), cache=nectar.make_cache())


@pytest.mark.parametrize("kind", ["quadrature", "mlp", "corrected"])
def test_a_fitted_context_is_near_the_full_cache_and_within_its_budget(tokenizer, toy_fit, kind):
    model = shallow()
    nectar = toy_fit(kind=kind, budget=0.5, steps=120, context_tokens=500)
    assert nectar.nbytes <= 0.5 * nectar.cache_nbytes
    if kind == "quadrature":  # there is room for every key, and what is left goes into finer bits
        assert 6 < nectar.bits < 8 and set(nectar.banks[0].sizes) == {(len(nectar.prefix),)}
    else:
        assert nectar.bits == 8
    assert nectar.prefix == prompts.prefix(tokenizer, TEXT, max_tokens=500)
    tokens = nectar.prompt(tokenizer, "Who runs?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    none = model(mx.array([tokens]))
    ours = logits(model, nectar, tokens)
    assert mx.abs(ours - full).mean() < 0.4 * mx.abs(none - full).mean()
    assert nectar.report["kl"] < 0.4 * nectar.report["kl_no_context"] and len(nectar.report["error"]) == 2 * len(
        model.layers
    )


def test_a_budget_that_is_too_small_is_refused_before_the_text_is_read(tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "read_text", lambda *a, **k: pytest.fail("the text was read"))
    with pytest.raises(NectarError, match=r"a budget of 0\.10% \(0\.\d kB\) is too small for \d+ tokens"):
        toys.fit(shallow(), tokenizer, TEXT, config=FitConfig(**FAST, budget=0.001))


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3", "phi3", "mistral", "granite"])
def test_every_architecture_can_be_fitted(tokenizer, toy_fit, architecture):
    model = shallow(architecture)
    nectar = toy_fit(architecture, budget=0.6, context_tokens=200)
    tokens = nectar.prompt(tokenizer, "Who?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    assert mx.isfinite(logits(model, nectar, tokens)).all()
    assert mx.abs(logits(model, nectar, tokens) - full).mean() < mx.abs(model(mx.array([tokens])) - full).mean()


def test_equal_seeds_give_equal_tensors(tokenizer, toy_fit):
    model, first = shallow(), toy_fit(**SHORT)
    second, other = (
        toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST | SHORT | {"seed": seed})) for seed in (0, 1)
    )
    assert first.digest == second.digest != other.digest
    measured = {"seconds": None, "peak_memory": None}
    assert first.report | measured == second.report | measured


FIGURES = {"kl", "agree", "kl_no_context", "gap_closed", "recall", "verdict"}
WHOLE = FIGURES | {"budget", "sizes", "queries", "error", "seconds", "peak_memory", "ahead"}
LAYERWISE = WHOLE | {"layerwise"}
STAGES = {"read", "study", "budgets", "regression", "check"}


@pytest.mark.parametrize("options, names, stages", [
    (SHORT, WHOLE | {"left_out_tokens"}, STAGES),
    ({"kind": "retrieval", "steps": 40, "budget": 0.3}, WHOLE, STAGES | {"keys"}),
    (SHORT | {"context_tokens": 300, "layerwise": True}, LAYERWISE | {"left_out_tokens"}, STAGES - {"read"}),
    ({"kind": "exact", "context_tokens": 300}, {"left_out_tokens", "seconds", "peak_memory"}, {"read"}),
])  # fmt: skip
def test_what_a_report_holds(tokenizer, toy_fit, options, names, stages):
    nectar = toy_fit(**options)
    report = nectar.report
    assert report.keys() == names and report["seconds"].keys() == stages
    whole = len(prompts.prefix(tokenizer, TEXT))
    assert report.get("left_out_tokens", 0) == whole - len(nectar.prefix)
    if "error" not in names:
        return
    heads = len(shallow().layers) * 2
    assert report["budget"] == options["budget"] and len(report["error"]) == heads
    trained = nectar.layout.bank.trainable
    assert all(0 < error < (1 if trained else 3) for error in report["error"])
    assert [tuple(size) for size in report["sizes"]] == [size for bank in nectar.banks for size in bank.sizes]
    # Sampling stops a little before all samples are there.
    assert 0.9 * FAST["queries"] <= report["queries"] <= FAST["queries"]
    assert report["gap_closed"] == pytest.approx(1 - report["kl"] / report["kl_no_context"], abs=2e-4)
    assert 0 <= report["agree"] <= 1 and report["verdict"] == nectar.verdict
    assert json.loads(json.dumps(report)).keys() == names


def test_exact_reproduces_the_stock_model(tokenizer, toy_fit):
    model = shallow()
    nectar = toy_fit(kind="exact", context_tokens=300)
    tokens = nectar.prompt(tokenizer, "Who runs, and why?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    np.testing.assert_allclose(logits(model, nectar, tokens), full, atol=2e-4 * float(mx.abs(full).max()))


def test_an_interrupted_fit_continues_where_it_stopped(tokenizer, tmp_path, monkeypatch):
    model = shallow()
    config = FitConfig(**FAST | SHORT | {"queries": 2500})
    batches, sample_answers = [], sampling.sample_answers

    def counted(*arguments, at, **options):
        if at < 1000:  # else all of it is known
            batches.append(1)
            if len(batches) == interrupt_at:
                raise KeyboardInterrupt
        sample_answers(*arguments, at=at, **options)

    monkeypatch.setattr(self_study, "sample_answers", counted)
    interrupt_at = None
    whole = toys.fit(model, tokenizer, TEXT, config=config)
    needed = len(batches)
    interrupt_at = needed + 2
    with pytest.raises(KeyboardInterrupt):
        toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    resumed = toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    assert resumed.digest == whole.digest
    assert needed >= 2 and len(batches) == 2 * needed + 1, "only the interrupted batch was sampled again"


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """A finished fit, and the folder in which it left its work."""
    folder = tmp_path_factory.mktemp("finished")
    config = FitConfig(**FAST | SHORT)
    return toys.fit(shallow(), tokenizer, TEXT, config=config, checkpoint=Checkpoint(folder)), folder


def test_fitted_heads_are_not_fitted_again(tokenizer, finished, monkeypatch):
    first, folder = finished
    monkeypatch.setattr(NodeTraining, "train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: pytest.fail("answers were sampled again"))
    config = FitConfig(**FAST | SHORT)
    second = toys.fit(shallow(), tokenizer, TEXT, config=config, checkpoint=Checkpoint(folder))
    assert second.digest == first.digest


@pytest.mark.parametrize("what, changed", [
    ("settings", {"config": FitConfig(**FAST | SHORT | {"budget": 0.6})}),
    ("model", {"model": shallow("llama", seed=1)}),
    ("tokenizer", {"tokenizer": toys.tokenizer(toys.CHAT.replace("user", "you") + " ")}),
    ("text", {"text": TEXT + " And then they slept."}),
])  # fmt: skip
def test_a_fit_of_anything_else_is_not_resumed(tokenizer, finished, what, changed):
    """What follows the cut of the text counts, too: the report says how much that was."""
    given = {"model": shallow(), "tokenizer": tokenizer, "text": TEXT, "config": FitConfig(**FAST | SHORT)}
    given |= changed
    positional = [given.pop(name) for name in ("model", "tokenizer", "text")]
    with pytest.raises(NectarError, match=f"other .*{what}"):
        toys.fit(*positional, **given, checkpoint=Checkpoint(finished[1], must_match=True))


def test_as_many_conversations_side_by_side_as_fit(tokenizer, set_device, many_conversations):
    model = shallow()
    set_device(study_shares=4, study_share=16, shared_scores=16 * attention_patch.route(model).n_heads * 100)
    each = attention_patch.route(model).cache_bytes(2 * FAST["answer_tokens"])

    def sizes(count, tokens=1000, **options):
        parts = self_study.side_by_side(fit_run(model, tokenizer, **options), count, tokens=tokens)
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
        return [part.stop - part.start for part in parts]

    assert sizes(50, conversations=1000) == [16, 17, 17]  # ranks share them, but a few take as long as many
    assert sizes(200, conversations=1000) == [50] * 4
    assert sizes(200, conversations=30) == [25] * 8
    assert sizes(200, conversations=1000, memory=4 * 40 * each) == [25] * 8
    assert sizes(40, conversations=1000, memory=1) == [13, 13, 14]
    assert sizes(3, conversations=1) == [1, 1, 1]
    assert sizes(200, tokens=7, conversations=1000) == [200]  # so few scores take as long for half of them
    assert sizes(200, tokens=7, conversations=100) == [100, 100]


@pytest.mark.parametrize("study_share, expected", [(1000, 6000), (8, 12_000)])
def test_as_few_conversations_as_give_the_samples(tokenizer, set_device, many_conversations, study_share, expected):
    """More where they are sampled in groups, since answers may end early: one rank would sample the rest."""
    set_device(end_together=False, study_share=study_share, expected_share=0.5)
    run = fit_run(shallow(), tokenizer)
    tokens = toys.random_tokens(40)
    batch = self_study.expected_to_give(6000, self_study.asking(tokenizer, tokens, first=0, seed=0), run)
    given = [run.group * (len(c.prompt) + run.config.answer_tokens) * (c.split == "train") for c in batch]
    assert sum(given) >= expected > sum(given[:-1])
    assert len(self_study.expected_to_give(1, self_study.asking(tokenizer, tokens, first=0, seed=0), run)) == 16


@pytest.mark.parametrize("together", [True, False])
def test_answers_that_are_sampled_together_end_together_on_a_cpu(tokenizer, set_device, together):
    set_device(end_together=together)
    run = fit_run(shallow(), tokenizer)
    batch = [Conversation(toys.random_tokens(n, seed=n)) for n in (3, 9, 5)]
    limits = self_study.longest_answers(run, batch)
    assert limits == ([22, 16, 20] if together else [16] * 3)
    context = read(run, toys.random_tokens(20))
    draws = {"temperature": 1.0, "chances": sampling.chances(0, range(3), max(limits))}
    sampling.sample_answers(run.model, context, batch, stop=set(), max_tokens=limits, **draws)
    assert [len(c.answer) for c in batch] == limits


def test_what_a_conversation_draws_is_its_own(tokenizer):
    """Whatever the others are; and the numbers of two conversations have nothing in common."""
    alone, beside = sampling.chances(5, [3], 50), sampling.chances(5, range(4), 60)
    assert np.array_equal(alone[0], beside[3, :50])
    assert len(np.unique(beside)) == beside.size and beside.min() >= 0 and beside.max() < 1


@pytest.fixture(scope="module")
def collected(tokenizer):
    """How the heads of 60 tokens are fitted."""
    run = fit_run(shallow(), tokenizer)
    return kind_fit(run, recording.collect(run, read(run, toys.random_tokens(60))))


def heads_of_two_sizes(collected):
    """Every other head has room for all 60 keys."""
    return train_heads(collected, [(60,) if i % 2 else (9,) for i in range(collected.n_heads)])


def test_a_head_with_room_for_every_key_keeps_them(collected, monkeypatch):
    monkeypatch.setattr(quantization, "round_nodes", lambda bank, samples, **options: bank)
    for i, head in enumerate(heads_of_two_sizes(collected)):
        layer, k = divmod(i, collected.run.geometry.n_kv_heads)
        keys = collected.data.context.banks[layer].parameters["keys"][k]
        assert head["keys"].shape[0] == (60 if i % 2 else 9)
        if i % 2:
            assert mx.array_equal(head["keys"], keys) and not mx.any(head["bias"])
        else:
            nearest = mx.abs(head["keys"][:, None] - keys[None]).max(-1).min(1)
            assert nearest.max() > 1e-3, "a smaller head is trained"


def test_a_head_that_keeps_every_key_is_rounded_and_not_trained(collected, monkeypatch):
    calls, round_nodes = set(), quantization.round_nodes

    def watched(bank, samples, *, steps, **options):
        calls.update((count, steps > 0) for (count,) in bank.sizes)
        return round_nodes(bank, samples, steps=steps, **options)

    monkeypatch.setattr(quantization, "round_nodes", watched)
    heads_of_two_sizes(collected)
    assert calls >= {(9, True), (60, False)} and (60, True) not in calls


def test_heads_much_larger_than_the_others_are_not_trained(collected, set_device):
    set_device(trained_share=0.4)
    assert collected.length == 60
    assert collected.trained([(9,)] * 4 + [(20,), (31,)]) == [True] * 5 + [False]
    assert collected.trained([(40,)] * 5 + [(60,)]) == [True] * 5 + [False], "a large budget trains all but whole heads"
    set_device(trained_share=1.0)
    assert collected.trained([(9,)] * 4 + [(59,), (60,)]) == [True] * 5 + [False]


@pytest.mark.parametrize("loss, needed", [(11, True), (9, False)])
def test_a_large_head_that_loses_more_by_a_key_than_a_node_stands_for_needs_every_key(
    collected, set_device, monkeypatch, loss, needed
):
    set_device(trained_share=0.4)
    last = collected.n_heads - 1
    planned, metric = [(9,)] * last + [(50,)], mx.ones((collected.n_heads, 1))
    mean = 0.1 / sum(nodes for (nodes,) in planned)  # 10 keys are missing
    monkeypatch.setattr(type(collected), "judge", lambda kind, bank, samples, metric: np.array([loss * mean]))
    found = sizes.heads_that_need_every_key(collected, planned, metric, nats=0.1)
    assert found == ([last] if needed else [])
    set_device(trained_share=1.0)
    assert sizes.heads_that_need_every_key(collected, planned, metric, nats=0.1) == [], "it is trained"


def test_a_head_that_needs_every_key_gets_them_at_the_cost_of_the_others(collected, monkeypatch):
    nbytes = 0.1 * collected.run.geometry.cache_bytes(60)
    plain = sizes.plan_sizes(collected, lambda share: nbytes, 0.1)
    least = plain.sizes.index(min(plain.sizes))
    monkeypatch.setattr(sizes, "heads_that_need_every_key", lambda kind, sizes, metric, *, nats: [least])
    plan = sizes.plan_sizes(collected, lambda share: nbytes, 0.1)
    assert plan.sizes[least] == (60,) and plain.sizes[least] < (60,)
    assert sum(nodes for (nodes,) in plan.sizes) <= 1.02 * sum(nodes for (nodes,) in plain.sizes)


def test_nodes_are_fitted_as_they_will_be_stored(collected):
    heads, layout = heads_of_two_sizes(collected), collected.run.layout
    stored = store.unpack(layout, store.pack(layout, heads))
    for head, kept in zip(heads, [h for bank in stored for h in bank.unstack()], strict=True):
        assert mx.array_equal(head["keys"], kept["keys"]) and mx.array_equal(head["values"], kept["values"])


def test_progress_is_reported_while_a_batch_is_sampled(tokenizer):
    reports = []
    run = fit_run(
        shallow(),
        tokenizer,
        queries=5000,
        conversations=12,
        progress=lambda what, _: nullcontext(reports.append if "sampling" in what else no_update),
    )
    conversations = self_study.study(run, read(run, toys.random_tokens(20)))
    batches = len(conversations) / 12
    assert reports == sorted(reports) and reports[-1] == min(count_samples(conversations, group=run.group), 5000)
    assert len(set(reports)) > 8 * batches > 8


@pytest.mark.parametrize("queries", [1, 30, 90])
def test_a_fit_that_needs_few_conversations_ends(tokenizer, queries):
    """The first conversation is held out: a batch of it alone gives no samples to train on."""
    run = fit_run(shallow(), tokenizer, queries=queries, conversations=1)
    conversations = self_study.study(run, read(run, toys.random_tokens(20)))
    assert count_samples(conversations, group=run.group) >= 0.9 * queries
    assert any(c.split == "held_out" for c in conversations)


def test_where_samples_are_kept_changes_nothing(tokenizer, many_conversations, tmp_path, monkeypatch):
    """In memory, on disk beyond the memory bound, and where a GPU computes."""
    model = toys.toy("llama")
    kept = toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST | SHORT))
    spilled = toys.fit(
        model,
        tokenizer,
        TEXT,
        config=FitConfig(**FAST | SHORT, memory=1, layerwise=False),
        checkpoint=Checkpoint(tmp_path),
    )
    assert list(tmp_path.glob("train.samples/*.f32"))
    stores = []

    def on_device(heads, capacity, head_dim, *, folder):
        stores.append(DeviceSampleStore(capacity))
        return stores[-1]

    on_device.nbytes = SampleStore.nbytes
    monkeypatch.setattr(capture, "SampleStore", on_device)
    near = toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST | SHORT))
    assert len(stores) == 2 and kept.digest == spilled.digest == near.digest


def test_what_is_captured_is_exact_attention(tokenizer):
    model = shallow()
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, toys.random_tokens(50), geometry)
    K, D, G = geometry.n_kv_heads, geometry.head_dim, geometry.n_heads // geometry.n_kv_heads
    train, held_out = (SampleStore(geometry.n_layers * K, 4000, D, folder=None) for _ in range(2))
    splits = ("train", "train", "held_out", "train")
    batch = [Conversation(toys.random_tokens(5 + i % 3, seed=i), split=split) for i, split in enumerate(splits)]
    chances = sampling.chances(0, range(4), 20)
    sampling.sample_answers(model, context, batch, stop={3}, max_tokens=20, temperature=1.0, chances=chances)
    capture.replay(model, context, batch, {"train": train, "held_out": held_out}, n_heads=geometry.n_heads)
    # the last token of an answer is kept but never fed, so nothing is captured for it
    expected = [
        sum(len(c.prompt) + len(c.answer) - 1 for c in batch if c.split == split) * G for split in ("train", "held_out")
    ]
    assert [train.count, held_out.count] == expected
    for layer, bank in enumerate(context.banks):
        samples = train.heads(range(layer * K, layer * K + K))
        part = bank(samples.queries.astype(mx.float32))
        np.testing.assert_allclose(samples.output, part.output, atol=2e-2)
        np.testing.assert_allclose(samples.log_normalizer, part.log_normalizer, atol=2e-2)


def test_answers_sampled_in_a_batch_follow_the_full_model(tokenizer):
    """At a temperature near zero, batched sampling is greedy decoding of prefix + prompt."""
    model = shallow()
    prefix = toys.random_tokens(40)
    context = prefill.read_text(model, prefix, attention_patch.route(model))
    batch = [Conversation(toys.random_tokens(4 + 3 * i, seed=i)) for i in range(3)]
    chances = sampling.chances(0, range(3), 6)
    sampling.sample_answers(model, context, batch, stop=set(), max_tokens=6, temperature=1e-4, chances=chances)
    for conversation in batch:
        tokens = prefix + conversation.prompt
        for token in conversation.answer:
            assert token == model(mx.array([tokens]))[0, -1].argmax().item()
            tokens = [*tokens, token]
        assert len(conversation.answer) == 6


def test_sampling_follows_the_distribution():
    logits = mx.array([[0.0, 1.0, 2.0, -50.0]] * 4000)
    chance = mx.random.uniform(shape=(4000, 1), key=mx.random.key(0))
    drawn = np.bincount(np.array(sampling.sample(logits, temperature=0.5, chance=chance)), minlength=4) / 4000
    truth = np.exp([0.0, 2.0, 4.0, -100.0]) / np.exp([0.0, 2.0, 4.0, -100.0]).sum()
    np.testing.assert_allclose(drawn, truth, atol=0.03)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("command")
    toys.save_model(shallow(), folder / "model", tokenizer)
    (folder / "book.txt").write_text(TEXT)
    return folder


def command(folder, *arguments, **replaced):
    named = {"model": folder / "model", "context": folder / "book.txt", "output": folder / "out.nectar"} | replaced
    options = [x for name, value in named.items() for x in (f"--{name}", str(value))]
    small = ["--queries", "400", "--steps", "10", "--context-tokens", "200", "--budget", "0.5"]
    return [*options, *(arguments or small)]


def test_the_command_writes_a_file_that_answers(folder, capsys):
    assert fit.main([*command(folder), "--json"]) == 0
    out, _ = capsys.readouterr()
    report = json.loads(out)
    assert report["bytes"] == (folder / "out.nectar").stat().st_size
    assert report["seconds"].keys() >= STAGES
    assert not (folder / "out.nectar.partial").exists()
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(folder / "model"))
    nectar = Nectar.load(folder / "out.nectar", model, tokenizer)
    assert len(nectar.prefix) == report["tokens"]


def test_the_output_is_named_after_the_context(folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = command(folder)
    del arguments[4:6]
    assert fit.main(arguments) == 0
    assert (folder / "book.nectar").is_file()


def fault(capsys, arguments, *words):
    """Exit code 2, one line on stderr with these words, nothing on stdout."""
    assert fit.main(arguments) == 2
    out, err = capsys.readouterr()
    line = err.strip().splitlines()[-1]
    assert out == "" and "Traceback" not in err
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
    long = command(folder, "--budget", "0.1", "--kind", "mlp", "--force", context=folder / "long.txt")
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
    from mlx_lm.models import mamba

    arguments = {"model_type": "mamba", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "state_size": 8,
                 "num_hidden_layers": 1, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
                 "time_step_rank": 4}  # fmt: skip
    toys.save_model(mamba.Model(mamba.ModelArgs.from_dict(arguments)), folder / "mamba", tokenizer)
    fault(capsys, [*command(folder, model=folder / "mamba"), "--force"], "mamba", "not supported")


def test_ctrl_c_keeps_the_work(folder):
    output = folder / "interrupted.nectar"
    arguments = command(
        folder, "--queries", "100000", "--steps", "10", "--context-tokens", "200", "--budget", "0.5", output=output
    )
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm"}  # or no progress is shown
    environment = os.environ | terminal | {"PYTHONPATH": str(Path(fit.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "nectar_mlx.fit", *arguments], env=environment, stderr=subprocess.PIPE
    )
    shown = b""
    while shown.count(b"sampling answers") < 3 and (more := os.read(process.stderr.fileno(), 1 << 16)):
        shown += more
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    error = (shown + rest).decode()
    assert process.returncode == 130 and "Traceback" not in error
    partial = output.with_name("interrupted.nectar.partial")
    assert not output.exists() and ("is kept" in error) == partial.exists(), "said of what is, and of nothing else"


def test_the_head_of_the_template_and_the_document_are_the_prefix(tokenizer):
    ids = prompts.prefix(tokenizer, "one two three", max_tokens=2)
    assert ids[: len(prompts.prefix(tokenizer, "", max_tokens=0))] == prompts.prefix(tokenizer, "", max_tokens=0)
    assert len(ids) == len(prompts.prefix(tokenizer, "", max_tokens=0)) + 2
