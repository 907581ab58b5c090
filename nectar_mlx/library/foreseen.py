"""How long the fits that wait will take, from what is expected of each and what those before took."""

from collections.abc import Sequence

from ..core.clock import duration
from ..core.progress import Stage
from .fitter import Fitter
from .volumes import Claim


class Foreseen:
    """Asks the fitter once for each volume: a library may have thousands."""

    def __init__(self, fitter: Fitter):
        self._fitter = fitter
        self._known: dict[str, float] = {}
        self._expected = self._spent = 0.0  # seconds of the fits so far

    def stages(self, waiting: Sequence[Claim]) -> list[Stage]:
        """A stage for each volume."""
        return [Stage(claim.volume, self._seconds(claim)) for claim in waiting]

    def end(self, waiting: Sequence[Claim]) -> str:
        """In how long all are fitted, for a person, to be put behind what they are; "" where that is not known."""
        seconds = sum(self._seconds(claim) for claim in waiting)
        pace = self._spent / self._expected if self._expected else 1.0
        return f", about {duration(seconds * pace)}" if seconds else ""

    def took(self, claim: Claim, seconds: float) -> None:
        """What the fit of a volume took."""
        self._spent += seconds
        self._expected += self._seconds(claim)

    def _seconds(self, claim: Claim) -> float:
        if claim.volume not in self._known:
            self._known[claim.volume] = self._fitter.expected(claim.characters)
        return self._known[claim.volume]
