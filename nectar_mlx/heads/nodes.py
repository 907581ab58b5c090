"""A bank's heads as plain nodes, whatever kind of nodes they are."""

import mlx.core as mx

from ..errors import NectarError
from .base import Bank, HeadArrays
from .exact import Exact
from .quadrature import Quadrature


def plain_nodes(bank: Bank) -> HeadArrays:
    """keys (absolute, positions applied), values [M, m, D] and bias [M, m] in float32; no key is read exactly.

    NectarError for heads that are networks.
    """
    bank = bank.without_retrieval()
    if not isinstance(bank, Quadrature | Exact):
        raise NectarError(f"these heads are networks (kind {bank.kind}), not nodes: fit with --kind quadrature")
    nodes = {name: x.astype(mx.float32) for name, x in bank.parameters.items()}
    if bank.offset is not None:
        nodes["keys"] = nodes["keys"] + bank.offset.astype(mx.float32)[:, None]
    return {"bias": mx.zeros(nodes["keys"].shape[:2])} | nodes
