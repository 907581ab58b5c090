"""A library: many documents, each with a fitted file, and the way from a question to the right one.

`scan` reads files into `database`, `volumes` decides which texts share a .nectar and who fits it, `work` fits through
`fitter`, `naming` and `whole` look after the files, `index` and `search` find words, `routing` decides, of close
documents with `deciding`, `library` is what callers use. MLX is imported only when something is fitted or renamed, or
asked of several close documents.
"""

from .documents import Document
from .fitter import Fitter, ModelFitter
from .folder import default_folder, holds_library
from .library import Added, Library, Removed
from .routing import Answers, Candidate, Evidence, Routing, none_of
from .scan import Scan
from .volumes import Identity
from .work import Work

__all__ = [
    "Added",
    "Answers",
    "Candidate",
    "Document",
    "Evidence",
    "Fitter",
    "Identity",
    "Library",
    "ModelFitter",
    "Removed",
    "Routing",
    "Scan",
    "Work",
    "default_folder",
    "holds_library",
    "none_of",
]
