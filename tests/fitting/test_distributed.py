"""One fit by several processes: the same bytes go to all, and one file is written."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from nectar_mlx import store
from nectar_mlx.fitting.distributed import World, _packed, _unpacked
from tests import toys
from tests.fitting.toy_fit import FAST, TEXT

PROGRAM = """
import os, sys
import nectar_mlx.fit
from nectar_mlx.fitting import config, train
plain = config.FitConfig
config.FitConfig = lambda **given: plain(**{**%r, **given})
if os.environ.get("DIES") == os.environ.get("MLX_RANK", "none"):
    train.train_heads.__globals__["groups"] = lambda *rest: os._exit(7)
sys.exit(nectar_mlx.fit.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    toys.save_model(toys.toy("llama"), folder / "model", toys.tokenizer())
    (folder / "book.txt").write_text(TEXT)
    (folder / "fit.py").write_text(PROGRAM % FAST)
    return folder


def fit(folder, output, *, ranks, dies=""):
    """Runs a fit in so many processes -> the finished process of the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("mlx.launch")
    options = ["--model", folder / "model", "--context", folder / "book.txt", "--budget", "0.3", "--output", output]
    start = [launcher, "-n", str(ranks), "--backend", "ring", "--starting-port", str(port)] if ranks > 1 else []
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [*start, sys.executable, folder / "fit.py", *options],
        env=os.environ | {"PYTHONPATH": root, "DIES": dies},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_shares_are_all_of_the_work():
    pieces = list(range(11))
    shares = [World(rank, 4).mine(pieces) for rank in range(4)]
    assert World(2, 4).in_order(shares[2], shares) == pieces


def test_arrays_keep_every_bit():
    arrays = {
        "half": mx.array([[1.5, -2.0]], mx.bfloat16),
        "float": mx.random.normal((3, 2)),
        "scalar": mx.array(2.0),
        "none": mx.zeros((0, 4)),
    }
    for name, x in _unpacked(_packed(arrays)).items():
        assert x.dtype == arrays[name].dtype
        assert x.shape == arrays[name].shape
        assert mx.array_equal(x, arrays[name])


def test_a_process_by_itself_is_a_world_of_one():
    assert World.here() == World()
    assert World().values({"a": 1}) == [{"a": 1}]


def test_two_ranks_write_one_file(folder):
    done = fit(folder, folder / "two.nectar", ranks=2)
    assert done.returncode == 0, done.stderr
    _, metadata = store.read(folder / "two.nectar")
    assert metadata["report"]["gap_closed"] > 0.9
    assert not list(folder.glob("*.partial"))
    again = fit(folder, folder / "again.nectar", ranks=2)
    assert again.returncode == 0
    assert (folder / "again.nectar").read_bytes() == (folder / "two.nectar").read_bytes()


def test_a_rank_that_dies_ends_the_job_and_leaves_its_work(folder):
    died = fit(folder, folder / "late.nectar", ranks=2, dies="1")
    assert "1" in died.stdout + died.stderr
    assert not (folder / "late.nectar").exists()
    assert (folder / "late.nectar.partial").exists()
    assert fit(folder, folder / "late.nectar", ranks=2).returncode == 0
