"""Looks for files that a reader cannot stand, guided by which of its lines each file reaches.

    uv pip install atheris
    python -m tests.fuzz_readers nectar --seconds 600      (or kv, gguf, docx, epub, pdf, html)

Every file must be read, or refused with one line, within a second or so; anything else ends the run with the file.
Without atheris, and with `--blind`, the seeds are only damaged at random. Checksums are taken for right: a fuzzer would
find nothing behind them. What pdfium does in C is not seen, only what becomes of it.
"""

import argparse
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType

import mlx.core as mx
import numpy as np

import nectar_mlx
from nectar_mlx import NectarError, store
from nectar_mlx.models import gguf_file, gguf_settings
from nectar_mlx.retrieval import KeyFile, sketch
from nectar_mlx.store import load, tensor_file
from tests import fuzz_documents
from tests.models import hostile_gguf
from tests.store import test_hostile as files

Reader = Callable[[Path], object]
KINDS = ("nectar", "kv", "gguf", *fuzz_documents.KINDS)
_PARTS = ("store", "core", "heads", "models", "documents", "retrieval", "mlxlm")
INSTRUMENTED = tuple(f"nectar_mlx.{part}" for part in _PARTS)
LIMIT = 2.0  # seconds of computing for one file
TIE = "0" * 64


def seeds(kind: str, folder: Path) -> list[bytes]:
    """Good files, small ones."""
    if kind in fuzz_documents.KINDS:
        return fuzz_documents.seeds(kind)
    path, made = folder / "seed", list[bytes]()
    if kind == "gguf":
        return [hostile_gguf.written(hostile_gguf.settings(k), hostile_gguf.tensors()) for k in ("gpt2", "llama")]
    if kind == "kv":
        keys, queries = mx.random.normal((2, 30, 16)), np.random.default_rng(0).normal(size=(2, 9, 16))
        KeyFile.of([(keys, keys)], small=sketch.build([keys], [queries], scale=0.25), nectar=TIE).write(path)
        return [path.read_bytes()]
    for name, bits in files.ALL:
        store.write(path, *files.made(name, bits))
        made.append(path.read_bytes())
    return made


def reader(kind: str) -> Reader:
    """What reads such a file, without its checksums."""
    if kind in fuzz_documents.KINDS:
        return partial(fuzz_documents.read, kind=kind)
    if kind == "gguf":
        return _gguf
    tensor_file.metadata_digest = lambda metadata: metadata.get("digest", "")
    tensor_file.read_sealed = lambda path: {n: x for n, x in tensor_file.read(path).items() if n != "checksum"}
    tensor_file.digest = _Anything
    store.file.prefix_digest = _Anything
    return _kv if kind == "kv" else nectar_mlx.Nectar.read


class _Anything(str):
    """A digest that equals every other."""

    def __new__(cls, *_: object) -> "_Anything":
        return super().__new__(cls, TIE)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, str)

    __hash__ = str.__hash__


def _kv(path: Path) -> None:
    keys = load.key_file(path, nectar=TIE, shape=(1, 2, 30), head_dim=16)
    if keys is not None:
        keys.read(0, np.zeros((2, 3), np.int32))


def _gguf(path: Path) -> None:
    metadata, tensors = gguf_file.read(path)
    try:
        gguf_settings.check_model("llama", metadata)
        gguf_settings.check_tokenizer(metadata)
        config = hostile_gguf.CONFIG | {"vocab_size": len(hostile_gguf.TOKENS)}
        gguf_settings.check_tensors(metadata, config, tensors)
    except ValueError:  # `gguf.convert` makes a line of it
        return


def check(read: Reader, path: Path, data: bytes) -> None:
    """Raises for anything but a file that is read, or refused with one line."""
    path.write_bytes(data)
    start = time.process_time()
    try:
        read(path)
    except NectarError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"a long message: {error}"
    assert time.process_time() - start < LIMIT, "it takes too long"


def damaged(seeds: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """Seeds with bytes changed, cut out, doubled or taken from elsewhere."""
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            at, length = chance.randrange(len(data)), chance.choice((1, 1, 2, 4, 8, 100))
            if chance.random() < 0.8:  # what is said of the numbers, not the numbers
                at = chance.randrange(min(len(data), 4000))
            how = chance.randrange(5)
            if how == 0:
                data[at : at + length] = chance.randbytes(length)
            elif how == 1:
                data[at : at + 1] = chance.choice((b"0", b"9", b"-", b"[", b"]", b"{", b'"', b",", b"\xff", b"e"))
            elif how == 2:
                del data[at : at + length]
            elif how == 3:
                data[at:at] = data[at : at + length]
            else:
                data[at : at + 8] = chance.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
            if not data:
                break
        yield bytes(data)


def blind(kind: str, *, seconds: float, seed: int = 0) -> int:
    """How many files were tried."""
    with tempfile.TemporaryDirectory() as scratch:
        made, read = seeds(kind, Path(scratch)), reader(kind)
        until = time.monotonic() + seconds
        for count, data in enumerate(damaged(made, random.Random(seed))):
            if time.monotonic() > until:
                return count
            try:
                check(read, Path(scratch, "case"), data)
            except BaseException:
                Path(tempfile.gettempdir(), f"finding.{kind}").write_bytes(data)
                raise
    return 0


def guided(kind: str, *, seconds: int, corpus: Path | None) -> None:
    """Ends the process, with 0 if there was no finding. corpus: a folder for what reached new lines, to go on from."""
    import atheris

    scratch = tempfile.TemporaryDirectory()
    corpus, path = corpus or Path(scratch.name, "corpus"), Path(scratch.name, "case")
    corpus.mkdir(exist_ok=True)
    made, read = seeds(kind, Path(scratch.name)), reader(kind)
    for number, data in enumerate(made):
        (corpus / f"seed-{number}").write_bytes(data)
        path.write_bytes(data)
        read(path)  # which also imports what is to be instrumented
    for name, module in list(sys.modules.items()):
        if name.startswith(INSTRUMENTED):
            for function in _functions(module):
                atheris.instrument_func(function)
    arguments = [sys.argv[0], str(corpus), f"-max_total_time={seconds}", "-max_len=200000", "-rss_limit_mb=4096"]
    atheris.Setup([*arguments, "-timeout=20", f"-artifact_prefix={tempfile.gettempdir()}/finding.{kind}."],
                  lambda data: check(read, path, data))  # fmt: skip
    atheris.Fuzz()


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """What is defined in a module, methods among it."""
    own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
    members = [member for x in own if isinstance(x, type) for member in vars(x).values()]
    for x in [*own, *members]:
        x = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
        if isinstance(x, FunctionType) and x.__code__.co_filename == module.__file__:
            yield x


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="a folder for what reached new lines")
    parser.add_argument("--blind", action="store_true")
    options = parser.parse_args()
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, write_through=True)
    if options.blind:
        print(f"{blind(options.kind, seconds=options.seconds):,} files without a finding")
    else:
        guided(options.kind, seconds=options.seconds, corpus=options.corpus)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    main()
