"""A calculated bound: bytes that the attention of one decode step reads, over the memory bandwidth of Apple's chips.

    python -m nectar_mlx.benchmarks.roofline          prints the table of docs/kernel.md

Nothing here is measured. Bandwidths are the published figures; no kernel reaches them, and launches (a few microseconds
a layer) come on top.
"""

from .measure import SHAPES, Fused, Shape

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


def step_bytes(shape: Shape, context: int, *, live: int = 64, nodes: int = Fused.nodes) -> dict[str, int]:
    """What one decode step reads of keys, values and parameters, in bytes; the 4-bit cache has groups of 64."""
    row = shape.head_dim
    heads = shape.layers * shape.n_kv_heads
    return {
        "full": shape.cache_bytes(context + live),
        "4-bit": int(shape.cache_bytes(context + live) * 4.5 / 16),
        "ours": heads * nodes * (4 * row + 4) + shape.cache_bytes(live),
        "ours, int8": heads * nodes * (2 * (row + row // 16) + 4) + shape.cache_bytes(live),
    }


def table(shape: Shape) -> str:
    """Milliseconds of attention a decode step at full bandwidth, as Markdown."""
    columns = [(f"{context // 1024}k {name}", context, name) for context in CONTEXTS for name in ("full", "4-bit")]
    columns += [(name, CONTEXTS[0], name) for name in ("ours", "ours, int8")]
    lines = [["chip", "GB/s", *(title for title, _, _ in columns)], ["---"] * (len(columns) + 2)]
    reads = {context: step_bytes(shape, context) for context in CONTEXTS}
    lines.append(["MB read", "", *(f"{reads[context][name] / 1e6:.0f}" for _, context, name in columns)])
    for chip, bandwidth in CHIPS.items():
        times = (reads[context][name] / bandwidth / 1e6 for _, context, name in columns)
        lines.append([chip, str(bandwidth), *(f"{ms:.2f}" for ms in times)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(SHAPES["qwen3-1.7b"]))
