"""The documents name what exists: modules, files, commands and their options; the worked example works."""

import argparse
import importlib
import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import mlx_lm
import pytest

import nectar_mlx.fitting.kinds
import nectar_mlx.heads
from nectar_mlx import Nectar, __main__, cli
from nectar_mlx.fitting.config import FitConfig
from tests import toys
from tests.test_layers import LEVELS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nectar_mlx"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README_COMMANDS = ("uv run nectar demo", "uv run pytest -n auto")  # what a stranger types first
SUFFIXES = (".py", ".md", ".metal", ".h", ".cpp", ".yml", ".toml", ".png", ".sh", ".html")
EXAMPLE = "affine.py"  # that CONTRIBUTING has a reader type in
TENSORS = {"heads.NAME", "heads.NAME.scales", "heads.grids", "heads.numbers"}  # in a file, not in the package
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.M)


def prose(document: Path) -> str:
    """Without the fenced blocks."""
    return _FENCED.sub("", document.read_text())


def spans(document: Path) -> list[str]:
    """What stands in backticks in the prose, without the arguments of calls."""
    return [span.partition("(")[0] for span in re.findall(r"`([^`\n]+)`", prose(document))]


def blocks(document: Path, *, python: bool) -> list[str]:
    """Python code, or what is typed in a shell and everything else."""
    fenced = _FENCED.findall(document.read_text())
    indented = [] if python else _INDENTED.findall(prose(document))
    return [textwrap.dedent(block) for _, language, block in fenced if (language == "python") == python] + indented


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            fields = getattr(found, "__dataclass_fields__", {})
            annotations = getattr(found, "__annotations__", {})
            if part in fields or part in annotations:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def dotted_names(document: Path) -> Iterator[str]:
    """With `nectar_mlx.` in front, and in backticks also without it, from the package's own modules on."""
    yield from re.findall(r"\bnectar_mlx(?:\.[A-Za-z_]\w*)+", document.read_text())
    own = {path.stem for path in PACKAGE.iterdir()} - {"nectar"}  # `nectar.save`: of an object of that name
    for span in spans(document):
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", span) and span.split(".")[0] in own and span not in TENSORS:
            yield f"nectar_mlx.{span}"
        elif span.startswith(("Nectar.", "nectar.")) and not span.endswith(SUFFIXES):
            yield f"nectar_mlx.Nectar.{span.split('.')[1]}"
    for block in blocks(document, python=True):
        for module, names in re.findall(r"^from (nectar_mlx[\w.]*) import ([\w, ]+)", block, re.M):
            yield from (f"{module}.{name.strip()}" for name in names.split(","))


def paths(document: Path) -> Iterator[str]:
    """Files and folders that links lead to, or that stand in backticks."""
    for target in re.findall(r"\]\(([^)#\s]+)", prose(document)):
        if "://" not in target:
            yield target
    for span in spans(document):
        path = span.split()[0] if span.split() else ""
        is_path = (
            re.fullmatch(r"[\w./-]+", path) and "/" in path and (path.endswith(("/", *SUFFIXES)) or path[0] == ".")
        )
        if is_path and Path(path).name != EXAMPLE:
            yield path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_exists(document):
    # An attribute that only objects have is not found on the class: those are named without their class.
    assert [name for name in sorted(set(dotted_names(document))) if not exists(name)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_exists(document):
    roots = (ROOT, PACKAGE, document.parent)
    assert [p for p in sorted(set(paths(document))) if not any((root / p).exists() for root in roots)] == []


def commands(document: Path) -> Iterator[list[str]]:
    """Lines of blocks that call a command of ours: its name and arguments."""
    for line in "".join(blocks(document, python=False)).replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ ").removeprefix("uv run "), comments=True)
        if words[:1] == ["nectar"]:
            yield words[1:]
        elif words[:2] == ["python", "-m"] and words[2].removeprefix("nectar_mlx.") in __main__.COMMANDS:
            yield [words[2].removeprefix("nectar_mlx."), *words[3:]]


def test_the_two_commands_of_the_readme_read_as_they_did():
    lines = [
        line.partition("#")[0].strip()
        for block in blocks(ROOT / "README.md", python=False)
        for line in block.splitlines()
    ]
    assert all(command in lines for command in README_COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_accepted_by_its_parser(document, monkeypatch):
    parsed: list[argparse.Namespace] = []

    def parse_only(parser, work, argv):
        parsed.append(parser.parse_args(argv))
        return 0

    monkeypatch.setattr(cli, "run", parse_only)
    called = list(commands(document))
    for command, *arguments in called:
        assert __main__.main([command, *arguments]) == 0
    assert len(parsed) == len(called)


def test_the_readme_shows_how_every_kind_of_user_begins():
    called = {command for command, *_ in commands(ROOT / "README.md")}
    assert called >= {"demo", "fit", "ask", "chat", "serve", "evaluate"}


def test_no_line_of_prose_is_too_long():
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md", *(ROOT / "docs" / "log").glob("*.md")]:
        lines = enumerate(prose(document).splitlines(), 1)
        long = [n for n, line in lines if len(line) > 120 and not line.lstrip().startswith(("|", "!["))]
        assert long == [], document.name


def test_the_table_of_layers_is_the_tested_one():
    rows = re.findall(r"^\| \d+ \| ([^|]*) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    table = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    tested = [{name for name in names if not name.startswith("__")} for names in LEVELS]
    assert table == [names for names in tested if names]


def load(source: str, name: str) -> types.ModuleType:
    """A module of the package from its text."""
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
    return module


@pytest.mark.fit
@pytest.mark.parametrize("document", ["README.md", "docs/api.md"])
def test_the_snippets_run_one_after_the_other(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(" ".join(f"Fox number {i} sees dog {i * i % 17}." for i in range(60)))
    Path("notes").mkdir()
    Path("notes/fox.md").write_text("A fox.")
    model, tokenizer, fit, generate = toys.toy("llama"), toys.tokenizer(), Nectar.fit, mlx_lm.generate
    fast = {"budget": 0.5, "queries": 300, "conversations": 8, "trial_steps": 2, "answer_tokens": 8, "checks": 1}
    fast |= {"steps": 2, "batch": 64}
    monkeypatch.setattr("nectar_mlx.models.load", lambda name, **options: (model, tokenizer))
    monkeypatch.setattr(Nectar, "fit", lambda *texts, **options: fit(*texts, **(options | fast)))
    monkeypatch.setattr(mlx_lm, "generate", lambda *asked, **options: generate(*asked, **options, max_tokens=4))
    program = "".join(blocks(ROOT / document, python=True))
    exec(compile(program, document, "exec"), {})
    assert Nectar.load("book.nectar", model, tokenizer).prefix


@pytest.mark.fit
def test_the_worked_example_of_a_kind_can_be_fitted(monkeypatch):
    head_source, fit_source = blocks(ROOT / "CONTRIBUTING.md", python=True)
    heads, kinds = nectar_mlx.heads, nectar_mlx.fitting.kinds
    try:
        kind = load(head_source, "nectar_mlx.heads.affine").Affine
        monkeypatch.setattr(heads, "Affine", kind, raising=False)
        monkeypatch.setitem(heads.KINDS, kind.kind, kind)
        fit = load(fit_source, "nectar_mlx.fitting.kinds.affine").AffineFit
        monkeypatch.setitem(kinds.KIND_FITS, kind.kind, fit)
    finally:
        for name in ("nectar_mlx.heads.affine", "nectar_mlx.fitting.kinds.affine"):
            sys.modules.pop(name, None)
    fast = {"queries": 300, "conversations": 8, "trial_steps": 2, "answer_tokens": 8, "checks": 1, "batch": 64}
    text = " ".join(f"Fox number {i} sees dog {i * i % 17}." for i in range(60))
    model, tokenizer = toys.toy("llama"), toys.tokenizer()

    def fitted(steps: int) -> Nectar:
        config = FitConfig(kind="affine", budget=0.5, steps=steps, context_tokens=100, **fast)
        return toys.fit(model, tokenizer, text, config=config)

    nectar = fitted(steps=60)
    assert {bank.kind for bank in nectar.banks} == {"affine"}
    assert nectar.nbytes <= 0.5 * nectar.cache_nbytes
    assert sum(nectar.report["error"]) < 0.9 * sum(fitted(steps=1).report["error"])
