"""The fused decode step: head functions, exact causal attention over the live tokens and their merge, in one or two
launches.

metal/ holds the kernel text. On Apple silicon it goes to `mx.fast.metal_kernel`, two launches a layer: partial results,
then their merge. On NVIDIA the same text goes to `mx.fast.cuda_kernel` behind metal/cuda.h, one launch a layer: the
threadgroup that finishes last at a KV head merges, which needs a memory fence between threadgroups that Metal does not
offer everywhere. Everywhere else, and for shapes without a kernel, callers take plain operations. So they do
where a kernel does not compile or computes something else: every text is tried before its first use (checking.py).

Calling a kernel through MLX costs host time that grows with the length of its text and the number of its inputs, so
constants are baked into the text, a layer's parameters are one buffer, and every text is built once.
"""

from .decode import DecodeKernel, blocks, pack
from .packing import Packed
from .source import backend
from .variants import HEAD_DIMS, LIVE_SLICE, MAX_LENGTH, MAX_SLICES, SIMDGROUPS

__all__ = [
    "HEAD_DIMS",
    "LIVE_SLICE",
    "MAX_LENGTH",
    "MAX_SLICES",
    "SIMDGROUPS",
    "DecodeKernel",
    "Packed",
    "backend",
    "blocks",
    "pack",
]
