"""A calculated bound: the bytes that the attention of one decode step reads / the memory bandwidth of Apple's chips.

    python -m nectar_mlx.benchmarks.roofline          prints the table of docs/kernel.md

Nothing here is measured. Bandwidths are the published figures; no kernel reaches them, and launches (a few microseconds
a layer) come on top.
"""

from .. import store
from .measure import SHAPES, Shape

# GB/s of unified memory, of the largest variant of each chip.
CHIPS = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": 400,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": 614,
}
CONTEXTS = (8192, 32768, 131072)
BUDGET = 0.02


def nodes_of(shape: Shape, context: int) -> int:
    """The mean number of nodes a head in a file of BUDGET."""
    layout = store.Layout(
        kind="quadrature",
        n_layers=shape.layers,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        scale=shape.scale,
        bits=None,
    )
    each = BUDGET * shape.cache_bytes(context) / (shape.layers * shape.n_kv_heads)
    return int(each / store.head_bytes(layout, (1000,)) * 1000)


def step_bytes(shape: Shape, context: int, *, live: int = 64) -> dict[str, int]:
    """Bytes of keys, values and parameters that one decode step reads; the 4-bit cache has groups of 64. The kernel
    reads nodes in 8 bits, twice their size in a file.
    """
    row, heads = shape.head_dim, shape.layers * shape.n_kv_heads
    return {
        "full": shape.cache_bytes(context + live),
        "4-bit": int(shape.cache_bytes(context + live) * 4.5 / 16),
        "ours": heads * nodes_of(shape, context) * (2 * (row + row // 16) + 4) + shape.cache_bytes(live),
    }


def table(shape: Shape) -> str:
    """Milliseconds of attention a decode step at full bandwidth, as Markdown."""
    reads = {context: step_bytes(shape, context) for context in CONTEXTS}
    columns = [(context, name) for context in CONTEXTS for name in reads[context]]
    titles = [f"{context // 1024}k {name}" for context, name in columns]
    lines = [["chip", "GB/s", *titles], ["---"] * (len(columns) + 2)]
    lines.append(["MB read", "", *(f"{reads[context][name] / 1e6:.0f}" for context, name in columns)])
    for chip, bandwidth in CHIPS.items():
        times = (reads[context][name] / bandwidth / 1e6 for context, name in columns)
        lines.append([chip, str(bandwidth), *(f"{ms:.2f}" for ms in times)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(SHAPES["qwen3-1.7b"]))
