"""Optional dependencies: nectar_mlx is on no package index, so what installs them starts from the clone."""


def install(extra: str) -> str:
    """The command for an extra of pyproject.toml, for a message."""
    return f"pip install '.[{extra}]' in the clone of nectar_mlx"
