"""Numbers that are typed as options; argparse makes one line of what is wrong with them."""

import argparse
import math
import re


def _number(text: str, low: float, high: float, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:  # NaN, too
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, 0, 1, "a number from 0 to 1")


def temperature(text: str) -> float:
    """A temperature of sampling."""
    return _number(text, 0, 5, "a temperature from 0 to 5")


def mass(text: str) -> float:
    """A share of probability, not 0."""
    return _number(text, 1e-9, 1, "above 0 and at most 1")


def seed(text: str) -> int:
    """A seed of random numbers."""
    return _integer(text, 0, 2**64 - 1, "a whole number from 0 to 2^64 - 1")


def positive(text: str) -> int:
    """A number of things, at least 1."""
    return _integer(text, 1, 10**9, "a whole number from 1 to a billion")


def _integer(text: str, low: int, high: int, wanted: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)


def size(text: str) -> int:
    """Bytes from a text such as 500M or 4G (powers of ten)."""
    return _scaled(text, "B?", "a size such as 500M or 4G")


def tokens(text: str) -> int:
    """The length of a text in tokens, such as 50000 or 50k."""
    return _scaled(text, "", "a number of tokens such as 50000 or 50k")


def _scaled(text: str, unit: str, wanted: str) -> int:
    """A number with a power of ten. unit: a pattern of what may follow. wanted: what the text should be."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([kMGT]?){unit}", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    number = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
    return int(min(number, 1e18))  # a text of enough digits is an infinity
