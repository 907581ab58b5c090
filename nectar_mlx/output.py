"""Before a .nectar is written: whether that would replace another fit, which may have taken hours."""

import json
from collections.abc import Mapping
from pathlib import Path

from . import store
from .core import terminal
from .core.types import JsonObject
from .documents import record
from .errors import NectarError

_CHARACTERS = 16  # of a token, on average, at most


def check(path: Path, force: bool, fit: Mapping[str, object], files: object = None) -> None:
    """Asks before a .nectar is replaced by a different one. A fit of the same text, by the same model, with the same
    settings may always be made again.

    Args:
        path: where the file will be written.
        force: replace it whatever it holds.
        fit: what the new file's metadata will say, as far as it is known: `model`, `config`; `adapter`, its path or "";
            `with`, the digests of other files that were in view.
        files: what its report will say of the files that were read, `Reading.as_list()`.

    NectarError if the answer is no, or if there is no terminal to ask at.
    """
    if force or not path.exists():
        return
    held = _held(path)
    wanted = json.loads(json.dumps(fit))
    if _names(held.get("files")) == _names(files) and {name: held.get(name) for name in wanted} == wanted:
        return
    what = f"{held['tokens']:,} tokens of {held['source'] or 'a text'}, by {held['model']}" if held else "a damaged fit"
    advice = "--force replaces it, --output writes elsewhere"
    if not terminal.confirm(f"{path} holds another fit ({what}). Replace it?", otherwise=advice):
        raise NectarError(f"{path} is kept: {advice}")


def _names(files: object) -> list[object]:
    """Names and sizes of files that were read: what of them is in the text depends on where it was cut."""
    return [(file.get("name"), file.get("characters")) for file in files] if isinstance(files, list) else []


def _held(path: Path) -> JsonObject:
    """The metadata of a file, with its files and tokens; empty for a damaged one."""
    try:
        tensors, metadata = store.read(path)
    except NectarError:
        return {}
    try:
        files = record.listed(metadata["report"], characters=_CHARACTERS * tensors["prefix"].size)
    except (TypeError, ValueError):
        return {}
    adapter = metadata.get("adapter", {}).get("path", "")
    return {"source": "", "with": [], **metadata, "adapter": adapter, "files": files, "tokens": tensors["prefix"].size}
