"""Where an interrupted fit leaves its work, and a resumed one finds it: a folder beside the output."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..core.types import JsonObject
from ..errors import NectarError
from ..heads import HeadArrays, Size
from ..store import MEAN_BITS
from .samples.conversation import Conversation


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

    def claim(self, config: JsonObject, prefix: Sequence[int]) -> None:
        """Starts or continues the fit of this text with these settings; NectarError if the folder holds another fit."""
        if self.folder is None:
            return
        ids = hashlib.sha256(np.array(prefix, dtype="<i4").data).hexdigest()
        mine = json.dumps({"config": config, "prefix": ids}, sort_keys=True)
        told = self.folder / "fit.json"
        if told.exists() and told.read_text() != mine:
            raise NectarError(
                f"{self.folder} holds a fit with other settings or another text: remove it, or do not --resume"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        told.write_text(mine)

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
            (self.folder / "conversations.json").write_text(json.dumps([asdict(c) for c in conversations]))

    def load_conversations(self) -> list[Conversation]:
        if self.folder is None or not (self.folder / "conversations.json").exists():
            return []
        return [Conversation(**c) for c in json.loads((self.folder / "conversations.json").read_text())]

    def save_plan(self, plan: Plan) -> None:
        if self.folder is not None:
            (self.folder / "plan.json").write_text(json.dumps(plan._asdict()))

    def load_plan(self) -> Plan | None:
        if self.folder is None or not (self.folder / "plan.json").exists():
            return None
        kept = json.loads((self.folder / "plan.json").read_text())
        return Plan(**kept | {"sizes": [tuple(size) for size in kept["sizes"]]})

    def save_heads(self, heads: dict[int, HeadArrays]) -> None:
        """Keeps a group of fitted heads, by their numbers."""
        if self.folder is not None:
            flat = {f"{i}.{name}": array for i, head in heads.items() for name, array in head.items()}
            temporary = self.folder / "group.safetensors"
            mx.save_safetensors(str(temporary), flat)
            temporary.replace(self.folder / f"heads-{min(heads)}.safetensors")

    def load_heads(self) -> dict[int, HeadArrays]:
        heads: dict[int, HeadArrays] = {}
        for path in self.folder.glob("heads-*.safetensors") if self.folder is not None else ():
            arrays = mx.load(str(path))
            assert isinstance(arrays, dict)
            for key, array in arrays.items():
                index, name = key.split(".", 1)
                heads.setdefault(int(index), {})[name] = array
        return heads

    def save_chunk(self, arrays: Mapping[str, mx.array], told: JsonObject) -> None:
        """Keeps what is left of a part that is done: arrays by name, and what goes with them. The rest is removed."""
        if self.folder is not None:
            temporary = self.folder / "half.safetensors"
            mx.save_safetensors(str(temporary), dict(arrays), {"told": json.dumps(told)})
            done = temporary.replace(self.folder / "done.safetensors")
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path not in (done, self.folder / "fit.json"):
                    path.unlink()

    def load_chunk(self) -> tuple[dict[str, mx.array], JsonObject] | None:
        if self.folder is None or not (self.folder / "done.safetensors").exists():
            return None
        loaded: Any = mx.load(str(self.folder / "done.safetensors"), return_metadata=True)
        arrays, metadata = loaded
        return arrays, json.loads(metadata["told"])

    def clear(self) -> None:
        """Removes what was kept: the fit is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._temporary is not None:
            self._temporary.cleanup()
