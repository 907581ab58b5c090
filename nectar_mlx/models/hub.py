"""Models and .nectar files on the Hugging Face hub and in its local cache: repositories of a name, and their files."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from nectar_mlx.core.progress import Log
from nectar_mlx.errors import NectarError

_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
_NECTAR_FILES = ["*.nectar", "*.nectar.kv", "*.nectar.*.kv"]
_OWNERS = ("Qwen", "HuggingFaceTB", "meta-llama", "mistralai", "google", "microsoft", "ibm-granite", "allenai")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TIMEOUT = 5.0  # seconds
_MOST_HASHED = 64 << 20  # bytes of a file
_MOST_HEADER = 100 << 20  # bytes of safetensors' header, its own limit
MEMORY_SHARE = 0.5  # the largest share of the memory for weights: a context and its fit need room too


class Unreachable(Exception):
    """The hub gives no answer; the message has the reason."""


def repositories(name: str) -> list[str]:
    """The repositories that a name may mean, the best first: full precision, then 8 and 4 bits."""
    if "/" in name:
        return [name]
    community = f"mlx-community/{name}"
    return [
        f"{community}-bf16",
        community,
        *(f"{owner}/{name}" for owner in _OWNERS),
        f"{community}-8bit",
        f"{community}-4bit",
    ]


def cached(name: str) -> tuple[str, Path] | None:
    """The first of a name's repositories that the hub's local cache holds whole, and its folder there."""
    for repository in repositories(name):
        try:
            folder = huggingface_hub.snapshot_download(repository, allow_patterns=_FILES, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            continue
        if _is_model(Path(folder)) and not damaged(Path(folder)):
            return repository, Path(folder)
    return None


def find(name: str) -> str | None:
    """The first of a name's repositories on the hub whose weights fit this machine's memory, else the smallest.

    None where the hub has none of them. Raises Unreachable.
    """
    limit = MEMORY_SHARE * memory()
    too_large: dict[str, int] = {}
    for repository in repositories(name):
        size = _weight_bytes(repository)
        if size is None:
            continue
        if size <= limit:
            return repository
        too_large[repository] = size
    return min(too_large, key=lambda repository: too_large[repository], default=None)


def download(repository: str, *, log: Log) -> Path:
    """Fetch what mlx-lm needs of a repository into the hub's cache.

    Raises Unreachable, or NectarError for a repository that is gated or holds nothing that mlx-lm reads.
    """
    log(f"downloading {repository} from {constants.ENDPOINT}")
    try:
        folder = _snapshot(repository, _FILES)
    except GatedRepoError as error:
        advice = "accept its licence on its page, then run `hf auth login`"
        raise NectarError(f"{repository} is gated: {advice}") from error
    if not _is_model(folder):
        raise NectarError(f"{repository} holds no safetensors weights that mlx-lm could read")
    return folder


def memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def nectar_file(name: str | Path) -> Path:
    """The path of a .nectar: a file's own, or for user/name that file of the repository, downloaded where needed, with
    its keys.

    Raises NectarError for a folder, for a file whose fit has not ended, and for a repository that cannot be had or does
    not hold exactly one .nectar.
    """
    path = Path(name)
    if path.is_dir():
        raise NectarError(f"{name} is a folder, not a .nectar: `nectar fit --context {name}` makes one of it")
    if os.path.isdir(f"{path}.partial") and not os.path.exists(path):
        raise NectarError(f"{name} is not there yet: its fit still runs, or the same `nectar fit` continues it")
    repository = str(name)
    if os.path.exists(path) or path.suffix == ".nectar" or not _REPOSITORY.fullmatch(repository):
        return path
    try:
        folder = _snapshot(repository, _NECTAR_FILES)
    except RepositoryNotFoundError:
        raise NectarError(f"{name}: no such file here, and no such repository at {constants.ENDPOINT}") from None
    except (Unreachable, GatedRepoError) as error:
        problem = f"{constants.ENDPOINT} gives no answer ({_reason(error)})"
        raise NectarError(f"{name}: no such file here or in the hub's cache, and {problem}") from None
    files = sorted(folder.glob("*.nectar"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files) or "no .nectar"
        raise NectarError(f"{name}: the repository holds {held}; it must hold exactly one")
    return files[0]


def sha256(path: Path) -> str:
    """Of a file, hex: what a card says of the files beside it, so that a copy can be compared with what was pushed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_public(repository: str) -> bool | None:
    """Whether everybody can see a repository; None where there is none that we can see. NectarError where the hub does
    not say."""
    try:
        with _asking():
            return not huggingface_hub.HfApi().model_info(repository, timeout=_TIMEOUT).private
    except RepositoryNotFoundError:
        return None
    except HFValidationError as error:
        raise NectarError(f"{repository} is not a repository's name (user/name): {_reason(error)}") from None
    except (Unreachable, GatedRepoError) as error:
        raise NectarError(f"{constants.ENDPOINT} does not say who sees {repository} ({_reason(error)})") from None


def upload(repository: str, files: dict[str, bytes | Path], *, private: bool) -> str:
    """Puts files into a repository, which is made where there is none, in one commit; returns its address.

    Raises NectarError where the hub does not take them.
    """
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        with _asking():
            api = huggingface_hub.HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            api.create_commit(repository, operations, commit_message="Upload a .nectar")
    except HFValidationError as error:
        raise NectarError(f"{repository} is not a repository's name (user/name): {_reason(error)}") from None
    except (Unreachable, RepositoryNotFoundError, GatedRepoError) as error:
        advice = "is the name yours, and are you logged in (`hf auth login`)?"
        raise NectarError(f"{constants.ENDPOINT} does not take {repository} ({_reason(error)}); {advice}") from None
    return f"{constants.ENDPOINT}/{repository}"


def _weight_bytes(repository: str) -> int | None:
    """The size of a repository's weights, or None where mlx-lm has nothing to read. Raises Unreachable."""
    try:
        with _asking():
            info: ModelInfo = huggingface_hub.HfApi().model_info(repository, files_metadata=True, timeout=_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError):
        return None
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = [size for file, size in files.items() if file.startswith("model") and file.endswith(".safetensors")]
    return sum(weights) if weights and "config.json" in files else None


@contextmanager
def _asking() -> Iterator[None]:
    """Unreachable for whatever comes out of the libraries under huggingface_hub: no answer, an address that is none, a
    token with characters that no header takes, a proxy whose package is missing. What the hub says of a repository is
    raised as it is."""
    try:
        yield
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError):
        raise
    except Exception as error:
        raise Unreachable(_reason(error)) from error


def _snapshot(repository: str, patterns: list[str]) -> Path:
    """The folder of a repository in the hub's cache, downloaded where needed; damaged files are fetched again.

    Raises Unreachable, or what huggingface_hub raises for a repository that is gated or is not there.
    """
    with _asking():
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        for name in damaged(folder):
            huggingface_hub.hf_hub_download(repository, name, force_download=True)
        if broken := damaged(folder):
            raise OSError(f"{broken[0]} does not arrive whole")
    return folder


def damaged(folder: Path) -> list[str]:
    """The files of a snapshot that are not what the hub said, by their names.

    The cache names a file by its hash: git's of small files, the sha256 of large ones. Those of some hundred MB are not
    hashed at each start; weights of any size must be as long as their header says.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return [path.relative_to(folder).as_posix() for path in files if not (_has_its_hash(path) and _fills_header(path))]


def _has_its_hash(path: Path) -> bool:
    blob = path.resolve()
    size, known = blob.stat().st_size if blob.is_file() else -1, blob.name
    if size < 0 or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", known) or size > _MOST_HASHED:
        return size >= 0
    content = blob.read_bytes()
    if len(known) == 40:
        return hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest() == known
    return hashlib.sha256(content).hexdigest() == known


def _fills_header(path: Path) -> bool:
    """Whether a file of weights is as long as its header says; any other file is."""
    if path.suffix != ".safetensors":
        return True
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size, _MOST_HEADER):
            return False
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            return bool(8 + length + max(ends, default=0) == size)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return False


def _is_model(folder: Path) -> bool:
    """Whether a folder has a configuration and every weight file that it names."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").exists():
        return False
    if not index.exists():
        return any(folder.glob("model*.safetensors"))
    try:
        return all((folder / file).exists() for file in set(json.loads(index.read_text())["weight_map"].values()))
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError):
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
