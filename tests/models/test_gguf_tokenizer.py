"""Tokenizers built from GGUF give the ids of those that their models were published with."""

import io
import json
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import normalizers

from nectar_mlx import NectarError, models
from nectar_mlx.models import gguf_tokenizer
from nectar_mlx.models.gguf_tokenizer import SPLITS
from tests.models.test_gguf import TEXT, toy_model, train_byte_level, write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path / "cache"))


def build(metadata: dict[str, Any]) -> Any:
    settings = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return gguf_tokenizer.build(Path("toy.gguf"), {"general.architecture": "llama"} | settings)


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_byte_level_tokenizers_agree_with_their_source(pre: str, tmp_path: Path) -> None:
    source = train_byte_level(SPLITS[pre])
    if "qwen" in pre:
        source.normalizer = normalizers.NFC()
    write_gguf(tmp_path / "toy.gguf", toy_model("llama", source.get_vocab_size()), source, pre=pre)
    _, loaded = models.load(str(tmp_path / "toy.gguf"))
    for text in (TEXT, "", " ", "\n\n\n x", "e\u0301 12345", "<|im_start|>user\nhi<|im_end|>"):
        assert loaded.encode(text) == source.encode(text).ids
        assert loaded.decode(loaded.encode(text)) == (normalizers.NFC().normalize_str(text) if "qwen" in pre else text)
    assert loaded.bos_token_id == 1 and loaded.eos_token_ids == {2}
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi<|im_end|>"


def test_sentencepiece_agrees_with_its_library() -> None:
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 10),
        model_writer=trained,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    loaded = build(sentencepiece_metadata(oracle))
    for text in (TEXT, "The lazy fox", "  two  spaces ", "unseen ☃ zebra", "x"):
        assert loaded.encode(text) == [oracle.bos_id(), *oracle.encode(text)]
        assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text


def sentencepiece_metadata(processor: Any) -> dict[str, Any]:
    def kind(i: int) -> int:
        if processor.is_unknown(i):
            return UNKNOWN
        return CONTROL if processor.is_control(i) else BYTE if processor.is_byte(i) else NORMAL

    ids = range(processor.vocab_size())
    return {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": [kind(i) for i in ids],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
    }


def gemma_metadata() -> dict[str, Any]:
    """As llama.cpp writes Gemma's: user-defined pieces with spaces and a score of their own, no space prefix."""
    kinds = {
        CONTROL: ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"],
        USER_DEFINED: ["\n", "\n\n", "  ", "   ", "    ", "<b>"],
        BYTE: [f"<0x{byte:02X}>" for byte in range(256)],
        NORMAL: ["▁a", "ab", "▁", "a", "b", "<", ">"],
    }
    scores = {CONTROL: -1000.0, USER_DEFINED: -1000.0, BYTE: 0.0}
    pieces = [(piece, kind) for kind, of in kinds.items() for piece in of]
    return {
        "model": "llama",
        "tokens": [piece for piece, _ in pieces],
        "token_type": [kind for _, kind in pieces],
        "scores": [scores.get(kind, -float(number)) for number, (_, kind) in enumerate(pieces)],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "padding_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": False,
    }


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("a b", ["a", "▁", "b"]),  # nothing in front
        (" a", ["▁a"]),
        ("a  b", ["a", "▁▁", "b"]),
        (" " * 5, ["▁▁▁▁", "▁"]),  # the longest first: two and three would do as well
        (" " * 7 + "a", ["▁▁▁▁", "▁▁▁", "a"]),  # before ▁a, whose score in the file is the better one
        ("a\n\n\nb", ["a", "\n\n", "\n", "b"]),
        ("<b>ab</b>", ["<b>", "ab", "<", "<0x2F>", "b", ">"]),
        ("<start_of_turn>a", ["<start_of_turn>", "a"]),
        ("▁▁", ["▁▁"]),
        ("é<0x0A>", ["<0xC3>", "<0xA9>", "<", "<0x30>", "<0x78>", "<0x30>", "<0x41>", ">"]),
    ],
)
def test_user_defined_pieces_of_sentencepiece(text: str, pieces: list[str]) -> None:
    tokenizer = build(gemma_metadata())
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == ["<bos>", *pieces]
    if "▁" not in text:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("pre, expected", [("llama-bpe", ["однако"]), ("qwen2", list("однако"))])
def test_llama_3_takes_a_known_word_whole(pre: str, expected: list[str]) -> None:
    """Whether its merges lead there or not."""
    letters = [train_byte_level(SPLITS["gpt-2"]).pre_tokenizer.pre_tokenize_str(c)[0][0] for c in "однак"]
    tokens = [*sorted(set("".join(letters))), *letters, "".join(letters[i] for i in (0, 1, 2, 3, 4, 0))]
    merges = [f"{letter[0]} {letter[1]}" for letter in letters]
    tokenizer = build({"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "add_bos_token": False})
    assert [tokenizer.decode([i]) for i in tokenizer.encode("однако")] == expected


def test_a_file_without_the_bos_that_it_adds() -> None:
    metadata = gemma_metadata()
    del metadata["bos_token_id"]
    with pytest.raises(NectarError, match=r"toy\.gguf: its tokenizer is damaged") as error:
        build(metadata)
    assert "\n" not in str(error.value)


def test_transformers_does_not_take_it_for_an_early_mistrals(tmp_path: Path) -> None:
    """Of a large tokenizer beside a config.json of unknown origin, many versions say that its splits are wrong."""
    source = train_byte_level(SPLITS["gpt-2"])
    write_gguf(tmp_path / "toy.gguf", toy_model("llama", source.get_vocab_size()), source)
    config = json.loads((models.resolve(str(tmp_path / "toy.gguf")).path / "config.json").read_text())
    assert int(config["transformers_version"].split(".")[0]) >= 5


# Ids that the published tokenizer.json of Qwen3 (which has Qwen2.5's vocabulary and more) and Gemma 3 give.
PUBLISHED = {
    "NECTAR_QWEN2_GGUF": {
        "def f(x):\n        return x\n": [750, 282, 2075, 982, 286, 470, 856, 198],
        "We'll see naïve ﬁnds.": [1654, 3278, 1490, 94880, 586, 32495, 70731, 81003, 13],
        "你好，世界": [108386, 3837, 99489],
        "مرحبا بالعالم": [124122, 29825, 124671, 124476, 129634],
        "नमस्ते": [60096, 87244, 78368, 30484, 97, 34370],
        "สวัสดี": [143126, 23271, 125136, 28319],
        "\U0001f469\U0001f3ff\u200d\U0001f680\u2764\ufe0f": [145233, 146530, 378, 235, 145836, 141390, 30543],
        "e\u0301 \ud55c": [963, 61298],
        " \x0c                                 ": [220, 200, 6656],
        "\n\n\n\t\t x": [1406, 298, 856],
        "12345 ٣٤½": [16, 17, 18, 19, 20, 220, 149, 96, 149, 97, 26062],
        "\x00\x1b\u200b\ufeff": [188, 215, 15692, 3225],
        "<b>bold</b>": [33177, 29, 14824, 522, 65, 29],
        "<table>": [20993, 29],
        "<|im_end|>user": [151645, 872],
        "<start_of_turn>user\n<end_of_turn>": [27, 2468, 3575, 37274, 29, 872, 198, 27, 408, 3575, 37274, 29],
        "▁▁ a": [10417, 223, 10417, 223, 264],
        "<0x0A>": [27, 15, 87, 15, 32, 29],
    },
    "NECTAR_GEMMA3_GGUF": {
        "def f(x):\n        return x\n": [2063, 517, 236769, 236781, 1473, 107, 144, 2060, 1123, 107],
        "We'll see naïve ﬁnds.": [1882, 236789, 859, 1460, 120362, 97940, 112383, 236761],
        "你好，世界": [144626, 236900, 12811],
        "مرحبا بالعالم": [236873, 150345, 107602, 17193],
        "नमस्ते": [226767],
        "สวัสดี": [49366],
        "\U0001f469\U0001f3ff\u200d\U0001f680\u2764\ufe0f": [243767, 245445, 237243, 242015, 29602],
        "e\u0301 \ud55c": [236744, 238288, 10601],
        " \x0c                                 ": [236743, 250, 167, 138],
        "\n\n\n\t\t x": [109, 255969, 1123],
        "12345 ٣٤½": [236770, 236778, 236800, 236812, 236810, 223766, 242090, 238612],
        "\x00\x1b\u200b\ufeff": [238, 239473, 237141, 237922],
        "<b>bold</b>": [200, 15640, 209],
        "<table>": [168],
        "<|im_end|>user": [236820, 236909, 548, 236779, 643, 111038, 2364],
        "<start_of_turn>user\n<end_of_turn>": [105, 2364, 107, 106],
        "▁▁ a": [138, 496],
        "<0x0A>": [236820, 236771, 236781, 236771, 236776, 236813],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variable", sorted(PUBLISHED))
def test_real_files_give_the_published_ids(variable: str) -> None:
    if variable not in os.environ:
        pytest.skip(f"set {variable} to the path of such a file")
    file = gguf.GGUFReader(os.environ[variable])
    metadata = {name: field.contents() for name, field in file.fields.items()}
    tokenizer = gguf_tokenizer.build(Path(os.environ[variable]), metadata)
    found = {text: tokenizer.encode(text, add_special_tokens=False) for text in PUBLISHED[variable]}
    assert found == PUBLISHED[variable]
