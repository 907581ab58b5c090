"""Read a long context once, keep a small file, and ask an mlx-lm model about it from the file alone."""

import os
import sys
from typing import TYPE_CHECKING

from nectar_mlx.core.before_mlx import use_fast_blas_with_mlx
from nectar_mlx.errors import NectarError

if TYPE_CHECKING:
    from nectar_mlx.nectar import Nectar

__all__ = ["Nectar", "NectarError", "__version__"]
__version__ = "0.1.0"

use_fast_blas_with_mlx()
if sys.argv[:1] == ["-m"]:  # as Python has it while `python -m nectar_mlx.fit` imports this package
    from nectar_mlx.core.extras import name_backend_outside_main

    name_backend_outside_main()
# Where MLX multiplies float32 numbers in 10 bits on a GPU, scores of thousands are wrong by several units. A fit was
# no slower with exact products (docs/log/numbers.md).
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# A decode step of a whole model is more CUDA graphs than MLX keeps by default; each would be built anew at every step.
os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "20000")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when huggingface_hub is first imported; tests/test_privacy.py


def __getattr__(name: str) -> object:
    if name == "Nectar":
        from nectar_mlx.nectar import Nectar

        return Nectar
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
