"""Read a long context once, keep a small file, and ask any mlx-lm model about it at a constant cost."""

from typing import TYPE_CHECKING

from nectar_mlx.blas import use_fast_blas
from nectar_mlx.errors import NectarError

if TYPE_CHECKING:
    from nectar_mlx.nectar import Nectar

__all__ = ["Nectar", "NectarError", "__version__"]
__version__ = "0.1.0"

use_fast_blas()


def __getattr__(name: str) -> object:
    if name == "Nectar":
        from nectar_mlx.nectar import Nectar

        return Nectar
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
