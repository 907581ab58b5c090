"""/v1/embeddings: the sentence encoder that `nectar evaluate` compares answers with, where it is on this machine."""

import asyncio
import base64
from pathlib import Path

import numpy as np

from ..core.types import DoubleArray, JsonObject
from ..evaluation import similarity
from .errors import ApiError, refused
from .schema import EmbeddingsRequest, parse
from .service import Service
from .web import Json, Request

NAME = "all-MiniLM-L6-v2"
_MAX_CHARACTERS = 16_384  # of a text; the encoder reads its first 256 tokens


class Embeddings:
    def __init__(self, service: Service):
        self._service = service
        self._encoder: similarity.MiniLM | None = None

    async def create(self, request: Request) -> Json:
        asked = parse(request.body, EmbeddingsRequest)
        if asked.dimensions is not None:
            raise refused("dimensions", "cannot be chosen: vectors have 384 numbers")
        folder = similarity.minilm_folder()
        if not folder.exists():
            raise ApiError(
                400,
                f"embeddings need {NAME} (84 MB), which is not on this machine: `nectar evaluate` fetches it",
                code="encoder_missing",
            )
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        vectors = [await self._embed(folder, text[:_MAX_CHARACTERS]) for text in texts]
        data: list[JsonObject] = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, asked.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        tokens = sum(len(text) // 4 + 1 for text in texts)  # about
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Json({"object": "list", "data": data, "model": NAME, "usage": usage})

    async def _embed(self, folder: Path, text: str) -> DoubleArray:
        """In the engine's thread, a text at a time, so that answers go on."""

        def work() -> DoubleArray:
            self._encoder = self._encoder or similarity.MiniLM(folder)
            return np.asarray(self._encoder.embed([text])[0])

        return await asyncio.wrap_future(self._service.engine.call(work))


def _encoded(vector: DoubleArray, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype(np.float32).tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
