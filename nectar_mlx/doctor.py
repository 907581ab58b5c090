"""`nectar doctor`: what is installed, what the machine has, and what is missing."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__, cli, settings
from .core import blas, extras
from .core.folders import cache_folder, state_folder
from .core.types import JsonObject
from .errors import NectarError

_LIBRARIES = ("mlx", "mlx-lm", "transformers", "tokenizers", "huggingface-hub", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("doctor", "Says what is installed, what the machine has, and what is missing.")
    parser.add_argument("--kernels", action="store_true", help="also compare the kernels with plain operations")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _work(args: argparse.Namespace) -> None:
    facts: JsonObject = {name: part() for name, part in _PARTS.items()}
    facts["kernels"] |= _checked_kernels(facts["kernels"]["backend"]) if args.kernels else {}
    facts["missing"] = _missing(facts)
    if args.json:
        print(json.dumps(facts))
        return
    for missing in facts["missing"]:
        cli.paragraph(f"! {missing}")
    for name, part in facts.items():
        if name != "missing":
            cli.row(name, _readable(part))


def _versions() -> JsonObject:
    found: JsonObject = {"nectar_mlx": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> JsonObject:
    import psutil

    memory, cache = psutil.virtual_memory(), cache_folder()
    disk = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "free_disk_bytes": shutil.disk_usage(disk).free,
    }


def _backend() -> JsonObject:
    import mlx.core as mx

    device = mx.default_device()
    name = "Metal" if mx.metal.is_available() else "CPU" if device == mx.cpu else "CUDA"
    return {"mlx_device": name}


def _blas() -> JsonObject:
    if not (sys.platform == "linux" and blas.is_installed("mlx-cpu")):
        return {"library": "MLX's own"}
    return {"library": blas.loaded, "threads": blas.threads}


def _kernels() -> JsonObject:
    from . import kernels

    return {"backend": kernels.backend()}


def _checked_kernels(backend: str) -> JsonObject:
    """How many of the kernels agree with plain operations."""
    if backend == "ops":
        return {}
    from .benchmarks import checks

    rows = checks.rows()
    return {"checked": len(rows), "right": sum(row["ok"] for row in rows)}


def _models() -> JsonObject:
    from .installed import installed

    return {model.name: {"bytes": model.nbytes, "where": model.where} for model in installed()}


def _settings() -> JsonObject:
    file = settings.path()
    facts: JsonObject = {"file": str(file), "exists": file.exists()}
    try:
        found = settings.read()
    except NectarError as error:
        return facts | {"error": str(error)}
    return facts | {name: str(value) for name, value in vars(found).items() if value is not None}


def _extras() -> JsonObject:
    """What some commands need beside the rest, and what installs it."""
    from .documents import ocr

    packages = {"JSON and forced function calls": ("llguidance", "json"), "charts": ("matplotlib", "plot")}
    facts: JsonObject = {
        what: bool(importlib.util.find_spec(package)) or f"not installed: {extras.install(extra)}"
        for what, (package, extra) in packages.items()
    }
    return facts | {"text recognition": bool(ocr.available()) or ocr.advice()}


def _folders() -> JsonObject:
    return {"cache": str(cache_folder()), "history": str(state_folder())}


_PARTS: dict[str, Callable[[], JsonObject]] = {
    "versions": _versions,
    "machine": _machine,
    "mlx": _backend,
    "BLAS": _blas,
    "kernels": _kernels,
    "models": _models,
    "extras": _extras,
    "settings": _settings,
    "folders": _folders,
}


def _missing(facts: JsonObject) -> list[str]:
    """What keeps this installation from working, or from being fast, and what to do about it."""
    kernels, missing = facts["kernels"], list[str]()
    if "library" in facts["BLAS"] and facts["BLAS"]["library"] is None:
        room = f"{facts['folders']['cache']} and the folder for temporary files cannot take its 25 MB"
        cause = room if blas.is_installed("scipy-openblas32") else f"{extras.install('cpu')} brings one"
        missing.append(f"No optimised BLAS: fits take tens of times longer; {cause}.")
    if not facts["models"]:
        missing.append("No model on this machine: the first fit will download one (`nectar demo`: 93 MB).")
    if "error" in facts["settings"]:
        missing.append(facts["settings"]["error"])
    if kernels.get("right", 0) < kernels.get("checked", 0):
        wrong = kernels["checked"] - kernels["right"]
        missing.append(f"{wrong} kernels are wrong here; plain operations take their place: `nectar bench selftest`.")
    if facts["machine"]["free_disk_bytes"] < 2e9:
        missing.append(f"Less than 2 GB are free on the disk of {Path(facts['folders']['cache'])}.")
    return missing


def _readable(part: JsonObject) -> str:
    return ", ".join(_words(name, value) for name, value in part.items()) or "none"


def _words(name: str, value: object) -> str:
    if isinstance(value, dict):
        return f"{name} ({value['bytes'] / 1e9:.1f} GB, {value['where']})"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {value / 1e9:.1f} GB"
    if name == "backend":
        plain = (
            "plain operations, as there is no GPU" if value == "ops" else f"{value}, each tried before its first use"
        )
        return plain if value == "ops" else f"{plain}; --kernels compares all"
    if name in ("system", "mlx_device", "library", "file"):
        return str(value)
    if name == "exists":
        return "is read" if value else "not written yet"
    if isinstance(value, bool):
        return f"{name}: {'yes' if value else 'no'}"
    if value is None:
        return f"{name.replace('_', ' ')} by the library"
    return f"{name.replace('_', ' ')}{': ' if ' ' in str(value) else ' '}{value}"


if __name__ == "__main__":
    sys.exit(main())
