"""Samples that are captured while answers are sampled, against those of a replay."""

from dataclasses import replace
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting import check, fidelity
from nectar_mlx.fitting.distributed import World
from nectar_mlx.fitting.samples import capture, conversation, recording, sampling, self_study
from nectar_mlx.fitting.samples.conversation import count_samples
from nectar_mlx.fitting.samples.sample_store import Samples, SampleStore
from tests import toys
from tests.fitting.toy_fit import fit_run, read

STOP = set(range(0, 320, 40))  # so that answers end at different times


def recorded(run, context, **options):
    made = recording.Recording(**options)
    return made, self_study.study(run, context, made)


def stored(run, made, split="train", capacity=10_000):
    store = SampleStore(run.n_heads, capacity, run.geometry.head_dim, folder=None)
    made.move(split, store, run.world)
    return store


@pytest.fixture
def some_stop(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "eos_token_ids", property(lambda self: STOP), raising=False)


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gemma3_text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4_text", "deepseek_v3"))],
)
@pytest.mark.parametrize("ahead, preamble", [(1, 0), (8, 5)])
def test_what_is_recorded_is_what_a_replay_sees(tokenizer, set_device, some_stop, architecture, ahead, preamble):
    set_device(steps_ahead=ahead)
    run = fit_run(toys.toy(architecture), tokenizer, queries=300)
    context = read(run, toys.random_tokens(60), preamble=preamble)
    made, conversations = recorded(run, context)
    assert len({len(c.answer) for c in conversations}) > 1
    ours = stored(run, made)
    replayed = SampleStore(run.n_heads, 10_000, run.geometry.head_dim, folder=None)
    told = [c for c in conversations if c.split == "train"]
    capture.replay(run.model, context, told, {"train": replayed}, n_heads=run.geometry.n_heads)
    assert ours.count == replayed.count == count_samples(conversations, group=run.group) > 0
    for head in (0, run.n_heads - 1):
        mine, theirs = (rows(store, head) for store in (ours, replayed))
        some = mine[np.random.default_rng(0).permutation(ours.count)[:200]]
        # Every token as often as there, for conversations may begin alike.
        seen, expected = (alike(some, others) for others in (mine, theirs))
        assert seen.min() >= 1 and np.array_equal(seen, expected)


def test_conversations_that_are_known_are_seen_as_in_a_replay(tokenizer, some_stop):
    run = fit_run(toys.toy("llama"), tokenizer, queries=300)
    context = read(run, toys.random_tokens(60))
    known = self_study.study(run, context)
    ours = recording.collect(run, context, lambda *_: [], kept=known, whole=True)
    whole = fit_run(run.model, tokenizer, queries=count_samples(known, group=run.group))
    replayed = capture.capture(whole, context, known)
    assert ours.conversations == known
    assert ours.train.count == replayed.train.count == count_samples(known, group=run.group)
    mine, theirs = (np.sort(rows(data.train, 5), axis=0) for data in (ours, replayed))
    assert np.abs(mine - theirs).max() < 5e-3


def rows(store, head):
    """Everything about each sample, [N, 3 D + 2]."""
    return np.concatenate([np.array(x[0]).reshape(store.count, -1) for x in store.heads([head])], axis=1)


def alike(some, others):
    return (np.abs(some[:, None] - others[None]).max(-1) < 5e-3).sum(1)


def test_more_than_wanted_are_drawn_at_random(tokenizer):
    run = fit_run(toys.toy("llama"), tokenizer)
    made, _ = recorded(run, read(run, toys.random_tokens(60)))
    other, _ = recorded(run, read(run, toys.random_tokens(60)))
    whole, part = (rows(stored(run, m, capacity=n), 5) for m, n in ((made, 10_000), (other, 90)))
    places = np.array([np.abs(whole - row).max(1).argmin() for row in part])
    assert len(part) == 90 and np.array_equal(whole[places], part)
    assert [np.mean(places < at * len(whole)) for at in (0.25, 0.5, 0.75)] == pytest.approx([0.25, 0.5, 0.75], abs=0.2)


def test_of_some_tokens_alone_samples_are_kept(tokenizer, monkeypatch):
    """The same ones where answers are fed again."""
    run = fit_run(toys.toy("llama"), tokenizer, queries=2000)
    context = read(run, toys.random_tokens(60))
    whole, conversations = recorded(run, context)
    first, _ = recorded(run, context, density=0.3)
    monkeypatch.setattr(run.checkpoint, "load_conversations", lambda: conversations)
    again, _ = recorded(run, context, density=0.3)
    every, some, same = (rows(stored(run, made), 3) for made in (whole, first, again))
    assert 0.2 < len(some) / len(every) < 0.4 and np.array_equal(some, same)
    assert set(map(bytes, some)) < set(map(bytes, every))


def test_more_conversations_are_sampled_where_some_tokens_are_kept(tokenizer, monkeypatch):
    run = fit_run(toys.toy("llama"), tokenizer, queries=2000)
    context = read(run, toys.random_tokens(60))
    monkeypatch.setattr(type(run), "density", lambda self, context: 0.5)
    data = recording.collect(run, context)
    assert count_samples(data.conversations, group=run.group) > 0.9 * 4000
    assert 0.8 * 2000 < data.train.count <= 2000


def test_nothing_is_drawn_again_for_samples_of_an_interrupted_run(tokenizer, monkeypatch):
    run = fit_run(toys.toy("llama"), tokenizer)
    context = read(run, toys.random_tokens(60))
    first, conversations = recorded(run, context)
    monkeypatch.setattr(run.checkpoint, "load_conversations", lambda: conversations)
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: pytest.fail("an answer was sampled again"))
    second, again = recorded(run, context)
    assert again == conversations
    for ours, theirs in zip(stored(run, first).heads([0, 5]), stored(run, second).heads([0, 5]), strict=True):
        assert mx.array_equal(ours, theirs)
    ours, theirs = (made.finals_of(of, run.world) for made, of in ((first, conversations), (second, again)))
    assert ours.keys() == theirs.keys() and all(mx.array_equal(ours[i], theirs[i]) for i in ours)


@pytest.mark.parametrize("architecture, ahead", [("llama", 1), ("llama", 8), ("gemma3_text", 1)])
def test_the_full_cache_s_logits_of_the_checks_follow_from_what_is_kept(
    tokenizer, some_stop, set_device, monkeypatch, architecture, ahead
):
    set_device(steps_ahead=ahead)
    run = fit_run(toys.toy(architecture), tokenizer, checks=5)
    data = recording.collect(run, read(run, toys.random_tokens(60)))
    checks = conversation.answered_checks(data.conversations)
    assert [data.conversations[i] for i in sorted(data.finals)] == checks
    assert len({len(c.answer) for c in checks}) > 1
    known = check._known(run, data, checks)
    for one in checks:
        (expected,) = fidelity.answer_logits(run.model, data.context.make_cache(), [one])
        np.testing.assert_allclose(known(one), expected, rtol=1e-3, atol=1e-3)
    figures = [check.check(run, of, data.context.banks) for of in (data, replace(data, finals={}))]
    assert figures[0]["kl"] == pytest.approx(figures[1]["kl"], abs=1e-6)
    assert figures[0]["kl_no_context"] == pytest.approx(figures[1]["kl_no_context"], rel=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "answer_logits", lambda model, *a, **k: pytest.fail("computed again"))
        fidelity.compare(run.model, pytest.fail, {}, checks, known=known)


def test_no_batch_is_made_for_a_few_missing_samples(tokenizer, some_stop, monkeypatch):
    def asked(queries):
        run = fit_run(toys.toy("llama"), tokenizer, queries=queries)
        conversations = self_study.study(run, read(run, toys.random_tokens(60)))
        return sum(c.split != "check" for c in conversations), count_samples(conversations, group=run.group)

    monkeypatch.setattr(self_study, "expected_to_give", lambda samples, asked, run: list(islice(asked, 16)))
    number, samples = asked(1)
    assert number == 16 and asked(round(samples / 0.8))[0] == 16 and asked(2 * samples)[0] > 16
    monkeypatch.setattr(self_study, "_FEW", 0)
    assert asked(round(samples / 0.8))[0] > 16


def test_samples_of_two_ranks_come_in_the_order_of_one():
    def piece(at):
        return Samples(*(mx.full(shape, at) for shape in ((2, 3, 4),) * 3 + ((2, 3),) * 2))

    def pieces(*groups):
        made = recording._Pieces()
        for group in groups:
            made.group = group
            for number in range(2):
                for layer in range(2):
                    made.add("train", layer, piece(100.0 * layer + 10 * group + number))
        return made

    alone = list(pieces(0, 1, 2).layers("train", World(), 2))
    first, second = pieces(0, 2), pieces(1)
    told = [
        {f"{group}.{number}.{name}": x for number, (group, s) in enumerate(of) for name, x in s._asdict().items()}
        for of in second._of["train"]
    ]

    class Two(World):
        def values(self, value):
            return [value, len(told)]

        def arrays(self, arrays):
            layer = int(arrays["0.0.queries"][0, 0, 0].item()) // 100
            return [dict(arrays), told[layer]]

    ((layer, ours),) = first.layers("train", Two(0, 2), 2)  # the other layer is the other rank's
    assert layer == 0 and [layer for layer, _ in alone] == [0, 1]
    assert all(mx.array_equal(x, y) for x, y in zip(ours, alone[0][1], strict=True))
