"""Which reader reads which file: by what its bytes say, and else by its suffix."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import PurePath

from nectar_mlx.documents.archive import Archive
from nectar_mlx.documents.blocks import MAX_CHARACTERS
from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.reading import Document, Unreadable

Reader = Callable[[bytes, str], Document]

_MOST_NESTED = 3  # a mail in a mail in a mail

_TEXTS_NAMES = (
    "txt text md markdown mdx rst log csv tsv json jsonl ndjson geojson yaml yml toml ini cfg conf properties xml tex "
    "bib org adoc asciidoc textile sql diff patch py pyi js mjs cjs ts tsx jsx c h cc cpp cxx hpp hh "
    "cs java kt kts scala go rs rb php pl pm r jl lua swift m mm sh bash zsh fish ps1 bat cmd vb hs ml mli erl ex exs "
    "clj lisp el scm dart f90 f95 asm s css scss less vue svelte cmake gradle make mk dockerfile proto graphql tf nix "
    "zig metal cu cuh opencl glsl wgsl hlsl"
)
_TEXTS = tuple(_TEXTS_NAMES.split())
_KINDS = {
    "a picture": "gif heic heif svg ico psd ai eps raw cr2 nef dng avif",
    "sound": "mp3 wav flac ogg m4a aac wma aiff mid opus",
    "a film": "mp4 mov avi mkv webm wmv m4v mpg mpeg",
    "an archive, whose files are not read": "zip tar gz tgz bz2 xz 7z rar zst dmg iso jar",
    "a program": "exe dll so dylib o a class pyc bin app msi deb rpm wasm",
    "data of another program": "db sqlite sqlite3 parquet npy npz pkl pt safetensors gguf h5 hdf5 mat",
    "a font": "ttf otf woff woff2",
}
_OTHER = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}
_HINTS = {
    "doc": "an old Word file; save it as .docx",
    "xls": "an old Excel file; save it as .xlsx",
    "ppt": "an old PowerPoint file; save it as .pptx",
    "msg": "an Outlook mail; save it as .eml",
    "pages": "an Apple Pages file; export it as .docx",
    "numbers": "an Apple Numbers file; export it as .xlsx",
    "key": "an Apple Keynote file; export it as .pptx",
    "mobi": "a Kindle e-book; convert it to .epub",
    "azw3": "a Kindle e-book; convert it to .epub",
    "azw": "a Kindle e-book; convert it to .epub",
    "kfx": "a Kindle e-book; convert it to .epub",
    "pst": "an Outlook mailbox; export its mails as .eml or .mbox",
    "one": "a OneNote file; export it as .pdf or .docx",
    "wpd": "a WordPerfect file; save it as .docx",
    "wps": "a Works file; save it as .docx",
    "pub": "a Publisher file; export it as .pdf",
    "vsd": "a Visio drawing; export it as .pdf",
    "vsdx": "a Visio drawing; export it as .pdf",
    "xps": "an XPS file; convert it to .pdf",
    "ps": "a PostScript file; convert it to .pdf",
    "xlsb": "a binary Excel file; save it as .xlsx",
    "djvu": "a DjVu file; convert it to .pdf",
    "nectar": "a text that is fitted already; `nectar ask` takes it",
}


def _lazy(module: str, function: str) -> Reader:
    """A reader whose module, and what that imports, is loaded when it is first needed."""

    def read(data: bytes, name: str) -> Document:
        reader: Reader = getattr(import_module(f"nectar_mlx.documents.{module}"), function)
        return reader(data, name)

    return read


def read_text(data: bytes, name: str) -> Document:
    """A text of any kind, as it is. What is empty at its ends is no part of it: editors add and remove it."""
    text, left_out = decode(data)
    return Document("text", text.lstrip("\n").rstrip(), left_out=left_out)


@dataclass
class _Room:
    """What may still be read of the documents in one file: characters, and documents, directly in it and deeper."""

    characters: int = MAX_CHARACTERS
    documents: list[int] = field(default_factory=lambda: [10_000, 200])

    def read(self, data: bytes, name: str, depth: int) -> Document:
        self.documents[depth > 1] -= 1
        if self.documents[depth > 1] < 0 or self.characters < 0:
            raise Unreadable("too much in one file")
        document = parse(data, name, depth=depth, room=self)
        self.characters -= len(document.text)
        if self.characters < 0:
            raise Unreadable(f"more than {MAX_CHARACTERS:,} characters with what is before it")
        return document


def _holder(module: str, function: str, depth: int, room: _Room) -> Reader:
    """A reader of what may hold other documents."""

    def read(data: bytes, name: str) -> Document:
        reader = getattr(import_module(f"nectar_mlx.documents.{module}"), function)
        document: Document = reader(data, name, inner=lambda data, name: room.read(data, name, depth + 1))
        return document

    return read


READERS: dict[str, Reader] = {
    **dict.fromkeys(_TEXTS, read_text),
    **dict.fromkeys(("html", "htm", "xhtml", "xht"), _lazy("html", "read_html")),
    "epub": _lazy("epub", "read_epub"),
    **dict.fromkeys(("pptx", "pptm", "ppsx", "potx"), _lazy("slides", "read_pptx")),
    **dict.fromkeys(("xlsx", "xlsm", "xltx"), _lazy("sheets", "read_xlsx")),
    **dict.fromkeys(
        ("odt", "ods", "odp", "ott", "ots", "otp", "fodt", "fods", "fodp"), _lazy("opendocument", "read_opendocument")
    ),
    "rtf": _lazy("rtf", "read_rtf"),
    "pdf": _lazy("pdf", "read_pdf"),
    "ipynb": _lazy("notebook", "read_notebook"),
    "webarchive": _lazy("html", "read_webarchive"),
    "fb2": _lazy("fictionbook", "read_fictionbook"),
    **dict.fromkeys(("vcf", "ics", "ical", "ifb"), _lazy("cards", "read_cards")),
    **dict.fromkeys(("srt", "vtt"), _lazy("subtitles", "read_subtitles")),
    **dict.fromkeys(("png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp"), _lazy("ocr", "read_picture")),
}
_MAILS = {
    **dict.fromkeys(("eml", "mht", "mhtml"), ("mail", "read_mail")),
    **dict.fromkeys(("mbox", "mbx"), ("mail", "read_mbox")),
    "emlx": ("mail", "read_emlx"),
}
_HOLDERS = {**_MAILS, **dict.fromkeys(("docx", "docm", "dotx", "dotm"), ("word", "read_docx"))}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(data: bytes, name: str, *, depth: int = 0, room: _Room | None = None) -> Document:
    """The document that these bytes are.

    Args:
        data: the bytes of a file.
        name: its name, whose suffix decides where the bytes do not.
        depth: in how many other files this one lies.
        room: what may still be read of documents in the outermost of them.

    Raises:
        Unreadable: with the reason, in one line.
    """
    if not data:
        raise Unreadable("the file is empty")
    if depth > _MOST_NESTED:
        raise Unreadable("attached too deep")
    suffix = PurePath(name).suffix.lower().removeprefix(".")
    reader = _reader(data, suffix, partial(_holder, depth=depth, room=_Room() if room is None else room))
    try:
        document = reader(data, name)
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable("nested too deep") from error
    except MemoryError as error:
        raise Unreadable("too large for this machine's memory") from error
    except Exception as error:  # parsers raise anything at all on damaged files
        raise Unreadable(f"a damaged {suffix.upper() or 'file'} ({type(error).__name__})") from error
    if len(document.text) > MAX_CHARACTERS:
        raise Unreadable(f"more than {MAX_CHARACTERS:,} characters")
    document.text = _LONE_SURROGATE.sub("\ufffd", document.text)
    if not document.text.strip():
        raise Unreadable("; ".join(["there is no text in it", *document.left_out[:3]]))
    return document


def needs_process(data: bytes, name: str) -> bool:
    """Whether a reader in C will see the bytes of a file whose maker may want it to hang or crash."""
    suffix = PurePath(name).suffix.lower().removeprefix(".")
    return _is_pdf(data) or suffix == "pdf" or (suffix in _MAILS and b"pdf" in data.lower())


def _is_pdf(data: bytes) -> bool:
    return re.search(rb"\A[^%]{0,1000}%PDF-", data[:1024]) is not None


def _reader(data: bytes, suffix: str, holder: Callable[[str, str], Reader]) -> Reader:
    suffix = _by_content(data, suffix) or suffix
    if suffix in _HOLDERS:
        return holder(*_HOLDERS[suffix])
    if suffix in READERS:
        return READERS[suffix]
    if suffix in _HINTS or suffix in _OTHER:
        raise Unreadable(_HINTS.get(suffix) or _OTHER[suffix])
    if re.match(rb"From \S+.*\d{4}\s*\n[\w-]+: ", data[:1000]):
        return holder("mail", "read_mbox")
    return _unknown


def _unknown(data: bytes, name: str) -> Document:
    try:
        return read_text(data, name)
    except Unreadable as error:
        raise Unreadable(f"{error}; its kind is not known") from error


def _by_content(data: bytes, suffix: str) -> str:
    """The suffix that the first bytes stand for, whatever the file is called; empty if they do not tell."""
    if _is_pdf(data):
        return "pdf"
    if data.startswith(b"{\\rtf"):
        return "rtf"
    if data.startswith(b"\x78\x9f\x3e\x22"):
        raise Unreadable("what Outlook packs attachments in (TNEF)")
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        # Office stores a file with a password in the old container.
        if b"E\0n\0c\0r\0y\0p\0t\0e\0d\0P\0a\0c\0k\0a\0g\0e" in data:
            raise Unreadable("the file is encrypted; save a copy without its password")
        raise Unreadable(_HINTS.get(suffix, "a file of an old Office program; save it in a new format"))
    return _zipped(data, suffix) if data.startswith(b"PK\x03\x04") else ""


def _zipped(data: bytes, suffix: str) -> str:
    try:
        names = {name.casefold() for name in Archive(data, "zip").names()}
    except Unreadable:
        return ""
    marks = {
        "word/document.xml": "docx",
        "ppt/presentation.xml": "pptx",
        "xl/workbook.xml": "xlsx",
        "content.xml": "odt",
        "meta-inf/container.xml": "epub",
    }
    if suffix in {**READERS, **_HOLDERS} and suffix not in _TEXTS:
        return ""
    return next((marks[name] for name in marks if name in names), "")
