"""The bytes of .nectar and .kv files, written here by hand as the layout says, so that files of today stay readable."""

import errno
import hashlib
import json
import os
import struct

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from nectar_mlx import Nectar, NectarError, store
from nectar_mlx.core.quantize import quantize
from nectar_mlx.retrieval import KeyFile
from nectar_mlx.store import tensor_file
from tests import toys

D, NODES = 16, 3
CONTENT = {
    "floats": mx.array([[1.5, -2.0], [0.0, 3.0]]),
    "halves": mx.array([1.0, 0.5, -0.25], dtype=mx.float16),
    "brains": mx.array([[1.0, -3.0, 0.1]], dtype=mx.bfloat16),
    "empty": mx.zeros((0, 4)),
    "odd": mx.array([1, 2, 255], dtype=mx.uint8),
    "integers": mx.array([-1, 7], dtype=mx.int32),
    "bytes": mx.array([-128, 127], dtype=mx.int8),
    "shorts": mx.array([65535], dtype=mx.uint16),
    "turned": mx.arange(6).astype(mx.int32).reshape(2, 3).T,
}


def by_hand(arrays, metadata):
    """A file of arrays {name: (dtype, shape, bytes)}."""
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def test_arrays_of_every_type_come_back(tmp_path):
    tensor_file.write(tmp_path / "file", CONTENT, {"who": "Anna · Velde"})
    assert tensor_file.metadata(tmp_path / "file") == {"who": "Anna · Velde"}
    found, (mapped, _) = tensor_file.read(tmp_path / "file"), tensor_file.map_arrays(tmp_path / "file")
    loaded = mx.load(str(tmp_path / "file"), format="safetensors")
    assert list(found) == list(mapped) == list(CONTENT)
    for name, array in CONTENT.items():
        assert found[name].dtype == array.dtype == loaded[name].dtype and found[name].shape == array.shape
        assert mx.array_equal(found[name], array) and mx.array_equal(loaded[name], array)
        assert np.array_equal(mapped[name], np.array(array.view(mx.uint16) if name == "brains" else array))
    assert tensor_file.digest(found) == tensor_file.digest(CONTENT)


@pytest.mark.parametrize("read", [tensor_file.metadata, tensor_file.read, tensor_file.read_sealed])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, read):
    tensor_file.write_sealed(tmp_path / "a.nectar", CONTENT, {})

    def refused(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tensor_file, "open", refused, raising=False)
    with pytest.raises(NectarError, match=r"a\.nectar cannot be read: Permission denied$"):
        read(tmp_path / "a.nectar")


def test_other_readers_read_it(tmp_path):
    arrays = {name: x for name, x in CONTENT.items() if x.dtype != mx.bfloat16}
    tensor_file.write(tmp_path / "file", arrays, {})
    for name, array in load_file(tmp_path / "file").items():
        assert np.array_equal(array, np.array(arrays[name]))


def test_the_digest_is_that_of_names_types_shapes_and_bytes():
    array = np.array([[1, 2, 3]], np.int32)
    rest = b"(1, 3);" + array.tobytes()
    assert tensor_file.digest({"x": array}) == hashlib.sha256(b"x int32 " + rest).hexdigest()
    assert tensor_file.digest({"x": mx.array(array)}) == hashlib.sha256(b"x mlx.core.int32 " + rest).hexdigest()
    two = {"b": array, "a": array}
    assert tensor_file.digest(two) == tensor_file.digest(dict(reversed(two.items())))


def test_a_type_that_is_not_read_is_named(tmp_path):
    (tmp_path / "file").write_bytes(by_hand({"x": ("F64", [1], bytes(8))}, {}))
    with pytest.raises(NectarError, match="F64"):
        tensor_file.read(tmp_path / "file")


def old_nectar():
    """A .nectar as versions before wrote it: nodes of one head, no offsets, timings in the report."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, NODES, D)).astype(np.float32)
    (first, first_scales), (second, second_scales) = (quantize(mx.array(x), bits=8) for x in (keys, values))
    bias, prefix = np.array([0.5, -1, 2], np.float16), np.array([5, 6, 7, 8], "<i4")
    arrays = {
        "heads.values": ("I8", [NODES, D], np.array(second).tobytes()),
        "sizes": ("I32", [1, 1], np.array([[NODES]], "<i4").tobytes()),
        "heads.keys": ("I8", [NODES, D], np.array(first).tobytes()),
        "heads.keys.scales": ("F16", [NODES], np.array(first_scales).tobytes()),
        "heads.values.scales": ("F16", [NODES], np.array(second_scales).tobytes()),
        "heads.bias": ("F16", [NODES], bias.tobytes()),
        "prefix": ("I32", [4], prefix.tobytes()),
    }
    types = {"I8": "int8", "I32": "int32", "F16": "float16"}
    sha = hashlib.sha256()
    for name, (dtype, shape, content) in sorted(arrays.items()):
        sha.update(f"{name} mlx.core.{types[dtype]} {tuple(shape)};".encode() + content)
    geometry = {
        "model_type": "llama",
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": D,
        "scale": 0.25,
        "windows": [0],
    }
    layout = {"kind": "quadrature", "n_layers": 1, "n_kv_heads": 1, "head_dim": D, "scale": 0.25, "bits": 8}
    metadata = {
        "nectar_mlx": "0.0.1",
        "tokenizer_sha256": "none",
        "model_sha256": "none",
        "model": "toy",
        "prefix_sha256": hashlib.sha256(prefix.tobytes()).hexdigest(),
        "report": json.dumps({"kl": 0.5, "seconds": {"read": 1.5, "check": 2.0}}),
        "layout": json.dumps(layout),
        "geometry": json.dumps(geometry),
        "format": "nectar-1",
        "digest": sha.hexdigest(),
    }
    return by_hand(arrays, metadata), keys, values, sha.hexdigest()


def test_a_nectar_of_before_is_read(tmp_path):
    content, keys, values, digest = old_nectar()
    (tmp_path / "old.nectar").write_bytes(content)
    nectar = Nectar.read(tmp_path / "old.nectar")
    assert nectar.prefix == [5, 6, 7, 8] and nectar.chunks == [] and nectar.digest == digest
    (bank,) = nectar.banks
    np.testing.assert_allclose(bank.parameters["keys"][0], keys, atol=0.03)
    np.testing.assert_allclose(bank.parameters["values"][0], values, atol=0.03)
    assert bank.parameters["bias"].tolist() == [[0.5, -1, 2]]
    assert nectar.report["seconds"] == {"read": 1.5, "check": 2.0}


def test_saving_drops_the_timings_and_nothing_else(tmp_path):
    (tmp_path / "old.nectar").write_bytes(old_nectar()[0])
    nectar = Nectar.read(tmp_path / "old.nectar")
    nectar.save(tmp_path / "new.nectar")
    (before, old), (after, new) = (store.read(tmp_path / f"{name}.nectar") for name in ("old", "new"))
    assert before.keys() == after.keys() and all(mx.array_equal(before[n], after[n]) for n in before)
    assert new == old | {"report": {"kl": 0.5}, "format": "nectar-2", "digest": new["digest"]}
    assert "seconds" in nectar.report, "in memory they stay"


def test_a_kv_file_is_the_bytes_that_its_layout_says(tmp_path):
    """The rows of one layer and one KV head, checksums included, behind what is small."""
    tie, n = "0123456789abcdef", 2
    keys, values = (mx.array(np.random.default_rng(i).normal(size=(1, n, D)).astype(np.float32)) for i in range(2))
    small = {"second": np.arange(3, dtype=np.int32), "first": np.arange(6, dtype=np.float16).reshape(2, 3)}
    KeyFile.of([(keys, values)], small=small, nectar=tie).write(tmp_path / "x.kv")
    rows = b""
    for i in range(n):
        parts = [quantize(x[0, i], bits=8) for x in (keys, values)]
        row = b"".join(np.array(p.data).tobytes() for p in parts) + b"".join(
            np.array(p.scales).tobytes() for p in parts
        )
        words = struct.unpack(f"<{len(row) // 4}I", row)
        mark = i * 2654435761 + int(tie[:8], 16)
        for at, word in enumerate(words):
            mixed = word * (2 * (at + 1) + 1) % 2**32
            mixed = (mixed ^ mixed >> 15) * 2654435761 % 2**32
            mark += mixed ^ mixed >> 13
        rows += row + struct.pack("<I", mark % 2**32)
    sha = hashlib.sha256(b"first float16 (2, 3);" + small["first"].tobytes())
    sha.update(b"second int32 (3,);" + small["second"].tobytes())
    arrays = {
        "second": ("I32", [3], small["second"].tobytes()),
        "first": ("F16", [2, 3], small["first"].tobytes()),
        "rows": ("U8", [1, 1, n, len(rows) // n], rows),
    }
    metadata = {
        "format": "nectar-kv-4",
        "nectar": tie,
        "head_dim": str(D),
        "bits": "8",
        "small_sha256": sha.hexdigest(),
    }
    metadata["digest"] = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    assert (tmp_path / "x.kv").read_bytes() == by_hand(arrays, metadata)


@pytest.mark.fit
@pytest.mark.parametrize("kind", ["quadrature", "retrieval"])
def test_equal_fits_give_equal_bytes(tmp_path, kind):
    text = " ".join(f"The ship {n} sailed at dawn with barley." for n in range(6))
    options = {"steps": 2, "trial_steps": 1, "queries": 100, "matching_samples": 100, "batch": 64, "answer_tokens": 8}
    for name in ("one", "two"):
        fitted = Nectar.fit(
            toys.toy("llama"), toys.tokenizer(), text, budget=0.3, kind=kind, conversations=4, checks=1, **options
        )
        assert sum(fitted.report["seconds"].values()) > 0
        fitted.save(tmp_path / f"{name}.nectar")
    one, two = tmp_path / "one.nectar", tmp_path / "two.nectar"
    assert one.read_bytes() == two.read_bytes()
    assert len(list(tmp_path.glob("*.kv"))) == (2 if kind == "retrieval" else 0)
    if kind == "retrieval":
        assert toys.key_file(one).read_bytes() == toys.key_file(two).read_bytes()


def test_the_order_in_which_a_file_was_made_leaves_no_trace(tmp_path):
    nectar = toys.picked(toys.toy("llama"), toys.random_tokens(40), 5)
    nectar.save(tmp_path / "one.nectar")
    tensors, metadata = store.read(tmp_path / "one.nectar")
    store.write(tmp_path / "two.nectar", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one.nectar").read_bytes() == (tmp_path / "two.nectar").read_bytes()


@pytest.mark.parametrize("shape", [[1 << 31, 0], [1 << 62, 0], [(1 << 64) - 1, 0], [1 << 70, 0], [1] * 70, [-1]])
def test_a_shape_that_no_array_has_is_an_error(tmp_path, shape):
    size = 4 if shape[0] == 1 else 0
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(NectarError, match="is cut short"):
        tensor_file.read(tmp_path / "x")


@pytest.mark.parametrize("space", [b"\t", b"\n", b"\r"])
def test_a_changed_space_of_the_header_is_noticed(tmp_path, space):
    """Also in a .kv, whose header no checksum covers as a whole."""
    tensor_file.write(tmp_path / "x", {"a": mx.zeros(3)}, {"b": "c"})
    content = (tmp_path / "x").read_bytes()
    for at in (at for at in range(8, len(content) - 12) if content[at : at + 1] == b" "):
        (tmp_path / "x").write_bytes(content[:at] + space + content[at + 1 :])
        with pytest.raises(NectarError, match="header"):
            tensor_file.metadata(tmp_path / "x")
