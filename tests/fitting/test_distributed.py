"""One fit by several processes: the same bytes go to all, and one file is written."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, store
from nectar_mlx.fitting import distributed, prefill
from nectar_mlx.fitting.distributed import World, _packed, _unpacked, batches, parts
from nectar_mlx.fitting.kinds.quadrature import QuadratureFit
from nectar_mlx.fitting.layers import LayerRunner
from nectar_mlx.fitting.samples.recording import collect
from nectar_mlx.fitting.samples.sample_store import DeviceSampleStore, SampleStore
from nectar_mlx.fitting.solve import grouping
from nectar_mlx.store import grids
from tests import launching, toys
from tests.fitting.toy_fit import FAST, TEXT, fit_run, read

PROGRAM = """
import os, sys, time
from dataclasses import replace
import nectar_mlx.fit
from nectar_mlx.core.device import device, using
from nectar_mlx.fitting import budget, checkpoint, config
given_steps = {"distillation_steps": 3} if os.environ.get("DISTILLS") else {}
budget.SMALL = 1.0 if given_steps else 0.01
plain = config.FitConfig
config.FitConfig = lambda **given: plain(**{**%r, **given_steps, **given})
if os.environ.get("WAITS") == os.environ.get("MLX_RANK", "none"):  # behind its first heads, for whoever kills it
    save = checkpoint.Checkpoint.save_heads
    checkpoint.Checkpoint.save_heads = lambda *given: (save(*given), time.sleep(1000))
with using(replace(device(), launch_scores=1024)):  # so that a toy's heads are worth dividing
    sys.exit(nectar_mlx.fit.main(sys.argv[1:]))
"""


STUDY = {"queries": 2500, "conversations": 20, "checks": 9}  # several groups that are sampled, several that are checked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    toys.save_model(toys.toy("llama"), folder / "model", toys.tokenizer())
    toys.save_model(toys.toy("llama", max_position_embeddings=1300), folder / "short", toys.tokenizer())
    (folder / "book.txt").write_text(TEXT)
    (folder / "fit.py").write_text(PROGRAM % (FAST | STUDY))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The file of a single process."""
    said = launching.said(start(folder, folder / "alone.nectar", ranks=1))
    assert (folder / "alone.nectar").exists(), said
    return (folder / "alone.nectar").read_bytes()


def start(folder, output, *, ranks, waits="", distills="", model="model"):
    """Begins a fit in so many processes -> that of the launcher."""
    options = ["--model", folder / model, "--context", folder / "book.txt", "--budget", "0.3", "--output", output]
    return launching.start(folder / "fit.py", *options, ranks=ranks, WAITS=waits, DISTILLS=distills)


def test_shares_are_all_of_the_work():
    pieces = list(range(11))
    shares = [World(rank, 4).mine(pieces) for rank in range(4)]
    assert World(2, 4).in_order(shares[2], shares) == pieces
    divided = [parts(pieces, 2)[number] for number in range(2)]
    assert divided == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]
    assert all(number in World(World(0, 4).owner(number), 4).mine(pieces) for number in pieces)


@pytest.mark.parametrize(
    "count, most, shares, lengths",
    [
        (96, 32, 2, [24] * 4),
        (8, 3, 2, [2] * 4),
        (8, 8, 2, [8]),
        (3, 1, 4, [1] * 3),
        (9, 4, 4, [2, 2, 2, 3]),
        (0, 4, 2, []),
    ],
)
def test_batches_are_as_many_for_each_rank(count, most, shares, lengths):
    made = batches(count, most=most, shares=shares)
    assert [len(batch) for batch in made] == lengths
    assert [number for batch in made for number in batch] == list(range(count))


@pytest.mark.parametrize("heads, tokens, expected", [(90, 3600, 4), (36, 2000, 4), (12, 2000, 1), (3, 3600, 1)])
def test_heads_are_divided_where_that_costs_one_process_little(tokenizer, heads, tokens, expected):
    run = fit_run(toys.toy("llama"), tokenizer, budget=0.02, batch=512)
    assert run.shares(heads, tokens) == expected


def test_arrays_keep_every_bit():
    arrays = {
        "half": mx.array([[1.5, -2.0]], mx.bfloat16),
        "float": mx.random.normal((3, 2)),
        "scalar": mx.array(2.0),
        "none": mx.zeros((0, 4)),
        "flags": mx.array([True, False]),
    }
    facts = [(name, distributed._NAMES[x.dtype], x.shape) for name, x in arrays.items()]
    for name, x in _unpacked(_packed(arrays.values()), facts).items():
        assert x.dtype == arrays[name].dtype
        assert x.shape == arrays[name].shape
        assert mx.array_equal(x, arrays[name])


@pytest.fixture
def two_ranks(monkeypatch):
    """Calls a function of a world in two threads, which are its ranks -> what both give."""
    told, together, own = [None, None], threading.Barrier(2), threading.local()

    def gather(x):
        told[own.rank] = np.array(x)
        together.wait(120)
        every = np.concatenate(told)
        together.wait(120)
        return mx.array(every)

    def rank(work, number):
        own.rank = number
        return work(World(number, 2))

    monkeypatch.setattr(distributed, "_gather", gather)
    with ThreadPoolExecutor(2) as pool:
        yield lambda work: list(pool.map(partial(rank, work), (0, 1)))


def test_what_is_told_may_be_longer_than_what_is_sent_at_once(two_ranks, monkeypatch):
    monkeypatch.setattr(distributed, "_PIECE", 32)
    for data in ((bytes(range(70)), b"123"), (b"", b"123456789"), (b"", b"")):

        def gathered(world, data=data):
            return [np.array(part).tobytes() for part in world.gathered(mx.array(list(data[world.rank]), mx.uint8))]

        assert two_ranks(gathered) == [list(data)] * 2


@pytest.mark.parametrize("on_device", [False, True])
def test_ranks_fit_the_groups_of_one_process_to_its_samples(tokenizer, set_device, two_ranks, on_device):
    """Each has the samples of some layers; those of a head that is moved to even out the work go with it."""
    set_device(launch_scores=1)
    run = fit_run(toys.toy("llama"), tokenizer, budget=0.3)
    whole = collect(run, read(run, toys.random_tokens(60)))
    assert [list(part) for part in whole.parts] == [[0, 1], [2, 3], [4, 5], []]
    sizes = [(size,) for size in (4, 30, 5, 6, 7, 8)]
    alone = QuadratureFit(run, whole)

    def part_of(store, layers):
        count, D = store.count, run.geometry.head_dim
        own = DeviceSampleStore(count) if on_device else SampleStore(run.n_heads, count, D, folder=None)
        for layer in layers:
            own.add(2 * layer, store.heads([2 * layer, 2 * layer + 1]))
        own.advance(count)
        return own

    def fitted(world):
        layers = QuadratureFit(replace(run, world=world), whole).layers
        stores = {name: part_of(getattr(whole, name), layers) for name in ("train", "held_out")}
        kind = QuadratureFit(replace(run, world=world), replace(whole, **stores))
        groups = kind.groups(sizes)
        for group in groups:
            for ours, theirs in zip(kind.training_samples(group), alone.training_samples(group), strict=True):
                assert mx.array_equal(ours, theirs)
            assert mx.array_equal(kind.held_out_samples(group).output, alone.held_out_samples(group).output)
        return layers, groups

    (first, of_first), (second, of_second) = two_ranks(fitted)
    assert (first, second) == ([0, 2], [1])
    assert sorted([*of_first, *of_second]) == sorted(alone.groups(sizes))
    assert any(head // 2 in first for group in of_second for head in group), "a head was moved"


@pytest.mark.parametrize("how", ["dense", "fixed"])
def test_ranks_read_some_of_a_text_each(tokenizer, two_ranks, monkeypatch, how):
    monkeypatch.setattr(prefill, "READ", 32)
    run, tokens = fit_run(toys.toy("llama"), tokenizer), toys.random_tokens(150)
    alone, seen, lock = read(run, tokens, prefill=how), list[int](), threading.RLock()

    def locked(work):  # what a model's class does is changed for a while, for both threads
        def call(*given):
            with lock:
                return work(*given)

        return call

    def layer(runner, index, hidden, cache, call=LayerRunner.layer):
        result = call(runner, index, hidden, cache)
        seen.append(hidden.shape[1] if hidden.shape[1] > 3 else 0)  # 3: of the runner's own proof
        return result

    monkeypatch.setattr(LayerRunner, "layer", locked(layer))
    monkeypatch.setattr(LayerRunner, "embed", locked(LayerRunner.embed))
    monkeypatch.setattr(prefill, "layer_runner", locked(prefill.layer_runner))
    for context in two_ranks(lambda world: read(run, tokens, prefill=how, world=world)):
        for ours, theirs in zip(context.banks, alone.banks, strict=True):
            assert all(mx.array_equal(x, theirs.parameters[name]) for name, x in ours.parameters.items())
            assert mx.array_equal(ours.offset, theirs.offset)
    assert sum(seen) == 3 * 150, "a piece goes through each layer once"


def test_ranks_pack_some_of_the_heads_each(two_ranks, monkeypatch):
    monkeypatch.setattr(grids, "BLOCK", 700)
    layout = store.Layout(kind="quadrature", n_layers=5, n_kv_heads=1, head_dim=8, scale=0.2, bits=None)
    rng = np.random.default_rng(0)
    heads = [
        {"keys": mx.array(rng.normal(size=(n, 8))), "values": mx.array(rng.normal(size=(n, 8))), "bias": mx.zeros(n)}
        for n in (40, 30, 1, 80, 20)
    ]
    mx.eval(heads)
    packed, coded = list[int](), grids.coded
    monkeypatch.setattr(grids, "coded", lambda values: (packed.append(len(values)), coded(values))[1])
    alone = store.pack(layout, heads)
    for tensors in two_ranks(lambda world: store.pack(layout, heads, shared=world.shared)):
        assert tensors.keys() == alone.keys()
        assert all(mx.array_equal(x, alone[name]) for name, x in tensors.items())
    assert [packed[0], *sorted(packed[1:])] == [5, 2, 3]


def test_parts_have_as_much_to_train(tokenizer):
    """The sizes of a fit on a CPU, where the largest heads are not trained: most of their nodes cost little."""
    sizes = [1600, 1600, 1600, 1600, 1407, 1282, 1193, 1267, 785, 666, 610, 511, 361, 261, 329, 310]
    sizes += [188, 224, 321, 228, 208, 193, 204, 209, 144, 193, 238, 104, 86, 159, 73, 136]
    run, trained = fit_run(toys.toy("llama"), tokenizer, budget=0.3, steps=250), [size <= 661 for size in sizes]
    kind = QuadratureFit(run, collect(run, read(run, toys.random_tokens(60))))
    costs = [kind.cost((size,), trained=trains) for size, trains in zip(sizes, trained, strict=True)]
    layers = parts(range(8), 4)
    made = grouping.evened([[4 * layer + k for layer in part for k in range(4)] for part in layers], costs)
    nodes = [sum(sizes[head] for head in part if trained[head]) for part in made]
    assert max(nodes) < 1.25 * sum(nodes) / 4, nodes


def test_a_process_by_itself_is_a_world_of_one():
    assert World.here() == World()
    assert World().values({"a": 1}) == [{"a": 1}]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_write_the_file_of_one_process(folder, alone, ranks):
    output = folder / f"of-{ranks}.nectar"
    said = launching.said(start(folder, output, ranks=ranks))
    assert output.exists(), said
    assert output.read_bytes() == alone
    assert not list(folder.glob("*.partial"))
    assert store.read(output)[1]["report"]["gap_closed"] > 0.9


@pytest.mark.process
@pytest.mark.slow
def test_ranks_write_the_distilled_file_of_one_process(folder, alone):
    """One of them distills, in the units of all layers."""
    files = []
    for ranks in (1, 2):
        output = folder / f"distilled-{ranks}.nectar"
        said = launching.said(start(folder, output, ranks=ranks, distills="yes"))
        assert output.exists(), said
        files.append(output.read_bytes())
    assert files[0] == files[1]
    before, after = (
        Nectar.read(folder / f"{name}.nectar").tensors["heads.numbers"] for name in ("alone", "distilled-1")
    )
    assert before.shape != after.shape or not mx.array_equal(before, after)


@pytest.mark.slow
def test_ranks_share_the_chunks_of_a_long_text(folder):
    """The first one is fitted together, each of the others by one rank."""
    files = []
    for ranks in (1, 2):
        output = folder / f"chunks-{ranks}.nectar"
        said = launching.said(start(folder, output, ranks=ranks, model="short"))
        assert output.exists(), said
        files.append(output.read_bytes())
    assert files[0] == files[1]
    assert len(store.read(output)[1]["chunks"]) >= 3


def changed(path):
    """When; None where there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.process
@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job_and_leaves_its_work(folder, alone):
    """Rank 1 is killed while all fit heads: the job ends and names it; the same command continues to the same file."""
    output = folder / "late.nectar"
    launched = start(folder, output, ranks=2, waits="1")
    kept, end = folder / "late.nectar.rank-1.partial", time.monotonic() + 150
    while not list(kept.glob("heads-*.safetensors")) and time.monotonic() < end and launched.poll() is None:
        time.sleep(0.05)
    os.kill(int((kept / "lock").read_text()), signal.SIGKILL)
    said = launching.said(launched)
    assert "rank 1" in said and not output.exists(), said  # what rank 0 says may be cut: the launcher ends it
    first = folder / "late.nectar.partial"
    sampled = changed(first / "conversations.json")
    assert sampled and (first / "plan.json").exists() and list(first.glob("heads-*.safetensors"))
    again = start(folder, output, ranks=2, waits="")
    while again.poll() is None:
        assert changed(first / "conversations.json") in (sampled, None), "answers were sampled again"
        time.sleep(0.05)
    said = launching.said(again)
    assert output.exists(), said
    assert output.read_bytes() == alone
    assert not list(folder.glob("*.partial"))
