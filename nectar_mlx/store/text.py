"""The text that a file stands for: its token ids hold it, and what they lose is kept beside them in the report."""

from collections.abc import Sequence

from ..core.types import JsonObject, Tokenizer
from ..documents import Reading, record
from ..errors import NectarError
from ..mlxlm import prompts

KEYS = ("files", "packed_files", "edits", "text")  # of a report, that tell of the documents


def keep(reading: Reading, tokenizer: Tokenizer, prefix: Sequence[int]) -> JsonObject:
    """What a file's report holds of the documents it was fitted to: KEYS, of them `text` where the tokenizer does not
    give back what it encoded."""
    document = prompts.document(tokenizer, prefix)
    if reading.text.startswith(whole := document.rstrip("\ufffd")):  # cut within a character
        return record.record(reading.cut(len(whole)), characters=len(document))
    _, spans = prompts.located(tokenizer, reading.text)
    read = reading.cut(max((end for _, end in spans[: len(prefix)]), default=len(reading.text)))
    return record.record(read, characters=len(document)) | {"text": record.packed(read.text)}


def kept(report: JsonObject, tokenizer: Tokenizer, prefix: Sequence[int], *, name: str) -> Reading:
    """The text with its files, places and edits. name: of the document, where the report tells of none.

    NectarError if what the report holds is damaged.
    """
    try:
        document = prompts.document(tokenizer, prefix)
        text = record.unpacked(report["text"], characters=len(document)) if "text" in report else document
        return record.restored(text, report, name=name, characters=len(document))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NectarError(f"the file is damaged: its list of documents is none ({error})") from None
