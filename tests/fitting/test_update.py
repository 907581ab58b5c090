"""A changed text: heads for what was added, heads trained on from where they were, or a fit."""

import itertools
import json
import random
import zlib
from contextlib import contextmanager
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, documents, store, update, update_file
from nectar_mlx.core.device import using
from nectar_mlx.core.progress import Stage
from nectar_mlx.fitting import machines, pipeline, updating, verdict
from nectar_mlx.fitting.checkpoint import Checkpoint
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.distributed import World
from nectar_mlx.fitting.estimate import estimate
from nectar_mlx.fitting.kinds.quadrature import QuadratureFit
from nectar_mlx.fitting.run import FitRun
from nectar_mlx.fitting.samples import kept_study, recording, sampling, self_study
from nectar_mlx.fitting.samples.ahead import FURTHEST
from nectar_mlx.fitting.samples.capture import capture
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.fitting.updating import append, behind, edit, plan, questions, warm
from nectar_mlx.fitting.updating.base import FileContents
from nectar_mlx.fitting.updating.revision import Revision
from nectar_mlx.heads import Quadrature
from nectar_mlx.mlxlm import prompts
from nectar_mlx.retrieval import find_keys
from tests import toys
from tests.fitting import update_figures
from tests.fitting.toy_fit import FAST, TEXT, Recorded, fit_run, read, shallow

MORE = TEXT + " A new hare came by, and it sang about the river."
EDITED = TEXT.replace("fox number 7", "cat number 9")


@pytest.fixture(scope="module")
def model():
    return shallow()


@pytest.fixture(scope="module")
def tokenizer():
    return toys.tokenizer()


@pytest.fixture(scope="module")
def fitted(model, tokenizer):
    return Nectar.fit(model, tokenizer, TEXT, budget=0.3, keep_study=True, **FAST)


class SimpleFile(FileContents):
    """A file of which no more is asked than how large its heads are."""

    def __init__(self, *, prefix, sizes, metadata):
        self.__dict__.update(prefix=prefix, stated=sizes, metadata=metadata)

    @property
    def sizes(self):
        return self.stated


def updated(model, tokenizer, file, text, **options):
    said: list[str] = []
    outcome = updating.update(
        model, tokenizer, text, tensors=file.tensors, metadata=file.metadata, log=said.append, **options
    )
    return outcome, said


@pytest.mark.parametrize("step, bits", [(0.5, 3.05), (0.25, 4.05)])  # the entropy of a normal number
def test_numbers_keep_the_bits_of_the_file(step, bits):
    """Those that its own size says, whatever a fit of today would choose for so few nodes."""
    draw, n = np.random.default_rng(0).normal, 60

    def rounded(*shape):
        return mx.array((np.rint(draw(size=shape) / step) * step).astype(np.float32))

    heads = [{"keys": rounded(n, 64), "values": rounded(n, 64), "bias": mx.zeros(n)} for _ in range(4)]
    layout = store.Layout(kind="quadrature", n_layers=2, n_kv_heads=2, head_dim=64, scale=0.1, bits=None)
    tensors = store.pack(layout, heads) | {"prefix": mx.arange(1000)}
    found = FileContents(tensors=tensors, metadata={"layout": asdict(layout)}).bits
    assert found == pytest.approx(bits - store.MOVED_BITS, abs=0.06)


class TestRevision:
    def test_what_follows_is_appended(self):
        revision = Revision.of([1, 2, 3], [1, 2, 3, 4, 5])
        assert (revision.appended, revision.changed, revision.kept) == (2, [(3, 5)], [(0, 3, 0)])

    def test_an_insertion_moves_what_is_behind_it(self):
        revision = Revision.of([1, 2, 3, 4, 5, 6], [1, 9, 9, 2, 3, 4, 5, 6])
        assert (revision.appended, revision.changed) == (0, [(1, 3)])
        assert revision.kept == [(0, 1, 0), (3, 8, 2)]
        assert revision.share == pytest.approx(2 / 8)

    def test_what_is_left_out_counts_as_changed(self):
        revision = Revision.of([1, 2, 3, 4], [1, 2])
        assert (revision.changed, revision.share) == ([], 0.5)

    @pytest.mark.parametrize("seed", range(20))
    def test_what_is_not_changed_is_the_old_text_in_its_order(self, seed):
        rng = random.Random(seed)
        old = [rng.randrange(5) for _ in range(rng.randrange(30))]
        new = [rng.randrange(5) if rng.random() < 0.2 else token for token in old for _ in range(rng.randrange(3))]
        revision = Revision.of(old, new)
        places = {place for start, end in revision.changed for place in range(start, end)}
        kept, rest = [token for place, token in enumerate(new) if place not in places], iter(old)
        assert all(token in rest for token in kept)
        assert 0 <= revision.share <= 1

    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_left_out_is_not_in_the_new_text(self, seed):
        rng = random.Random(seed)
        old = list(range(60))
        gone = [place for place in old if rng.random() < 0.1]
        revision = Revision.of(old, [token for token in old if token not in gone])
        left_out = {place for start, end in revision.left_out for place in range(start, end)}
        assert left_out >= set(gone)
        assert len(old) - len(left_out) == sum(run.end - run.start for run in revision.kept)

    def test_what_quotes_the_old_text_where_it_is_another(self):
        old = list(range(60))
        revision = Revision.of(old, [*old[:20], 99, *old[21:40], *old[50:]])
        quoted = {"kept": old[1:20], "replaced": old[18:22], "left out": [7, *old[41:45], 7], "new": [*old[17:20], 99]}
        assert {name for name, tokens in quoted.items() if revision.quotes_left_out(tokens)} == {"replaced", "left out"}
        assert not Revision.of(old, [*old, *old[5:9]]).quotes_left_out(old)
        assert not Revision.of([1, 2, 3, 4, 5, 1, 2, 3, 4], [1, 2, 3, 4]).quotes_left_out([1, 2, 3, 4])

    def test_passages_that_meet_are_one(self):
        old = list(range(100))
        new = [*old[:10], 200, *old[10:20], 201, *old[20:90], 202, 203, *old[90:]]
        revision = Revision.of(old, new)
        assert revision.changed == [(10, 11), (21, 22), (92, 94)]
        assert revision.passages(15) == [(0, 22), (77, 94)]
        assert revision.passages(5) == [(5, 11), (16, 22), (87, 94)]

    def test_very_many_tokens_are_not_compared_one_by_one(self):
        old, new = list(range(40_000)), [0, *range(100_000, 140_000), 39_999]
        assert Revision.of(old, new).changed == [(1, 40_001)]


class TestKeptStudy:
    def test_conversations_come_back(self):
        kept = [Conversation([1, 2], [3], "train"), Conversation([4], [5, 6], "check"), Conversation([7])]
        assert kept_study.unpacked(kept_study.packed(kept), vocabulary=8) == kept[:2]

    @pytest.mark.parametrize(
        "data",
        [
            b"no zlib",
            zlib.compress(b"[1]"),
            zlib.compress(b'[{"prompt":[],"answer":[1],"split":"train"}]'),
            zlib.compress(b'[{"prompt":[99],"answer":[1],"split":"train"}]'),
            zlib.compress(b'[{"prompt":[1],"answer":[1],"split":"other"}]'),
            zlib.compress(b"[" + b" " * (32 << 20) + b"]"),
        ],
    )
    def test_anything_else_is_refused(self, data):
        with pytest.raises(NectarError, match="study"):
            kept_study.unpacked(mx.array(np.frombuffer(data, np.uint8)), vocabulary=50)

    def test_it_is_not_counted_and_not_kept_unless_asked(self, model, tokenizer, fitted):
        plain = Nectar.fit(model, tokenizer, TEXT, budget=0.3, **FAST)
        assert plain.nbytes == fitted.nbytes
        assert kept_study.TENSOR not in plain.tensors


def test_some_of_the_kept_conversations_are_held_out(model, tokenizer):
    run = fit_run(model, tokenizer)
    kept = [Conversation([1] * 10, [2] * 10, "held_out" if i % 10 == 0 else "train") for i in range(40)]
    few = questions.some(kept, run, samples=run.group * 19 * 4)
    assert [sum(c.split == split for c in few) for split in ("train", "held_out")] == [4, 1]
    assert len(questions.some(kept, run, samples=10**6)) == len(kept)


def test_new_questions_give_the_samples_that_are_wanted(model, tokenizer):
    run = fit_run(model, tokenizer, answer_tokens=16)
    new = toys.random_tokens(300)
    asked = questions.about_the_new(run, Revision.of(new[:200], new), [Conversation([1], [2])], samples=1500)
    each = [run.group * (len(c.prompt) + 16) for c in asked]
    assert sum(each[:-1]) < 1500 <= sum(each)
    assert "check" not in [c.split for c in asked]


@pytest.mark.parametrize("count", [3, 10, 100])
def test_a_long_append_does_not_drive_out_the_study(count):
    study = [Conversation([1], [n], "check" if n >= 8 else "train") for n in range(10)]
    fresh = [Conversation([2], [n], "train") for n in range(count)]
    kept = updating.outcome._further_study(study, fresh)
    assert [c for c in kept if c.split == "check"] == study[8:]
    assert len(kept) == min(20, 10 + count)
    of_study = sum(c.prompt == [1] and c.split == "train" for c in kept)
    assert of_study == (8 if count <= 10 else pytest.approx(18 * 8 / (8 + count), abs=1))


def test_one_is_held_out_where_the_study_holds_none(model, tokenizer):
    run, revision = fit_run(model, tokenizer), Revision.of(list(range(200)), list(range(220)))
    for kept in ([Conversation([1], [2], "train")] * 4, [Conversation([1], [2], "held_out")]):
        asked = questions.about_the_new(run, revision, kept, samples=100)
        assert sum(c.split == "held_out" for c in [*kept, *asked]) == 1


def test_without_a_study_some_are_about_the_whole_text_and_one_is_held_out(model, tokenizer):
    run = fit_run(model, tokenizer)
    asked = questions.about_the_new(run, Revision.of(list(range(200)), list(range(220))), [], samples=100)
    assert "held_out" in [c.split for c in asked]
    assert sum(c.split == "check" for c in asked) == run.config.checks


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        (MORE, "runs. A new hare came by, and it sang about the river."),  # and a few tokens before it
        (
            TEXT.replace("dog sees fox number 7", "cat saw a hen and bit number 7"),
            "runs. The lazy cat saw a hen and bit",
        ),
        (TEXT.replace(" sees fox number 7", ""), "sees fox number 7"),
    ],
    ids=["appended", "replaced", "left out"],
)
def test_the_check_asks_short_questions_all_over_what_is_new(model, tokenizer, fitted, text, phrases):
    run = fit_run(model, tokenizer)
    asked = questions.checking_the_new(run, Revision.of(fitted.prefix, prompts.prefix(tokenizer, text)))
    quoted = [str(tokenizer.decode(c.prompt)).split('"')[1] for c in asked]
    assert len(asked) == 8 and {c.split for c in asked} == {"check"}
    assert all(phrase in phrases for phrase in quoted)
    starts = [phrases.index(phrase) for phrase in quoted]
    told = {place for start, phrase in zip(starts, quoted, strict=True) for place in range(start, start + len(phrase))}
    assert len(told) > 0.7 * len(phrases)


@pytest.mark.parametrize(
    ("whole", "new", "grade"),
    [
        (0.999, 0.999, "close"),
        (0.999, 0.95, "usable"),
        (0.999, 0.3, "not faithful"),
        (0.95, 0.999, "usable"),
        (0.3, 0.95, "not faithful"),
    ],
)
def test_the_worse_of_the_whole_text_and_what_is_new_decides_the_verdict(whole, new, grade):
    figures = [{"kl": 2 * (1 - gap), "kl_no_context": 2.0, "gap_closed": gap} for gap in (whole, new)]
    report = figures[0] | {"new": figures[1]}
    assert verdict.grade(report) == grade
    assert verdict.worse(report)["gap_closed"] == min(whole, new)
    sentence = verdict.sentence(report, share=0.02)
    assert sentence.lower().startswith(grade)
    assert f"about what is new {new:.1%}" in sentence
    alone = verdict.sentence(min(figures, key=lambda f: f["gap_closed"]), share=0.02)
    assert sentence.partition("budget of about ")[2] == alone.partition("budget of about ")[2]  # that would be close


@pytest.mark.parametrize(
    ("old", "new", "sizes", "tokens", "after"),
    [
        (1000, 1100, [10, 190], 100, [20, 200]),  # what is more is divided equally
        (1000, 1100, [10, 190, 1000], 100, [20, 200, 1100]),  # every key
        (1000, 1100, [10, 190, 500], 100, [20, 200, 550]),  # a large one grows as the text does
        (1000, 1100, [890, 950], 100, [979, 1100]),  # nearly every key
        (1000, 1010, [400, 999], 3, [403, 1010]),  # not more than there are new tokens
        (1000, 1000, [50, 60], 40, [50, 60]),  # as many tokens as before
        (1000, 900, [50, 1000], 0, [45, 900]),
        (1000, 10, [1], 0, [1]),
        (1000, 1100, [1000, 1000], 100, [1100, 1100]),
    ],
)
def test_heads_grow_with_the_text(old, new, sizes, tokens, after):
    revision = Revision(range(old), range(new), [])
    assert edit.new_sizes([(m,) for m in sizes], revision, tokens=tokens) == [(m,) for m in after]


@pytest.mark.parametrize(
    ("old", "sizes", "grown", "tokens", "total"),
    [
        (1000, [50] * 40, 1.0, 50, 330),  # 3.3 times as many nodes a token
        (1000, [50] * 40, 1.0, 250, 1000),  # of many tokens fewer: half as many nodes for a quarter of the text
        (1000, [50] * 40, 1.0, 1000, 2000),
        (1000, [60] * 40, 1.2, 50, 330),  # what appends gave before does not count
        (1000, [1000] * 10, 1.0, 50, 500),  # every key
        (1000, [900, 90, 9], 1.0, 100, 300),
        (1000, [900, 90, 9], 1.0, 10, 30),
    ],
)
def test_new_tokens_get_more_nodes_than_a_fit_would_give_them(old, sizes, grown, tokens, total):
    report = {"updated": {"grown": grown}}
    file = SimpleFile(prefix=range(old), sizes=[(m,) for m in sizes], metadata={"report": report})
    new = [m for (m,) in append.new_sizes(file, tokens=tokens)]
    assert sum(new) == pytest.approx(total, rel=0.08) and min(new) >= 1 and max(new) <= tokens
    assert all(first >= second - 1 for first, second in itertools.pairwise(new))
    after = (sum(sizes) + sum(new)) / (sum(sizes) / grown * (old + tokens) / old)
    assert append.grown(file, tokens=tokens) == pytest.approx(after)


def test_a_larger_head_gets_more_nodes_for_new_tokens_but_not_in_proportion():
    file = SimpleFile(prefix=range(10_000), sizes=[(320,), (10,)], metadata={"report": {}})
    (large,), (small,) = append.new_sizes(file, tokens=1000)
    assert large / small == pytest.approx(32**0.6, rel=0.1)  # the power that was measured (docs/log/update.md)


def test_two_small_errors_add_up():
    before = {"kl": 0.01, "agree": 0.95, "kl_no_context": 3.0, "gap_closed": 0.9967}
    added = verdict.added({"kl": 0.02, "agree": 0.98, "kl_no_context": 1.5, "gap_closed": 0.98}, before)
    assert added == {"kl": 0.03, "agree": 0.93, "kl_no_context": 1.5, "gap_closed": 0.98}


def test_questions_of_about_one_length_are_asked(model, tokenizer):
    run, new = fit_run(model, tokenizer, answer_tokens=16), toys.random_tokens(300)
    revision = Revision.of(new[:200], new)
    lengths = [
        {len(c.prompt) for c in questions.about_the_new(run, revision, kept, samples=1500)}
        for kept in ([Conversation([1], [2])], [])
    ]
    assert max(lengths[0]) - min(lengths[0]) < 10 < max(lengths[1]) - min(lengths[1])


class TestAppend:
    @pytest.mark.parametrize("study", [True, False])
    def test_there_are_more_nodes_and_the_new_text_is_answered_from(self, model, tokenizer, fitted, study):
        tensors = {name: x for name, x in fitted.tensors.items() if study or name != kept_study.TENSOR}
        outcome, said = updated(model, tokenizer, Nectar(tensors, fitted.metadata), MORE)
        assert outcome.way == "append"
        assert "tokens were added" in said[0]
        nectar = Nectar(outcome.tensors, outcome.metadata)
        assert nectar.prefix[: len(fitted.prefix)] == fitted.prefix
        added = len(nectar.prefix) - len(fitted.prefix)
        for (old,), (new,) in zip(fitted.report["sizes"], nectar.report["sizes"], strict=True):
            assert old < new <= (old + added if old < 0.9 * len(fitted.prefix) else len(nectar.prefix))
        assert nectar.report["kl"] < 2 * fitted.report["kl"] + 0.01
        assert nectar.report["new"]["questions"] == 8
        assert {"kl", "agree", "kl_no_context", "gap_closed"} < set(nectar.report["new"])
        assert f"about what is new {nectar.report['new']['gap_closed']:.1%}" in nectar.report["verdict"]
        assert (kept_study.TENSOR in nectar.tensors) == study

    def test_the_old_nodes_stay_as_they_are(self, model, tokenizer, fitted):
        outcome, _ = updated(model, tokenizer, fitted, MORE)
        before, after = (FileContents(tensors=x.tensors, metadata=x.metadata) for x in (fitted, outcome))
        for old, new, (nodes,) in zip(before.heads, after.heads, fitted.report["sizes"], strict=True):
            assert all(mx.array_equal(new[name][:nodes], old[name]) for name in ("keys", "values"))
            np.testing.assert_allclose(new["bias"][:nodes], old["bias"], atol=1e-3)

    def test_the_old_text_is_not_read_again(self, model, tokenizer, fitted):
        totals = {}

        @contextmanager
        def progress(description, total):
            totals[description] = total
            yield lambda done: None

        outcome, _ = updated(model, tokenizer, fitted, MORE, progress=progress)
        assert totals["reading"] == len(outcome.tensors["prefix"].tolist()) - len(fitted.prefix)

    def test_behind_heads_that_are_exact_it_is_read_as_in_the_whole_text(self, model, tokenizer):
        file = Nectar.fit(model, tokenizer, TEXT, budget=1.0, keep_study=True, **FAST)
        run, prefix = fit_run(model, tokenizer), [*file.prefix, *toys.random_tokens(30)]
        contents = FileContents(tensors=file.tensors, metadata=file.metadata)
        ours, whole = behind.read_behind(run, contents, prefix), read(run, prefix, offsets=contents.offsets)
        queries = mx.random.normal((1, run.geometry.n_heads, 5, run.geometry.head_dim))
        for own, exact in zip(ours.banks, whole.banks, strict=True):
            for ours_part, exact_part in (
                (own, exact),
                *((x.part(slice(len(file.prefix), None)) for x in (own, exact)),),
            ):
                for x, y in zip(ours_part.over(queries), exact_part.over(queries), strict=True):
                    np.testing.assert_allclose(x, y, atol=0.02)
        logits = [
            model(mx.array([toys.random_tokens(9, seed=3)]), cache=context.make_cache()) for context in (ours, whole)
        ]
        np.testing.assert_allclose(*logits, atol=0.05)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"ahead": 5}, "fitted for questions at most 5 tokens behind"),
            ({"ahead": None}, "fitted for questions at most 0 tokens behind"),
            ({"ahead": -(10**400)}, "fitted for questions at most 0 tokens behind"),
            ({"updated": {"grown": 1.44}}, "times the nodes that a fit gives it"),
            ({"updated": {"grown": 10**400}}, "times the nodes that a fit gives it"),
            ({"kl": None}, "does not say how closely it answers"),
            ({"kl": -0.5}, "does not say how closely it answers"),
            ({"agree": None}, "does not say how closely it answers"),
            ({"agree": 1.5}, "does not say how closely it answers"),
        ],
    )
    def test_where_the_old_nodes_would_not_do_it_is_a_fit(self, model, tokenizer, fitted, change, reason):
        metadata = fitted.metadata | {"report": fitted.report | change}
        outcome, _ = updated(model, tokenizer, Nectar(fitted.tensors, metadata), MORE)
        assert outcome.way == "fit" and reason in outcome.reason
        assert outcome.metadata["report"]["ahead"] > 100

    def test_a_file_is_not_fitted_for_questions_further_on_than_any(self, model, tokenizer, fitted):
        metadata = fitted.metadata | {"report": fitted.report | {"ahead": 10**400}}
        outcome, _ = updated(model, tokenizer, Nectar(fitted.tensors, metadata), MORE)
        assert outcome.way == "append" and outcome.metadata["report"]["ahead"] < FURTHEST

    def test_the_file_quotes_as_it_did(self, model, tokenizer, fitted):
        """It is compared with itself, which quotes no better."""
        recall = {"weight": 0.8, "exponent": 0.25}
        metadata = fitted.metadata | {"report": fitted.report | {"recall": recall}}
        outcome, _ = updated(model, tokenizer, Nectar(fitted.tensors, metadata), MORE)
        assert outcome.way == "append" and outcome.metadata["report"]["recall"] == recall

    def test_errors_are_shares_of_what_the_whole_text_gives(self, model, tokenizer, fitted):
        """One token's output does not vary: as a share of that, a rounding error was an error of 24."""
        outcome, _ = updated(model, tokenizer, fitted, TEXT + "!")
        assert outcome.way == "append"
        for before, after in zip(fitted.report["error"], outcome.metadata["report"]["error"], strict=True):
            assert before <= after < 1.1 * before

    @pytest.mark.parametrize(("study", "worth"), [(True, 60), (True, 0), (False, 60)])
    def test_where_all_heads_learn_from_many_samples_they_are_trained_on(
        self, model, tokenizer, fitted, set_device, monkeypatch, study, worth
    ):
        """A text is read quickly there. Where it is not, and without its conversations, its heads stay as they are."""
        set_device(trained_share=1)
        monkeypatch.setattr(plan, "WORTH_WAITING", worth)
        tensors = {name: x for name, x in fitted.tensors.items() if study or name != kept_study.TENSOR}
        trained = study and worth > 0
        metadata = fitted.metadata | {"report": fitted.report | {"ahead": 0 if trained else 900}}
        outcome, said = updated(model, tokenizer, Nectar(tensors, metadata), MORE)
        assert outcome.way == "append", said
        before, after = (FileContents(tensors=x.tensors, metadata=x.metadata) for x in (fitted, outcome))
        stayed = [
            mx.array_equal(new["keys"][:nodes], old["keys"]).item()
            for old, new, (nodes,) in zip(before.heads, after.heads, fitted.report["sizes"], strict=True)
        ]
        assert any(stayed) != trained and (after.grown > 1) != trained and after.ahead > 100

    def test_a_distilled_file_is_appended_to_and_not_edited(self, model, tokenizer, fitted, monkeypatch):
        monkeypatch.setattr(plan, "distills", lambda *_: True)
        monkeypatch.setattr(FitRun, "distills", lambda *_: False)
        assert updated(model, tokenizer, fitted, MORE)[0].way == "append"
        outcome, _ = updated(model, tokenizer, fitted, EDITED)
        assert outcome.way == "fit" and "trained through the whole model" in outcome.reason

    def test_it_samples_a_fraction_of_a_fit(self, model, tokenizer, fitted, monkeypatch):
        sampled = []
        answer = sampling.sample_answers

        def counted(model, context, batch, **options):
            answer(model, context, batch, **options)
            sampled.extend(len(c.answer) for c in batch)

        monkeypatch.setattr(self_study, "sample_answers", counted)
        file = Nectar.fit(model, tokenizer, TEXT, budget=0.3, keep_study=True, **FAST | {"queries": 12000, "checks": 8})
        whole = sum(sampled)
        sampled.clear()
        assert updated(model, tokenizer, file, MORE)[0].way == "append"
        assert sum(sampled) < 0.3 * whole

    @pytest.mark.parametrize("architecture", ["gemma3_text", "mistral"])
    def test_windows_are_those_of_the_whole_text(self, tokenizer, architecture):
        model = toys.toy(architecture)
        file = Nectar.fit(model, tokenizer, TEXT, budget=0.3, keep_study=True, **FAST)
        outcome, _ = updated(model, tokenizer, file, MORE)
        assert outcome.way == "append"
        whole = read(fit_run(model, tokenizer), Nectar(outcome.tensors, outcome.metadata).prefix)
        for layer, window in whole.windows.items():  # as read behind the heads
            np.testing.assert_allclose(outcome.tensors[f"windows.{layer}.keys"], window.keys, atol=0.02)

    def test_twice(self, model, tokenizer, fitted):
        once = updated(model, tokenizer, fitted, MORE)[0]
        again, _ = updated(model, tokenizer, Nectar(once.tensors, once.metadata), MORE + " It slept.")
        assert again.way == "append"
        assert again.metadata["report"]["error"]
        first, last = (FileContents(tensors=x.tensors, metadata=x.metadata) for x in (fitted, again))
        run = fit_run(model, tokenizer)
        checks = [[c for c in x.study(run) if c.split == "check"] for x in (first, last)]
        assert checks[0] == checks[1], "the questions whose divergence without the text is known"
        assert len(last.study(run)) > len(first.study(run))
        kept = again.metadata["report"]["updated"]["fitted"]
        assert kept == {name: fitted.report[name] for name in ("kl", "gap_closed")}, "of the fit, not of an update"

    def test_a_study_without_checks(self, model, tokenizer, fitted):
        file = FileContents(tensors=fitted.tensors, metadata=fitted.metadata)
        study = [c for c in file.study(fit_run(model, tokenizer)) if c.split != "check"]
        tensors = fitted.tensors | {kept_study.TENSOR: kept_study.packed(study)}
        report = updated(model, tokenizer, Nectar(tensors, fitted.metadata), MORE)[0].metadata["report"]
        assert report["kl_no_context"] == report["new"]["kl_no_context"] != fitted.report["kl_no_context"]

    @pytest.mark.parametrize("most", [None, 550, 557])
    def test_a_word_that_was_cut_at_the_end_stays_in_two_tokens(self, model, tokenizer, most):
        old, whole = (prompts.prefix(tokenizer, f"{TEXT} {word}") for word in ("qu", "quick fox runs."))
        assert whole[: len(old)] != old
        run = fit_run(model, tokenizer, context_tokens=most)
        prefix = plan._prefix(run, SimpleFile(prefix=old, sizes=[], metadata={}), f"{TEXT} quick fox runs.")
        if most is None:
            assert tokenizer.decode(prefix) == tokenizer.decode(whole)
        else:
            assert len(prefix) == most + prompts.preamble(tokenizer)
        assert prefix[: len(old)] == old[: len(prefix)]

    def test_tokens_that_would_be_merged_across_the_end_stay_apart(self, model, tokenizer, fitted):
        text = TEXT[:-1] + ".. and more."
        ids = prompts.prefix(tokenizer, text)
        outcome, _ = updated(model, tokenizer, fitted, text)
        tokens = outcome.tensors["prefix"].tolist()
        assert outcome.way == "append"
        assert tokens[: len(fitted.prefix)] == fitted.prefix
        assert tokenizer.decode(tokens) == tokenizer.decode(ids)


class TestEdit:
    def test_it_starts_from_the_old_nodes_and_the_keys_of_the_new_text(self, model, tokenizer):
        """With room for every key the new text's stand for themselves: old nodes and they are the whole context."""
        run, tokens = fit_run(model, tokenizer, queries=300), toys.random_tokens(60)
        context = read(run, tokens)
        asked = self_study.training_conversations(tokenizer, tokens, first=0, count=8, seed=0)
        self_study.answer(run, context, asked, seed=0)
        data = capture(run, context, asked)
        nodes = [head for bank in context.banks for head in bank.part(slice(40)).nodes()]
        kind = warm.WarmFit(
            run,
            data,
            nodes=nodes,
            places=range(40, 60),
            sizes=[(59,)] * len(nodes),  # with 60 they would be untrained
            rooms=[20] * len(nodes),
            effort=edit.EDIT,
        )
        started = kind.match(range(kind.n_heads), [60] * kind.n_heads)
        K = run.geometry.n_kv_heads
        for layer, exact in enumerate(context.banks):
            bank = Quadrature.stack(started[layer * K : layer * K + K], scale=exact.scale, offset=exact.offset)
            queries = kind.held_out_samples(range(layer * K, layer * K + K)).queries
            assert mx.allclose(bank(queries).output, exact(queries).output, atol=1e-4)
            assert mx.allclose(bank.parameters["keys"], exact.parameters["keys"], atol=1e-5)

    def test_a_head_that_is_not_trained_starts_as_in_a_fit(self, model, tokenizer, set_device):
        set_device(trained_share=0.0)
        run, tokens = fit_run(model, tokenizer, queries=300), toys.random_tokens(60)
        context = read(run, tokens)
        asked = self_study.training_conversations(tokenizer, tokens, first=0, count=8, seed=0)
        self_study.answer(run, context, asked, seed=0)
        data, nodes = capture(run, context, asked), [head for bank in context.banks for head in bank.nodes()]
        sizes, last = [(4,)] * (len(nodes) - 1) + [(40,)], len(nodes) - 1
        options = {"nodes": nodes, "places": range(50, 60), "sizes": sizes, "rooms": [2] * len(nodes)}
        kind = warm.WarmFit(run, data, effort=edit.EDIT, **options)
        assert kind.trained(sizes) == [True] * last + [False]
        ours, theirs = (of.match([last], [40])[0] for of in (kind, QuadratureFit(run, data)))
        assert mx.allclose(ours["keys"], theirs["keys"], atol=1e-6)
        assert mx.allclose(ours["values"], theirs["values"], atol=1e-4)

    def test_it_starts_from_the_heads_of_the_file(self, model, tokenizer, fitted):
        outcome, said = updated(model, tokenizer, fitted, EDITED)
        assert outcome.way == "edit", said
        nectar = Nectar(outcome.tensors, outcome.metadata)
        assert nectar.prefix == prompts.prefix(tokenizer, EDITED)
        assert nectar.report["kl"] < 2 * fitted.report["kl"] + 0.01
        assert nectar.report["updated"]["from"] == fitted.digest
        assert nectar.report["kl_no_context"] == fitted.report["kl_no_context"]  # is not measured again
        assert [len(bank.sizes) for bank in nectar.banks] == [len(bank.sizes) for bank in fitted.banks]
        assert kept_study.TENSOR in nectar.tensors

    def test_what_was_taken_out_of_the_text_is_not_in_the_file(self, model, tokenizer, fitted):
        """Nor in the conversations that it keeps."""

        def quoting(file, phrase):
            kept = FileContents(tensors=file.tensors, metadata=file.metadata).study(fit_run(model, tokenizer))
            return [phrase in tokenizer.decode(c.prompt) for c in kept]

        quoted = next(f"fox number {n}," for n in range(16) if any(quoting(fitted, f"sees fox number {n},")))
        outcome, said = updated(model, tokenizer, fitted, TEXT.replace(quoted, "hen,"))
        assert outcome.way == "edit", said
        assert not any(quoting(outcome, f"sees {quoted}")) and len(quoting(outcome, "")) > 1

    def test_a_head_that_kept_every_key_keeps_every_key(self, model, tokenizer):
        file = Nectar.fit(model, tokenizer, TEXT, budget=1.0, keep_study=True, **FAST)
        text = TEXT.replace("fox number 7", "fox that was seen before it was number 7")
        outcome, said = updated(model, tokenizer, file, text)
        assert outcome.way == "edit", said
        length = len(outcome.tensors["prefix"].tolist())
        assert length > len(file.prefix)
        assert outcome.metadata["report"]["sizes"] == [[length]] * len(file.report["sizes"])

    def test_nodes_move_with_the_keys_that_they_stand_for(self, model, tokenizer):
        """The first layer's keys depend on token and position alone: as nodes they come to lie on the new text's."""
        run, old = fit_run(model, tokenizer), toys.random_tokens(60)
        new = [*old[:30], 1, 2, 3, *old[30:]]
        before, revision = read(run, old), Revision.of(old, new)
        after = read(run, new, offsets=before.offsets)
        nodes = [Quadrature.stack(bank.nodes(), scale=bank.scale, offset=bank.offset) for bank in before.banks]
        moved = warm.moved_nodes(run, nodes, after, revision.kept)
        kept = mx.array([place for start, end, _ in revision.kept for place in range(start, end)])
        for head, keys in zip(moved, after.banks[0].parameters["keys"], strict=False):
            assert mx.allclose(head["keys"], keys[kept], atol=1e-4)


class TestFit:
    @pytest.mark.parametrize(
        ("text", "change", "reason"),
        [
            (TEXT[: len(TEXT) // 3], {}, "of the text has changed"),
            (TEXT * 2, {}, "too many for an update"),
            (EDITED, {"study": None}, "keep-study"),
            (MORE, {"model_sha256": "0" * 64}, "another model"),
            (MORE, {"nectar_mlx": "0.0.1"}, "version 0.0.1"),
            (
                EDITED,
                {"config": FAST | {"budget": 0.3, "distillation_steps": 9}, "report": {"budget": 0.005}},
                "whole model",
            ),
        ],
    )
    def test_it_says_why(self, model, tokenizer, fitted, monkeypatch, text, change, reason):
        fits = []
        monkeypatch.setattr(pipeline, "fit", lambda *given, **options: fits.append((*given, options)) or ({}, {}, None))
        tensors = {name: x for name, x in fitted.tensors.items() if name not in change}
        metadata = fitted.metadata | {name: value for name, value in change.items() if name != "study"}
        said = []
        outcome = updating.update(model, tokenizer, text, tensors=tensors, metadata=metadata, log=said.append)
        assert outcome.way == "fit"
        assert reason in outcome.reason
        assert said == [f"fitting anew: {outcome.reason}"]
        ((*given, options),) = fits
        assert given == [model, tokenizer, text] and options["config"] == updating.outcome.config_of(metadata)

    def test_other_kinds_are_fitted_anew(self, model, tokenizer):
        file = Nectar.fit(model, tokenizer, TEXT, budget=0.3, kind="mlp", **FAST)
        outcome, _ = updated(model, tokenizer, file, MORE)
        assert (outcome.way, outcome.reason) == ("fit", "heads of kind mlp cannot be updated")
        assert outcome.tensors["prefix"].tolist() == prompts.prefix(tokenizer, MORE)

    def test_a_worse_result_is_given_up(self, model, tokenizer, fitted, monkeypatch):
        stored = updating.outcome.stored

        def bad(*rest, **options):
            tensors, report = stored(*rest, **options)
            return tensors, report | {"kl": 0.5, "gap_closed": 0.2}

        monkeypatch.setattr(updating.outcome, "stored", bad)
        metadata = fitted.metadata | {"report": fitted.report | {"kl": 0.001, "gap_closed": 0.999}}
        outcome, said = updated(model, tokenizer, Nectar(fitted.tensors, metadata), MORE)
        assert (outcome.way, outcome.reason) == ("fit", "the update answers worse than the file did when it was fitted")
        assert outcome.metadata["report"]["kl"] < 0.5
        assert len(said) == 2

    @pytest.mark.parametrize(
        ("of_the_fit", "before", "after", "given_up"),
        [
            (0.999, 0.97, 0.96, True),  # many updates that lost a little each
            (0.999, 0.995, 0.985, False),
            (0.95, 0.95, 0.5, True),
            (0.95, 0.93, 0.91, False),
            (0.5, 0.5, 0.1, False),
        ],
    )
    def test_it_is_compared_with_the_last_fit(self, of_the_fit, before, after, given_up):
        then, now, new = ({"kl": 2 * (1 - gap), "gap_closed": gap} for gap in (of_the_fit, before, after))
        fitted = updating.outcome._fitted(now | {"updated": {"fitted": then}})
        assert updating.outcome._worse(new, fitted) == given_up
        for odd in (None, [], {"fitted": 1}, {"fitted": {"kl": "x"}}):
            assert updating.outcome._fitted(now | {"updated": odd})["kl"] == now["kl"]

    def test_a_result_that_lost_what_is_new_is_given_up(self, model, tokenizer, fitted, monkeypatch):
        """However close it is to the rest of the text."""
        asked = []

        def check(run, data, banks, **options):
            asked.append([tokenizer.decode(c.prompt) for c in options["asked"]])
            kl = 0.5 if any("river" in prompt for prompt in asked[-1]) else 0.001
            return {"kl": kl, "agree": 1, "kl_no_context": 1.0, "gap_closed": 1 - kl}

        monkeypatch.setattr(updating.base, "check", check)
        metadata = fitted.metadata | {"report": fitted.report | {"kl": 0.001, "gap_closed": 0.999}}
        outcome, _ = updated(model, tokenizer, Nectar(fitted.tensors, metadata), MORE)
        assert (outcome.way, outcome.reason) == ("fit", "the update answers worse than the file did when it was fitted")
        assert len(asked) == 2 and not set(asked[0]) & set(asked[1])

    def test_where_an_update_is_expected_to_take_as_long_the_text_is_fitted(
        self, model, tokenizer, fitted, monkeypatch
    ):
        monkeypatch.setattr(append, "expected_stages", lambda *a, **k: [Stage("reading", 1e6)])
        outcome, said = updated(model, tokenizer, fitted, MORE)
        assert outcome.way == "fit"
        assert outcome.reason.startswith("an update is expected to take 12 days, a fit ")
        assert said == [f"fitting anew: {outcome.reason}"]

    @pytest.mark.parametrize("end", ["", "\n", " \n\n"])
    def test_the_same_text_is_left_alone(self, model, tokenizer, fitted, end):
        assert updated(model, tokenizer, fitted, TEXT + end)[0] == updating.Outcome(way="same")


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path, model, tokenizer, fitted):
        toys.save_model(model, tmp_path / "model", tokenizer)
        file = Nectar(fitted.tensors, fitted.metadata | {"model": str(tmp_path / "model")})
        file.save(tmp_path / "book.nectar")
        return tmp_path

    def run(self, folder, text, *options):
        (folder / "book.txt").write_text(text)
        return update.main([str(folder / "book.nectar"), "--context", str(folder / "book.txt"), *options])

    def test_the_file_is_replaced(self, folder, capsys):
        assert self.run(folder, MORE, "--json") == 0
        said = capsys.readouterr()
        facts = json.loads(said.out)
        assert facts["way"] == "append"
        assert facts["new"]["questions"] == 8
        assert "text added" in said.err and "about what is new" in said.err
        tensors, _ = store.read(folder / "book.nectar")
        assert facts["tokens"] == len(tensors["prefix"].tolist())
        assert not (folder / "book.nectar.partial").exists()

    @pytest.mark.parametrize("text", [TEXT, TEXT + "  \n \n", "\ufeff" + TEXT + "\r\n"])
    def test_the_same_text_changes_nothing(self, folder, capsys, text):
        before = (folder / "book.nectar").read_bytes()
        assert self.run(folder, text) == 0
        assert "is up to date" in capsys.readouterr().err
        assert (folder / "book.nectar").read_bytes() == before

    def test_of_a_link_the_file_is_written_that_it_leads_to(self, folder):
        (folder / "elsewhere").mkdir()
        (folder / "book.nectar").rename(folder / "elsewhere" / "real.nectar")
        (folder / "book.nectar").symlink_to(folder / "elsewhere" / "real.nectar")
        before = (folder / "elsewhere" / "real.nectar").read_bytes()
        assert self.run(folder, MORE) == 0
        assert (folder / "book.nectar").is_symlink()
        assert (folder / "elsewhere" / "real.nectar").read_bytes() != before

    def test_what_cannot_be_read_is_named(self, folder, capsys):
        (folder / "bad.pdf").write_bytes(b"%PDF-1.4 no more")
        assert self.run(folder, TEXT, str(folder / "bad.pdf")) == 0
        assert "read 1 of 2 files: bad.pdf: a damaged PDF" in capsys.readouterr().err

    def test_an_equal_text_of_another_name_is_called_so(self, folder, tokenizer, capsys):
        (folder / "old.txt").write_text(TEXT)
        file = Nectar.read(folder / "book.nectar")
        file.keep(documents.read([folder / "old.txt"]), tokenizer)
        file.metadata["source"] = "old.txt"
        file.save(folder / "book.nectar")
        keys = folder / f"book.nectar.{file.digest[:16]}.kv"
        store.tensor_file.write(keys, {}, {"format": "nectar-kv-9"})  # as a later version writes them
        assert self.run(folder, TEXT, "--json") == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["way"] == "same" and "names its text anew" in said.err
        found = Nectar.read(folder / "book.nectar")
        assert [f.name for f in found.text(tokenizer).files] == [found.metadata["source"]] == ["book.txt"]
        assert found.digest == file.digest and keys.exists(), "nothing else is another"
        before = (folder / "book.nectar").stat().st_mtime_ns
        assert self.run(folder, TEXT) == 0
        assert (folder / "book.nectar").stat().st_mtime_ns == before

    def test_a_copy_of_what_is_up_to_date_has_its_keys_beside_it(self, folder, model, tokenizer):
        file = Nectar.fit(model, tokenizer, TEXT, kind="retrieval", **FAST)
        Nectar(file.tensors, file.metadata | {"model": str(folder / "model")}, file.keys).save(folder / "book.nectar")
        assert self.run(folder, TEXT, "--output", str(folder / "copy.nectar")) == 0
        assert find_keys(folder / "copy.nectar", file.digest).exists()

    def test_an_interrupted_update_goes_on(self, folder, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            patch.setattr(recording.Recording, "move", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            assert self.run(folder, MORE) == 130
        assert "the same command continues" in capsys.readouterr().err
        monkeypatch.setattr(sampling, "sample", lambda *a, **k: pytest.fail("an answer was sampled again"))
        assert self.run(folder, MORE) == 0

    def test_an_interrupted_fit_in_the_place_of_an_update_goes_on(self, folder, monkeypatch, capsys):
        monkeypatch.setattr(updating.outcome, "_worse", lambda *_: True)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save_plan", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            assert self.run(folder, MORE) == 130
        monkeypatch.setattr(sampling, "sample", lambda *a, **k: pytest.fail("an answer was sampled again"))
        assert self.run(folder, MORE) == 0
        said = capsys.readouterr().err
        assert "fitted anew" in said and "starting anew" not in said
        assert not (folder / "book.nectar.partial").exists()

    @pytest.mark.parametrize("name", ["absent.nectar", "text.nectar"])
    def test_what_is_no_nectar_is_refused(self, tmp_path, capsys, name):
        (tmp_path / "text.nectar").write_text("no")
        (tmp_path / "book.txt").write_text(TEXT)
        assert update.main([str(tmp_path / name), "--context", str(tmp_path / "book.txt")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "--output" not in err

    def test_a_file_that_was_fitted_with_others_is_left_as_it_is(self, folder, model, tokenizer, fitted, capsys):
        """Also from Python."""
        both = Nectar(fitted.tensors, fitted.metadata | {"with": ["0" * 64], "model": str(folder / "model")})
        both.save(folder / "book.nectar")
        before = (folder / "book.nectar").read_bytes()
        assert self.run(folder, MORE) == 2
        err = capsys.readouterr().err
        assert "`nectar fit --with` fits it again" in err and err.count("\n") == 1
        assert (folder / "book.nectar").read_bytes() == before
        assert not (folder / "book.nectar.partial").exists()
        with pytest.raises(NectarError, match="other files in view"):
            updated(model, tokenizer, both, MORE)

    def test_most_likely_the_wrong_text_does_not_replace_the_file(self, folder, capsys):
        before = (folder / "book.nectar").read_bytes()
        other = " ".join(f"Ship {n} lay in harbour {n * 7 % 11}." for n in range(40))
        assert self.run(folder, other) == 2
        assert "of the text has changed: if it is the right one" in capsys.readouterr().err
        assert (folder / "book.nectar").read_bytes() == before
        assert self.run(folder, other, "--output", str(folder / "ships.nectar")) == 0
        assert (folder / "book.nectar").read_bytes() == before
        assert self.run(folder, other, "--force") == 0
        assert "fitted anew" in capsys.readouterr().err

    def test_several_ranks_are_refused(self, folder, monkeypatch, capsys):
        monkeypatch.setattr(World, "here", lambda: World(1, 2))
        assert self.run(folder, MORE) == 2
        assert "is the work of one process" in capsys.readouterr().err
        assert not (folder / "book.nectar.partial").exists()

    def test_options_of_the_library_are_not_a_file(self):
        assert not update_file.names_file([])
        assert not update_file.names_file(["--watch"])
        assert update_file.names_file(["book.nectar"])

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["--context", "book.txt"], "FILE.nectar is missing: the file to bring up to date"),
            (["book.txt", "--context", "book.txt"], "book.txt is not a .nectar"),
            (["--strict", "book.nectar", "--context=other.txt"], "other.txt: no such file"),
        ],
    )
    def test_with_a_context_it_is_of_a_file(self, folder, monkeypatch, capsys, arguments, said):
        monkeypatch.chdir(folder)
        (folder / "book.txt").write_text(MORE)
        assert update.main(arguments) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind, less", [("append", 0.35), ("edit", 0.7)])
@pytest.mark.parametrize("machine", [machines.MACHINES[0], machines.MACHINES[2]], ids=["cpu", "mac"])
def test_an_update_is_expected_to_take_less_than_a_fit(tokenizer, kind, less, machine):
    old = list(range(2000))
    new = {"append": [*old, *range(3000, 3200)], "edit": [*old[:500], *range(3000, 3100), *old[600:]]}[kind]
    shape = machines.named_shape("SmolLM2-135M")
    with using(machine.profile):
        run = FitRun(model=None, tokenizer=tokenizer, geometry=shape.geometry, config=FitConfig(budget=0.04))
        study, revision = [Conversation([1], [2])], Revision.of(old, new)
        if kind == "append":
            sizes = [(80,)] * run.n_heads
            file = SimpleFile(prefix=old, sizes=sizes, metadata={"report": {}})
            stages = append.expected_stages(run, file, revision, study, shape=shape, machine=machine)
        else:
            stages = edit.expected_stages(run, revision, study, shape=shape, machine=machine)
        fit = estimate(shape, machine, run.config, len(new)).seconds
    assert 0.05 * fit < sum(stage.seconds for stage in stages) < less * fit


def test_the_stages_of_an_update_are_expected(model, tokenizer, fitted):
    progress = Recorded()
    updated(model, tokenizer, fitted, MORE, progress=progress)
    assert progress.came == progress.expected


def test_work_of_another_update_is_not_taken(model, tokenizer, fitted, tmp_path):
    run = fit_run(model, tokenizer, checkpoint=Checkpoint(tmp_path))
    run.claim(fitted.prefix)
    run.checkpoint.save_conversations([Conversation([1], [2])])
    outcome, _ = updated(model, tokenizer, fitted, MORE, checkpoint=Checkpoint(tmp_path))
    assert outcome.metadata["report"]["queries"] > 10


@pytest.mark.parametrize("kind", ["append", "edit"])
def test_the_figures_of_an_update_are_told(tmp_path, model, tokenizer, kind):
    toys.save_model(model, tmp_path / "model", tokenizer)
    (tmp_path / "text").write_text(TEXT.replace(". ", ".\n\n"))
    settings = json.dumps(FAST | {"budget": 0.3})
    options = ["--kind", kind, "--settings", settings, "--folder", str(tmp_path), "--questions", "4"]
    options += ["--about-new", "2", "--share", "0.1", "--tokens", "400"]
    arguments = [str(tmp_path / "model"), str(tmp_path / "text"), *options]
    first = update_figures.main(arguments)
    assert first["way"] == kind
    if kind == "edit":  # a fit that was kept is not made again
        assert update_figures.main(arguments)["seconds"]["fits"] == first["seconds"]["fits"]
    for part in ("all", "general", "about new"):
        value, error = first["ratio"][part]
        assert value == pytest.approx(first["kl"]["update"][part] / first["kl"]["fit 0"][part], rel=0.01)
        assert error > 0
