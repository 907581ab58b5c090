"""Starting several ranks of one command with `mlx.launch`, for tests."""

import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(*command, ranks=2, **environment):
    """So many processes of `python COMMAND` -> that of the launcher, or of one the command's; all on stdout."""
    port = _free_ports(8 * ranks)
    launcher = Path(sys.executable).with_name("mlx.launch")
    launch = [launcher, "-n", str(ranks), "--backend", "ring", "--starting-port", str(port)] if ranks > 1 else []
    return subprocess.Popen(
        [*map(str, launch), sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.PIPE,  # and it stays open: the launcher spins on one that has ended
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _free_ports(count):
    """The first of so many free ports in a row, below those that the system gives to connections."""
    while True:
        first = random.SystemRandom().randrange(10_000, 32_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as free:
                    free.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def said(process, *, seconds=240):
    """All that it says until it has ended."""
    watch = threading.Timer(seconds, process.kill)
    watch.start()
    try:
        return process.stdout.read()
    finally:
        watch.cancel()
        process.wait()
        process.stdin.close()
