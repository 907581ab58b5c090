"""Words of many languages: what looks alike is alike, and scripts without spaces can be searched."""

import unicodedata

import pytest

from nectar_mlx.core.words import words


def test_words_are_lower_case_without_punctuation():
    assert words("Who's ANNA -- \u201cVelde\u201d?") == ["who", "s", "anna", "velde"]
    assert words("snake_case, 3.14 and x²") == ["snake_case", "3", "14", "and", "x2"]


def test_phrases_are_words_in_a_row():
    assert words("to be or", phrase=2) == ["to", "be", "or", "to be", "be or"]


@pytest.mark.parametrize(
    "first, second",
    [
        ("ﬁnd oﬃce", "FIND OFFICE"),
        ("Straße", "STRASSE"),
        ("ＡＢＣ１", "abc1"),
        ("ﾊﾟｽ", "パス"),
        ("İstanbul", "istanbul"),
        ("co\u00adoperate", "cooperate"),
        ("م\u064fح\u064eم\u0651\u064eد كت\u0640اب", "محمد كتاب"),
        ("ש\u05c1\u05b8לו\u05b9ם", "שלום"),
        ("ΣΙΣΥΦΟΣ", "σισυφος"),
        ("٤٢ ๔๒ ४२", "42 42 42"),
    ],
)
def test_texts_that_mean_the_same_have_the_same_words(first, second):
    assert words(first) == words(second)


@pytest.mark.parametrize(
    "text",
    ["café", "İ\u0307x", "한국어", "パスワード", "ệ\u0302 ऩ"],
)
def test_decomposed_text_equals_composed(text):
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text)) != []


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("玉清门", "昨天玉清门关了。"),
        ("室戸山", "私は室戸山に登った。"),
        ("น้ำตก", "เราไปน้ำตกด้วยกัน"),
        ("ວຽງ", "ນະຄອນວຽງຈັນ"),
        ("អង្គរ", "ប្រាសាទអង្គរវត្ត"),
        ("ရန်ကုန်", "မြို့ရန်ကုန်တွင်"),
        ("서울역", "서울역에서"),
    ],
)
def test_a_name_is_found_within_a_clause_without_spaces(name, sentence):
    assert set(words(name)) <= set(words(sentence)) and len(words(sentence)) > 1


def test_marks_belong_to_their_letters():
    assert words("हिन्दी में") == ["हिन्दी", "में"]


def test_a_single_character_is_a_word_and_other_scripts_end_a_run():
    assert words("猫") == ["猫"]
    assert words("私は2024年にAPIを") == ["私は", "2024", "年に", "api", "を"]


@pytest.mark.parametrize("text", ["", " \n", "\u0301\u0301", "\ud800x", "\u200b\u200b", "\ufdfa" * 9])
def test_odd_texts_do_no_harm(text):
    assert all(word.strip() for word in words(text))
