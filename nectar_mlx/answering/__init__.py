"""What `ask`, `chat` and `serve` share when an answer is written: sampling, stop strings, thoughts."""

from .answer import Answer
from .sampling import Sampling, SamplingError
from .stops import MAX_STOP_LENGTH, MAX_STOPS, StopStrings
from .thoughts import Markers, Piece, ThoughtSplitter

__all__ = [
    "MAX_STOPS",
    "MAX_STOP_LENGTH",
    "Answer",
    "Markers",
    "Piece",
    "Sampling",
    "SamplingError",
    "StopStrings",
    "ThoughtSplitter",
]
