"""Where an interrupted fit leaves its work, and a resumed one finds it: a folder beside the output.

Everything in it has a checksum, of what it is for as well: what is torn, altered, or of another fit or another part of
this one counts as not there and is computed again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..core.files import locked, write_atomically
from ..core.progress import Log, no_log
from ..errors import NectarError
from ..heads import HeadArrays, Size
from ..store import MEAN_BITS, tensor_file
from .samples.conversation import Conversation

FORMAT = 4  # of the folder: another one counts as another fit
SAVE_SECONDS = 15.0  # between two savings of what is under way
_CLAIM, _LOCK = "fit.json", "lock"
_T = TypeVar("_T")


class Plan(NamedTuple):
    """What each head gets. sizes: of every head. share: bytes kept / bytes of the bf16 KV cache. exponent: the
    divergence falls with so much of a power of the bytes, where that was measured. bits: of a number of a node."""

    sizes: list[Size]
    share: float
    exponent: float | None = None
    bits: float = MEAN_BITS

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "Plan":
        """From what JSON makes of one."""
        return cls(**{**kept, "sizes": [tuple(size) for size in kept["sizes"]]})


class Checkpoint:
    """The folder of one fit. With folder=None nothing is kept, and what does not fit in memory goes to a temporary
    folder.

    must_match: whether a folder of another fit is an error; else that one is removed, and log is told why. part: of
    the fit. Before it is claimed it holds nothing.
    """

    def __init__(self, folder: Path | None, *, must_match: bool = False, log: Log = no_log, part: str = ""):
        self.folder, self.must_match, self.log = folder, must_match, log
        self._part, self._claimed = part, ""  # which part of the fit; sha256 of the claim
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._saved = time.monotonic()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the folder is this process's alone; NectarError that names the other process where it is not.

        A folder that holds no work at the end is removed.
        """
        with ExitStack() as lock:
            if self.folder is not None:
                lock.callback(self._remove_empty)
                self._lock(self.folder, lock)
            yield

    def _lock(self, folder: Path, lock: ExitStack) -> None:
        path = folder / _LOCK
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            path.touch()
            lock.enter_context(locked(path))
            path.write_text(str(os.getpid()))
        except BlockingIOError:
            lock.pop_all()  # the folder is the other's
            raise NectarError(
                f"another fit to the same output is running (process {path.read_text() or 'unknown'}): wait for it, or "
                "choose another --output"
            ) from None
        except OSError as error:
            raise NectarError(f"{folder} cannot be used for the work of the fit: {error.strerror}") from None

    def _remove_empty(self) -> None:
        if self.folder is not None and self.folder.is_dir() and not self.holds_work():
            shutil.rmtree(self.folder, ignore_errors=True)

    def claim(self, claim: Mapping[str, Any]) -> None:
        """Starts or continues the fit that these facts decide. Where the folder holds another one it is removed, or a
        NectarError says what is different (`must_match`)."""
        if self.folder is None:
            return
        mine = json.loads(json.dumps({"format": FORMAT, **claim}))
        kept = self._read(_CLAIM)
        if kept != mine and isinstance(kept, dict) and self.holds_work():
            what = ", ".join(_different(mine, kept)) or "facts"
            if self.must_match:
                raise NectarError(
                    f"{self.folder} holds a fit with other {what}, which --resume cannot continue: leave --resume "
                    "out to start anew"
                )
            self.log(f"starting anew: {self.folder} holds a fit with other {what}")
        self._claimed = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
        if kept == mine:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove(but=(_LOCK,))
        self._write(_CLAIM, mine)

    def empty(self) -> None:
        """Removes what an interrupted fit left, but for the lock."""
        if self.folder is not None:
            self._remove(but=(_LOCK,))

    def part(self, name: str) -> "Checkpoint":
        """That of a part of the fit, within this one."""
        return Checkpoint(self.folder and self.folder / name, part=f"{self._part}/{name}")

    def holds_work(self) -> bool:
        """Whether there is anything that a resumed fit would not compute again."""
        files = self.folder.rglob("*") if self.folder is not None else ()
        return any(path.suffix in (".json", ".safetensors") and path.name != _CLAIM for path in files)

    def continues(self) -> bool:
        """Whether the same fit, which has claimed the folder, would continue from what it holds."""
        return bool(self._claimed) and self.holds_work()

    def spill(self) -> Path:
        """A folder for arrays that do not fit in memory."""
        if self.folder is not None:
            return self.folder
        self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="nectar-")
        return Path(self._temporary.name)

    def decided(self, name: str, decide: Callable[[], _T]) -> _T:
        """What the first run of this fit decided or measured, a JSON value: a resumed one goes on with it."""
        kept: _T | None = self._read(f"{name}.decided")
        if kept is None:
            kept = decide()
            self._write(f"{name}.decided", kept)
        return kept

    def save_conversations(self, conversations: Sequence[Conversation]) -> None:
        if self.folder is not None:
            self._write("conversations.json", [asdict(c) for c in conversations])
            (self.folder / "answers.json").unlink(missing_ok=True)

    def load_conversations(self) -> list[Conversation]:
        """None where there are none, or none that can be read; as of all that follows."""
        return self._parsed("conversations.json", lambda kept: [Conversation(**c) for c in kept]) or []

    def save_answers(self, batch: Sequence[Conversation], *, seed: int, group: int, at: int) -> None:
        """Keeps answers that are being sampled: where a group has ended, and every SAVE_SECONDS. group: that is under
        way, those before it are done. at: as for `sampling.sample_answers`."""
        begins = group > 0 and at == 0
        if begins or time.monotonic() - self._saved > SAVE_SECONDS:
            record = {"seed": seed, "group": group, "at": at, "conversations": [asdict(c) for c in batch]}
            self._write("answers.json", record)
            self._saved = time.monotonic()

    def load_answers(self, batch: Sequence[Conversation], *, seed: int) -> tuple[int, int]:
        """Puts what was kept of a batch's answers into it -> the group that was under way, and up to where it was
        sampled; zeros where nothing was."""

        def parse(kept: dict[str, Any]) -> tuple[int, int, list[Conversation]]:
            conversations = kept["conversations"] if kept["seed"] == seed else []
            return int(kept["group"]), int(kept["at"]), [Conversation(**c) for c in conversations]

        group, at, kept = self._parsed("answers.json", parse) or (0, 0, [])
        if [c.prompt for c in kept] != [c.prompt for c in batch]:
            return 0, 0
        for conversation, answered in zip(batch, kept, strict=True):
            conversation.answer = answered.answer
        return group, at

    def save_plan(self, plan: Plan) -> None:
        self._write("plan.json", plan._asdict())

    def load_plan(self) -> Plan | None:
        return self._parsed("plan.json", Plan.of)

    def save_heads(self, heads: dict[int, HeadArrays]) -> None:
        """Keeps a group of fitted heads, by their numbers."""
        arrays = {f"{i}.{name}": array for i, head in heads.items() for name, array in head.items()}
        self._write_arrays(f"heads-{min(heads)}.safetensors", arrays, {})

    def load_heads(self) -> dict[int, HeadArrays]:
        heads: dict[int, HeadArrays] = {}
        for path in self.folder.glob("heads-*.safetensors") if self.folder is not None else ():
            arrays, _ = self._read_arrays(path.name) or ({}, {})
            for key, array in arrays.items():
                index, name = key.split(".", 1)
                heads.setdefault(int(index), {})[name] = array
        return heads

    def save_distillation(self, step: int, arrays: Mapping[str, mx.array]) -> None:
        """Keeps heads that are being distilled, every SAVE_SECONDS. step: how many steps were taken."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._write_arrays("distillation.safetensors", arrays, {"step": str(step)})
            self._saved = time.monotonic()

    def load_distillation(self) -> tuple[int, dict[str, mx.array]] | None:
        found = self._read_arrays("distillation.safetensors")
        return None if found is None else (int(found[1]["step"]), found[0])

    def save_chunk(self, arrays: Mapping[str, mx.array], report: Mapping[str, object]) -> None:
        """Keeps what is left of a chunk that is done: arrays by name, and a report that goes with them. The rest is
        removed."""
        if self.folder is not None:
            self._write_arrays("done.safetensors", arrays, {"report": json.dumps(report)})
            self._remove(but=("done.safetensors", _CLAIM, _LOCK))

    def load_chunk(self) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
        found = self._read_arrays("done.safetensors")
        return None if found is None else (found[0], json.loads(found[1]["report"]))

    def _mark(self, name: str) -> bytes:
        """What a file of this name is for: checksums cover it, so that no other fit's file is taken for it."""
        return b"" if name == _CLAIM else f"{self._claimed} {self._part} {name}\n".encode()

    def _write(self, name: str, value: object) -> None:
        """One line with a checksum of the JSON that follows."""
        if self.folder is not None:
            text = json.dumps(value, sort_keys=True).encode()
            checksum = hashlib.sha256(self._mark(name) + text).hexdigest().encode()
            write_atomically(self.folder / name, lambda file: file.write(checksum + b"\n" + text))

    def _read(self, name: str) -> Any:
        """None where there is no file, or none that can be read; so below."""
        if self.folder is None:
            return None
        try:
            checksum, _, text = (self.folder / name).read_bytes().partition(b"\n")
            right = hashlib.sha256(self._mark(name) + text).hexdigest()
            return json.loads(text) if checksum.decode() == right else None
        except (OSError, ValueError, RecursionError):
            return None

    def _write_arrays(self, name: str, arrays: Mapping[str, mx.array], told: Mapping[str, str]) -> None:
        if self.folder is not None:
            mark = hashlib.sha256(self._mark(name)).hexdigest()
            tensor_file.write_sealed(self.folder / name, arrays, {**told, "mark": mark})

    def _read_arrays(self, name: str) -> tuple[dict[str, mx.array], dict[str, str]] | None:
        """The arrays, and what was told of them."""
        if self.folder is None:
            return None
        try:
            arrays, told = tensor_file.read_sealed(self.folder / name), tensor_file.metadata(self.folder / name)
        except NectarError:
            return None
        return (arrays, told) if told.get("mark") == hashlib.sha256(self._mark(name)).hexdigest() else None

    def _parsed(self, name: str, parse: Callable[[Any], _T]) -> _T | None:
        kept = self._read(name)
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


def _different(mine: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """The names of the facts that differ; of settings, which ones."""
    names = list[str]()
    for name, fact in mine.items():
        other: Any = kept.get(name)
        if other != fact:
            both = isinstance(fact, dict) and isinstance(other, dict)
            fields = [field for field in fact if other.get(field) != fact[field]] if both else []
            names.append(f"{name} ({', '.join(fields)})" if fields else name)
    return names


def text_digest(text: str | Sequence[int]) -> str:
    """sha256 of a text, or of token ids as little-endian int32."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else np.array(text, dtype="<i4").tobytes()
    return hashlib.sha256(data).hexdigest()
