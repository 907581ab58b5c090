"""The user's defaults: a TOML file with a model, its adapter, a library and a budget. Options on the command line come
first.

model = "Qwen3-1.7B"
adapter = "~/adapters/mine"
library = "~/Documents/nectar"
budget = "2%"
"""

import os
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from .errors import NectarError

_LARGEST = 100_000  # bytes; such a file has a few lines


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the file may set; None where it does not.

    model: for `fit` and `add`, as in --model. adapter: of that model, as in --adapter. library: the folder of the
    library. budget: as in --budget.
    """

    model: str | None = None
    adapter: str | None = None
    library: Path | None = None
    budget: str | None = None


def path() -> Path:
    """Where the file is, or would be: NECTAR_CONFIG; on a Mac Library/Application Support/nectar if it is there; else
    nectar in the user's folder for configurations."""
    if chosen := os.environ.get("NECTAR_CONFIG"):
        return Path(chosen).expanduser()
    mac = Path("~/Library/Application Support/nectar/config.toml").expanduser()
    if sys.platform == "darwin" and mac.exists():
        return mac
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "nectar" / "config.toml"


def read() -> Settings:
    """The settings, all None without a file; NectarError, with the file's name, for anything that is not as above."""
    file = path()
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise NectarError(f"{file}: too large for a file of settings")
        table = tomllib.loads(content.decode())
    except (FileNotFoundError, NotADirectoryError):
        return Settings()
    except OSError as error:
        raise NectarError(f"{file} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NectarError(f"{file} is not TOML: {error}") from None
    return _checked(table, file)


def _checked(table: dict[str, object], file: Path) -> Settings:
    known = [field.name for field in fields(Settings)]
    if unknown := [name for name in table if name not in known]:
        raise NectarError(f"{file}: there is no setting {unknown[0]!r}; the settings are {', '.join(known)}")
    for name, value in table.items():
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise NectarError(f'{file}: {name} must be a text in quotes, as in {name} = "{_EXAMPLES[name]}"')
    texts = {name: str(value).strip() for name, value in table.items()}
    library = Path(texts["library"]).expanduser() if "library" in texts else None
    if "adapter" in texts and "model" not in texts:
        raise NectarError(f"{file}: adapter is of a model: set model, too")
    model, adapter, budget = (texts.get(name) for name in ("model", "adapter", "budget"))
    return Settings(model=model, adapter=adapter, library=library, budget=budget)


_EXAMPLES = {"model": "Qwen3-1.7B", "adapter": "~/adapters/mine", "library": "~/Documents/nectar", "budget": "2%"}
