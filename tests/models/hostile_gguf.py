"""Small .gguf files written by hand, and every way in which one of their parts can be wrong.

python -m tests.models.hostile_gguf [how many]     converts that many (all: 1,500) and says what came of them
"""

import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 4, 5, 6, 7, 8, 9, 10, 12
TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    *(chr(c) for c in range(33, 127)),
    *(chr(c) for c in range(161, 256)),
    "Ġ",
    "th",
    "the",
]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
HIDDEN, HEADS, D, INNER, LAYERS = 32, 2, 16, 48, 1
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "head_dim": D,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
}
Setting = tuple[int, Any]


def packed(kind: int, value: Any) -> bytes:
    """A setting's value. An array is (kind of its items, items)."""
    if kind == STRING:
        data = value if isinstance(value, bytes) else value.encode()
        return struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(packed(inner, item) for item in items)
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q", F64: "<d"}[kind], value)


def settings(kind: str = "gpt2") -> dict[str, Setting]:
    tokens = TOKENS if kind == "gpt2" else [t.replace("Ġ", "▁") for t in TOKENS]
    types = [3 if token.startswith("<") else 1 for token in tokens]
    tokenizer: dict[str, Setting] = {
        "model": (STRING, kind),
        "tokens": (ARRAY, (STRING, tokens)),
        "token_type": (ARRAY, (I32, types)),
        "bos_token_id": (U32, 1),
        "eos_token_id": (U32, 2),
        "unknown_token_id": (U32, 0),
        "padding_token_id": (U32, 2),
        "add_bos_token": (BOOL, True),
    }
    if kind == "gpt2":
        tokenizer |= {"pre": (STRING, "gpt-2"), "merges": (ARRAY, (STRING, ["t h", "th e"]))}
    else:
        tokenizer |= {"scores": (ARRAY, (F32, [-float(i) for i in range(len(tokens))]))}
    model: dict[str, Setting] = {
        "block_count": (U32, LAYERS),
        "context_length": (U32, 128),
        "embedding_length": (U32, HIDDEN),
        "feed_forward_length": (U32, INNER),
        "attention.head_count": (U32, HEADS),
        "attention.head_count_kv": (U32, 1),
        "attention.key_length": (U32, D),
        "attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "rope.freq_base": (F32, 10000.0),
        "rope.scaling.type": (STRING, "linear"),
        "rope.scaling.factor": (F32, 2.0),
    }
    return {
        "general.architecture": (STRING, "llama"),
        "general.alignment": (U32, 32),
        **{f"llama.{name}": value for name, value in model.items()},
        **{f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()},
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }


def tensors() -> dict[str, np.ndarray]:
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * D, HIDDEN),
        "blk.0.attn_k.weight": (D, HIDDEN),
        "blk.0.attn_v.weight": (D, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * D),
        "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) / 8 for name, shape in shapes.items()}


def entry(name: str, array: np.ndarray, offset: int, changed: dict[str, Any]) -> bytes:
    """A tensor's place in the file. changed: dims (the last axis first), kind, name or offset."""
    dims, kind = changed.get("dims", array.shape[::-1]), changed.get("kind", 0)
    name, offset = changed.get("name", name), changed.get("offset", offset)
    data = packed(STRING, name) + struct.pack("<I", changed.get("n_dims", len(dims)))
    return data + b"".join(struct.pack("<Q", n) for n in dims) + struct.pack("<IQ", kind, offset)


def written(
    values: dict[str, Setting],
    arrays: dict[str, np.ndarray],
    changes: dict[str, dict[str, Any]] | None = None,
    head: bytes | None = None,
) -> bytes:
    """A file. changes: what is said of some tensors instead of the truth. head: magic, version and counts."""
    out = head if head is not None else b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(values))
    for name, (kind, value) in values.items():
        out += packed(STRING, name) + struct.pack("<I", kind) + (value if kind > 99 else packed(kind, value))
    body = b""
    for name, array in arrays.items():
        out += entry(name, array, len(body), (changes or {}).get(name, {}))
        body += array.tobytes() + b"\0" * (-array.nbytes % 32)
    return out + b"\0" * (-len(out) % 32) + body


VALUES: dict[str, Setting] = {
    "zero": (U32, 0),
    "one": (U32, 1),
    "odd": (U32, 3),
    "large": (U32, 1 << 20),
    "largest": (U32, (1 << 32) - 1),
    "huge": (U64, (1 << 64) - 1),
    "minus": (I32, -1),
    "least": (I32, -(1 << 31)),
    "half": (F32, 0.5),
    "nan": (F32, float("nan")),
    "inf": (F64, float("inf")),
    "e300": (F64, 1e300),
    "tiny": (F64, 1e-300),
    "true": (BOOL, True),
    "text": (STRING, "x"),
    "empty": (STRING, ""),
    "escape": (STRING, "\x1b]0;owned\x07\x1b[2J"),
    "long": (STRING, "A" * 300_000),
    "bytes": (STRING, b"\xff\xfe"),
    "none": (ARRAY, (U32, [])),
    "numbers": (ARRAY, (U32, [1, 2, 3])),
    "floats": (ARRAY, (F32, [float("nan")] * 3)),
    "words": (ARRAY, (STRING, ["a", "b c"])),
    "many": (ARRAY, (U32, [7] * 50_000)),
    "nested": (ARRAY, (ARRAY, [(U32, [1])] * 3)),
}
_N = len(TOKENS)
LISTS: dict[str, dict[str, Setting]] = {
    "tokens": {
        "twice": (ARRAY, (STRING, ["a"] * _N)),
        "empties": (ARRAY, (STRING, [""] * _N)),
        "one piece of a megabyte": (ARRAY, (STRING, ["a" * 1_000_000, *TOKENS[1:]])),
        "long pieces": (ARRAY, (STRING, ["ab" * 500 + str(i) for i in range(_N)])),
        "one less": (ARRAY, (STRING, TOKENS[:-1])),
        "one more": (ARRAY, (STRING, [*TOKENS, "more"])),
        "many": (ARRAY, (STRING, [f"t{i}" for i in range(60_000)])),
        "escapes": (ARRAY, (STRING, ["\x1b[31m" + t for t in TOKENS])),
        "spaces": (ARRAY, (STRING, [" " * (i + 1) for i in range(_N)])),
        "numbers": (ARRAY, (I32, [1] * _N)),
    },
    "token_type": {
        "control": (ARRAY, (I32, [3] * _N)),
        "user": (ARRAY, (I32, [4] * _N)),
        "bytes": (ARRAY, (I32, [6] * _N)),
        "none": (ARRAY, (I32, [-5] * _N)),
        "large": (ARRAY, (I32, [2**31 - 1] * _N)),
        "less": (ARRAY, (I32, [1] * (_N - 1))),
        "floats": (ARRAY, (F32, [1.0] * _N)),
    },
    "merges": {
        "unknown": (ARRAY, (STRING, ["no such"])),
        "no space": (ARRAY, (STRING, ["the"])),
        "empty": (ARRAY, (STRING, [""])),
        "same": (ARRAY, (STRING, ["t h"] * 5000)),
        "blank": (ARRAY, (STRING, [" "])),
        "three": (ARRAY, (STRING, ["t h e"])),
        "megabyte": (ARRAY, (STRING, ["t" * 1_000_000 + " h"])),
    },
    "scores": {
        "nan": (ARRAY, (F32, [float("nan")] * _N)),
        "inf": (ARRAY, (F32, [float("inf")] * _N)),
        "less": (ARRAY, (F32, [0.0])),
        "equal": (ARRAY, (F32, [0.0] * _N)),
    },
}
TEMPLATES = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "product": "{{ 'a' * 10 ** 10 }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "long": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "names": "{{ namespace(__class__=1) }}",
    "refusal": "{{ raise_exception('no\n\x1b[31mno') }}",
    "syntax": "{% if",
    "drops": "nothing",
    "huge": "x" * 2_000_000,
    "megabyte": "x" * 900_000,
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "include": "{% include '/etc/passwd' %}",
    "sort": "{{ (range(99999) | list * 1000) | sort }}",
    "batch": "{{ range(99999) | batch(1, 1) | map('batch', 99999, 1) | map('list') | list }}",
    "regex": "{{ ('<a ' * 100000) | striptags }}{{ ('http://' * 100000) | urlize }}",
}
HEADS_OF_FILE = {
    "magic": b"GGUG" + struct.pack("<IQQ", 3, 11, 20),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 11, 20),
    "version 4": b"GGUF" + struct.pack("<IQQ", 4, 11, 20),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 11, 20),
    "tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 22),
    "settings": b"GGUF" + struct.pack("<IQQ", 3, 11, 2**62),
    "none": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "fewer": b"GGUF" + struct.pack("<IQQ", 3, 3, 22),
    "many": b"GGUF" + struct.pack("<IQQ", 3, 2**32, 2**32),
}
TENSORS: dict[str, dict[str, Any]] = {
    **{f"dims {dims}": {"dims": dims} for dims in ((), (0,), (1,), (2**63,), (2**31, 2**31), (4, 4, 4, 4), (2**40, 0))},
    **{f"n_dims {n}": {"n_dims": n} for n in (0, 5, 2**32 - 1)},
    **{f"kind {k}": {"kind": k} for k in (1, 2, 4, 8, 12, 14, 19, 24, 28, 30, 34, 39, 41, 99, 2**32 - 1)},
    **{f"offset {o}": {"offset": o} for o in (1, 32, 2**31, 2**63, 2**64 - 32)},
    "name": {"name": "blk.0.other.weight"},
    "long name": {"name": "x" * 5000},
    "no name": {"name": ""},
    "layer": {"name": "blk.99999999999999999999.attn_q.weight"},
    "digits": {"name": "blk.²." + "attn_q.weight"},
    "twice": {"name": "output_norm.weight"},
}


def cases(count: int = 1500) -> Iterator[tuple[str, bytes]]:
    """Names and files, the same ones every time: all that is listed above, then random damage."""
    good = {kind: (settings(kind), tensors()) for kind in ("gpt2", "llama")}
    made = list[tuple[str, bytes]]()
    for kind, (values, arrays) in good.items():
        for name in values:
            made.append((f"{kind}/without/{name}", written({n: v for n, v in values.items() if n != name}, arrays)))
            made += [(f"{kind}/{name}/{v}", written(values | {name: VALUES[v]}, arrays)) for v in VALUES]
        for name, lists in LISTS.items():
            full = f"tokenizer.ggml.{name}"
            made += [(f"{kind}/{name}/{v}", written(values | {full: lists[v]}, arrays)) for v in lists]
    values, arrays = good["gpt2"]
    for name, template in TEMPLATES.items():
        made.append((f"template/{name}", written(values | {"tokenizer.chat_template": (STRING, template)}, arrays)))
    made += [(f"head/{name}", written(values, arrays, head=head)) for name, head in HEADS_OF_FILE.items()]
    for tensor in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_norm.weight"):
        made += [(f"{tensor}/{name}", written(values, arrays, {tensor: change})) for name, change in TENSORS.items()]
        for value in (np.nan, np.inf, 1e38):
            changed = arrays | {tensor: np.full_like(arrays[tensor], value)}
            made.append((f"{tensor}/{value}", written(values, changed)))
        made.append((f"{tensor}/missing", written(values, {n: a for n, a in arrays.items() if n != tensor})))
    listed = sorted(made, key=lambda case: random.Random(case[0]).random())
    damaged = (len(listed) * 3) // 10 if count >= len(listed) else count // 4
    yield from listed[: count - damaged]
    for i in range(damaged):
        yield f"damage/{i}", _damaged(written(*good[("gpt2", "llama")[i % 2]]), random.Random(i))


def _damaged(data: bytes, chance: random.Random) -> bytes:
    changed, how = bytearray(data), chance.randrange(4)
    if how == 0:
        return data[: chance.randrange(len(data))]
    for _ in range(chance.choice((1, 1, 3, 20))):
        at = chance.randrange(len(data) if how == 1 else 6000)
        changed[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256))) if how < 3 else changed[at] ^ 1 << 3
    return bytes(changed)


def outcome(path: Path, folder: Path) -> str:
    """What comes of a file: "converted" or "refused"; whatever else is raised is a fault."""
    import mlx.core as mx
    import mlx_lm

    from nectar_mlx import NectarError
    from nectar_mlx.mlxlm import prompts
    from nectar_mlx.models import gguf

    try:
        gguf.convert(path, folder)
    except NectarError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, "a long message"
        return "refused"
    model, tokenizer = mlx_lm.load(str(folder))
    assert mx.isfinite(model(mx.array([[1, 5, 6]]))).all().item(), "NaN"
    tokenizer.decode(tokenizer.encode("the theme <s> 你"))
    try:
        prompts.prefix(tokenizer, "the theme")
    except NectarError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, "a long message"
        return "converted; its template is refused"
    return "converted"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    tally, slowest, most = Counter[str](), (0.0, ""), (0, "")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "case.gguf")
        path.write_bytes(written(settings(), tensors()))
        outcome(path, Path(scratch))  # imports
        for name, data in cases(count):
            path, folder = Path(scratch, "case.gguf"), Path(scratch, f"model-{sum(tally.values())}")
            path.write_bytes(data)
            folder.mkdir()
            Path("/proc/self/clear_refs").write_text("5")
            before, start = _peak(), time.perf_counter()
            try:
                found = outcome(path, folder)
            except BaseException as error:
                found = f"raised {type(error).__name__}: {str(error)[:80]}"
                print(name, found, flush=True)
            slowest = max(slowest, (round(time.perf_counter() - start, 2), name))
            most = max(most, (_peak() - before - 2 * len(data) >> 20, name))
            tally[found.split(":")[0]] += 1
            for file in folder.iterdir():
                file.unlink()
    print(f"{sum(tally.values())} cases: {dict(tally)}; slowest {slowest} s; most {most} MiB beyond 2 x the file")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
