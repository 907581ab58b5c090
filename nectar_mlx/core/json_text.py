"""JSON from files that nobody vouches for: what it may take is bounded before it is decoded."""

import json
import math
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import msgspec

_T = TypeVar("_T")

BYTES_EACH = 20  # of the text for a value, on average, at most
MOST_VALUES = 400_000
MOST_BYTES = BYTES_EACH * MOST_VALUES
_MOST_DEPTH = 20


def decode(text: bytes | str, *, most_values: int = MOST_VALUES) -> object:
    """The value; ValueError if it is no JSON, names something twice, has a NaN, or is larger or deeper than any file's.

    A value takes some hundred bytes of memory where it takes two in the text, so values are counted first.
    """
    data = text.encode() if isinstance(text, str) else text
    check_size(data, most_values=most_values)
    try:
        value: object = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse
        )
    except RecursionError:
        raise ValueError("its metadata is nested too deep") from None
    _check_depth(value)
    return value


def check_size(data: bytes, *, most_values: int = MOST_VALUES) -> None:
    """ValueError for more than `decode` takes; also for writers, whose files must be read again."""
    if len(data) > BYTES_EACH * most_values or sum(data.count(mark) for mark in b"[{,") > most_values:
        raise ValueError("it has too much metadata")


def typed(value: object, kind: type[_T]) -> _T:
    """A decoded value as a `msgspec` type, with its bounds; ValueError that says where it is something else."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("its metadata says something twice")
    return fields


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse("number that is too large")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"its metadata has a {constant}")


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_MOST_DEPTH):
        lists = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not lists:
            return
        level = [child for values in lists for child in values]
    raise ValueError("its metadata is nested too deep")
