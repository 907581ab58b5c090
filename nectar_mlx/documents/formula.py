"""Formulas of Office documents (OMML) and of web pages (MathML) in one line: x^2, (a+b)/2, √(x)."""

import re
from collections.abc import Callable, Sequence

from nectar_mlx.documents.archive import Element, attribute, local

Parts = Sequence[str]


def fraction(top: str, bottom: str) -> str:
    return f"{grouped(top)}/{grouped(bottom)} "


def power(base: str, exponent: str) -> str:
    return f"{base}^{grouped(exponent)}"


def index(base: str, below: str) -> str:
    return f"{base}_{grouped(below)}"


def root(inside: str, degree: str = "") -> str:
    return f"{'√' if degree in ('', '2') else grouped(degree) + '√'}({inside})"


def grouped(text: str) -> str:
    """The text in brackets unless it is one number, name or bracket."""
    text = text.strip()
    return text if re.fullmatch(r"\w*|[−+-]?\d+(?:[.,]\d+)?|[^\w\s]", text) else f"({text})"


def tidy(text: str) -> str:
    """The formula with single spaces, and none before a sign or a bracket."""
    return re.sub(r" +(?=[^\w√∑∏∫({\[]|$)", "", re.sub(r"\s+", " ", text)).strip()


def _plain(parts: Parts) -> str:
    return "".join(parts)


def _at(parts: Parts, position: int) -> str:
    return parts[position] if position < len(parts) else ""


_MATHML: dict[str, Callable[[Parts], str]] = {
    "mfrac": lambda parts: fraction(_at(parts, 0), _at(parts, 1)),
    "msup": lambda parts: power(_at(parts, 0), _at(parts, 1)),
    "msub": lambda parts: index(_at(parts, 0), _at(parts, 1)),
    "msubsup": lambda parts: power(index(_at(parts, 0), _at(parts, 1)), _at(parts, 2)),
    "munderover": lambda parts: power(index(_at(parts, 0), _at(parts, 1)), _at(parts, 2)) + " ",
    "munder": lambda parts: index(_at(parts, 0), _at(parts, 1)) + " ",
    "mover": lambda parts: power(_at(parts, 0), _at(parts, 1)),
    "msqrt": lambda parts: root(_plain(parts)),
    "mroot": lambda parts: root(_at(parts, 0), _at(parts, 1)),
    "mtd": lambda parts: _plain(parts) + " ",
    "mtr": lambda parts: _plain(parts).strip() + "; ",
    "annotation": lambda parts: "",
    "annotation-xml": lambda parts: "",
}


def mathml(tag: str, parts: Parts) -> str:
    """The line of a MathML element, from the lines of its children."""
    return _MATHML.get(tag, _plain)(parts)


def omml(tag: str, parts: dict[str, str], inside: str) -> str:
    """The line of an OMML element.

    Args:
        tag: its local name.
        parts: the lines of its children, by local name; "chr", "begChr" and "endChr" from its properties.
        inside: the lines of all its children together.
    """
    part = parts.get
    match tag:
        case "f":
            return fraction(part("num", ""), part("den", ""))
        case "sSup":
            return power(part("e", ""), part("sup", ""))
        case "sSub":
            return index(part("e", ""), part("sub", ""))
        case "sSubSup" | "sPre":
            return power(index(part("e", ""), part("sub", "")), part("sup", ""))
        case "rad":
            return root(part("e", ""), part("deg", ""))
        case "nary":
            below, above = part("sub", ""), part("sup", "")
            sign = part("chr", "∫")
            sign = index(sign, below) if below else sign
            return f"{power(sign, above) if above else sign} {part('e', '')}"
        case "d":
            return f"{part('begChr', '(')}{inside}{part('endChr', ')')}"
        case "limLow":
            return index(part("e", ""), part("lim", "")) + " "
        case "limUpp":
            return power(part("e", ""), part("lim", ""))
        case "func":
            return f"{part('fName', '')} {grouped(part('e', ''))}"
        case "mr" | "eqArr":
            return inside + "; "
    return inside


def math_line(element: Element) -> str:
    """An equation of an Office document (OMML) in one line."""
    tag = local(element)
    if tag in ("t", "delText"):
        return element.text or ""
    parts: dict[str, str] = {}
    inside: list[str] = []
    for item in element:
        name = local(item)
        if name.endswith("Pr"):
            signs = {local(sign): attribute(sign, "val") for sign in item if local(sign) in ("chr", "begChr", "endChr")}
            parts |= signs
            continue
        line = math_line(item)
        parts[name] = parts.get(name, "") + line
        inside.append(line)
    if tag == "oMathPara":
        return "\n".join(inside)
    separator = "," if tag == "d" else " " if tag == "mr" else "; " if tag in ("m", "eqArr") else ""
    return omml(tag, parts, separator.join(inside))
