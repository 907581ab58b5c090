"""How each kind of head function is fitted, a file a kind (retrieval and hybrid share one)."""

from ..run import FitRun
from ..samples.capture import Collected
from .base import KindFit
from .completion import CompletionFit
from .corrected import CorrectedFit
from .hybrid import HybridFit, RetrievalFit, ThresholdedFit
from .mlp import TargetScoreFit
from .quadrature import QuadratureFit

KIND_FITS: dict[str, type[KindFit]] = {
    "quadrature": QuadratureFit,
    "mlp": TargetScoreFit,
    "corrected": CorrectedFit,
    "retrieval": RetrievalFit,
    "completion": CompletionFit,
    "hybrid": ThresholdedFit,
}


def kind_fit(run: FitRun, data: Collected, *, training_scores: int | None = None) -> KindFit:
    """How the run's kind of heads is fitted to what was collected."""
    kind = KIND_FITS[run.layout.kind](run, data, training_scores=training_scores)
    kind.prepare()
    return kind


__all__ = ["KIND_FITS", "HybridFit", "KindFit", "kind_fit"]
