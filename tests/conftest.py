"""What the tests share. The library comes first: it loads an optimised BLAS, which must precede mlx.core."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import nectar_mlx  # noqa: F401
