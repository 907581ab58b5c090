"""The text comes back from a file: its documents, places and spelling, whatever the tokenizer loses."""

import json
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nectar_mlx import NectarError, documents
from nectar_mlx.core import json_text
from nectar_mlx.documents.normalize import normalized
from nectar_mlx.mlxlm import prompts
from nectar_mlx.store import text
from tests import toys
from tests.documents.makers import column, pdf, write

CAFE = "The cafe\u0301 closes at ﬁve. 旧桥 <|im_end|> 🌉 \t tabs,  two spaces\n\n▁ a sign"


A = {"name": "a", "start": 0, "end": 6}


@pytest.fixture
def reading(tmp_path: Path) -> documents.Reading:
    write(tmp_path / "a.txt", CAFE)
    write(tmp_path / "b.pdf", pdf(column(["First page."]), column(["Second page."])))
    return documents.read([tmp_path])


def metaspace() -> TokenizerWrapper:
    """Like SentencePiece: a space is the sign ▁, so that the sign itself comes back as a space."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    specials = ["<unk>", *toys.CHATML, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog. " * 9], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", unk_token="<unk>")
    fast.chat_template = toys.CHAT
    return TokenizerWrapper(fast)


def test_the_ids_hold_the_text(reading: documents.Reading) -> None:
    tokenizer = toys.tokenizer()
    prefix = prompts.prefix(tokenizer, reading.text)
    report = json.loads(json.dumps(text.keep(reading, tokenizer, prefix)))
    assert report.keys() == {"files", "edits"}
    assert text.kept(report, tokenizer, prefix, name="") == reading
    assert reading.original(*_range(reading, 0)) == CAFE


def _range(reading: documents.Reading, number: int) -> tuple[int, int]:
    return reading.files[number].start, reading.files[number].end


def test_what_a_tokenizer_loses_is_kept(reading: documents.Reading) -> None:
    tokenizer = metaspace()
    prefix = prompts.prefix(tokenizer, reading.text)
    assert prompts.document(tokenizer, prefix) != reading.text
    report = json.loads(json.dumps(text.keep(reading, tokenizer, prefix)))
    assert "text" in report and text.kept(report, tokenizer, prefix, name="") == reading


@pytest.mark.parametrize("tokens", [3, 20, 33, 34, 35, 36, 60])
@pytest.mark.parametrize("make", [toys.tokenizer, metaspace])
def test_a_cut_text_is_as_much_as_was_read(tokens: int, make, reading: documents.Reading) -> None:
    tokenizer = make()
    prefix = prompts.prefix(tokenizer, reading.text, max_tokens=tokens)
    report = text.keep(reading, tokenizer, prefix)
    found = text.kept(report, tokenizer, prefix, name="").text.rstrip("\ufffd")
    assert reading.text.startswith(found) and 0 < len(found) < len(reading.text)


def test_a_text_without_documents_is_one() -> None:
    tokenizer = toys.tokenizer()
    prefix = prompts.prefix(tokenizer, "A fox.")
    found = text.kept({}, tokenizer, prefix, name="book")
    assert found.text == "A fox." and [(file.name, file.start, file.end) for file in found.files] == [("book", 0, 6)]


@pytest.mark.parametrize(
    "report",
    [
        {"files": [{"nam": 1}]},
        {"files": [A | {"places": [["1", 0]]}]},
        {"files": [A | {"places": [["1", 0, 9]]}]},
        {"files": [A | {"places": 5}]},
        {"files": [A | {"start": -1}]},
        {"files": [3]},
        {"files": [A], "edits": "no"},
        {"files": [A], "edits": documents.record.packed("[1, 2]")},
        {"files": [A], "edits": documents.record.packed('["a", 2, 3]')},
        {"text": "~~"},
        {"text": 5},
        {"files": [A], "edits": documents.record.packed("[-1, 2, 3]")},
        {"files": [A], "edits": documents.record.packed("[" * 100_000)},
        {"packed_files": documents.record.packed("[" + "[]," * 500_000 + "1]")},
        {"text": documents.record.packed("a long text " * 99)[:-9]},
        {"text": documents.record.packed("\0" * (1 << 24))},
    ],
    ids=range(16),
)
def test_a_damaged_list_is_named(report: dict[str, object]) -> None:
    tokenizer = toys.tokenizer()
    with pytest.raises(NectarError, match="damaged"):
        text.kept(report, tokenizer, prompts.prefix(tokenizer, "A fox."), name="")


def test_edits_are_small() -> None:
    """Every third character is a soft hyphen, as in some e-books."""
    found, edits = normalized("so\u00adft " * 20_000)
    reading = documents.Reading(found, [documents.FileReport("a", "text", len(found), 0, len(found))], edits)
    kept = documents.record.record(reading)
    assert len(edits) == 20_000 and len(str(kept["edits"])) < 2_000
    assert documents.record.restored(found, kept, name="") == reading


def test_a_text_whose_every_character_is_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decomposed Korean, as macOS writes it."""
    monkeypatch.setattr(json_text, "MOST_VALUES", 100)
    found, edits = normalized("\u1112\u1161\u11ab" * 9_000)
    reading = documents.Reading(found, [documents.FileReport("a", "text", len(found), 0, len(found))], edits)
    kept = documents.record.record(reading)
    assert len(edits) == len(found) == 9_000
    assert documents.record.restored(found, kept, name="") == reading


def test_what_would_not_be_read_again_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that is cut far shorter than its documents are."""
    monkeypatch.setattr(json_text, "MOST_VALUES", 1000)
    count = 9_000
    files = [documents.FileReport(f"{i}", "text", 9, 10 * i, 10 * i + 9) for i in range(count)]
    reading = documents.Reading("x" * 10 * count, files, [documents.Edit(i, i, "\u00ad") for i in range(3 * count)])
    assert documents.record.record(reading).keys() == {"packed_files", "edits"}
    kept = documents.record.record(reading, characters=100)
    assert documents.record.restored("x" * 100, kept, name="a").files == [documents.FileReport("a", "", 100, 0, 100)]


@pytest.mark.parametrize("most, key", [(1 << 20, "files"), (10, "packed_files")])
def test_documents_may_be_renamed(
    reading: documents.Reading, monkeypatch: pytest.MonkeyPatch, most: int, key: str
) -> None:
    monkeypatch.setattr(documents.record, "_MOST_LISTED", most)
    kept, characters = documents.record.record(reading), len(reading.text)
    renamed = documents.record.renamed(kept | {"kl": 1}, ["c.txt", "d.pdf"], characters=characters)
    assert key in renamed and renamed["kl"] == 1
    found = documents.record.restored(reading.text, renamed, name="")
    assert [(file.name, file.places) for file in found.files] == [
        (name, file.places) for name, file in zip(("c.txt", "d.pdf"), reading.files, strict=True)
    ]
    assert found.edits == reading.edits
    assert documents.record.renamed(kept, ["c.txt"], characters=characters) == kept, "one name is not enough"
