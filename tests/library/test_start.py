"""A question to a library of a hundred documents starts nearly as soon as one to a single file."""

import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pytest

from nectar_mlx import cli
from nectar_mlx.from_library import Questions
from nectar_mlx.library import Library, ModelFitter
from tests import toys
from tests.library import generated


@pytest.mark.slow
def test_routing_and_opening_against_opening_alone(tmp_path):
    model = toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    library, single = measure(tmp_path, str(model))
    assert library - single < 0.1, "of a real model, which takes a second to load, a tenth"


def measure(folder, model, *, count=12):
    """Asks the library and its single files in turn; the median seconds of each until a prompt can be read."""
    made = generated.generate({"en": generated.B["en"], "de": generated.B["de"]}, {}, seed=3)
    (folder / "documents").mkdir()
    for number, text in enumerate(made.texts):
        (folder / "documents" / f"{number}.txt").write_text(text[-5000:])
    library = Library(folder / "library")
    library.add([folder / "documents"], ModelFitter(model, {"kind": "exact", "context_tokens": 300}))
    single, whole = [], []
    asked = [question for question in made.questions if question.document is not None][:count]
    for question in asked:
        start = time.perf_counter()
        args = Namespace(nectar="library", library=folder / "library", model=None, adapter=None, fetch=False)
        questions = Questions.open(args)
        found = questions.find(question.text)
        middle = time.perf_counter()
        document = questions.document or library.documents()[0]
        cli.load(str(document.file), args)
        if found is not None and all(c.log_likelihood is None for c in questions.routing.candidates):
            whole.append(middle - start)
            single.append(time.perf_counter() - middle)
    single, whole = sorted(single), sorted(whole)
    ratio = whole[len(whole) // 2] / single[len(single) // 2]
    print(f"{len(whole)} of {len(asked)} without doubt: {whole[len(whole) // 2]:.3f} s, {ratio:.2f} of a single file")
    assert len(whole) > len(asked) / 2
    return whole[len(whole) // 2], single[len(single) // 2]


if __name__ == "__main__":  # with a real model: python -m tests.library.test_start SmolLM2-135M-Instruct
    with tempfile.TemporaryDirectory() as made:
        measure(Path(made), sys.argv[1])
