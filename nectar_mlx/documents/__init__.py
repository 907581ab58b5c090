"""Documents as text: txt, md, html, epub, docx and pdf, one or many, files and folders."""

import codecs
import importlib.util
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nectar_mlx.documents import markup
from nectar_mlx.errors import NectarError

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_READ = "txt, md, html, epub, docx and pdf (on macOS `textutil -convert txt FILE` makes a txt of doc, rtf and odt)"


def read(paths: Sequence[str | Path]) -> str:
    """The text of documents, in the order given; a folder stands for the documents in it, sorted by path.

    A path "-" is standard input. Several documents get their names as headings. Raises NectarError, in one line, for a
    document that is missing, empty, or has no readable text.
    """
    documents = [(name, load()) for path in paths for name, load in _documents(path)]
    if not documents:
        raise NectarError("no document was given")
    if len(documents) == 1:
        return documents[0][1]
    return "\n\n".join(f"# {name}\n\n{text}" for name, text in documents)


def _documents(path: str | Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The name of each document at a path, and a function that reads it."""
    if str(path) == "-":
        yield "standard input", lambda: _parsed("standard input", ".txt", sys.stdin.buffer.read())
        return
    path = Path(path).expanduser()
    if not path.is_dir():
        yield path.name, lambda: _read_file(path)
        return
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in _PARSERS]
    files = [file for file in files if not any(name.startswith(".") for name in file.relative_to(path).parts)]
    if not files:
        raise NectarError(f"{path}: the folder holds no document; nectar reads {_READ}")
    for file in files:
        yield str(file.relative_to(path)), lambda file=file: _read_file(file)  # type: ignore[misc]


def _read_file(path: Path) -> str:
    try:
        return _parsed(str(path), path.suffix.lower(), path.read_bytes())
    except FileNotFoundError as error:
        raise NectarError(f"{path}: no such file or folder") from error
    except OSError as error:
        raise NectarError(f"{path}: cannot be read ({error.strerror})") from error


def _parsed(name: str, suffix: str, data: bytes) -> str:
    if not data:
        raise NectarError(f"{name}: the file is empty")
    try:
        text = _PARSERS.get(suffix, _pdf if data.startswith(b"%PDF-") else _plain)(data)
    except markup.Unreadable as error:
        raise NectarError(f"{name}: {error}") from error
    if not text.strip():
        raise NectarError(f"{name}: there is no text in it")
    return text


def _plain(data: bytes) -> str:
    text = decode(data)
    if text.startswith("{\\rtf"):
        raise markup.Unreadable(f"an RTF file; nectar reads {_READ}")
    return text.strip("\n")


def decode(data: bytes) -> str:
    """Text in its byte order mark's encoding, UTF-8, or else the likeliest legacy encoding, with plain newlines.

    Raises markup.Unreadable for what is not text.
    """
    marked = next((encoding for bom, encoding in _BOMS.items() if data.startswith(bom)), None)
    try:
        text = data.decode(marked or "utf-8")
    except UnicodeDecodeError as error:
        if marked or b"\0" in data:
            raise markup.Unreadable(f"not a text file; nectar reads {_READ}") from error
        text = _decode_legacy(data)
    if len(_CONTROLS.findall(text)) > len(text) // 200:
        raise markup.Unreadable(f"not a text file; nectar reads {_READ}")
    return re.sub(r"\r\n?|\x0c", "\n", text)


def _decode_legacy(data: bytes) -> str:
    encoding = "cp1252"
    # A few high bytes are accents of western languages, which detectors confuse; many are another script.
    if sum(byte >= 0x80 for byte in data) > len(data) // 4 and importlib.util.find_spec("charset_normalizer"):
        import charset_normalizer

        scripts = ["cp1251", "koi8_r", "cp1253", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr"]
        best = charset_normalizer.from_bytes(data, cp_isolation=scripts).best()
        encoding = best.encoding if best else encoding
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise markup.Unreadable("text in an unknown encoding; save it as UTF-8") from error


def _html(data: bytes) -> str:
    declared = re.search(
        rb"<(?:meta[^>]+charset|\?xml[^>]+encoding)\s*=\s*[\"']?\s*([\w-]+)", data[:2048], re.IGNORECASE
    )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        if declared and not any(data.startswith(bom) for bom in _BOMS):
            try:
                return markup.html_text(data.decode(declared[1].decode(), errors="replace"))
            except LookupError:
                pass
    return markup.html_text(decode(data))


def _pdf(data: bytes) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise markup.Unreadable("the PDF is encrypted; save a copy without its password")
        pages = [page.extract_text() for page in reader.pages]
    except markup.Unreadable:
        raise
    except pypdf.errors.DependencyError as error:
        raise markup.Unreadable("the PDF is encrypted; save a copy without encryption") from error
    except Exception as error:  # pypdf raises anything at all on a damaged file
        raise markup.Unreadable(f"a damaged PDF ({type(error).__name__})") from error
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise markup.Unreadable("the PDF holds no text, only pictures of it; run text recognition (OCR) on it first")
    return _unwrapped(text)


def _unwrapped(text: str) -> str:
    """Lines that a page's width broke, joined: at a hyphen between small letters, and before a small letter."""
    text = re.sub(r"(?<=[^\W\d_])[-\u00ad]\n(?=[^\W\d_A-Z])", "", text)
    return re.sub(r" *\n(?=[^\W\d_A-Z])", lambda match: " ", text)


_PARSERS: dict[str, Callable[[bytes], str]] = {
    **dict.fromkeys((".txt", ".md", ".markdown", ".rst"), _plain),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _html),
    ".epub": markup.epub_text,
    ".docx": markup.docx_text,
    ".pdf": _pdf,
}
