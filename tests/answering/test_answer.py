"""Stop strings and thoughts in streamed text: the result does not depend on how the text is divided."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nectar_mlx import NectarError
from nectar_mlx.answering import MAX_STOP_LENGTH, MAX_STOPS, Answer, Markers, StopStrings
from nectar_mlx.mlxlm import prompts
from tests import toys

THINK = Markers("<think>", "</think>")


def written(pieces, *args, **options) -> Answer:
    answer = Answer(*args, **options)
    for piece in pieces:
        answer.feed(piece)
        if answer.stopped:
            break
    answer.finish()
    return answer


def divided(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


def cut(text: str, stops: list[str]) -> str:
    """The slow, obvious way: the shortest beginning that ends with a stop string, without the longest such string."""
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))]
    return text


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=6), max_size=MAX_STOPS),
    st.lists(st.integers(0, 99)),
)
def test_a_text_ends_before_a_stop_string_however_it_is_divided(text, stops, cuts):
    found = written(divided(text, cuts), stops)
    assert found.text == cut(text, stops)
    assert found.stopped == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    stops = StopStrings(["Bosun", "END"])
    assert [stops.feed(piece) for piece in ("The cat was called Bo", "b", ". E", "N", "E")] == [
        "The cat was called ",
        "Bob",
        ". ",
        "",
        "EN",
    ]
    assert (stops.found, stops.finish()) == (None, "E")
    assert (stops.feed("x Bosun y"), stops.found, stops.feed("more"), stops.finish()) == ("x ", "Bosun", "", "")


@pytest.mark.parametrize("stops", [["a", "b", "c", "d", "e"], [""], ["x" * (MAX_STOP_LENGTH + 1)]])
def test_stop_strings_have_bounds(stops):
    with pytest.raises(NectarError, match="stop string"):
        StopStrings(stops)


def test_equal_stop_strings_count_once():
    assert written(["abc"], ["b"] * 50).text == "a"


@pytest.mark.parametrize(
    "text, opened, thoughts, answer",
    [
        ("<think>\nwhy?\n</think>\n\nBecause.", False, "why?", "Because."),
        ("\n <think>why?</think>Because.", False, "why?", "Because."),
        ("why?\n\n</think>\n\nBecause.", True, "why?", "Because."),
        ("\n</think>\nBecause.", True, "", "Because."),
        ("<think>cut of", False, "cut of", ""),
        ("still thinking </thi", True, "still thinking </thi", ""),
        ("The tag <think> opens a thought, </think> ends it.", False, "", None),
        ("<think>a</think>In HTML, <think>b</think> is none.", False, "a", "In HTML, <think>b</think> is none."),
        ("<thin", False, "", None),
        ("  Because.", False, "", None),
        ("<think></think>", False, "", ""),
        ("", True, "", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 99)))
def test_thoughts_are_apart_from_the_answer(text, opened, thoughts, answer, cuts):
    found = written(divided(text, cuts), markers=THINK, opened=opened)
    assert (found.thoughts, found.text) == (thoughts, text if answer is None else answer)


def test_white_space_is_not_held_back_for_long():
    answer = Answer(["\n\n\n\n\n\n"], THINK)
    assert [answer.feed("\n").answer for _ in range(6)] == [""] * 6
    assert answer.stopped and answer.text == ""
    assert written([" " * 9, "<think>"], markers=THINK).text == " " * 9 + "<think>"


@given(st.lists(st.integers(0, 99)))
def test_a_model_that_does_not_think_writes_the_tags(cuts):
    text = "<think>x</think>y"
    assert written(divided(text, cuts)).text == text


@given(st.lists(st.integers(0, 99)))
def test_a_stop_string_counts_in_the_answer_alone(cuts):
    found = written(divided("<think>is it Bosun?</think>It is Bosun.", cuts), ["Bosun"], THINK)
    assert (found.thoughts, found.text, found.stop) == ("is it Bosun?", "It is ", "Bosun")


def test_text_is_returned_as_soon_as_it_is_certain():
    answer = Answer(["STOP"], THINK)
    pieces = ["<thi", "nk>a ", "thought", " </th", "ink>\n", "An ", "answer S", "TOP"]
    assert [tuple(answer.feed(piece)) for piece in pieces] == [
        ("", ""),
        ("a", ""),
        (" thought", ""),
        ("", ""),
        ("", ""),
        ("", "An "),
        ("", "answer "),
        ("", ""),
    ]
    assert answer.stopped


@pytest.mark.parametrize("opens", [True, False])
def test_a_template_may_open_the_thought(opens):
    tokenizer = toys.tokenizer(toys.CHAT + ("<think>\n" if opens else ""))
    markers = Markers.of(tokenizer)
    assert markers == THINK
    for question in ("who?", "what does <think> do?", "<think>"):
        assert markers.opened(tokenizer, prompts.prompt(tokenizer, question)) == opens


def test_a_tokenizer_without_the_markers_does_not_think():
    assert Markers.of(toys.tokenizer(specials=("<|im_end|>",))) is None


HARMONY = ("<|im_end|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>")


def test_gpt_oss_thinks_in_a_channel():
    markers = Markers.of(toys.tokenizer(specials=HARMONY))
    text = "<|channel|>analysis<|message|>why?<|end|><|start|>assistant<|channel|>final<|message|>Because."
    found = written([text], markers=markers)
    assert (found.thoughts, found.text) == ("why?", "Because.")
    assert written(["<|channel|>final<|message|>Because."], markers=markers).text == "Because."
