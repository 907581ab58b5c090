"""Ctrl-C ends a command wherever it arrives."""

import os
import signal
import threading

import pytest

from nectar_mlx import __main__, cli
from nectar_mlx.core import interrupt


class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # it arrives between two steps of Python
            pass


def work(_):
    thing = Interrupted()
    del thing
    if threading.Event().wait(60):
        raise AssertionError


def test_while_an_object_is_destroyed(capsys):
    assert cli.run(cli.Parser("fit"), work, []) == cli.INTERRUPTED
    assert capsys.readouterr().err == "nectar fit: interrupted\n"


def test_while_the_command_is_imported(capsys, monkeypatch):
    def imported(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__.importlib, "import_module", imported)
    assert __main__.main(["fit"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "nectar fit: interrupted\n"


def test_others_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Broken:
        def __del__(self):
            raise ValueError

    with interrupt.kept():
        Broken()
    Broken()
    assert told == [ValueError, ValueError]


def test_an_interrupt_elsewhere_is_one_as_before():
    with pytest.raises(KeyboardInterrupt), interrupt.kept():
        raise KeyboardInterrupt
