"""Byte-level language models with dense, fixed and strided attention, side by side.

    python examples/sparse_bytes.py                      the Python manual; about three minutes on two CPU cores
    python examples/sparse_bytes.py book.txt --steps 2000 --context 4096 --plot curves.png
    python examples/sparse_bytes.py book.txt --resume    goes on where an interrupted run stopped

Every model gets the same initial weights, the same batches and the same number of steps; only the keys that a query
sees differ. The recipe is that of Sparse Transformers (Child et al., arXiv 1904.10509): pre-activation residual blocks
whose last layers start smaller the deeper the network (section 5.2), attention recomputed in the reverse pass (section
5.4), AdamW with warm-up, cosine decay and clipping. Positions are rotary, not learned per row and column: a run of a
few minutes is too short to learn them.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from nectar_mlx import NectarError
from nectar_mlx.sparse import Fixed, Pattern, Strided, sparse_attention

import mlx.core as mx  # isort: skip (nectar_mlx loads an optimised BLAS first)
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Cache = list[tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Settings:
    """What a checkpoint must agree on to be resumed."""

    context: int
    stride: int
    summary: int
    combine: str
    layers: int
    width: int
    heads: int
    batch: int
    steps: int
    learning_rate: float
    seed: int

    def pattern(self, kind: str) -> Pattern | None:
        if kind == "dense":
            return None
        if kind == "strided":
            return Strided(self.stride, self.combine)  # type: ignore[arg-type]
        return Fixed(self.stride, self.combine, summary=self.summary)  # type: ignore[arg-type]


def attend(queries: mx.array, keys: mx.array, values: mx.array, pattern: Pattern | None) -> mx.array:
    """Causal attention of queries [B, H, T, D] over keys and values [B, H, S, D] -> [B, H, T, D]; bfloat16 on a GPU."""
    scale = queries.shape[-1] ** -0.5
    if mx.default_device() == mx.cpu:  # where ours is faster than MLX's for dense attention too
        pattern = pattern or Fixed(keys.shape[2], summary=1)
        return sparse_attention(queries, keys, values, pattern=pattern, scale=scale).output
    queries, keys, values = (x.astype(mx.bfloat16) for x in (queries, keys, values))
    if pattern is None:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")
    return sparse_attention(queries, keys, values, pattern=pattern, scale=scale).output


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, pattern: Pattern | None) -> None:
        super().__init__()
        self.heads, self.pattern = heads, pattern
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.rope = nn.RoPE(width // heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def __call__(
        self, x: mx.array, past: tuple[mx.array, mx.array] | None
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """x [B, T, width], past = keys and values [B, H, S - T, D] -> the same shape, and those of all S positions."""
        B, T, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(B, T, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        start = past[0].shape[2] if past else 0
        queries, keys, values = self.rope(qkv[0], offset=start), self.rope(qkv[1], offset=start), qkv[2]
        if past is not None:
            keys, values = (mx.concatenate(pair, axis=2) for pair in zip(past, (keys, values), strict=True))
        heads = attend(queries, keys, values, self.pattern)
        x = x + self.attention_out(heads.swapaxes(1, 2).reshape(B, T, width))
        # Squared ReLU where the paper has GELU: MLX's CPU build for Linux is slow at exponentials.
        return x + self.mlp_out(nn.relu(self.mlp_in(self.mlp_norm(x))).square()), (keys, values)


class ByteTransformer(nn.Module):
    """Bytes [B, T] -> logits [B, T, 256] of the bytes that follow."""

    def __init__(self, settings: Settings, kind: str) -> None:
        super().__init__()
        width = settings.width
        self.bytes = nn.Embedding(256, width)
        pattern = settings.pattern(kind)
        patterns = [pattern and pattern.at(layer) for layer in range(settings.layers)]
        self.blocks = [Block(width, settings.heads, at) for at in patterns]
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, 256)
        self._initialize(settings.seed)

    def _initialize(self, seed: int) -> None:
        """Normal weights of deviation 1/√inputs, by a further 1/√(2N) where one of the N blocks adds to its residual.

        Then the sum over the 2N residual branches has the same size at any depth. Embeddings have deviation 1; biases
        and logits start at zero.
        """
        key = mx.random.key(seed)
        fixed = {"bytes.weight": 1.0, "logits.weight": 0.0}
        residual = 1 / math.sqrt(2 * len(self.blocks))
        weights = [(name, x) for name, x in tree_flatten(self.parameters()) if name.endswith("weight") and x.ndim == 2]
        for name, weight in sorted(weights):
            key, own = mx.random.split(key)
            scale = fixed.get(name, weight.shape[1] ** -0.5) * (residual if "_out." in name else 1)
            self.update(tree_unflatten([(name, scale * mx.random.normal(weight.shape, key=own))]))
        biases = [(name, mx.zeros_like(x)) for name, x in tree_flatten(self.parameters()) if name.endswith("bias")]
        self.update(tree_unflatten(biases))

    def __call__(self, tokens: mx.array, past: Cache | None = None) -> tuple[mx.array, Cache]:
        x = self.bytes(tokens)
        cache: Cache = []
        for n, block in enumerate(self.blocks):
            x, kept = block(x, past[n] if past else None)
            cache.append(kept)
        return self.logits(self.norm(x)), cache


def loss_fn(model: ByteTransformer, windows: mx.array) -> mx.array:
    """Bits per byte of predicting windows [B, context + 1] from left to right."""
    logits, _ = model(windows[:, :-1])
    return nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean") / math.log(2)


class Run:
    """One model's training: weights, optimiser, and what has been measured, all of which a checkpoint holds."""

    def __init__(self, kind: str, settings: Settings, directory: Path) -> None:
        self.kind, self.settings = kind, settings
        self.path = directory / f"{kind}.safetensors"
        self.model = ByteTransformer(settings, kind)
        warm_up = max(1, settings.steps // 10)
        schedule = optim.join_schedules(
            [
                optim.linear_schedule(0.0, settings.learning_rate, warm_up),
                optim.cosine_decay(settings.learning_rate, max(1, settings.steps - warm_up)),
            ],
            [warm_up],
        )
        self.optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=0.01)
        self.optimizer.init(self.model.trainable_parameters())
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self._loss_and_grad = nn.value_and_grad(self.model, loss_fn)

    def step(self, text: np.ndarray) -> None:
        """One update on the batch that seed and step determine."""
        settings, start = self.settings, time.perf_counter()
        places = np.random.default_rng([settings.seed, len(self.losses)])
        starts = places.integers(0, len(text) - settings.context, settings.batch)
        windows = mx.array(np.stack([text[at : at + settings.context + 1] for at in starts]))
        loss, grads = self._loss_and_grad(self.model, windows)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        self.optimizer.update(self.model, grads)
        mx.eval(self.model, self.optimizer.state, loss)
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def save(self) -> None:
        arrays = dict(tree_flatten({"model": self.model.parameters(), "optimizer": self.optimizer.state}))
        done = {"losses": self.losses, "seconds": self.seconds, "peak_bytes": self.peak_bytes}
        metadata = {"settings": json.dumps(asdict(self.settings)), "done": json.dumps(done)}
        partial_file = self.path.with_suffix(".partial.safetensors")
        mx.save_safetensors(str(partial_file), arrays, metadata)
        os.replace(partial_file, self.path)

    def load(self) -> None:
        try:
            arrays, metadata = mx.load(str(self.path), return_metadata=True)
            settings, done = json.loads(metadata["settings"]), json.loads(metadata["done"])
            state = tree_unflatten(list(arrays.items()))
        except (RuntimeError, KeyError, ValueError):
            raise NectarError(f"{self.path} is not a checkpoint: delete it, or leave out --resume") from None
        if settings != asdict(self.settings):
            raise NectarError(f"{self.path} was made with other settings: use those, or leave out --resume")
        self.model.update(state["model"])
        self.optimizer.state = state["optimizer"]
        self.losses, self.seconds, self.peak_bytes = done["losses"], done["seconds"], done["peak_bytes"]

    def train(self, text: np.ndarray, progress: Progress, save_every: int) -> None:
        steps = self.settings.steps
        bar = progress.add_task(self.kind, total=steps, completed=len(self.losses), note="")
        mx.clear_cache()
        mx.reset_peak_memory()
        try:
            while len(self.losses) < steps:
                self.step(text)
                self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory())
                if len(self.losses) % save_every == 0:
                    self.save()
                progress.update(bar, advance=1, note=f"{np.mean(self.losses[-20:]):.3f} bits/byte")
        finally:
            self.save()

    def bits_per_byte(self, text: np.ndarray) -> float:
        """On all of the text, in windows that do not overlap."""
        context = self.settings.context
        starts = range(0, len(text) - context, context)
        windows = np.stack([text[start : start + context + 1] for start in starts])
        losses = [loss_fn(self.model, mx.array(window[None])).item() for window in windows]
        return float(np.mean(losses))

    def sample(self, prompt: np.ndarray, length: int, temperature: float) -> bytes:
        """What the model writes after the prompt; one byte at a time, with the keys and values kept."""
        key = mx.random.key(self.settings.seed)
        tokens, cache, written = mx.array(prompt[None]), None, bytearray()
        for _ in range(min(length, self.settings.context - len(prompt))):
            logits, cache = self.model(tokens, cache)
            key, own = mx.random.split(key)
            tokens = mx.random.categorical(logits[:, -1:] / temperature, key=own)
            written.append(tokens.item())
        return bytes(written)

    def report(self, held_out: np.ndarray, sample_bytes: int, temperature: float) -> dict[str, object]:
        prompt = held_out[: self.settings.context // 4]
        return {
            "kind": self.kind,
            "bits_per_byte": self.bits_per_byte(held_out),
            "train_bits_per_byte": float(np.mean(self.losses[-20:])),
            "seconds_per_step": float(np.median(self.seconds)),
            "peak_bytes": self.peak_bytes,
            "steps": len(self.losses),
            "parameters": sum(x.size for _, x in tree_flatten(self.model.parameters())),
            "sample": self.sample(prompt, sample_bytes, temperature).decode(errors="replace"),
        }


def read_text(path: Path | None) -> np.ndarray:
    """The bytes of a file, or of the Python manual that comes with every Python."""
    if path is None:
        from pydoc_data import topics

        return np.frombuffer("\n\n".join(dict.fromkeys(topics.topics.values())).encode(), np.uint8)
    try:
        return np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise NectarError(f"{path} cannot be read: {error.strerror}") from None


def check_plot(path: Path) -> None:
    """Before the training rather than after it."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise NectarError(f"--plot {path}: end its name with .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise NectarError("--plot needs matplotlib: pip install 'nectar-mlx[plot]'")


def plot(runs: Sequence[Run], path: Path) -> None:
    """Training curves, by step and by time, each point the mean of the last 20 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for run in runs:
        width = min(20, len(run.losses))
        smooth = np.convolve(run.losses, np.ones(width) / width, mode="valid")
        by_step.plot(range(width, len(run.losses) + 1), smooth, label=run.kind)
        by_time.plot(np.cumsum(run.seconds)[width - 1 :], smooth, label=run.kind)
    by_step.set(xlabel="step", ylabel="bits per byte (training)")
    by_time.set(xlabel="seconds")
    by_step.legend()
    figure.savefig(path)


def show(reports: Sequence[dict[str, object]], console: Console) -> None:
    for report in reports:
        console.rule(f"{report['kind']} writes")
        console.print(report["sample"], markup=False, highlight=False)
    table = Table("attention", "bits/byte, held out", "seconds/step", "peak memory")
    for r in reports:
        bits, seconds, peak = (float(r[name]) for name in ("bits_per_byte", "seconds_per_step", "peak_bytes"))  # type: ignore[arg-type]
        table.add_row(str(r["kind"]), f"{bits:.3f}", f"{seconds:.3f}", f"{peak / 2**20:.0f} MiB")
    console.print(table)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = partial(p.add_argument, type=int)
    p.add_argument("text", nargs="?", type=Path, help="any file; default: the Python manual")
    p.add_argument("--kinds", default="dense,fixed,strided", help="which models to train (default: %(default)s)")
    number("--context", default=1024, help="bytes in view (default: %(default)s)")
    number("--stride", default=64, help="width of the grid (default: %(default)s)")
    number("--summary", default=8, help="summary columns of the fixed pattern (default: %(default)s)")
    p.add_argument(
        "--combine", choices=["merged", "interleaved", "heads"], default="merged", help="(default: %(default)s)"
    )
    number("--layers", default=2, help="(default: %(default)s)")
    number("--width", default=128, help="(default: %(default)s)")
    number("--heads", default=2, help="(default: %(default)s)")
    number("--batch", default=1, help="windows a step (default: %(default)s)")
    number("--steps", default=300, help="(default: %(default)s)")
    p.add_argument("--learning-rate", type=float, default=5e-3, help="(default: %(default)s)")
    number("--seed", default=0, help="of weights, batches and samples (default: %(default)s)")
    number("--save-every", default=50, help="steps between checkpoints (default: %(default)s)")
    number("--sample-bytes", default=300, help="(default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.7, help="of the samples (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("sparse_bytes"), help="checkpoints (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoints in --output")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the training curves (.png, .svg, .pdf)")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return p


def compare(args: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    names = Settings.__dataclass_fields__
    settings = Settings(**{name: getattr(args, name) for name in names})
    if args.plot:
        check_plot(args.plot)
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - {"dense", "fixed", "strided"}:
        raise NectarError(f"--kinds {sorted(unknown)[0]}: choose from dense, fixed, strided")
    if settings.width % settings.heads:
        raise NectarError(f"--width {settings.width} is not a multiple of --heads {settings.heads}")
    text = read_text(args.text)
    split = len(text) * 9 // 10
    if len(text) - split <= settings.context:
        raise NectarError(
            f"the text has {len(text)} bytes: give at least {10 * settings.context + 20}, or less --context"
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NectarError(f"--output {args.output} cannot be made: {error.strerror}") from None
    runs = [Run(kind, settings, args.output) for kind in kinds]
    columns = TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for run in runs:
            if args.resume and run.path.exists():
                run.load()
            run.train(text[:split], progress, args.save_every)
    reports = [run.report(text[split:], args.sample_bytes, args.temperature) for run in runs]
    if args.plot:
        plot(runs, args.plot)
    return reports


def main(argv: Sequence[str] | None = None) -> int:
    args, console = parser().parse_args(argv), Console(stderr=True)
    try:
        reports = compare(args, console)
    except NectarError as error:
        print(f"sparse_bytes: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps({"models": reports}))
    else:
        show(reports, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
