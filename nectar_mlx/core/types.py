"""Types that the package shares: what it needs of a tokenizer and of a layer's cache, arrays, JSON objects."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]
DoubleArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
WordArray: TypeAlias = npt.NDArray[np.uint32]
AnyArray: TypeAlias = npt.NDArray[Any]

JsonObject: TypeAlias = dict[str, Any]
"""An object that `json.dumps` writes."""


class Tokenizer(Protocol):
    """What the package uses of mlx-lm's `TokenizerWrapper`.

    Not every tokenizer has these, so they are read with `getattr` and a default: `backend_tokenizer` (fast tokenizers),
    `think_start` and `think_end`.
    """

    @property
    def bos_token(self) -> str | None: ...

    @property
    def eos_token_ids(self) -> Iterable[int]: ...

    @property
    def chat_template(self) -> str | None: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...


class LayerCache(Protocol):
    """What the package uses of one layer's cache from mlx-lm, whatever its class."""

    state: Any

    def is_trimmable(self) -> bool: ...

    def trim(self, n: int, /) -> int: ...
