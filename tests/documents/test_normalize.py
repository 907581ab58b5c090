"""One spelling for each text, and the way back to the original."""

import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nectar_mlx.documents.normalize import normalized, position_map
from nectar_mlx.documents.reading import Reading

HANGUL = unicodedata.normalize("NFD", "한국어")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("plain text", "plain text"),
        ("cafe\u0301", "café"),
        ("Do\u00adnau\u00addampf\u00adschiff", "Donaudampfschiff"),
        ("e\ufb03cient \ufb02ow \ufb01nds", "efficient flow finds"),
        (HANGUL, "한국어"),
        ("\u212b \u2126 \uf900", "Å Ω 豈"),
        ("a\u0323\u0307 s\u0323\u0307", "ạ̇ ṩ"),
        ("\u09c7\u09be", "\u09cb"),
        ("\ufe8d\ufedf\ufecc", "الع"),
        ("x\ud800y", "x\ufffdy"),
        ("½ ² ① ａ", "½ ² ① ａ"),
        ("שׁלום", unicodedata.normalize("NFC", "שׁלום")),
    ],
)
def test_spelling(text: str, right: str) -> None:
    assert normalized(text)[0] == right


@example("\u1112\u1161\u11ab")  # a position within what became one character
@given(st.text(alphabet="abé\u0301\u0323\u00adﬁ한\u1112\u1161\u11ab \n\u212b", max_size=60))
@settings(max_examples=300, deadline=None)
def test_the_original_can_be_had_back(text: str) -> None:
    spelled, edits = normalized(text)
    assert Reading(spelled, [], edits).original(0, len(spelled)) == text
    assert unicodedata.is_normalized("NFC", spelled)
    position = position_map(edits)
    for start in range(len(text) + 1):
        assert 0 <= position(start) <= len(spelled)
    assert position(len(text)) == len(spelled)


def test_many_marks_take_linear_time() -> None:
    start = time.process_time()
    normalized("a" + "\u0301\u0323" * 200_000)
    normalized("e\u0301" * 200_000)
    assert time.process_time() - start < 4
