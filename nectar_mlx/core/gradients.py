"""Functions that bring their own vjp pass."""

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, cast

import mlx.core as mx

P = ParamSpec("P")
R = TypeVar("R")
Arrays = Sequence[mx.array]
Vjp = Callable[[Arrays, Arrays, Arrays], Arrays | mx.array]
"""(arguments, gradients of the results, results) -> gradients of the arguments."""


def with_vjp(vjp: Vjp) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function of arrays that returns a tuple of arrays: `mx.custom_function`, typed."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        custom = mx.custom_function(function)
        custom.vjp(vjp)
        return cast(Callable[P, R], custom)

    return decorate
