"""Samples rows: in memory, in a mapped file and on the device they are the same rows."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting.samples.sample_store import DeviceSampleStore, Samples, SampleStore

LAYERS, K, D, CAPACITY = 3, 2, 4, 25


def stores(folder):
    return [
        SampleStore(LAYERS * K, CAPACITY, D, folder=None),
        SampleStore(LAYERS * K, CAPACITY, D, folder=folder / "rows"),
        DeviceSampleStore(CAPACITY),
    ]


def filled(study, batches):
    """What went in, [heads, rows, ...] a field; a batch is one array a layer."""
    rng, kept = np.random.default_rng(0), []
    for n in batches:
        wide = [rng.normal(size=(LAYERS * K, n, D)).astype(np.float16) for _ in range(3)]
        rows = Samples(*wide, *(rng.normal(size=(LAYERS * K, n)).astype(np.float32) for _ in range(2)))
        kept.append(rows)
        for layer in range(LAYERS):
            study.add(layer * K, Samples(*(mx.array(x[layer * K : layer * K + K]) for x in rows)))
        study.advance(n)
    return Samples(*(np.concatenate(x, axis=1)[:, :CAPACITY] for x in zip(*kept, strict=True)))


@pytest.mark.parametrize("batches", [(7,), (7, 9), (7, 9, 20)])
@pytest.mark.parametrize("rows", [None, [3], [6, 0, 2], [5, 4, 3, 2, 1, 0, 6]])
@pytest.mark.parametrize("heads", [[0], [5, 0, 3], range(6)])
def test_every_store_gives_the_rows_that_went_in(tmp_path, batches, rows, heads):
    for study in stores(tmp_path):
        expected = filled(study, batches)
        assert study.rows == min(sum(batches), CAPACITY) and study.full == (sum(batches) >= CAPACITY)
        found = study.heads(heads, None if rows is None else np.array(rows))
        for ours, truth in zip(found, expected, strict=True):
            whole = truth[list(heads)]
            wanted = whole if rows is None else whole[:, rows]
            assert np.array_equal(np.array(ours), wanted)
