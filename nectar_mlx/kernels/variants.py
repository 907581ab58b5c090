"""The texts of the decode kernel: metal/{rows,decode,partial,merge}.metal with the constants that a call of some shapes
needs, and the choices that depend on the machine."""

import functools
import re
from dataclasses import dataclass

from ..core.quantize import group_size
from ..heads.work import WorkKind
from . import source
from .packing import Form

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_LENGTH = 8  # query tokens; more go through matmuls
SIMDGROUPS = 8
MAX_TILE = 4  # query rows that a simdgroup holds
LIVE_SLICE, MAX_SLICES = 64, 32  # live tokens a threadgroup; threadgroups for the live tokens of one KV head, at most
# Rows that a lane has asked for before it uses the first, by bits: measured on an H100. "nodes": without hidden units,
# and with at most two queries a simdgroup. For Apple, which has half the registers, by count: a lane must not need more
# than 128; with more than two queries a simdgroup it is half as many.
FLIGHT = {
    "metal": {32: 2, 16: 4, 8: 4, 4: 8},
    "cuda": {32: 4, 16: 4, 8: 4, 4: 8},
    "cuda nodes": {32: 4, 16: 6, 8: 6, 4: 8},
}


def variant_for(form: Form, rows: int, group: int, length: int, element: str, padded: bool) -> "Variant":
    """The text for so many query rows of a KV head in all sequences. A simdgroup holds at most MAX_TILE, as even as
    the simdgroups side by side allow."""
    tile = -(-rows // _tiles(rows, MAX_TILE)) if rows < MAX_TILE * SIMDGROUPS else MAX_TILE
    tile = form.tile or tile
    halved = 2 if tile > 2 and form.backend == "metal" else 1
    few = form.backend == "cuda" and form.work == {WorkKind.NODES} and tile <= 2
    flight = FLIGHT["cuda nodes" if few else form.backend]
    return Variant(
        backend=form.backend,
        element=element,
        storage=form.storage,
        kind=form.kind,
        work=form.work,
        head_dim=form.head_dim,
        scale=form.scale,
        n_kv_heads=form.n_kv_heads,
        group=group,
        length=length,
        tile=tile,
        tiles=_tiles(rows, tile),
        flight=form.flight or flight[bits_of(form.storage)] // halved,
        live_flight=2 if element == "float32" else flight[16] // halved,
        padded=padded,
        offset=form.offset,
    )


def bits_of(storage: str) -> int:
    """float16 -> 16, int8 -> 8, ..."""
    return int(re.sub(r"\D", "", storage))


def _tiles(rows: int, tile: int) -> int:
    """Simdgroups side by side that hold different query rows: a power of two."""
    tiles = 1
    while tiles < SIMDGROUPS and tiles * tile < rows:
        tiles *= 2
    return tiles


@dataclass(frozen=True)
class Variant:
    """Everything that is a constant of a kernel's text."""

    backend: str
    element: str  # type of queries, keys, values and output
    storage: str  # of the parameters
    kind: str  # of the heads
    work: frozenset[WorkKind]
    head_dim: int
    scale: float
    n_kv_heads: int
    group: int  # query heads of a KV head
    length: int  # query tokens
    tile: int  # query rows a simdgroup holds
    tiles: int  # simdgroups that hold different rows
    flight: int  # rows of parameters that a lane has asked for before it uses the first
    live_flight: int  # the same of live tokens
    padded: bool
    offset: bool  # whether keys are relative to an offset

    def __str__(self) -> str:
        parts = [f"{self.kind} heads of {self.head_dim} ({self.storage})", f"{self.element} queries"]
        parts += [f"{self.group} to a KV head x {self.length} tokens", f"{self.tiles} x {self.tile} rows"]
        parts += ["an offset of keys"] if self.offset else []
        parts += ["left padding"] if self.padded else []
        return ", ".join(parts)

    @property
    def quantised(self) -> bool:
        return self.storage.startswith("int")

    @property
    def given_activations(self) -> bool:
        """Whether stock matmuls evaluate the hidden layers."""
        return WorkKind.GIVEN in self.work

    @property
    def full(self) -> bool:
        """Whether query rows beyond those of one threadgroup would be the next round's."""
        return self.tiles == SIMDGROUPS and self.tile == MAX_TILE

    @property
    def shares(self) -> int:
        """Simdgroups that share the merge of a row: a power of two."""
        return SIMDGROUPS // _tiles(self.tile, 1) if self.tiles == 1 else 1

    def text(self, stage: str) -> tuple[str, str]:
        """The kernel's header and body in Metal. stage: "partial" and "merge", or "fused", which is both."""
        has_units = self.work != {WorkKind.NODES}
        lanes = 1 << (self.head_dim // 8 - 1).bit_length()
        numbers = {
            "HEAD_DIM": self.head_dim,
            "PARTS": self.head_dim // 8,
            "VECTORS": self.head_dim // 4,
            "LANES": lanes,
            "ROW_WORDS": self.head_dim * bits_of(self.storage) // 32,
            "GROUP": group_size(self.head_dim),
            "ROW_SCALES": self.head_dim // group_size(self.head_dim) if self.quantised else 0,
            "N_KV_HEADS": self.n_kv_heads,
            "QUERY_HEADS": self.group,
            "LENGTH": self.length,
            "TILE": self.tile,
            "TILES": self.tiles,
            "SHARES": self.shares,
            "ROUND": max(1, min(self.tile, 4096 // (SIMDGROUPS * self.head_dim))),
            "SIMDGROUPS": SIMDGROUPS,
            "FLIGHT": self.flight,
            "LIVE_FLIGHT": self.live_flight,
            "AHEAD": 8,
            "LIVE_SLICE": LIVE_SLICE,
            "MAX_SLICES": MAX_SLICES,
            "HAS_NODES": int(WorkKind.NODES in self.work),
            "HAS_UNITS": int(has_units),
        }
        flags = {
            "READS": stage != "merge",
            "MERGES": stage != "partial",
            "ONE_LAUNCH": stage == "fused",
            "HINTS": self.backend == "cuda",  # for the cache
            "NO_HINTS": self.backend != "cuda",
            "LATE_QUERIES": self.backend == "cuda",
            "EARLY_QUERIES": self.backend != "cuda",
            "UNITS": has_units,
            "GATED_UNITS": WorkKind.GATED in self.work,
            "NETWORKS": WorkKind.PLAIN in self.work,
            "DEEP_NETWORKS": self.given_activations,
            "LINEAR_UNITS": WorkKind.LINEAR in self.work,
            "PADDED": self.padded,
            "OFFSETS": self.offset,
            "FLOATS": "float32" in (self.element, self.storage),
            "HALVES": not {self.element, self.storage}.isdisjoint(("float16", "bfloat16")),
            "BYTES": self.storage == "int8",
            "NIBBLES": self.storage == "int4",
        }
        types = {"bfloat16": "bfloat16_t", "float16": "half", "float32": "float", "int8": "Int8", "int4": "Int4"}
        lines = [
            "namespace nectar {",
            *(f"constant constexpr int {name} = {value};" for name, value in numbers.items()),
            f"constant constexpr float SCALE = {self.scale!r}f;",
            source.read("rows"),
            f"typedef {types[self.element]} Element;",
            f"typedef {types[self.storage]} Weight;",
            source.read("decode"),
            "}\n",
        ]
        body = source.read("merge" if stage == "merge" else "partial")
        defined = {name for name, on in flags.items() if on}
        return source.resolve("\n".join(lines), defined), source.resolve(body, defined)


@functools.lru_cache(maxsize=256)
def build(variant: Variant, stage: str) -> source.Kernel:
    """The kernel of a stage, as `Variant.text` has them."""
    outputs = {"fused": ["partials", "output"], "partial": ["partials"], "merge": ["output"]}[stage]
    inputs, text = inputs_of(variant, stage), variant.text(stage)
    return source.kernel(stage, variant.backend, *text, inputs=inputs, outputs=outputs, ensure_row_contiguous=False)


def inputs_of(variant: Variant, stage: str) -> list[str]:
    """The inputs of a stage, in order."""
    if stage == "merge":
        return ["queries", "parameters", "live_tokens", "partials"]
    inputs = ["queries", "keys", "values", "parameters", "live_tokens"]
    inputs += ["left_padding"] if variant.padded else []
    inputs += ["activations"] if variant.given_activations else []
    return inputs + (["arrival_counters"] if stage == "fused" else [])
