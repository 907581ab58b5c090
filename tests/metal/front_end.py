"""A second front end for the kernels' text: clang reads it as C++ for OpenCL, which has Metal's address spaces.

Its library comes with PyPI's `libclang`. It is stricter than check.h: a temporary cannot be bound to a reference into
`thread`, say. What OpenCL allows and Metal does not is searched for in the text itself.
"""

import re
from pathlib import Path
from typing import Any

HEADER = Path(__file__).with_name("opencl.h")
ARGUMENTS = [
    *("-x", "cl", "-cl-std=clc++", "-cl-no-stdinc", "-target", "spir64-unknown-unknown", f"-I{HEADER.parent}"),
    *("-Wall", "-Wextra", "-Wno-unused", "-Wno-unused-parameter", "-Wno-pass-failed"),
]
# Of Metal's library, all that kernels call; opencl.h declares them.
BUILTINS = {
    *("as_type", "fma", "exp", "log", "max", "min", "simd_shuffle", "simd_shuffle_xor"),
    *("threadgroup_barrier", "simdgroup_multiply_accumulate", "thread_elements"),
}
_KEYWORDS = {"if", "for", "while", "switch", "return", "sizeof", "alignof", "static_cast", "reinterpret_cast"}
_WARNING = 2  # clang's severity


def available() -> bool:
    """Whether PyPI's libclang is installed."""
    try:
        _index()
    except Exception:  # no such package, or one without its library
        return False
    return True


def complaints(text: str) -> list[str]:
    """All that is wrong with a text that MLX would hand to Metal, a line each."""
    return [*_of_clang(text), *(what for rule in RULES for what in rule(text))]


def _index() -> Any:
    from clang import cindex

    return cindex.Index.create()


def _of_clang(text: str) -> list[str]:
    """Errors and warnings of clang."""
    lines = re.sub(r"^#include <metal_\w+>$", "", text, flags=re.M)
    lines = re.sub(r" \[\[\w+(\(\d+\))?\]\]", "", lines.replace("[[kernel]] void", "__kernel void"))
    lines = re.sub(r"\blocal\b", "local_", lines)  # a word of OpenCL's
    source = f'#include "{HEADER.name}"\n{lines}'
    unit = _index().parse("kernel.cl", args=ARGUMENTS, unsaved_files=[("kernel.cl", source)])
    at = source.splitlines()
    return [f"{d.spelling}: {at[d.location.line - 1]}" for d in unit.diagnostics if d.severity >= _WARNING]


def _lambdas(text: str) -> list[str]:
    capture = r"[=(,{&|?:]\s*\[[\w\s,&=*]*\]\s*(?:\([^()]*\))?\s*(?:mutable\s*)?(?:->\s*[\w:]+\s*)?\{"
    return [f"a lambda: {found[0]}" for found in re.finditer(capture, text)]


def _statics(text: str) -> list[str]:
    return [f"a static variable: {found[0]}" for found in re.finditer(r"\bstatic\b(?! METAL_FUNC\b)[^;{]*", text)]


def _doubles(text: str) -> list[str]:
    literal = r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?![\w.])"
    return [f"a double: {found[0]}" for found in re.finditer(rf"\bdouble\b|{literal}", text)]


def pointers(text: str) -> list[str]:
    """Pointers and references without an address space. OpenCL has a generic one, Metal has none."""
    declared = re.finditer(r"[\w<> ]*\b(?:float|half|u?int|uint4|float4|Element|Left|Tile|Block)\s?[*&]\s?\w+", text)
    found = (one[0].strip() for one in declared if not re.search(r"\b(device|thread|threadgroup|constant)\b", one[0]))
    return [f"a pointer without an address space: {one}" for one in found]


def _program_scope(text: str) -> list[str]:
    """What stands outside of functions and types is a function, a type or a constant."""
    start = text.index("namespace nectar {") + len("namespace nectar {")
    inside = _block(text, start)
    outside = re.sub(
        "^#.*$", "", text[: start - len("namespace nectar {")] + text[start + len(inside) + 1 :], flags=re.M
    )
    allowed = r"constant |typedef |struct |enum |template |using |METAL_FUNC |\[\[kernel\]\] |$"
    found = []
    for part in (inside, outside):
        while (flat := re.sub(r"\{[^{}]*\}", "@", part)) != part:
            part = flat
        declared = (one.strip() for one in re.split(r";|@(?!;)", re.sub("^#.*$", "", part, flags=re.M)))
        found += [f"at program scope: {one}" for one in declared if not re.match(allowed, one)]
    return found


def _functions(text: str) -> list[tuple[str, str, int, str]]:
    """(type it belongs to or "", name, number of parameters, body) of every function but the kernel."""
    found = []
    for head in re.finditer(r"METAL_FUNC [^(){};]*?\b(\w+)\(([^()]*)\) (?:const )?\{", text):
        owner = [m[1] for m in re.finditer(r"^struct (\w+(?:<\w+>)?) \{|^\};", text[: head.start()], re.M)]
        found.append((owner[-1] or "" if owner else "", head[1], _count(head[2]), _block(text, head.end())))
    return found


def _block(text: str, start: int) -> str:
    """From behind an opening bracket to its closing one."""
    depth = 1
    for at in re.finditer(r"[{}]", text[start:]):
        depth += 1 if at[0] == "{" else -1
        if not depth:
            return text[start : start + at.start()]
    return text[start:]


def _count(arguments: str) -> int:
    """How many arguments stand in a list, commas inside brackets aside."""
    while (flat := re.sub(r"\([^()]*\)|\[[^\[\]]*\]|<[^<>]*>", "", arguments)) != arguments:
        arguments = flat
    return arguments.count(",") + 1 if arguments.strip() else 0


def _calls(body: str) -> set[tuple[str, str, int]]:
    """(type it is asked of or "", name, number of arguments) of every call."""
    found = set()
    for call in re.finditer(r"(?:\b(\w+(?:<\w+>)?)::)?\b(\w+)(?:<[\w\s*,()/+]*>)?\(", body):
        depth, end = 1, call.end()
        while depth and end < len(body):
            depth += {"(": 1, ")": -1}.get(body[end], 0)
            end += 1
        found.add((call[1] or "", call[2], _count(body[call.end() : end - 1])))
    return found


def _recursion(text: str) -> list[str]:
    """Functions that call themselves, by way of others too. Overloads differ by their numbers of arguments."""
    functions = {(owner, name, n): _calls(body) for owner, name, n, body in _functions(text)}
    found = []
    for start in functions:
        ahead, seen = [start], set()
        while ahead:
            here = ahead.pop()
            for owner, name, n in functions[here]:
                # Without a type's name it is one of the same type, or a free one.
                for called in ((owner or here[0], name, n), ("", name, n)):
                    if called == start:
                        found.append(f"recursion: {start[1]}")
                    if called in functions and called not in seen:
                        seen.add(called)
                        ahead.append(called)
                        break
    return sorted(set(found))


def _builtins(text: str) -> list[str]:
    own = {name for _, name, _, _ in _functions(text)} | set(re.findall(r"\bstruct (\w+)", text))
    kernel = text[text.index("[[kernel]]") :]
    bodies = [body for *_, body in _functions(text)] + [_block(kernel, kernel.index("{") + 1)]
    called = {name for body in bodies for _, name, _ in _calls(body)}
    return [f"not a builtin that is known to be there: {name}" for name in sorted(called - own - BUILTINS - _KEYWORDS)]


RULES = (_lambdas, _statics, _doubles, pointers, _program_scope, _recursion, _builtins)
