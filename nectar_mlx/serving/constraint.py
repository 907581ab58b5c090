"""Answers that follow a JSON schema: tokens that would break it are left out (llguidance, an optional package)."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, cast

import mlx.core as mx
import msgspec
import numpy as np

from ..answering.sampling import Processor
from ..core import extras
from ..errors import NectarError
from .errors import refused
from .tools import MAX_DEPTH, depth, invalid

MAX_SCHEMA = 64 << 10  # bytes
MAX_MULTIPLE = 20_000  # the least common one of a schema's `multipleOf`: a state each, whatever the limits
# llguidance's own limits let a single token take seconds, in which nobody's answer goes on.
_LIMITS: Any = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 100_000, "max_lexer_states": 20_000}
# With flexible white space an answer may be endless.
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraints:
    """Made once for a model's tokenizer; ready at the first use."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._lexer: Any = None

    def of(self, schema: dict[str, Any], param: str) -> Callable[[], Processor]:
        """What makes a processor for one answer. param: the field that asks for it. ApiError where the package is
        missing or the schema is not supported."""
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise refused(param, f"only text is supported: for JSON {extras.install('json')} and restart") from None
        if depth(schema) > MAX_DEPTH:
            raise invalid(param, f"the schema is deeper than {MAX_DEPTH} levels")
        text = msgspec.json.encode(schema)
        if len(text) > MAX_SCHEMA:
            raise invalid(param, f"the schema has more than {MAX_SCHEMA:,} bytes")
        if common_multiple(schema) > MAX_MULTIPLE:
            raise invalid(param, f"the least common multiple of all multipleOf is above {MAX_MULTIPLE:,}")
        if self._lexer is None:
            fast = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
            ends = sorted(self._tokenizer.eos_token_ids)
            self._lexer = llguidance.hf.from_tokenizer(fast, eos_token=ends)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text.decode(), overrides=_STYLE)
            limits = llguidance.LLParserLimits(**_LIMITS)
            matcher = llguidance.LLMatcher(self._lexer, grammar, limits=limits)
            problem = matcher.get_error()
        except (TypeError, ValueError) as error:
            problem = str(error)
        if problem:
            line = problem.strip().splitlines()[0][:300]
            raise invalid(param, f"the schema is not supported: {line}")
        lexer = self._lexer
        return lambda: _Processor(matcher.deep_copy(), lexer)


def common_multiple(schema: Any) -> int:
    """The least common multiple of all numbers that a schema has as `multipleOf`, in units of their last digit."""
    found = {Fraction(str(number)) for number in _multiples(schema)} - {Fraction(0)}
    unit = math.lcm(*(number.denominator for number in found))
    return math.lcm(*(abs(int(number * unit)) for number in found))


def _multiples(schema: Any) -> Iterator[int | float]:
    if isinstance(schema, dict):
        number = schema.get("multipleOf")
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
            yield number
    if isinstance(schema, dict | list):
        for item in schema.values() if isinstance(schema, dict) else schema:
            yield from _multiples(item)


class _Processor:
    """Sets the logits of all tokens to -inf that the grammar does not allow next."""

    def __init__(self, matcher: Any, lexer: Any):
        import llguidance.numpy

        self._matcher, self._prompt = matcher, True
        self._mask = llguidance.numpy.allocate_token_bitmask(1, lexer.vocab_size)
        self._fill = llguidance.numpy.fill_next_token_bitmask

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._prompt:
            self._prompt = False  # the last of these tokens is the prompt's
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(cast("int", tokens[-1].item()))
        if problem := self._matcher.get_error():
            raise NectarError(f"the answer cannot follow the schema: {problem.splitlines()[0][:200]}")
        self._fill(self._matcher, self._mask, 0)
        allowed = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little")[: logits.shape[-1]].astype(bool)
        padded = np.zeros(logits.shape[-1], bool)  # a model may have logits for more tokens than there are
        padded[: len(allowed)] = allowed
        return mx.where(mx.array(padded), logits, -mx.inf)
