"""Puts the fast BLAS in place as soon as MLX is imported: commands that need neither start without them."""

import sys


class _BeforeMlx:
    """Finds nothing. It acts when MLX is imported for the first time, and then goes away."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            sys.meta_path.remove(self)
            _use_fast_blas()


def use_fast_blas_with_mlx() -> None:
    """`blas.use_fast_blas` before `mlx.core` is imported."""
    if "mlx.core" in sys.modules:
        _use_fast_blas()
    else:
        sys.meta_path.insert(0, _BeforeMlx())


def _use_fast_blas() -> None:
    from .blas import use_fast_blas

    use_fast_blas()
