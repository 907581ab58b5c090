"""Where the time of a long command went."""

import time


class Clock:
    """`laps`: seconds from one lap to the next, by name; laps of one name add up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(self.laps.get(name, 0.0) + now - self._last, 2)
        self._last = now


def duration(seconds: float) -> str:
    """As a person says it: 40 s, 7 min, 2.5 h, 12 days."""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{1 if name == 'h' and seconds < 36000 else 0}f} {name}"
    return f"{seconds / 86400:,.0f} days"
