"""The library comes first: it loads an optimised BLAS, which must happen before mlx.core is imported."""

import nectar_mlx  # noqa: F401
