"""Head functions: what stands for the context of one KV head, a function of the query that returns (o, L).

Each file is one kind. Heads of the same kind and size class are evaluated together as a `Bank`.
"""

from .base import Bank, HeadArrays, Size
from .completion import Completion
from .corrected import Corrected
from .exact import Exact, Weighed
from .hybrid import HybridHead, Retrieval
from .mlp import TargetScore
from .quadrature import Quadrature
from .thresholded import ThresholdedNodes

_ALL: tuple[type[Bank], ...] = (Quadrature, TargetScore, Corrected, Exact, Retrieval, Completion, ThresholdedNodes)
KINDS: dict[str, type[Bank]] = {bank.kind: bank for bank in _ALL}
AUTO = Quadrature.kind  # what serves best where nothing is chosen
ALIASES = {"retrieval+nectar": "hybrid"}  # names of before, in files and commands

__all__ = [
    "ALIASES",
    "AUTO",
    "KINDS",
    "Bank",
    "Completion",
    "Corrected",
    "Exact",
    "HeadArrays",
    "HybridHead",
    "Quadrature",
    "Retrieval",
    "Size",
    "TargetScore",
    "ThresholdedNodes",
    "Weighed",
]
