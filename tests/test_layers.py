"""Imports point one way: a module imports only from the levels below its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nectar_mlx"
LEVELS = (
    ("__version__", "errors"),
    ("core",),
    ("heads", "documents"),
    ("kernels",),
    ("sparse", "models"),
    ("answering", "mlxlm"),
    ("store",),
    ("retrieval",),
    ("fitting",),
    ("nectar_file",),
    ("nectar",),
    ("__init__", "baselines", "composition", "interchange", "library"),
    ("evaluation", "benchmarks"),
    ("serving",),
    ("agent", "console", "editor", "output", "parser", "settings"),
    ("installed",),
    ("cli",),
    ("from_library", "inspect", "ranks", "update_file", "writing"),
    ("conversation", "remote"),
    (
        *("add", "ask", "bench", "chat", "demo", "doctor", "evaluate", "export", "fit", "list", "plan", "push"),
        *("remove", "serve", "update"),
    ),
    ("__main__",),
    ("completion",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> Iterator[str]:
    """The parts of the package (its subpackages and root modules) that a module imports from."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = (*base, *(node.module or "").split(".")) if node.module else base
        if module[:1] != ("nectar_mlx",):
            continue
        yield from {(*module, alias.name)[1] for alias in node.names}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_lower_levels_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert [name for name in imports(path) if name != own and LEVEL[name] >= LEVEL[own]] == []


def test_every_part_of_the_package_has_a_level() -> None:
    parts = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")
    }
    assert parts == LEVEL.keys() - {"__version__"}
