"""Conversations further on than right behind their text: as each would be alone, and which begin where."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.errors import NectarError
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.prefill import Context, read_text
from nectar_mlx.fitting.run import FitRun
from nectar_mlx.fitting.samples import capture, kept_study, sampling
from nectar_mlx.fitting.samples.ahead import FURTHEST, furthest, spaced
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.fitting.samples.sample_store import SampleStore
from nectar_mlx.mlxlm import attention_patch
from nectar_mlx.mlxlm.positions import shifted
from tests import toys


def make_run(model, **settings) -> FitRun:
    return FitRun(
        model=model, tokenizer=toys.tokenizer(), geometry=attention_patch.route(model), config=FitConfig(**settings)
    )


def seen(run: FitRun, context: Context, conversation: Conversation) -> SampleStore:
    """What attention sees in a conversation by itself."""
    store = SampleStore(run.n_heads, 1000, run.geometry.head_dim, folder=None)
    capture.replay(run.model, context, [conversation], {"train": store}, n_heads=run.geometry.n_heads)
    return store


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_side_by_side_as_alone(architecture):
    """Sampled in one batch, of which some end before the others; answers are greedy."""
    run = make_run(toys.toy(architecture))
    context = read_text(run.model, toys.random_tokens(40), run.geometry)
    together = [Conversation(toys.random_tokens(4 + i % 3, seed=i), ahead=13 * i) for i in range(6)]
    alone = [Conversation(list(c.prompt), ahead=c.ahead) for c in together]
    for batch in (together, *([c] for c in alone)):
        sampling.sample_answers(
            run.model,
            context,
            batch,
            stop=set(),
            max_tokens=[5 + 2 * i for i in range(len(batch))] if len(batch) > 1 else 15,
            temperature=1e-4,
            chances=sampling.chances(0, range(len(batch)), 15),
        )
    assert [len(c.answer) for c in together] == [5, 7, 9, 11, 13, 15]
    assert [c.answer for c in together] == [a.answer[: len(c.answer)] for a, c in zip(alone, together, strict=True)]


def test_queries_are_turned_further():
    """Of the first layer, whose hidden states are the tokens' own: by as many positions as was asked for."""
    run = make_run(toys.toy("llama"))
    context = read_text(run.model, toys.random_tokens(40), run.geometry)
    prompt = toys.random_tokens(7, seed=1)
    near, far = (seen(run, context, Conversation(prompt, [1], ahead=by)).heads([0]) for by in (0, 100))
    turned = shifted(run.model, 0, near.queries, 100)
    np.testing.assert_allclose(far.queries, turned, atol=1e-4)
    assert mx.abs(far.queries - near.queries).max().item() > 0.1
    np.testing.assert_allclose(far.live_output, near.live_output, atol=1e-4)  # among themselves they stand as before
    scores = run.geometry.scale * turned[0] @ (context.banks[0].parameters["keys"][0]).T
    np.testing.assert_allclose(far.log_normalizer[0], mx.logsumexp(scores, axis=-1), atol=1e-4)


def test_a_quarter_of_those_that_are_learned_from_begin_further_on():
    run = make_run(toys.toy("llama"))
    splits = ["check" if i % 5 == 0 else "train" for i in range(1000)]
    spaced(run, batch := [Conversation([1], split=split) for split in splits], furthest=500, first=0)
    aheads = np.array([c.ahead for c in batch])
    assert not aheads[::5].any() and aheads.max() < 500
    moved = aheads[np.arange(1000) % 5 > 0]
    assert 0.2 < (moved > 0).mean() < 0.3
    assert 100 < np.median(moved[moved > 0]) < 150 and 145 < moved[moved > 0].mean() < 190  # more of them near
    spaced(run, part := [Conversation([1]) for _ in range(3)], furthest=500, first=601)
    assert [c.ahead for c in part] == aheads[601:604].tolist()
    spaced(run, none := [Conversation([1]) for _ in range(9)], furthest=0, first=0)
    assert not any(c.ahead for c in none)


def test_as_far_as_the_window_has_room():
    for window, expected in ((None, 1024), (1 << 20, 1024), (40 + 1024 + 9, 9), (1000, 0)):
        model = toys.toy("llama", max_position_embeddings=window or 1 << 20)
        if window is None:
            model.args.max_position_embeddings = None
        run = make_run(model)
        context = read_text(model, toys.random_tokens(40), run.geometry)
        assert furthest(run, context, start=context.start) == expected, window
    assert furthest(run, context, start=100_000) == 0
    model.args.max_position_embeddings = None
    assert furthest(run, context, start=100_000) == 12_500  # of a long text an eighth, so much may be appended


def test_models_that_cannot_stand_at_two_positions_are_fitted_right_behind_their_text(monkeypatch):
    model = toys.toy("llama")
    run = make_run(model)
    context = read_text(model, toys.random_tokens(40), run.geometry)
    rope = type(model.layers[0].self_attn.rope)
    usual = rope.__call__

    def of_the_first(self, x, offset=0):
        return usual(self, x, offset=offset[0].item() if isinstance(offset, mx.array) else offset)

    def one_number(self, x, offset=0):
        return usual(self, x, offset=int(offset.item() if isinstance(offset, mx.array) else offset))

    assert furthest(run, context, start=40) > 0
    for call in (of_the_first, one_number):
        monkeypatch.setattr(rope, "__call__", call)
        assert furthest(run, context, start=40) == 0


def test_kept_with_the_conversations_and_checked():
    conversations = [Conversation([1], [2], "train", 17), Conversation([3], [4], "held_out")]
    assert kept_study.unpacked(kept_study.packed(conversations), vocabulary=9) == conversations
    for wrong in (-1, FURTHEST + 1):
        packed = kept_study.packed([Conversation([1], [2], "train", wrong)])
        with pytest.raises(NectarError, match="nowhere near"):
            kept_study.unpacked(packed, vocabulary=9)
