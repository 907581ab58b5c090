"""Fits that are killed at random moments, and then continued by the same command: is the file that of a whole fit?

    python -m tests.fitting.killing FOLDER [--kills 50] [--model NAME] [--seed 0] [-- options of fit]

Prints one JSON line: kills, how many files were identical byte for byte, how many fits had kept work when they were
killed, what was left beside the files. FOLDER is empty; a toy model is made there where none is named.

Every fit is a fork of one process that has imported everything and computed nothing.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

TOY = ["--queries", "300", "--steps", "20", "--context-tokens", "200", "--budget", "0.3", "--seed", "1"]


def forked(work, log, *, kill_after=None):
    """work() in a child -> its exit code, and its seconds. kill_after: seconds until SIGKILL."""
    pid = os.fork()
    if pid == 0:
        handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            code = work() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        sys.stderr.flush()
        os._exit(code)
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        if kill_after is not None and time.monotonic() - start > kill_after:
            os.kill(pid, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


def make_toy(folder):
    from tests import toys

    toys.save_model(toys.toy("llama"), folder / "model", toys.tokenizer())


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model")
    parser.add_argument("--seed", type=int, default=0)
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, TOY)
    arguments = parser.parse_args(own)
    import mlx_lm  # noqa: F401
    import rich.live  # noqa: F401

    import nectar_mlx.documents
    import nectar_mlx.fitting.pipeline
    import nectar_mlx.nectar  # noqa: F401
    from nectar_mlx import fit
    from nectar_mlx.core import device
    from nectar_mlx.fitting import checkpoint
    from tests.fitting.toy_fit import TEXT

    checkpoint.SAVE_SECONDS = (
        0.2 if arguments.model is None else 2.0
    )  # as much of a short fit as 15 s are of a long one
    folder, log = arguments.folder, arguments.folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        forked(lambda: make_toy(folder), log)
    (folder / "book.txt").write_text(TEXT)

    def command(output):
        named = ["--model", arguments.model or str(folder / "model"), "--context", str(folder / "book.txt")]
        return lambda: run([*named, "--output", str(output), *options])

    def run(given):
        quick = {"fit_checks": 2, "fit_conversations": 6, "fit_batch": 128, "trial_steps": 5}
        with device.using(replace(device.device(), **quick)):
            return fit.main(given)

    code, seconds = forked(command(folder / "whole.nectar"), log)
    assert code == 0, log.read_text()
    whole = (folder / "whole.nectar").read_bytes()
    chance, identical, kept, killed, left, others = random.Random(arguments.seed), 0, 0, 0, set(), []
    for number in range(arguments.kills):
        place = folder / f"kill-{number}"
        place.mkdir()
        at = chance.uniform(0.05, 1.0) * seconds
        code, _ = forked(command(place / "book.nectar"), log, kill_after=at)
        killed += code == -signal.SIGKILL
        kept += any(place.rglob("*.safetensors")) or any(place.rglob("conversations.json"))
        kept_answers = any(place.rglob("answers.json"))
        code, _ = forked(command(place / "book.nectar"), log)
        output = place / "book.nectar"
        same = code == 0 and output.read_bytes() == whole
        identical += same
        if not same:
            others.append([number, round(at, 2), kept_answers, log.read_text()[-300:]])
        print(
            f"{number}: killed at {at:.1f} s, {'identical' if same else 'NOT identical'}", file=sys.stderr, flush=True
        )
        left |= {p.name for p in place.iterdir()} - {"book.nectar"}
        shutil.rmtree(place)
    figures = {"kills": arguments.kills, "killed": killed, "identical": identical, "kept": kept, "left": sorted(left)}
    print(json.dumps(figures | {"seconds": round(seconds, 1), "others": others}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads do not survive a fork
    import nectar_mlx  # noqa: F401  before mlx.core

    main(sys.argv[1:])
