"""Head functions: what stands for the context of one KV head, a function of the query that returns (o, L).

Each file is one kind. Heads of the same kind and size class are evaluated together as a `Bank`.
"""

from .base import Bank, HeadArrays, Size
from .corrected import Corrected
from .exact import Exact
from .mlp import TargetScore
from .quadrature import Quadrature

KINDS: dict[str, type[Bank]] = {bank.kind: bank for bank in (Quadrature, TargetScore, Corrected, Exact)}

__all__ = ["KINDS", "Bank", "Corrected", "Exact", "HeadArrays", "Quadrature", "Size", "TargetScore"]
