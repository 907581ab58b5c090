"""What goes between the event loop and the engine: a job, its ticket, and the events of its answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ..answering import Sampling, StopStrings
from ..answering.sampling import Processor
from ..core.types import JsonObject
from ..mlxlm.window import ANSWER_TOKENS
from ..retrieval.fitted_text import About
from .calls import Call, Tools


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request for an answer, with every value checked.

    name: of the file. prompt: the token ids that follow its text. questions: the user's, the last one first, by which a
    chunk of the text is chosen; none where the whole text is to be used. exact: the share of the text's keys to read
    exactly, None for the server's default. stops: the strings that end the answer. max_tokens: of the answer; None for
    `default_tokens`, cut to the room there is. top_logprobs: how many alternatives to name for each token, None for no
    log-probabilities. constraint: makes a processor of logits for one answer. thinks: whether thoughts are told from
    the answer. sources: whether the answer is to name its sources. recall: whether the text's own words count where an
    answer quotes it (`retrieval.recall`). tools: what the answer may call. facts: what the reply says of its document.
    said: an answer that is known without the model. about: the document that alone is to be a source, of those in one
    file; without a name all of them.
    """

    name: str
    prompt: Sequence[int]
    questions: Sequence[str] = ()
    exact: float | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()
    max_tokens: int | None = None
    default_tokens: int = ANSWER_TOKENS
    top_logprobs: int | None = None
    constraint: Callable[[], Processor] | None = None
    thinks: bool = True
    sources: bool = False
    recall: bool = True
    tools: Tools | None = None
    facts: JsonObject = field(default_factory=dict)
    said: str | None = None
    about: About = field(default_factory=About)

    def __post_init__(self) -> None:
        StopStrings(self.stops)  # NectarError here, not in the engine


class TokenLogprob(NamedTuple):
    """A token's text and log-probability, and the likeliest alternatives' (text, log-probability)."""

    text: str
    logprob: float
    top: Sequence[tuple[str, float]]


class Started(NamedTuple):
    """The prompt is being read. cached: tokens of it that were read before. chunk: of the text, None for the whole."""

    prompt_tokens: int
    cached_tokens: int
    chunk: int | None


class Written(NamedTuple):
    """What is new of the answer."""

    text: str
    thoughts: str
    logprobs: Sequence[TokenLogprob]
    calls: Sequence[Call] = ()


class Finished(NamedTuple):
    """reason: "stop", "length" or "tool_calls". tokens: of the answer with its thoughts. reading: what was read of the
    text."""

    reason: str
    tokens: int
    reading: JsonObject


class Failed(NamedTuple):
    """The job has ended with an error."""

    error: Exception


Event: TypeAlias = Started | Written | Finished | Failed


class Ticket:
    """A job in the engine. deliver: called in the engine's thread with each event. After `cancel` no more come."""

    def __init__(self, job: Job, deliver: Callable[[Event], None]):
        self.job, self._deliver = job, deliver
        self.cancelled = False

    def cancel(self) -> None:
        """May be called from any thread, at any time."""
        self.cancelled = True

    def deliver(self, event: Event) -> None:
        if not self.cancelled:
            self._deliver(event)
