"""Commands that are stopped at random moments, and then given again: are the files those of a whole run?

    python -m tests.fitting.killing FOLDER [fit|update|add] [--kills 50] [--model NAME] [--full] [-- OPTIONS]

`update` has a changed text for a file that `fit --keep-study` wrote; `add` has a folder of three notes. They are
stopped by SIGKILL; with --full, by a full disk: FOLDER/disk, a file system of its own, gets room for a random part of
what they write. Prints one JSON line: after how many all files were identical byte for byte, how many commands had kept
work when they were stopped, and what went wrong. FOLDER is empty but for `disk`; a toy model is made there where none
is named. OPTIONS are those of fit or add.

Every command is a fork of one process that has imported everything and computed nothing.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

TOY = ["--queries", "300", "--steps", "20", "--budget", "0.3", "--context-tokens", "200", "--seed", "1"]


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
    from tests.fitting.toy_fit import shallow

    toys.save_model(shallow(), folder / "model", toys.tokenizer())


def contents(place):
    """What a command left: the bytes of files; of a library's database, the rows that are not times."""
    from nectar_mlx.library import Library
    from tests.library.test_kill import contents as of_library

    if (place / "library").is_dir():
        return of_library(Library(place / "library"))
    return {str(path.relative_to(place)): path.is_file() and path.read_bytes() for path in place.rglob("*")}


class Work:
    """One of the three commands, on texts and a model in a folder. options: of the fit or of `add`; None for those of a
    fit of a second."""

    def __init__(self, name, folder, *, model=None, options=None):
        from tests.fitting.toy_fit import TEXT

        self.name, self._folder = name, folder
        self._options = options if options is not None else TOY[:6] if name == "add" else TOY
        self._model, self._book, self._notes = model or str(folder / "model"), folder / "book.txt", folder / "notes"
        self._book.write_text(TEXT)
        self._notes.mkdir()
        for number in range(3):
            (self._notes / f"{number}.txt").write_text(TEXT.replace("number", f"of note {number}, number"))

    def prepare(self, log):
        """The file that is to be updated; the text is another one from now on."""
        if self.name == "update":
            base = ["--context", self._book, "--output", self._folder / "base.nectar", *self._options, "--keep-study"]
            code, _ = forked(lambda: self._run("fit", *base), log)
            assert code == 0, log.read_text()
            self._book.write_text(self._book.read_text().replace("number 1,", "number 9,"))

    def begin(self, place):
        """What is there before the command."""
        place.mkdir()
        if self.name == "update":
            shutil.copy(self._folder / "base.nectar", place / "book.nectar")

    def run(self, place):
        if self.name == "add":
            return self._run("add", self._notes, "--library", place / "library", *self._options)
        if self.name == "update":
            return self._run("update", place / "book.nectar", "--context", self._book)
        return self._run("fit", "--context", self._book, "--output", place / "book.nectar", *self._options)

    def _run(self, command, *arguments):
        from nectar_mlx import add, fit, update
        from nectar_mlx.core import device

        main = {"fit": fit.main, "add": add.main, "update": update.main}[command]
        quick = dict(fit_checks=2, fit_conversations=6, fit_answer_tokens=24, fit_batch=128, trial_steps=5)
        with device.using(replace(device.device(), **quick)):
            return main([*map(str, arguments), "--model", self._model])


def kill(work, place, log, *, chance, seconds):
    """Stops the command of a place by SIGKILL -> when, whether it was stopped, nothing that is wrong."""
    at = chance.uniform(0.05, 1.0) * seconds
    code, _ = forked(lambda: work.run(place), log, kill_after=at)
    return f"at {at:.1f} s", code == -signal.SIGKILL, ""


def fill(work, place, log, *, chance, size):
    """Stops it by a disk that has room for a part of its work -> the room, whether it was stopped, what is wrong about
    how it ended. size: of what it leaves."""
    room, filler = int(chance.uniform(0, 2.5) * size), place.parent / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(place).free - room)))
    code, _ = forked(lambda: work.run(place), log)
    filler.unlink()
    said = log.read_text()
    last = said.strip().splitlines()[-1:]
    if code and (code != 2 or "Traceback" in said or not re.search("No space left|disk is full", str(last))):
        return f"with {room:,} bytes", True, f"it ended with {code}: {said[-300:]}"
    return f"with {room:,} bytes", code != 0, ""


def stopped_and_continued(work, place, log, *, whole, stop):
    """Whether it was stopped and had kept work, and what went wrong."""
    work.begin(place)
    before = contents(place)
    at, stopped, wrong = stop(work, place, log)
    kept = any(place.rglob("*.safetensors")) or any(place.rglob("conversations.json"))
    if before and contents(place)["book.nectar"] not in (before["book.nectar"], whole["book.nectar"]):
        wrong = "the file that was there is lost"
    code, _ = forked(lambda: work.run(place), log)
    if not wrong and (code or contents(place) != whole):
        left = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
        wrong = f"not the files of a whole run: {left} {log.read_text()[-300:]}"
    print(f"{place.name}: stopped {at} {wrong or 'identical'}", file=sys.stderr, flush=True)
    shutil.rmtree(place)
    return stopped, kept, wrong


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", nargs="?", choices=["fit", "update", "add"], default="fit")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, None)
    arguments = parser.parse_args(own)
    import mlx_lm  # noqa: F401
    import rich.live  # noqa: F401

    import nectar_mlx.documents
    import nectar_mlx.fitting.updating
    import nectar_mlx.library
    import nectar_mlx.nectar  # noqa: F401
    from nectar_mlx.fitting import checkpoint, pipeline
    from nectar_mlx.fitting.samples import self_study
    from tests.fitting.toy_fit import FEW_TOGETHER

    # As much of a short fit as 15 s are of a long one.
    checkpoint.SAVE_SECONDS = 0.2 if arguments.model is None else 2.0
    if arguments.model is None:
        self_study.FEWEST_TOGETHER = FEW_TOGETHER
    if arguments.full:  # else most would be refused before the work
        pipeline.free_space = lambda folder: 1 << 40
    folder, log = arguments.folder, arguments.folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        forked(lambda: make_toy(folder), log)
    work = Work(arguments.work, folder, model=arguments.model, options=options)
    work.prepare(log)
    work.begin(folder / "whole")
    code, seconds = forked(lambda: work.run(folder / "whole"), log)
    assert code == 0, log.read_text()
    whole, chance = contents(folder / "whole"), random.Random(arguments.seed)
    size = sum(path.stat().st_size for path in (folder / "whole").rglob("*"))
    stop = partial(fill, chance=chance, size=size) if arguments.full else partial(kill, chance=chance, seconds=seconds)
    places = [folder / ("disk" if arguments.full else "") / f"stop-{number}" for number in range(arguments.kills)]
    done = [stopped_and_continued(work, place, log, whole=whole, stop=stop) for place in places]
    figures = {"kills": len(done), "stopped": sum(d[0] for d in done), "kept": sum(d[1] for d in done)}
    wrong = [d[2] for d in done if d[2]]
    print(json.dumps({**figures, "identical": len(done) - len(wrong), "seconds": round(seconds, 1), "wrong": wrong}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads do not survive a fork
    import nectar_mlx  # noqa: F401  before mlx.core

    main(sys.argv[1:])
