"""Adam, and Muon for stacks of matrices, as pure functions over flat dictionaries (so that a whole step can be
compiled).

MLX's own Muon flattens a stack [M, rows, columns] into one matrix; here each of the M heads is a problem of its own.
"""

from typing import NamedTuple

import mlx.core as mx

Arrays = dict[str, mx.array]

_BETA1, _BETA2, _EPSILON, _MOMENTUM = 0.9, 0.99, 1e-12, 0.95


class State(NamedTuple):
    """Step count, and per parameter the first and second moment (Muon keeps only the first)."""

    step: mx.array
    first: Arrays
    second: Arrays


def start(parameters: Arrays) -> State:
    return State(
        mx.array(0.0),
        {n: mx.zeros(p.shape) for n, p in parameters.items()},
        {n: mx.zeros(p.shape) for n, p in parameters.items()},
    )


def update(
    parameters: Arrays,
    gradients: Arrays,
    state: State,
    *,
    rate: mx.array,
    muon_rate: mx.array,
    muon: frozenset[str],
) -> tuple[Arrays, State]:
    """One step: Muon for the names in `muon` (stacks [M, rows, columns]), Adam for the rest."""
    step = state.step + 1
    correct1, correct2 = 1 - _BETA1**step, 1 - _BETA2**step
    new, first, second = {}, {}, {}
    for name, g in gradients.items():
        p, m, v = parameters[name], state.first[name], state.second[name]
        if name in muon:
            m = _MOMENTUM * m + g
            rows, columns = p.shape[-2:]
            size = max(1.0, rows / columns) ** 0.5
            p = p - muon_rate * size * orthogonal(g + _MOMENTUM * m)
        else:
            m = _BETA1 * m + (1 - _BETA1) * g
            v = _BETA2 * v + (1 - _BETA2) * mx.square(g)
            p = p - rate * (m / correct1) / (mx.sqrt(v / correct2) + _EPSILON)
        new[name], first[name], second[name] = p, m, v
    return new, State(step, first, second)


def orthogonal(matrices: mx.array, steps: int = 5) -> mx.array:
    """Each of [M, rows, columns] moved towards the nearest orthogonal matrix by the quintic Newton-Schulz iteration of
    Muon.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if tall else matrices
    x = x / (mx.sqrt(mx.square(x).sum((-2, -1), keepdims=True)) + 1e-7)
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.swapaxes(-1, -2) if tall else x


def schedule(step: int, steps: int, *, warm_up: int = 50, decay: float = 0.6) -> float:
    """Linear warm-up, flat, then linear decay to zero over the last `decay` share of the steps."""
    warm_up = min(warm_up, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * min(1.0, (steps - step) / (decay * steps))
