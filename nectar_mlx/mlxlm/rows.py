"""What stands before each sequence of a batch: a context, which its neighbours may share or not.

Neighbours of one context are a run, and are evaluated together. So a batch that is to be fast keeps sequences of one
context side by side; in another order it is slower, and as right.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import mlx.core as mx

from ..core.attention import Partial, join
from ..heads import Bank
from ..kernels import DecodeKernel


class Row(NamedTuple):
    """Of one sequence: `bank` answers for its `context` tokens; kernel: the bank's, where there is one."""

    bank: Bank
    context: Any
    kernel: "DecodeKernel | RunKernels | None"


class Run(NamedTuple):
    """The sequences [start, stop) of a batch, which are behind one context."""

    row: Row
    start: int
    stop: int


class RunBanks(Bank):
    """The banks of a batch's runs as one. offset: [B, M, D]."""

    def __init__(self, runs: Sequence[Run]):
        first = runs[0].row.bank
        super().__init__(parameters={}, sizes=first.sizes, scale=first.scale, offset=_offsets(runs))
        self._runs = runs

    def over(self, queries: mx.array) -> Partial:
        return join([run.row.bank.over(queries[run.start : run.stop]) for run in self._runs], axis=0)


class RunKernels:
    """The decode kernels of a batch's runs as one; see `DecodeKernel.attend`."""

    def __init__(self, runs: Sequence[Run]):
        self._runs = runs

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        live: int | None = None,
        left_padding: mx.array | None = None,
    ) -> mx.array | None:
        assert left_padding is not None, "of a batch"
        outputs = []
        for row, start, stop in self._runs:
            part = queries[start:stop], keys[start:stop], values[start:stop]
            assert row.kernel is not None
            output = row.kernel.attend(*part, live=live, left_padding=left_padding[start:stop])
            if output is None:
                return None
            outputs.append(output)
        return mx.concatenate(outputs)


def together(rows: Sequence[Row]) -> Row:
    """What stands before a batch of these sequences, as if it were one; its context has [B] numbers where they have
    several."""
    runs = _runs(rows)
    if len({id(row.bank) for row in rows}) == 1:
        return rows[0]
    kernels = RunKernels(runs) if all(row.kernel is not None for row in rows) else None
    return Row(RunBanks(runs), mx.array([row.context for row in rows]), kernels)


def _runs(rows: Sequence[Row]) -> list[Run]:
    runs, start = [], 0
    for _, group in groupby(rows, key=lambda row: id(row.bank)):
        members = list(group)
        runs.append(Run(members[0], start, start + len(members)))
        start += len(members)
    return runs


def _offsets(runs: Sequence[Run]) -> mx.array | None:
    """Each sequence's offset; zero where a bank has none beside others that do."""
    known = [run.row.bank.offset for run in runs]
    some = next((offset for offset in known if offset is not None), None)
    if some is None:
        return None
    offsets = []
    for run, offset in zip(runs, known, strict=True):
        own = mx.zeros_like(some) if offset is None else offset
        offsets.append(mx.broadcast_to(own, (run.stop - run.start, *own.shape)))
    return mx.concatenate(offsets)
