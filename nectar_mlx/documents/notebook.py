"""Jupyter notebooks: the text and the code of the cells, and what the code printed."""

import json
from collections.abc import Iterator, Mapping

from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.html import html_text
from nectar_mlx.documents.reading import Document, Places, Unreadable


def read_notebook(data: bytes, name: str) -> Document:
    """A notebook with a place for each cell; pictures among the outputs are counted, not read."""
    text, notes = decode(data)
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable("a damaged notebook: it is not JSON") from error
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if isinstance(notebook, dict) and cells is None:  # notebooks of version 3 have worksheets
        sheets = notebook.get("worksheets")
        cells = (
            [cell for sheet in sheets if isinstance(sheet, dict) for cell in sheet.get("cells", [])]
            if isinstance(sheets, list)
            else None
        )
    if not isinstance(cells, list):
        raise Unreadable("not a notebook: it has no cells")
    language = _language(notebook)
    places, pictures = Places("cell"), 0
    for number, cell in enumerate((cell for cell in cells if isinstance(cell, dict)), 1):
        source = _string(cell.get("source", cell.get("input")))
        parts = [f"```{language}\n{source}\n```" if cell.get("cell_type") == "code" and source else source]
        for output in cell.get("outputs") or []:
            shown = list(_output(output)) if isinstance(output, dict) else []
            parts += [f"Output:\n```\n{text}\n```" for text in shown if text]
            pictures += not shown
        if joined := "\n\n".join(part for part in parts if part.strip()):
            places.add(str(number), joined)
    if pictures:
        notes.append(f"{pictures} output{'s' * (pictures > 1)} without text (pictures)")
    return Document("ipynb", *places.result(), left_out=notes)


def _language(notebook: Mapping[str, object]) -> str:
    metadata = notebook.get("metadata")
    info = metadata.get("language_info") if isinstance(metadata, dict) else None
    return _string(info.get("name")) if isinstance(info, dict) else ""


def _string(value: object) -> str:
    """Text that is stored as one string or as a list of lines."""
    if isinstance(value, list):
        return "".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


def _output(output: Mapping[str, object]) -> Iterator[str]:
    if "text" in output:
        yield _string(output["text"]).strip("\n")
    elif "evalue" in output:
        yield f"{_string(output.get('ename'))}: {_string(output['evalue'])}"
    data = output.get("data")
    if isinstance(data, dict):
        for kind in ("text/markdown", "text/html", "text/latex", "text/plain"):
            if text := _string(data.get(kind)).strip("\n"):
                if any(key.startswith("image/") for key in data) and kind == "text/plain":
                    return  # the name of a figure's object
                yield html_text(text)[0] if kind == "text/html" else text
                return
