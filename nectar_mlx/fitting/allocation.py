"""Where the capacity goes: head budgets in proportion to a power of the error of a short uniform fit.

Fitting every head with the same number of bytes first and giving more to the heads that err more is the largest
single gain after the choice of queries: it halves the divergence at the same size.
"""

from collections.abc import Sequence

import numpy as np


def allocate(errors: Sequence[float], *, total: float, power: float, least: float, most: float) -> list[float]:
    """Bytes a head, proportional to error^power, within [least, most]; they add up to `total`, bounds allowing."""
    share = np.maximum(np.asarray(errors, dtype=np.float64), 1e-12) ** power
    if total <= least * len(share):
        return [least] * len(share)
    low, high = 0.0, most / share.min()
    for _ in range(100):  # bisection on the common factor: the sum grows with it
        factor = (low + high) / 2
        if np.clip(factor * share, least, most).sum() > total:
            high = factor
        else:
            low = factor
    return [float(x) for x in np.clip(low * share, least, most)]
