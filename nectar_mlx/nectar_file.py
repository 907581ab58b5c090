"""A .nectar without its model: what it holds, how large it is, how close its answers were when it was fitted."""

from functools import cached_property
from pathlib import Path
from typing import Any, Self

from . import store
from .core.types import JsonObject
from .errors import NectarError
from .fitting import verdict
from .fitting.samples import kept_study
from .heads import Bank, HybridHead
from .models import hub
from .retrieval import KeyFile, kv_path
from .store import Layout, load
from .store.chunking import ChunkedPrefix
from .store.kv_file import remove_stale_keys

_MEASURED = ("seconds", "peak_memory")  # of a report: other in every fit, so not in the file


class NectarFile:
    """What a .nectar holds; `Nectar` answers from it.

    Attributes:
        prefix: the token ids that it stands for, at positions 0 … n-1.
        chunks: lengths in tokens of the chunks that the prefix ends with, each read on its own; empty where the text
            was read in one piece.
        banks: the head functions, one bank for each layer with full attention.
        windows: what each layer without heads keeps, by layer: a sliding window's exact keys and values, a state.
        keys: the file of exact keys and values beside it, None where there is none.
        report: what was measured while fitting: `kl`, `agree`, `gap_closed`, ...; `seconds` and
            `peak_memory` only until it is saved.
        metadata: model, tokenizer, settings, source.
        geometry, layout: of the model's attention, and of the heads in the file.
        tensors: what the file holds.
    """

    def __init__(self, tensors: store.Tensors, metadata: store.Metadata, keys: KeyFile | None = None):
        """tensors, metadata: what a file holds (`store.contents`, `store.description`). keys: the file beside it.

        NectarError where they do not fit each other; of heads when these are first asked for.
        """
        self.tensors, self.metadata, self.keys = tensors, metadata, keys
        self.geometry, self.layout = load.geometry(metadata), Layout(**metadata["layout"])
        ids: Any = tensors["prefix"].tolist()
        self.prefix: list[int] = ids
        self._ids = ChunkedPrefix.checked(self.prefix, metadata.get("chunks", []))
        self.chunks = list(self._ids.lengths)
        self.report: JsonObject = metadata["report"]
        if not isinstance(self.report, dict):
            raise NectarError("the file is damaged: its report is none")
        self.windows = load.windows(tensors, self.geometry, self.start)
        shapes = {(x.n_kv_heads, x.head_dim, x.scale) for x in (self.layout, self.geometry)}
        if self.layout.n_layers != len(self.geometry.fitted) or len(shapes) > 1:
            raise NectarError("the file is damaged: its heads are not those of its model")

    def __repr__(self) -> str:
        share = f"{self.nbytes / max(1, self.cache_nbytes):.2%} of the KV cache"
        parts = [f"{len(self.prefix):,} tokens for {self.metadata['model'] or 'an unnamed model'}", self.layout.kind]
        parts += [f"{self.nbytes:,} bytes", share]
        parts += [f"{len(self.chunks)} chunks"] if self.chunks else []
        return f"<Nectar: {', '.join(parts)}>"

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a .nectar without its model: to look at, not to answer from. NectarError unless it is whole."""
        tensors, metadata = store.read(hub.nectar_file(path))
        with store.damage_named(path):
            nectar = cls(tensors, metadata)
            _ = nectar.banks  # or damage would show when they are first needed
            return nectar

    def save(self, path: str | Path) -> None:
        """Writes a .nectar, and its keys beside it. The report's timings are left out: equal fits give equal files.

        The keys are written first, under a name of their own, and those of a file that was there are removed last: a
        process that is killed in between leaves the old pair or the new one. NectarError if the path holds something
        else, or cannot be written; then what was there stays.
        """
        path, keys = Path(path), None
        store.check_writable(path)
        if self.keys is not None:
            keys = kv_path(path, self.digest)
            self.keys.write(keys)
        report = {name: value for name, value in self.report.items() if name not in _MEASURED}
        store.write(path, self.tensors, self.metadata | {"report": report})
        remove_stale_keys(path, but=keys)

    @property
    def start(self) -> int:
        """The position of the token that follows: behind the prefix, or behind its longest chunk."""
        return self._ids.start

    @property
    def nbytes(self) -> int:
        """Bytes of the fitted parameters, as kept."""
        return sum(x.nbytes for name, x in self.tensors.items() if name not in ("prefix", kept_study.TENSOR))

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the bf16 KV cache that it replaces."""
        return self.geometry.cache_bytes(len(self.prefix))

    @property
    def bits(self) -> float:
        """Bits that an entry of a matrix takes in the file, on average."""
        return store.mean_bits(self.layout, self.tensors)

    @property
    def verdict(self) -> str:
        """How close its answers are to those with the full text, in one sentence; "" where it was not checked, as
        where every key is kept."""
        return str(self.report.get("verdict", ""))

    @property
    def faithful(self) -> bool:
        """Whether the verdict is that its answers are close to those with the full text, or there is none."""
        return verdict.grade(self.report) in (None, "close")

    @property
    def is_hybrid(self) -> bool:
        """Whether its heads are made for exact keys beside them."""
        return issubclass(self.layout.bank, HybridHead)

    @cached_property
    def digest(self) -> str:
        """sha256 of the tensors: what ties a file of keys to this one."""
        return store.digest(self.tensors)

    @cached_property
    def banks(self) -> list[Bank]:
        """The head functions, one bank for each layer with full attention. NectarError where the tensors hold none."""
        return load.banks(self.layout, self.tensors)
