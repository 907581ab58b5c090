"""Packages: folders that a Mac shows as one file. Books keeps its e-books so, each an unpacked zip file."""

import io
import os
import zipfile
from pathlib import Path

# Why they are not read; "" for those that are.
REASONS = {
    ".epub": "",
    ".pages": "an Apple Pages file; export it as .docx",
    ".numbers": "an Apple Numbers file; export it as .xlsx",
    ".key": "an Apple Keynote file; export it as .pptx",
    ".app": "a program",
    ".photoslibrary": "the pictures of Photos",
    ".musiclibrary": "the music of Music",
}


def is_package(path: Path) -> bool:
    """Whether there is a folder of such a name. OSError where that cannot be seen."""
    return path.suffix.lower() in REASONS and path.is_dir()


def stamp(folder: Path) -> tuple[int, int]:
    """The size of all files in bytes, and when one, or a folder, was changed last, in ns. OSError where one cannot be
    seen."""
    files, folders = _contents(folder)
    stats = [file.stat() for file in files.values()]
    changed = [status.st_mtime_ns for status in (*stats, *(place.stat() for place in folders))]
    return sum(status.st_size for status in stats), max(changed)


def zipped(folder: Path) -> bytes:
    """The zip file that a folder stands for: the same one for the same files. OSError where one cannot be read."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for name, file in sorted(_contents(folder)[0].items()):
            archive.writestr(zipfile.ZipInfo(name), file.read_bytes())  # with one time for all
    return data.getvalue()


def _contents(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The files in a folder by their names in the zip file, and the folders. A link is followed to another file of the
    folder alone: a zip file could not lead further."""
    root, files = folder.resolve(), dict[str, Path]()
    folders = [root]
    for place in folders:
        with os.scandir(place) as entries:
            for entry in entries:
                file = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(file)
                elif file.is_file() and (not entry.is_symlink() or file.resolve().is_relative_to(root)):
                    # Names that are no text do not matter here.
                    files[os.fsencode(file.relative_to(root).as_posix()).decode(errors="replace")] = file
    return files, folders
