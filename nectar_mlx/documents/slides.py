"""Presentations (PPTX): the slides in their order, each with its notes."""

import re
from collections.abc import Iterable

from nectar_mlx.documents import blocks, formula
from nectar_mlx.documents.archive import Archive, Element, attribute, child, children, local
from nectar_mlx.documents.charts import chart
from nectar_mlx.documents.office import main_part, relations
from nectar_mlx.documents.reading import Document, Places, Unreadable
from nectar_mlx.documents.word_signs import raised

_FURNITURE = {"sldNum", "dt", "ftr", "hdr", "sldImg"}  # number, date, footer; the picture of the slide on its notes


def read_pptx(data: bytes, name: str) -> Document:
    """A presentation with a place for each slide."""
    archive = Archive(data, "PPTX")
    main = main_part(archive, "ppt/presentation.xml")
    parts = relations(archive, main)
    listed = child(archive.xml(main), "sldIdLst")
    places, left_out = Places("slide"), []
    for number, reference in enumerate(children(listed, "sldId"), 1):
        path = parts.get(_relation(reference), ("", ""))[1]
        if not path:
            left_out.append(f"slide {number}: the file does not hold it")
            continue
        try:
            places.add(str(number), f"## Slide {number}\n\n{_slide(archive, path)}".strip())
        except Unreadable as error:
            left_out.append(f"slide {number}: {error}")
    return Document("pptx", *places.result(), left_out=left_out)


def _relation(reference: Element) -> str:
    """The relation's id; the plain `id` beside it is the slide's own."""
    return next((value for key, value in reference.attrib.items() if key.endswith("}id")), "")


def _slide(archive: Archive, path: str) -> str:
    found = list(_shapes(archive.xml(path)))
    parts = relations(archive, path)
    for kind, part in parts.values():
        if kind == "diagramData" and part:
            points = (item for item in archive.xml(part).iter() if local(item) == "pt")
            found += [text for point in points if (text := "\n".join(_paragraphs(point)))]
        elif kind == "notesSlide" and part:
            notes = blocks.joined(list(_shapes(archive.xml(part))))
            found += [f"Notes: {notes}"] if notes else []
        elif kind == "chart" and part:
            found.append(chart(archive.xml(part)))
        elif kind == "comments" and part:
            texts = ("".join(item.itertext()).strip() for item in archive.xml(part).iter() if local(item) == "cm")
            found += [f"Comment: {text}" for text in texts if text]
    return blocks.joined(found)


def _shapes(parent: Element) -> Iterable[str]:
    """The texts and tables of the shapes, in the file's order, titles as headings."""
    for element in parent:
        tag = local(element)
        if tag == "sp":
            kind = _placeholder(element)
            lines = [] if kind in _FURNITURE else list(_paragraphs(element))
            if kind in ("title", "ctrTitle") and lines:
                yield blocks.heading(3, " ".join(" ".join(lines).split()))
            else:
                yield "\n".join(lines)
        elif tag == "tbl":
            rows = children(element, "tr")
            yield blocks.table([[" ".join(_paragraphs(cell)) for cell in children(row, "tc")] for row in rows])
        elif tag == "pic":
            name = child(element, "nvPicPr", "cNvPr")
            if name is not None and (description := attribute(name, "descr")):
                yield f"[{' '.join(description.split())}]"
        elif tag != "Fallback":
            yield from _shapes(element)


def _placeholder(shape: Element) -> str:
    found = child(shape, "nvSpPr", "nvPr", "ph")
    return "" if found is None else attribute(found, "type", "body")


def _paragraphs(parent: Element) -> Iterable[str]:
    for element in parent:
        if local(element) == "p":
            text = "".join(_runs(element)).strip()
            if text:
                yield text
        elif local(element) != "Fallback":
            yield from _paragraphs(element)


def _runs(element: Element) -> Iterable[str]:
    for item in element:
        tag = local(item)
        if tag == "t":
            yield item.text or ""
        elif tag == "br":
            yield "\n"
        elif tag in ("oMath", "oMathPara"):
            yield formula.tidy(formula.math_line(item))
        elif tag == "r" and (properties := child(item, "rPr")) is not None and _is_raised(properties):
            yield raised("".join(_runs(item)))
        elif tag not in ("Fallback", "pPr", "rPr"):
            yield from _runs(item)


def _is_raised(properties: Element) -> bool:
    return re.fullmatch("[1-9][0-9]{0,6}", attribute(properties, "baseline")) is not None
