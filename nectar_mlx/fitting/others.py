"""Other files that are in view while a text is fitted (`nectar fit --with other.nectar`).

They lie before the text, end to end, as `composition.compose` puts them: its conversations are answered with all of
them, and a head's error is that of the whole attention, theirs merged in. Positions count by distance alone, so the
text stays where it is, and the others move back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.nn as nn

from ..errors import NectarError
from ..heads import Bank, HeadArrays, Quadrature
from ..heads.together import Together
from ..mlxlm import placement
from ..mlxlm.geometry import Geometry
from ..mlxlm.placement import FittedText

ALONE = "a text that is fitted in chunks or layer by layer is fitted alone: leave out --with"


class OtherFile(FittedText, Protocol):
    """A file that may be in view (`Nectar`)."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Others:
    """The other texts in view. texts: how many there are with the text itself. positions: that they take before it.
    layers: their heads as nodes, by layer, their keys absolute and at their places."""

    texts: int
    positions: int
    layers: Sequence[HeadArrays]

    @classmethod
    def before(
        cls, prefix: Sequence[int], files: Sequence[OtherFile], model: nn.Module, geometry: Geometry
    ) -> "Others | None":
        """Files before a text of this prefix; None where there are none. NectarError for what cannot be moved."""
        if not files:
            return None
        *shifts, own = placement.end_to_end(_lengths(prefix, files))
        layers = [
            placement.nodes(model, layer, [file.banks[index] for file in files], [by - own for by in shifts])
            for index, layer in enumerate(geometry.fitted)
        ]
        return cls(len(files) + 1, own, layers)

    def together(self, banks: Sequence[Bank]) -> list[Bank]:
        """A text's heads, a bank a layer, each beside those of the others."""
        others = (
            placement.bank(nodes, scale=own.scale, offset=own.offset)
            for own, nodes in zip(banks, self.layers, strict=True)
        )
        return [Together.of(own, other, texts=self.texts) for own, other in zip(banks, others, strict=True)]


def check(files: Sequence[OtherFile], *, model: str, kind: str) -> None:
    """NectarError for files of another model than that of this fingerprint, and for a kind of heads that cannot be put
    together with others."""
    for file, name in zip(files, names(files), strict=True):
        if file.metadata["model_sha256"] != model:
            raise NectarError(
                f"{name} was fitted on another model ({file.metadata['model']}): --with takes files of the same one"
            )
    if files and kind != Quadrature.kind:
        raise NectarError(f"kind {kind} is fitted to its text alone: leave out --with, or choose {Quadrature.kind}")


def names(files: Sequence[OtherFile]) -> list[str]:
    """What files say that their texts are."""
    return [str(file.metadata.get("source") or "a file without a name") for file in files]


def digests(files: Sequence[OtherFile]) -> dict[str, list[str]]:
    """Which files they are, for a claim and for the metadata; empty where there are none."""
    return {"with": [file.digest for file in files]} if files else {}


def tokens(prefix: Sequence[int], files: Sequence[OtherFile]) -> int:
    """How many positions a text takes with these files before it."""
    return placement.common_tokens([*(file.prefix for file in files), prefix]) + sum(_lengths(prefix, files))


def _lengths(prefix: Sequence[int], files: Sequence[OtherFile]) -> list[int]:
    """Positions behind what all begin with, of the files and then of the text."""
    common = placement.common_tokens([*(file.prefix for file in files), prefix])
    return [*(file.start - common for file in files), len(prefix) - common]
