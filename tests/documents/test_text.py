"""Plain text in every encoding, and what is no text."""

import io
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nectar_mlx import documents
from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.reading import Unreadable
from tests.documents.makers import FOX, refusal, text_of, write

FRENCH = "Le garçon élève où l'été naît — «déjà vu», cœur, naïve façade.\n"
RUSSIAN = "Привет, мир! Это обычный русский текст, написанный давно. "


def test_is_kept(tmp_path: Path) -> None:
    text = "# Title\n\n- a\n- b\n\n| x | y |\n\n    code"
    assert text_of(write(tmp_path / "a.md", text)) == text


def test_what_is_empty_at_its_ends_is_no_part_of_it(tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "a.txt", "\n\n  indented\n\nlast  \n \t\n")) == "  indented\n\nlast"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "utf-16-le"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "a.txt", (FRENCH * 5).encode(encoding))) == (FRENCH * 5).strip()


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN * 4, "cp1251"),
        (RUSSIAN * 4, "koi8_r"),
        ("これは日本語の文章です。古い文字コードで保存されています。" * 4, "shift_jis"),
        ("这是一个普通的中文句子，用旧的编码保存。天气很好，我们去公园。" * 4, "gb18030"),
        ("이것은 오래된 문자 코드로 저장된 평범한 한국어 문장입니다. " * 4, "euc_kr"),
        ("Zażółć gęślą jaźń. Dziś będzie ładna pogoda, więc pójdziemy do parku. " * 4, "cp1250"),
        ("Bu eski bir kodlamada yazılmış sıradan bir Türkçe metindir, değil mi? " * 4, "cp1254"),
        ("Die Müller fährt über die Straße, größer als äußerst schön, für 12 €.", "cp1252"),
        ("café", "cp1252"),
    ],
)
def test_legacy_encodings(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == (text, [])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("line", "encoding"),
    [("これは日本語の文章です。\n", "shift_jis"), ("天氣很好，我們去公園。這是一個句子。\n", "big5")],
)
def test_a_long_legacy_text(line: str, encoding: str, shift: int) -> None:
    text = "a" * shift + line * 6000
    assert decode(text.encode(encoding))[0] == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ((FRENCH * 50).encode() + b"\xe9\n", FRENCH * 50 + "\ufffd\n"),
        ((FRENCH * 50).encode()[:-60] + b"\xc3", (FRENCH * 50).encode()[:-60].decode() + "\ufffd"),
        (b"one arrow \xe2\x86\x92, one emoji \xf0\x9f\x99\x82, caf\xe9\n", "one arrow →, one emoji 🙂, caf\ufffd\n"),
        ((RUSSIAN * 50).encode() + b"\xff\n", RUSSIAN * 50 + "\ufffd\n"),
        ("漢字かな".encode() + b"\x80 " + "漢字かな".encode(), "漢字かな\ufffd 漢字かな"),
    ],
)
def test_a_wrong_byte_spoils_nothing_else(data: bytes, text: str) -> None:
    assert decode(data) == (text, ["1 character that is not valid UTF-8"])


@pytest.mark.parametrize("bom", [b"\xff\xfe", b"\xfe\xff"])
def test_byte_order(bom: bytes) -> None:
    encoding = "utf-16-le" if bom == b"\xff\xfe" else "utf-16-be"
    assert decode(bom + "é1".encode(encoding))[0] == "é1"


def test_newlines() -> None:
    assert decode(b"a\r\nb\rc\nd\x0ce")[0] == "a\nb\nc\nd\ne"


@pytest.mark.parametrize(
    "declared", ["no-such", "hex", "utf-7", "base64", "idna", "a\0b", "undefined", "rot13", "unicode_escape"]
)
def test_a_declared_encoding_that_is_none(declared: str) -> None:
    assert decode(b"caf\xe9", declared=declared)[0] == "café"


def test_an_unknown_suffix_may_be_text(tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "notes.xyz", FOX)) == FOX
    assert text_of(write(tmp_path / "README", FOX)) == FOX


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve".encode())))
    assert documents.read(["-"]).text == "naïve"
    assert "standard input: the file is empty" in refusal("-")


@pytest.mark.parametrize(
    "data", [b"\x7fELF\x02\x01\x01" + bytes(200), b"\x89PNG\r\n\x1a\n\x00\x00", bytes(range(256)) * 4]
)
@pytest.mark.parametrize("name", ["a.txt", "a.xyz", "a"])
def test_binary_data_is_no_text(name: str, data: bytes, tmp_path: Path) -> None:
    assert "not a text file" in refusal(write(tmp_path / name, data))


@pytest.mark.parametrize("data", [b"\xff\xfea", b"\xef\xbb\xbf\xff", b"\xff\xfe\x00\xd8"])
def test_a_mark_that_lies(data: bytes, tmp_path: Path) -> None:
    assert "not a text file" in refusal(write(tmp_path / "a.txt", data))


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
@pytest.mark.parametrize("suffix", ["txt", "html", "csv", "json"])
def test_nothing_in_it(suffix: str, content: str, tmp_path: Path) -> None:
    reason = refusal(write(tmp_path / f"a.{suffix}", content))
    assert "the file is empty" in reason or "there is no text in it" in reason


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_text_or_refused(data: bytes) -> None:
    try:
        assert isinstance(decode(data)[0], str)
    except Unreadable as error:
        assert "\n" not in str(error)
