"""The thread that computes: the only one that uses MLX.

Jobs arrive through a queue. A step admits what has arrived, reads a piece of somebody's prompt, and decodes one token
of every answer; so nobody waits for the whole of another's prompt. An error ends the answers that it concerns; the
thread lives on.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import mlx.core as mx

from ..errors import NectarError
from .admission import Admission, Settings
from .decoding import AnswerSequence, Batch, size_class
from .job import Failed, Ticket
from .kept import KeptPrompts
from .metrics import Metrics
from .shelf import Shelf, UnreadableFile

T = TypeVar("T")
_SMALLEST_PIECE = 16  # tokens of a prompt
_ALONE_SECONDS = 0.02, 0.25  # that a piece may take where nothing is decoded
_CLEAR_EVERY = 256  # steps after which MLX's free memory is given back
_log = logging.getLogger(__name__)


class Busy(Exception):
    """There are more open requests than the server takes."""


class Engine:
    """Starts with `start`, which returns once the model is loaded; then takes tickets until `stop`.

    open_shelf: loads the model, in the engine's thread. After `start` the event loop may use `shelf.files` and the
    tokenizer, which do not compute.
    """

    shelf: Shelf
    _admission: Admission

    def __init__(self, open_shelf: Callable[[], Shelf], settings: Settings, metrics: Metrics | None = None):
        self._open_shelf, self.settings = open_shelf, settings
        self.metrics = metrics or Metrics()
        self._arrivals: queue.SimpleQueue[Ticket | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._reading: list[AnswerSequence] = []
        self._batches: list[Batch] = []
        self._kept = KeptPrompts(settings.kept_prompts, settings.kept_bytes)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ready: Future[None] = Future()
        self._stopping = threading.Event()
        self._lock, self._open = threading.Lock(), 0
        self._step_seconds = 0.0  # of the last decoding step, 0 where nothing is decoded
        self._usual_step = 0.01  # seconds, lately
        self._debt = 0.0  # seconds of reading that decoding has not had, yet
        self._rate = 1000.0  # prompt tokens read in a second, lately
        self._oldest_next = False
        self._steps = 0

    def start(self) -> None:
        """Loads the model and its first file, if there is one; NectarError where they cannot be read."""
        self._thread.start()
        self._ready.result()

    def submit(self, ticket: Ticket) -> None:
        """Takes a job; Busy if there are too many. Its ticket gets `Failed` or `Finished` as the last event."""
        with self._lock:
            if self._open >= self.settings.max_open or self._stopping.is_set():
                raise Busy
            self._open += 1
        self._arrivals.put(ticket)

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Runs something short that computes between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._arrivals.put(run)
        return future

    def stop(self, *, timeout: float = 5.0) -> bool:
        """Ends the thread after its step, with all open answers; whether it has ended within the time."""
        self._stopping.set()
        self._arrivals.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Requests that are waiting or being answered."""
        return self._open

    def _run(self) -> None:
        try:
            self.shelf = self._open_shelf()
            self.shelf.on_close = self._kept.forget
            self._admission = Admission(self.shelf, self._kept, self.settings)
            if self.shelf.files:
                self.shelf.get(next(iter(self.shelf.files)))
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception as error:  # none is expected: the parts of a step handle their own
                self._fail_all(error)
        self._fail_all(NectarError("the server is stopping"))
        self._batches, self._reading = [], []
        self._kept.shrink(-1)

    def _step(self) -> None:
        self._receive(wait=not (self._waiting or self._reading or self._batches))
        self._drop_cancelled()
        self._admit()
        self._read()
        self._decode()
        self.metrics.observe(self._open, len(self._waiting), self.shelf.open, self.shelf.nbytes, self._kept.nbytes)
        self._steps += 1
        if self._steps % _CLEAR_EVERY == 0:
            mx.clear_cache()

    def _receive(self, *, wait: bool) -> None:
        """Takes what has arrived; with wait=True, waits until something does."""
        if wait:
            mx.clear_cache()
        while wait or not self._arrivals.empty():
            arrival = self._arrivals.get()
            wait = False
            if isinstance(arrival, Ticket):
                self._waiting.append(arrival)
            elif arrival is not None:
                arrival()

    def _drop_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
            self._waiting.remove(ticket)
            self._end()
        for sequence in [sequence for sequence in self._reading if sequence.ticket.cancelled]:
            self._reading.remove(sequence)
            self._end()
        for batch in self._batches:
            if gone := [member for member in batch.members if member.ticket.cancelled]:
                self._leave(batch, gone)
        self._batches = [batch for batch in self._batches if batch.members]

    def _admit(self) -> None:
        """Starts the jobs that there is room for, in the order of their arrival."""
        while self._waiting and len(self._active()) < self.settings.concurrency:
            ticket = self._waiting[0]
            try:
                sequence = self._admission.sequence(ticket, self._active())
            except Exception as error:
                self._waiting.popleft()
                self._fail(ticket, error)
                continue
            if sequence is None:
                return
            self._waiting.popleft()
            self._reading.append(sequence)
            self.metrics.prompt(len(sequence.prompt), sequence.read)
            ticket.deliver(sequence.started)

    def _active(self) -> list[AnswerSequence]:
        return self._reading + [member for batch in self._batches for member in batch.members]

    def _read(self) -> None:
        """Reads prompts for about as long as a decoding step takes; without one, a single piece. A piece that took
        longer is made up for by steps without reading."""
        if self._debt > 0 and self._batches:
            return
        start, ready = time.perf_counter(), []
        while self._reading:
            sequence = self._next_to_read()
            try:
                if sequence.unread:
                    self._read_piece(sequence)
                if not sequence.unread:
                    self._reading.remove(sequence)
                    ready.append(sequence)
            except Exception as error:
                self._reading.remove(sequence)
                self._fail(sequence.ticket, error)
            self._debt = time.perf_counter() - start
            if not self._arrivals.empty() or self._debt >= self._step_seconds:
                break
        if ready:
            self._join(ready)
            self._debt = time.perf_counter() - start

    def _next_to_read(self) -> AnswerSequence:
        """The one with the shortest rest, and every other time the one that came first."""
        self._oldest_next = not self._oldest_next
        return min(self._reading, key=lambda sequence: sequence.unread) if self._oldest_next else self._reading[0]

    def _read_piece(self, sequence: AnswerSequence) -> None:
        # While others wait for their next token, as long as they take for it; else so long that a request that arrives
        # now does not notice much.
        shortest, longest = _ALONE_SECONDS
        seconds = self._step_seconds or min(longest, max(shortest, 4 * self._usual_step))
        size = min(self.settings.prefill_step, max(_SMALLEST_PIECE, int(self._rate * seconds)))
        start = time.perf_counter()
        count = sequence.read_piece(self.shelf.model, size)
        self._rate += 0.3 * (count / max(1e-6, time.perf_counter() - start) - self._rate)

    def _join(self, ready: Sequence[AnswerSequence]) -> None:
        """Starts to decode what has been read."""
        alike: dict[object, list[AnswerSequence]] = {}
        for sequence in ready:
            alike.setdefault(sequence if sequence.single else size_class(sequence), []).append(sequence)
        for sequences in alike.values():
            batch = next((batch for batch in self._batches if batch.takes(sequences[0])), None)
            try:
                if batch is None:
                    self._batches.append(Batch(self.shelf.model, sequences))
                else:
                    batch.join(sequences)
            except Exception as error:
                for sequence in sequences:
                    self._fail(sequence.ticket, error)

    def _decode(self) -> None:
        """One token for every answer."""
        start = time.perf_counter()
        for batch in self._batches:
            try:
                ended = batch.step()
            except Exception as error:
                for member in batch.members:
                    self._fail(member.ticket, error)
                batch.members = []
                continue
            for member in ended:
                if member.error:
                    member.ticket.deliver(Failed(member.error))
                    _log_error(member.error)
            if ended:
                self._leave(batch, ended)
        self._batches = [batch for batch in self._batches if batch.members]
        self._step_seconds = time.perf_counter() - start if self._batches else 0.0
        self._debt -= self._step_seconds
        if self._batches:
            self._usual_step += 0.1 * (self._step_seconds - self._usual_step)

    def _leave(self, batch: Batch, members: list[AnswerSequence]) -> None:
        """Ends some members, and keeps what was read for the next turns."""
        for member in members:
            self.metrics.answer(member.count)
            try:
                self._kept.add(member.nectar, member.ticket.job.exact, *batch.caches_of(member))
            except Exception as error:
                _log_error(error)
            self._end()
        batch.remove(members)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        _log_error(error)
        ticket.deliver(Failed(error))
        self._end()

    def _fail_all(self, error: Exception) -> None:
        tickets = [sequence.ticket for sequence in self._active()] + list(self._waiting)
        self._batches, self._reading = [], []
        self._waiting.clear()
        for ticket in tickets:
            self._fail(ticket, error)

    def _end(self) -> None:
        with self._lock:
            self._open -= 1


def _log_error(error: Exception) -> None:
    if isinstance(error, UnreadableFile):
        _log.error("%s", error)
    elif not isinstance(error, NectarError):
        _log.error("%s: %s", type(error).__name__, error, exc_info=error)
