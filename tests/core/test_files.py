"""A file appears whole or not at all."""

import fcntl
import os
import resource
import stat
import tempfile
import threading

import pytest

from nectar_mlx.core.files import write_atomically, written_at_once
from nectar_mlx.errors import NectarError


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    return tmp_path / "file"


def names(path):
    return [p.name for p in path.parent.iterdir()]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0])
def test_the_file_has_the_content_and_is_for_the_user_alone(path, mask):
    before = os.umask(mask)
    try:
        write_atomically(path, lambda file: file.write(b"after"))
    finally:
        os.umask(before)
    assert path.read_bytes() == b"after" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(path) == ["file"]


def test_until_it_is_whole_the_old_content_stays(path):
    def write(file):
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"before"
        file.write(b", whole")

    write_atomically(path, write)
    assert path.read_bytes() == b"half, whole"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no")])
def test_an_interrupted_write_leaves_nothing(path, error):
    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"before" and names(path) == ["file"]


def test_a_file_that_grows_too_large_is_an_error_with_its_reason(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(NectarError, match=rf"cannot write {path}: File too large"):
            write_atomically(path, lambda file: file.write(bytes(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and names(path) == ["file"]


def test_a_missing_folder_and_a_folder_in_its_place_are_errors(path):
    with pytest.raises(NectarError, match="No such file"):
        write_atomically(path.parent / "none" / "file", lambda file: file.write(b""))
    (path.parent / "folder").mkdir()
    with pytest.raises(NectarError, match=r"cannot write .*folder"):
        write_atomically(path.parent / "folder", lambda file: file.write(b""))
    assert sorted(names(path)) == ["file", "folder"]


def test_file_and_folder_reach_the_disk_in_this_order(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    write_atomically(path, lambda file: file.write(b"after"))
    assert synced == [False, True]


def test_of_many_writers_one_wins_whole(path):
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [
        threading.Thread(target=write_atomically, args=(path, lambda file, content=content: file.write(content)))
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and names(path) == ["file"]


def test_what_a_killed_writer_left_is_removed_by_the_next(path):
    """That of a writer who is alive stays, and so does everything else."""
    child = os.fork()
    if child == 0:
        write_atomically(path, lambda file: os.kill(os.getpid(), 9))
    os.waitpid(child, 0)
    (left,) = [p for p in path.parent.iterdir() if p != path]
    (path.parent / ".nectar-other").write_text("mine")

    def write(file):
        assert not left.exists() and len(names(path)) == 3
        write_atomically(path, lambda inner: inner.write(b"first"))
        assert len(names(path)) == 3, "the one that is being written is there"
        file.write(b"second")

    write_atomically(path, write)
    assert path.read_bytes() == b"second" and sorted(names(path)) == [".nectar-other", "file"]


def test_a_folder_of_a_killed_writer_too(tmp_path):
    (tmp_path / ".model-kept").mkdir()
    child = os.fork()
    if child == 0:
        with written_at_once(tmp_path / "model"):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    with written_at_once(tmp_path / "model") as scratch:
        (scratch / "weights").write_text("x")
        with written_at_once(tmp_path / "model"):
            assert scratch.exists()
    assert {p.name for p in tmp_path.iterdir()} == {".model-kept", "model"}


@pytest.mark.parametrize("module, name", [(tempfile, "mkdtemp"), (fcntl, "flock")], ids=["before it is open", "then"])
def test_a_folder_that_another_writer_took_for_abandoned_is_made_anew(tmp_path, monkeypatch, module, name):
    real = getattr(module, name)

    def after_the_other_writer(*arguments, **options):
        monkeypatch.setattr(module, name, real)
        made = real(*arguments, **options)
        next(tmp_path.iterdir()).rmdir()
        return made

    monkeypatch.setattr(module, name, after_the_other_writer)
    with written_at_once(tmp_path / "model") as scratch:
        (scratch / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "whole"
