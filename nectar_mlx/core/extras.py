"""Optional dependencies: nectar_mlx is on no package index, so what installs them starts from the clone."""


def install(extra: str) -> str:
    """The command for an extra of pyproject.toml, for a message."""
    return f"pip install '.[{extra}]' in the clone of nectar_mlx"


def without_backend(error: ImportError) -> str:
    """What to tell of an MLX that lacks the library that computes, which is an extra on Linux; "" for other errors."""
    if "libmlx" not in str(error):
        return ""
    return f"MLX has nothing to compute with: {install('cpu')}, or with an NVIDIA GPU '.[cuda13]'"
