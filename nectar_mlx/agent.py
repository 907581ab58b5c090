"""`nectar serve … --install-agent`: a launchd agent on a Mac, so that the server runs from login on.

launchd starts it without a shell: with no PATH of the user's, in the folder of the root. So the agent names the Python
that runs now, and the folder that relative names count from.
"""

import argparse
import os
import plistlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .core.progress import Log
from .errors import NectarError

LABEL = "org.nectar-mlx.serve"
_KEPT = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "NECTAR_CACHE", "NECTAR_CONFIG", "NECTAR_API_KEY")


def add_options(parser: argparse.ArgumentParser, log: Log) -> None:
    """Adds --install-agent, which is for `install`, and --remove-agent, which acts at once, without files to serve."""
    parser.add_argument(
        "--install-agent", action="store_true", help="on a Mac: serve these files from now on, and after every login"
    )
    parser.add_argument("--remove-agent", action=_Remove, nargs=0, log=log, help="end that, and stop the server")


def install(nectars: Sequence[str], *, log: Log, arguments: Sequence[str] | None = None) -> None:
    """Writes the agent that runs this very command, and loads it; one that was there is replaced.

    nectars: the files, which must be whole enough to name their model: launchd would start a server that fails again
    and again. arguments: of `serve`, by default this process's. NectarError on other systems, or if launchd refuses.
    """
    from . import store
    from .models import hub

    _check_system()
    for nectar in nectars if list(nectars) != ["library"] else ():
        store.model_name(hub.nectar_file(nectar))
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in words[words[:1] == ["serve"] :] if word != "--install-agent"]
    path = plist_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # its mode and target would stay
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # it may hold a key
        plistlib.dump(description(words), file)
    _launchctl("bootout", f"{_domain()}/{LABEL}", check=False)
    _launchctl("bootstrap", _domain(), str(path))
    log(f"{path}: the server runs from now on; its messages are in {_log_path()}; --remove-agent ends it")


def remove(*, log: Log) -> None:
    """Stops the server and removes the agent. NectarError on other systems."""
    _check_system()
    _launchctl("bootout", f"{_domain()}/{LABEL}", check=False)
    existed = plist_path().exists()
    plist_path().unlink(missing_ok=True)
    log(f"{plist_path()}: " + ("removed" if existed else "there is none"))


def description(arguments: Sequence[str]) -> dict[str, Any]:
    """The agent as a property list. arguments: of `serve`."""
    return {
        "Label": LABEL,
        "ProgramArguments": [sys.executable, "-m", "nectar_mlx", "serve", *arguments],
        "WorkingDirectory": os.getcwd(),
        "EnvironmentVariables": {name: os.environ[name] for name in _KEPT if name in os.environ},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,  # seconds between two starts
        "ProcessType": "Interactive",  # macOS slows down other agents
        "StandardOutPath": str(_log_path()),
        "StandardErrorPath": str(_log_path()),
    }


def plist_path() -> Path:
    return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def _log_path() -> Path:
    return Path.home() / "Library" / "Logs" / "nectar.log"


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _check_system() -> None:
    if sys.platform != "darwin":
        raise NectarError("agents are launchd's, on a Mac; elsewhere a systemd user unit can run `nectar serve`")


def _launchctl(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["/bin/launchctl", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise NectarError(f"launchctl {arguments[0]} failed: {reason[-1]}")


class _Remove(argparse.Action):
    """Removes the agent while the arguments are parsed, as --help prints."""

    def __init__(self, *arguments: Any, log: Log, **options: Any):
        super().__init__(*arguments, **options)
        self._log = log

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        remove(log=self._log)
        parser.exit()
