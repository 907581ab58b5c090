"""A fitter that needs no model: its file is a .nectar without heads, whose source is the text. Also a program that adds
a folder with it, or with a toy model."""

import hashlib
import sys
import time
from pathlib import Path

import numpy as np

from nectar_mlx import store
from nectar_mlx.errors import NectarError
from nectar_mlx.library import Identity, Library, ModelFitter
from tests.fitting.toy_fit import FAST as TOY

FAST = TOY | {"budget": 0.5, "steps": 4, "checks": 1, "context_tokens": 120}


class CheapFitter:
    """broken: texts with this word cannot be fitted. raising: what to raise instead of any fit. seconds: of a fit."""

    def __init__(self, name="cheap", *, broken="unfittable", raising=None, seconds=0.0, weights="1"):
        self.name, self._broken, self._raising, self._seconds = name, broken, raising, seconds
        self.adapter = ""
        self.identity = Identity(name, hashlib.sha256(f"{name}{weights}".encode()).hexdigest(), "tokens")
        self.fitted: list[str] = []
        self.former: list[str | None] = []

    def fit(self, reading, output, *, source, partial, progress, former=None):
        if self._raising is not None:
            raise self._raising
        partial.mkdir(exist_ok=True)
        (partial / "begun").write_text(source)
        time.sleep(self._seconds / 2)
        text = reading.text
        if self._broken in text:
            raise NectarError("this text cannot be fitted")
        self.fitted.append(source)
        self.former.append(former and text_in(former))
        output.write_text(source)  # what a kill leaves is no whole file
        time.sleep(self._seconds / 2)
        _, model, tokenizer, _ = self.identity
        digests = {"model_sha256": model, "tokenizer_sha256": tokenizer, "prefix_sha256": "none"}
        nothing = {"geometry": {}, "layout": {}, "report": {}, "model": self.name, "nectar_mlx": ""}
        metadata = nothing | digests | {"source": f"{source}\n{text}"}
        store.write(output, {"prefix": np.arange(300, dtype=np.int32)}, metadata)

    def expected(self, characters):
        return self._seconds

    def is_whole(self, path):
        try:
            store.check_whole(path)
            return store.tensor_file.metadata(path)["model_sha256"] == self.identity.model_sha256
        except NectarError:
            return False


def text_in(path):
    """The text of a file that a `CheapFitter` wrote."""
    return store.tensor_file.metadata(path)["source"]


if __name__ == "__main__":
    library, folder, how = sys.argv[1:]
    fitter = CheapFitter(seconds=float(how)) if how[0].isdigit() else ModelFitter(how, FAST)
    print(len(Library(Path(library)).add([folder], fitter).work.fitted), "documents fitted")
