"""What the files of Microsoft's Office share: parts of a zip file, found through relations."""

from nectar_mlx.documents.archive import Archive, attribute, children, resolve

Relations = dict[str, tuple[str, str]]
"""By a relation's id: what it is ("styles", "slide" …), and the path of the part; empty if it is outside."""


def relations(archive: Archive, part: str) -> Relations:
    """The relations of a part; of the whole file for the part ""."""
    folder, _, name = part.rpartition("/")
    path = archive.find(f"{folder}/_rels/{name}.rels" if folder else f"_rels/{name}.rels")
    if not path:
        return {}
    found = {}
    for item in children(archive.xml(path), "Relationship"):
        outside = attribute(item, "TargetMode") == "External"
        target = "" if outside else archive.find(resolve(part, attribute(item, "Target")))
        found[attribute(item, "Id")] = (attribute(item, "Type").rpartition("/")[2], target)
    return found


def main_part(archive: Archive, usual: str) -> str:
    """The path of the document itself."""
    found = next((path for kind, path in relations(archive, "").values() if kind == "officeDocument"), "")
    return found or archive.find(usual) or usual
