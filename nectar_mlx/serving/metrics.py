"""Counts of what the server does, as Prometheus reads them."""

import threading
from collections import Counter

_HELP = {
    "nectar_requests_total": ("counter", "requests by path and status"),
    "nectar_prompt_tokens_total": ("counter", "tokens of prompts"),
    "nectar_cached_tokens_total": ("counter", "tokens of prompts that had been read before"),
    "nectar_answer_tokens_total": ("counter", "tokens of answers"),
    "nectar_answers_total": ("counter", "answers that have ended"),
    "nectar_open_requests": ("gauge", "requests that are waiting or being answered"),
    "nectar_waiting_requests": ("gauge", "requests that are waiting"),
    "nectar_open_files": ("gauge", "files in memory"),
    "nectar_files_bytes": ("gauge", "bytes of the files in memory"),
    "nectar_kept_bytes": ("gauge", "bytes kept for the next turns of conversations"),
}


class Metrics:
    """May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()

    def request(self, path: str, status: int) -> None:
        """path: of a route, not what a client made up."""
        with self._lock:
            self._requests[path, status] += 1

    def prompt(self, tokens: int, cached: int) -> None:
        self._add(nectar_prompt_tokens_total=tokens, nectar_cached_tokens_total=cached)

    def answer(self, tokens: int) -> None:
        self._add(nectar_answer_tokens_total=tokens, nectar_answers_total=1)

    def observe(self, open_requests: int, waiting: int, files: int, files_bytes: int, kept_bytes: int) -> None:
        """The present state of the engine."""
        with self._lock:
            self._values["nectar_open_requests"] = open_requests
            self._values["nectar_waiting_requests"] = waiting
            self._values["nectar_open_files"] = files
            self._values["nectar_files_bytes"] = files_bytes
            self._values["nectar_kept_bytes"] = kept_bytes

    def text(self) -> str:
        """In Prometheus' format."""
        with self._lock:
            values, requests = dict(self._values), sorted(self._requests.items())
        lines = []
        for name, (kind, meaning) in _HELP.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            if name == "nectar_requests_total":
                lines += [f'{name}{{path="{path}",status="{status}"}} {n}' for (path, status), n in requests]
            else:
                lines.append(f"{name} {values.get(name, 0)}")
        return "\n".join(lines) + "\n"

    def _add(self, **numbers: int) -> None:
        with self._lock:
            self._values.update(numbers)
