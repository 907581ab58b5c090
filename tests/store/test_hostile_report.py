"""Reports with right checksums and wrong contents: refused when the file is read, or harmless to all that read them."""

import json

import pytest

from nectar_mlx import Nectar, NectarError, inspect, output, push, store
from nectar_mlx.evaluation import methods
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.updating.base import FileContents
from nectar_mlx.fitting.updating.outcome import config_of
from tests import toys
from tests.store.test_hostile import made

FILE = {"name": "a", "kind": "text", "characters": 5, "start": 0, "end": 5, "unit": "page", "places": [["1", 0, 5]]}
REPORT = {
    "verdict": "Close",
    "kl": 0.1,
    "agree": 0.9,
    "gap_closed": 0.5,
    "kl_no_context": 1.0,
    "error": [0.1] * 4,
    "seconds": {"fit": 1.0},
    "recall": {"weight": 0.5, "exponent": 0.5},
    "files": [FILE | {"left_out": [], "reason": ""}],
    "packed_files": "",
    "edits": "",
    "text": "",
    "left_out_tokens": 3,
}
VALUES = [None, True, -1, 2**63, 10**400, 1e308, "x", "\x1b\u202e\n", [], {}, [[]], [None], {"a": []}, ["x"] * 4]


@pytest.mark.parametrize("field", REPORT)
def test_whatever_a_report_says(tmp_path, capsys, field):
    tensors, metadata = made("quadrature", None)
    tokenizer, path = toys.tokenizer(), tmp_path / "x.nectar"
    for value in VALUES:
        report = {k: v for k, v in REPORT.items() if k not in ("text", "packed_files") or k == field}
        store.write(path, tensors, metadata | {"report": report | {field: value}})
        output._held(path)
        try:
            nectar = Nectar.read(path)
            facts = inspect.describe(path)
            nectar.text(tokenizer)
        except NectarError as error:
            assert "\n" not in str(error)
            continue
        assert inspect.main([str(path)]) == 0
        assert push.card(facts, "a/b", {}) and json.dumps(facts) and isinstance(nectar.faithful, bool)
        assert methods.of_file("x", nectar, []) and 0 <= nectar.recall.weight < 1
        FileContents(tensors=nectar.tensors, metadata=nectar.metadata).errors  # noqa: B018
    told = capsys.readouterr()
    assert not set("\x1b\u202e") & set(told.out + told.err)


@pytest.mark.parametrize("field", FitConfig.__dataclass_fields__)
def test_settings_of_a_file_are_settings_or_the_defaults(field):
    for value in [*VALUES, 0, float("inf")]:
        config_of({"config": {field: value, "unknown": value}})
