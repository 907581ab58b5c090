"""Where an interrupted fit leaves its work, and a resumed one finds it: a folder beside the output."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..core.files import write_atomically
from ..errors import NectarError
from ..heads import HeadArrays, Size
from ..store import MEAN_BITS, tensor_file
from .samples.conversation import Conversation

_T = TypeVar("_T")


class Plan(NamedTuple):
    """What each head gets. sizes: of every head. share: bytes kept / bytes of the bf16 KV cache. exponent: the
    divergence falls with so much of a power of the bytes, where that was measured. bits: of a number of a node."""

    sizes: list[Size]
    share: float
    exponent: float | None = None
    bits: float = MEAN_BITS


class Checkpoint:
    """The folder of one fit. With folder=None nothing is kept, and what does not fit in memory goes to a temporary
    folder.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def claim(self, config: dict[str, Any], prefix: Sequence[int]) -> None:
        """Starts or continues the fit of this text with these settings; NectarError if the folder holds another fit."""
        if self.folder is None:
            return
        ids = hashlib.sha256(np.array(prefix, dtype="<i4").data).hexdigest()
        mine = {"config": config, "prefix": ids}
        path = self.folder / "fit.json"
        kept = _read_json(path)
        if kept is None and path.exists():
            self._remove()  # nobody can tell whose fit it is
        elif kept not in (None, json.loads(json.dumps(mine))):
            raise NectarError(
                f"{self.folder} holds a fit with other settings or another text: remove it, or do not --resume"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(path, mine)

    def part(self, name: str) -> "Checkpoint":
        """That of a part of the fit, within this one."""
        return Checkpoint(self.folder and self.folder / name)

    def spill(self) -> Path:
        """A folder for arrays that do not fit in memory."""
        if self.folder is not None:
            return self.folder
        self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="nectar-")
        return Path(self._temporary.name)

    def save_conversations(self, conversations: Sequence[Conversation]) -> None:
        if self.folder is not None:
            _write_json(self.folder / "conversations.json", [asdict(c) for c in conversations])

    def load_conversations(self) -> list[Conversation]:
        """None where there are none, or none that can be read; as of all that follows."""
        return self._parsed("conversations.json", lambda kept: [Conversation(**c) for c in kept]) or []

    def save_plan(self, plan: Plan) -> None:
        if self.folder is not None:
            _write_json(self.folder / "plan.json", plan._asdict())

    def load_plan(self) -> Plan | None:
        return self._parsed("plan.json", lambda kept: Plan(**kept | {"sizes": [tuple(s) for s in kept["sizes"]]}))

    def save_heads(self, heads: dict[int, HeadArrays]) -> None:
        """Keeps a group of fitted heads, by their numbers."""
        if self.folder is not None:
            arrays = {f"{i}.{name}": array for i, head in heads.items() for name, array in head.items()}
            tensor_file.write(self.folder / f"heads-{min(heads)}.safetensors", arrays, {})

    def load_heads(self) -> dict[int, HeadArrays]:
        heads: dict[int, HeadArrays] = {}
        for path in self.folder.glob("heads-*.safetensors") if self.folder is not None else ():
            try:
                arrays = tensor_file.read(path)
            except NectarError:
                continue
            for key, array in arrays.items():
                index, name = key.split(".", 1)
                heads.setdefault(int(index), {})[name] = array
        return heads

    def save_chunk(self, arrays: Mapping[str, mx.array], report: Mapping[str, object]) -> None:
        """Keeps what is left of a chunk that is done: arrays by name, and a report that goes with them. The rest is
        removed."""
        if self.folder is not None:
            tensor_file.write(self.folder / "done.safetensors", arrays, {"report": json.dumps(report)})
            self._remove(but=("done.safetensors", "fit.json"))

    def load_chunk(self) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
        if self.folder is None:
            return None
        path = self.folder / "done.safetensors"
        try:
            return tensor_file.read(path), json.loads(tensor_file.metadata(path)["report"])
        except (NectarError, KeyError, ValueError):
            return None

    def _parsed(self, name: str, parse: Callable[[Any], _T]) -> _T | None:
        kept = None if self.folder is None else _read_json(self.folder / name)
        try:
            return None if kept is None else parse(kept)
        except (TypeError, KeyError, ValueError):  # JSON, but of something else
            return None

    def _remove(self, *, but: Sequence[str] = ()) -> None:
        """Removes all that the folder holds, but for some names."""
        assert self.folder is not None
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in but:
                path.unlink()

    def clear(self) -> None:
        """Removes what was kept: the fit is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._temporary is not None:
            self._temporary.cleanup()


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(value, sort_keys=True).encode()))


def _read_json(path: Path) -> Any:
    """None where there is no file, or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
