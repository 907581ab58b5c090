"""Attention under the patterns of Sparse Transformers (Child et al., arXiv 1904.10509)."""

from .attention import sparse_attention
from .patterns import Combine, Fixed, Pattern, Strided

__all__ = ["Combine", "Fixed", "Pattern", "Strided", "sparse_attention"]
