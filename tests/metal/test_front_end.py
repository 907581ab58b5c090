"""Every text that Metal would get, read by a second front end; and that this front end sees what is wrong."""

import pytest

from tests.metal import front_end, texts

pytestmark = pytest.mark.skipif(not front_end.available(), reason="PyPI's libclang is not installed: uv sync does it")


@pytest.fixture(scope="module")
def every():
    return texts.texts()


def test_every_text(every):
    kinds = {name.split("-")[0] for name in every}
    assert kinds == {"partial", "merge", "sparse_forward", "sparse_queries", "sparse_keys"}
    assert len(every) > 200
    padding = {
        line.strip().split(" int")[0]
        for text in every.values()
        for line in text.splitlines()
        if "left_padding [[" in line
    }
    assert padding == {"const constant", "const device"}, "of few sequences, and of many"
    wrong = {name: found for name, text in every.items() if (found := front_end.complaints(text))}
    assert not wrong


# ruff: noqa: E501  (texts to find in the kernels are as long as they are)
# What is wrong: the stage, the part of its text that is replaced, by what, and what is to be said about it.
PLANTED = {
    "a temporary for a reference": ("sparse_forward", "Left left, Right right) {", "thread const Left& left, thread const Right& right) {", "no matching function"),
    "another address space": ("merge", "device Element* to = ", "thread Element* to = ", "cannot initialize"),
    "an array for a buffer": ("merge", "partials, output, sums, head,", "partials, output, output, head,", "no matching function"),
    "no address space": ("partial", "const device float* bias,", "const float* bias,", "without an address space"),
    "a builtin that is not there": ("partial", "metal::fast::exp(", "metal::precise::exp(", "no member named"),
    "a name of Metal's library": ("partial", "Matrix", "matrix", "ambiguous"),
    "types that do not fit": ("partial", "metal::min(tile_row + n, rows - 1)", "metal::min(tile_row + n, 3u)", "ambiguous"),
    "a name that is unknown": ("sparse_keys", "const Head head =", "const Heat head =", "unknown type name"),
    "a builtin that may not be called": ("merge", "metal::max(far_top, live_top)", "metal::mix(far_top, live_top, 0.5f)", "not a builtin that is known"),
    "a lambda": ("merge", "float4 z;", "const auto f = [](int a) { return a; }; float4 z;", "a lambda"),
    "a lambda that captures": ("partial", "Tile tile;", "Tile tile; apply([&] { return rows; });", "a lambda"),
    "a static variable": ("partial", "Lane lane;", "static int count = 0; Lane lane;", "a static variable"),
    "a double literal": ("merge", "1.0f / all_mass", "1.0 / all_mass", "a double: 1.0"),
    "a double literal with an exponent": ("merge", "1.0f / all_mass", "1e-3 / all_mass", "a double: 1e-3"),
    "a double": ("sparse_forward", "float total[2]", "double total[2]", "a double"),
    "a variable at program scope": ("partial", "struct Lane {", "int launches = 0; struct Lane {", "at program scope: int launches"),
    "a variable behind the functions": ("merge", "[[kernel]] void", "float last;\n[[kernel]] void", "at program scope: float last"),
    "a function that calls itself": ("merge", "return 8 * (v % PARTS)", "if (v > 99) { return column_of(v - 1); } return 8 * (v % PARTS)", "recursion: column_of"),
    "functions that call each other": ("sparse_forward", "METAL_FUNC bool far_visible(int i, int f) {", "METAL_FUNC int odd(int n);\nMETAL_FUNC int even(int n) { return n == 0 ? 1 : odd(n - 1); }\nMETAL_FUNC int odd(int n) { return n == 0 ? 0 : even(n - 1); }\nMETAL_FUNC bool far_visible(int i, int f) {", "recursion: even"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_wrong_is_seen(every, what):
    stage, good, bad, said = PLANTED[what]
    text = next(text for name, text in every.items() if name.startswith(f"{stage}-"))
    assert good in text, "the text has changed: plant it elsewhere"
    complaints = front_end.complaints(text.replace(good, bad))
    assert any(said in complaint for complaint in complaints), complaints


def test_every_builtin_that_is_known_is_called(every):
    """So that the list says what Metal must have, and no more."""
    called = {
        name for text in every.values() for name in front_end.BUILTINS if f"{name}(" in text or f"{name}<" in text
    }
    assert called == front_end.BUILTINS


def test_texts_are_written(tmp_path, capsys):
    texts.main(str(tmp_path))
    files = list(tmp_path.glob("*.metal"))
    assert capsys.readouterr().out == f"{len(files)} texts in {tmp_path}\n"
    assert all("[[kernel]] void" in file.read_text() and 'utils.h"\n' in file.read_text() for file in files)
