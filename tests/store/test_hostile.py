"""Files with right checksums and wrong contents: one line, before anything is decoded or allocated by what they say."""

import json
import time
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, inspect, store
from nectar_mlx.core import json_text
from nectar_mlx.documents import FileReport, Reading, record
from nectar_mlx.heads import KINDS
from nectar_mlx.store import Layout, schema
from tests import toys

D, K, N = 16, 2, 40
SIZES = {"mlp": (8, 2, 32, 2), "corrected": (6, 4), "exact": (N,), "retrieval": (0,), "completion": (5,)}


def made(kind, bits):
    """The tensors and metadata of a file of some kind, as `store.read` gives them."""
    layout = Layout(kind=kind, n_layers=2, n_kv_heads=K, head_dim=D, scale=0.25, bits=bits)
    key, heads = mx.random.key(3), []
    for _ in range(2 * K):
        head = {}
        for name, shape in layout.bank.shapes(SIZES.get(kind, (7,)), D).items():
            key, now = mx.random.split(key)
            head[name] = mx.random.normal(shape, key=now)
        heads.append(head)
    tensors = store.contents(layout, heads, prefix=range(N), windows={}, offsets=[mx.zeros((K, D))] * 2)
    shared = {"n_kv_heads": K, "head_dim": D, "scale": 0.25}
    metadata = {
        "model": "toy",
        "model_sha256": "a",
        "tokenizer_sha256": "b",
        "nectar_mlx": "0",
        "prefix_sha256": store.file.prefix_digest(tensors),
        "geometry": {"model_type": "llama", "n_layers": 2, "n_heads": 4, "windows": [0, 0], **shared},
        "layout": {"kind": kind, "n_layers": 2, "bits": bits, **shared},
        "report": {},
        "chunks": [],
    }
    return tensors, metadata


ALL = [("quadrature", None), ("quadrature", 16), *((kind, 8) for kind in KINDS if kind != "exact"), ("exact", 16)]


def refused(path, tensors, metadata):
    """The line that a written file gets, soon and without memory."""
    store.write(path, tensors, metadata)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(NectarError) as error:
        Nectar.read(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.5 and peak < 2 * path.stat().st_size + 50e6
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("kind", "bits"), ALL)
def test_the_files_themselves_are_good(tmp_path, kind, bits):
    store.write(tmp_path / "x.nectar", *made(kind, bits))
    assert len(Nectar.read(tmp_path / "x.nectar").banks) == 2


@pytest.mark.parametrize(("kind", "bits"), ALL)
def test_a_tensor_that_is_not_as_its_sizes_say(tmp_path, kind, bits):
    tensors, metadata = made(kind, bits)
    for name, tensor in tensors.items():
        wrong = {
            "missing": None,
            "longer": mx.concatenate([tensor, tensor]),
            "shorter": tensor[:-1],
            "empty": tensor[:0],
            "deeper": tensor[None],
            "another type": tensor.astype(mx.uint16),
        }
        for how, changed in wrong.items():
            if name == "offsets" and changed is None:  # files of before have none
                continue
            if name in store.layout.CODED and how in ("longer", "shorter", "empty"):  # the decoder says so
                continue
            others = {n: t for n, t in tensors.items() if n != name} | ({} if changed is None else {name: changed})
            facts = dict(metadata)
            if name == "prefix" and changed is not None and changed.dtype == mx.int32:
                facts["prefix_sha256"] = store.file.prefix_digest(others)
                if how in ("longer", "shorter") and kind != "exact":  # another text, as far as anyone can tell
                    continue
            refused(tmp_path / "x.nectar", others, facts)


@pytest.mark.parametrize(("kind", "bits"), ALL)
@pytest.mark.parametrize("value", [-1, 0, 1, 3_000_000, 2**31 - 1])
@pytest.mark.parametrize("column", [0, -1])
def test_impossible_sizes_ask_for_no_memory(tmp_path, kind, bits, value, column):
    tensors, metadata = made(kind, bits)
    table = np.array(tensors["sizes"])
    if (table[:, column] == value).all():
        pytest.skip("this is its size")
    table[:, column] = value
    if kind == "retrieval" and value == 1:  # a size that this kind does not look at
        return
    refused(tmp_path / "x.nectar", tensors | {"sizes": mx.array(table)}, metadata)


@pytest.mark.parametrize(("kind", "bits"), ALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(tmp_path, kind, bits, value):
    tensors, metadata = made(kind, bits)
    for name, tensor in tensors.items():
        if mx.issubdtype(tensor.dtype, mx.floating):
            assert "not finite" in refused(
                tmp_path / "x.nectar", tensors | {name: mx.full(tensor.shape, value, tensor.dtype)}, metadata
            )


FIELDS = [None, True, 0, -1, 0.5, 2**31, 2**63, 10**400, 1e308, "x", [], {}, [[1]], [2**40], [-1]]


@pytest.mark.parametrize("part", ["geometry", "layout"])
def test_fields_of_another_type_or_range(tmp_path, part):
    tensors, metadata = made("quadrature", None)
    for field in metadata[part]:
        for value in FIELDS:
            if (field, value) in [("bits", None), ("model_type", "x")]:
                continue
            refused(tmp_path / "x.nectar", tensors, metadata | {part: metadata[part] | {field: value}})
        rest = {name: value for name, value in metadata[part].items() if name != field}
        refused(tmp_path / "x.nectar", tensors, metadata | {part: rest})


@pytest.mark.parametrize("part", ["geometry", "layout", "report", "config", "chunks"])
def test_metadata_of_another_type(tmp_path, part):
    tensors, metadata = made("quadrature", None)
    for value in [None, 1, "x", [[1]], ["x"], [0], [-1], [N + 1], [2**40]]:
        refused(tmp_path / "x.nectar", tensors, metadata | {part: value})
    for files in [1, ["x"], [{"name": 1}], {"a": 1}]:
        refused(tmp_path / "x.nectar", tensors, metadata | {"report": {"files": files}})


def test_what_a_report_says_reaches_the_terminal_as_text(tmp_path, capsys):
    tensors, metadata = made("quadrature", None)
    evil = {"model": "\x1b[2J\x1b]0;owned\x07", "source": "a\nnectar: all is well", "report": {"verdict": "\x9b31m"}}
    store.write(tmp_path / "x.nectar", tensors, metadata | evil)
    assert inspect.main([str(tmp_path / "x.nectar")]) == 0
    told = capsys.readouterr()
    assert not set("\x1b\x07\x9b") & set(told.out + told.err) and "\\x1b[2J" in told.out


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 900 + "]" * 900,
        '{"a": 1, "a": 2}',
        "[NaN]",
        "[-Infinity]",
        "[1e999]",
        "9" * 5000,
        "[" + "{}," * 600_000 + "1]",
        '"' + "a" * 9_000_000 + '"',
        "{",
        "",
    ],
    ids=range(11),
)
def test_json_that_is_not_decoded(text):
    with pytest.raises(ValueError):
        json_text.decode(text)


def test_heads_that_would_not_fit_in_the_memory(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 1024)
    tensors, metadata = made("quadrature", None)
    schema.check(metadata, tensors)
    monkeypatch.setattr("os.sysconf", lambda name: 16)
    with pytest.raises(NectarError, match="memory"):
        schema.check(metadata, tensors)


def test_many_arrays_are_not_even_decoded(tmp_path):
    entry = json.dumps({"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
    header = ("{" + ", ".join(f'"t{i}": {entry}' for i in range(50_000)) + "}").encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    start = time.process_time()
    with pytest.raises(NectarError, match="too many arrays"):
        store.tensor_file.metadata(tmp_path / "x")
    assert time.process_time() - start < 0.3


def test_a_model_name_from_a_file_is_only_a_name(tmp_path, monkeypatch):
    from nectar_mlx import models

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = []
    for name in ("a" * 4000, "~nobody/x", "\x1b[2J", "user/name", "x\x00y"):
        with pytest.raises(NectarError) as error:
            models.resolve(name, may_fetch=lambda name: bool(asked.append(name)))
        assert "\n" not in str(error.value)
    assert "user/name" in asked


def test_the_toys_of_the_tests_pass(tmp_path):
    model = toys.toy("gemma3_text")
    toys.exact(model, toys.random_tokens(60)).save(tmp_path / "window.nectar")
    tensors, metadata = store.read(tmp_path / "window.nectar")
    name = next(name for name in tensors if name.startswith("windows."))
    for changed in (tensors[name][:, :-1], tensors[name].astype(mx.int32), tensors[name] * float("nan")):
        refused(tmp_path / "x.nectar", tensors | {name: changed}, metadata)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.uint8])
def test_token_ids_of_another_type(tmp_path, dtype):
    tensors, metadata = made("quadrature", 16)
    refused(tmp_path / "x.nectar", tensors | {"prefix": tensors["prefix"].astype(dtype)}, metadata)


def test_no_file_is_written_that_would_not_be_read(tmp_path):
    tensors, metadata = made("quadrature", 16)
    for notes in (["x" * (9 << 20)], [0] * 500_000):
        with pytest.raises(NectarError, match="cannot be written"):
            store.write(tmp_path / "x.nectar", tensors, metadata | {"report": {"notes": notes}})
    assert not list(tmp_path.iterdir())


def test_the_documents_of_a_large_folder_are_kept(tmp_path):
    tensors, metadata = made("quadrature", 16)
    count = 60_000
    files = [FileReport(f"folder/note {i}.txt", "text", 9, 10 * i, 10 * i + 9) for i in range(count)]
    reading = Reading("x" * 10 * count, files)
    store.write(tmp_path / "x.nectar", tensors, metadata | {"report": record.record(reading)})
    assert (tmp_path / "x.nectar").stat().st_size < 4e6
    report = Nectar.read(tmp_path / "x.nectar").report
    assert record.restored(reading.text, report, name="").files == files
