"""Samples in memory, in a mapped file and on the device are the same samples."""

import errno
import os
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import NectarError
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.fitting.samples.sample_store import DeviceSampleStore, Samples, SampleStore
from nectar_mlx.fitting.samples.self_study import batch_progress

LAYERS, K, D, CAPACITY = 3, 2, 4, 25


def stores(folder):
    return [
        SampleStore(LAYERS * K, CAPACITY, D, folder=None),
        SampleStore(LAYERS * K, CAPACITY, D, folder=folder / "samples"),
        DeviceSampleStore(CAPACITY),
    ]


def filled(store, batches):
    """What went in, [heads, samples, ...] a field; a batch is one array a layer."""
    rng, kept = np.random.default_rng(0), []
    for n in batches:
        wide = [rng.normal(size=(LAYERS * K, n, D)).astype(np.float16) for _ in range(3)]
        samples = Samples(*wide, *(rng.normal(size=(LAYERS * K, n)).astype(np.float32) for _ in range(2)))
        kept.append(samples)
        for layer in range(LAYERS):
            store.add(layer * K, Samples(*(mx.array(x[layer * K : layer * K + K]) for x in samples)))
        store.advance(n)
    return Samples(*(np.concatenate(x, axis=1)[:, :CAPACITY] for x in zip(*kept, strict=True)))


@pytest.mark.parametrize("batches", [(7,), (7, 9), (7, 9, 20)])
@pytest.mark.parametrize("chosen", [None, [3], [6, 0, 2], [5, 4, 3, 2, 1, 0, 6]])
@pytest.mark.parametrize("heads", [[0], [5, 0, 3], range(6)])
def test_every_store_gives_the_samples_that_went_in(tmp_path, batches, chosen, heads):
    for store in stores(tmp_path):
        expected = filled(store, batches)
        assert store.count == min(sum(batches), CAPACITY) and store.full == (sum(batches) >= CAPACITY)
        samples = store.heads(heads, None if chosen is None else np.array(chosen))
        for ours, truth in zip(samples, expected, strict=True):
            whole = truth[list(heads)]
            wanted = whole if chosen is None else whole[:, chosen]
            assert np.array_equal(np.array(ours), wanted)


def test_a_file_that_is_written_a_piece_at_a_time(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:5], at))
    store = SampleStore(LAYERS * K, CAPACITY, D, folder=tmp_path)
    expected = filled(store, (7, 9))
    for ours, truth in zip(store.heads(range(6)), expected, strict=True):
        assert np.array_equal(np.array(ours), truth)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """Through mapped memory it would be the end of the process."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NectarError, match=r"cannot write .*queries.f32: No space left on device"):
        filled(SampleStore(LAYERS * K, CAPACITY, D, folder=tmp_path), (7,))


def test_a_head_is_taken_over_from_another_rank(tmp_path):
    for store in stores(tmp_path)[:2]:
        expected = filled(store, (7, 9))
        store.receive(1, Samples(*(mx.array(x[[4]]) for x in expected)))
        for ours, truth in zip(store.heads([1, 2]), expected, strict=True):
            assert np.array_equal(np.array(ours), truth[[4, 2]])


def test_a_cleared_store_takes_samples_again(tmp_path):
    for store in stores(tmp_path):
        filled(store, (7, 9))
        store.clear()
        assert store.count == 0
        expected = filled(store, (5,))
        for ours, truth in zip(store.heads([4]), expected, strict=True):
            assert np.array_equal(np.array(ours), truth[[4]])


def test_heads_that_were_given_what_is_not_finite_are_noted(tmp_path):
    for store in stores(tmp_path):
        wide, narrow = mx.zeros((K, 3, D)), mx.zeros((K, 3))
        store.add(2, Samples(wide, wide, wide, narrow, mx.array([[0.0, 0, 0], [0, np.inf, 0]])))
        assert store.not_finite == {3}


def test_sampling_is_not_done_before_the_longest_answer_may_have_ended():
    """Samples are enough long before that, where a batch is small."""
    batch = [Conversation([0] * 10, answer=[0] * 90, split="train") for _ in range(4)]
    run, told = SimpleNamespace(group=1, config=SimpleNamespace(answer_tokens=90)), []
    progress = batch_progress(run, batch, 0, 100, told.append)
    for tokens in (50, 90, 100):
        progress(tokens)
    assert told == [50, 90, 100]
    batch_progress(run, batch, 120, 100, told.append)(50)
    assert told[-1] == 100, "enough already, and only checks are answered"
