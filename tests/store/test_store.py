import json
import os
import struct
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, store
from nectar_mlx.heads import KINDS
from nectar_mlx.store import Layout
from tests import toys

SIZES = {
    "quadrature": [(3,), (5,), (1,), (8,)],
    "corrected": [(3, 2), (5, 1), (2, 2), (4, 3)],
    "mlp": [(8, 2, 32, 2), (16, 2, 32, 2), (8, 2, 32, 2), (24, 2, 64, 2)],
    "exact": [(6,)] * 4,
}


def layout(kind, bits, head_dim=16):
    return Layout(kind=kind, n_layers=2, n_kv_heads=2, head_dim=head_dim, scale=0.25, bits=bits)


def heads(kind, head_dim=16):
    rng = np.random.default_rng(0)
    shapes = [KINDS[kind].shapes(s, head_dim) for s in SIZES[kind]]
    return [{n: mx.array(rng.normal(size=s).astype(np.float32)) for n, s in one.items()} for one in shapes]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("bits, tolerance", [(16, 1e-3), (8, 2e-2), (4, 0.5)])
def test_heads_come_back(kind, bits, tolerance):
    tensors = store.pack(layout(kind, bits), heads(kind))
    back = [h for bank in store.unpack(layout(kind, bits), tensors) for h in bank.unstack()]
    for given, got in zip(heads(kind), back, strict=True):
        for name in given:
            np.testing.assert_allclose(got[name], given[name], atol=tolerance * 4)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_head_bytes_are_the_bytes_of_the_tensors(kind, bits, head_dim):
    tensors = store.pack(layout(kind, bits, head_dim), [
        {n: a.astype(mx.float16) if kind == "exact" else a for n, a in h.items()} for h in heads(kind, head_dim)
    ])  # fmt: skip
    counted = sum(store.head_bytes(layout(kind, bits, head_dim), s) for s in SIZES[kind])
    assert counted == sum(t.nbytes for n, t in tensors.items() if n != "sizes")


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_heads_of_16_bits_and_their_padding_are_finite(size):
    """1e6 is more than float16 holds; so is what pads the bias of a small head."""
    large = [head | {"values": size * head["values"]} for head in heads("quadrature")]
    tensors = store.pack(layout("quadrature", 16), large)
    assert tensors["heads.values"].dtype == (mx.float16 if size == 1 else mx.bfloat16)
    for bank, pair in zip(store.unpack(layout("quadrature", 16), tensors), (large[:2], large[2:]), strict=True):
        assert all(mx.isfinite(x).all().item() for x in bank.parameters.values())
        for head, wanted in zip(bank.unstack(), pair, strict=True):
            np.testing.assert_allclose(head["values"].astype(mx.float32), wanted["values"], rtol=4e-3, atol=2e-3)
        scores = mx.random.normal((2, 5, 16), key=mx.random.key(0))
        assert mx.isfinite(bank(scores).output).all().item()


@pytest.fixture
def saved(tmp_path):
    book = toys.book(tmp_path)
    return book.path, toys.toy("llama")


def test_what_is_saved_is_what_is_loaded(saved):
    path, model = saved
    nectar = Nectar.load(path, model)
    again = path.with_name("again.nectar")
    nectar.save(again)
    tokens = mx.array([toys.random_tokens(9, seed=5)])
    first, second = (model(tokens, cache=n.make_cache()) for n in (nectar, Nectar.load(again, model)))
    assert mx.array_equal(first, second)
    assert not list(path.parent.glob(".*")), "a temporary file was left"


def test_another_model_is_refused(saved):
    path, _ = saved
    with pytest.raises(NectarError, match="which is not the model in use"):
        Nectar.load(path, toys.toy("llama", seed=1))
    with pytest.raises(NectarError, match="which is not the model in use"):
        Nectar.load(path, toys.toy("qwen2"))


def test_another_tokenizer_is_refused(saved):
    path, model = saved
    with pytest.raises(NectarError, match="another tokenizer"):
        Nectar.load(path, model, toys.tokenizer(toys.CHAT + " "))


def test_a_cut_file_is_refused_wherever_it_is_cut(saved):
    path, model = saved
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(NectarError):
            Nectar.load(path, model)


def test_a_flipped_bit_anywhere_in_the_data_is_noticed(saved):
    path, model = saved
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in np.random.default_rng(0).integers(start, len(whole), 12):
        changed = bytearray(whole)
        changed[at] ^= 1 << int(at) % 8
        path.write_bytes(changed)
        with pytest.raises(NectarError, match="checksum"):
            Nectar.load(path, model)


def rewritten(path, change):
    """The file with its metadata changed, and a digest that fits its tensors."""
    tensors, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    change(tensors, metadata)
    metadata["digest"] = store.digest(tensors)
    mx.eval(tensors)
    path.unlink()
    mx.save_safetensors(str(path.with_suffix(".safetensors")), tensors, metadata)
    path.with_suffix(".safetensors").rename(path)


@pytest.mark.parametrize("change", [
    lambda t, m: m.pop("geometry"),
    lambda t, m: m.pop("model_sha256"),
    lambda t, m: m.update(geometry="[]"),
    lambda t, m: m.update(report="[" * 200_000),
    lambda t, m: m.update(layout="{not json"),
    lambda t, m: m.update(layout=json.dumps(json.loads(m["layout"]) | {"kind": "magic"})),
    lambda t, m: m.update(layout=json.dumps(json.loads(m["layout"]) | {"bits": 3})),
    lambda t, m: m.update(layout=json.dumps(json.loads(m["layout"]) | {"head_dim": 0})),
    lambda t, m: t.pop("heads.keys"),
    lambda t, m: t.update(sizes=t["sizes"] * 1000),
    lambda t, m: t.update(sizes=t["sizes"] * -1),
    lambda t, m: t.update(sizes=t["sizes"][:1]),
    lambda t, m: t.update(sizes=t["sizes"].astype(mx.float32)),
    lambda t, m: t.update(prefix=t["prefix"] + 1),
    lambda t, m: t.pop("prefix"),
    lambda t, m: t.update({"heads.keys": t["heads.keys"][:-1]}),
])  # fmt: skip
def test_a_hostile_file_is_an_error_not_a_crash(saved, change):
    path, model = saved
    rewritten(path, change)
    with pytest.raises(NectarError):
        Nectar.load(path, model)


@pytest.mark.parametrize("told", [4, 5, 6, 8])
def test_other_bits_than_the_file_has_are_an_error(told):
    layout = store.Layout(kind="quadrature", n_layers=1, n_kv_heads=1, head_dim=64, scale=0.125, bits=7)
    head = {"keys": mx.ones((3, 64)), "values": mx.ones((3, 64)), "bias": mx.zeros(3)}
    tensors = store.pack(layout, [head])
    assert mx.allclose(store.unpack(layout, tensors)[0].parameters["keys"], mx.ones((1, 3, 64)), atol=1e-2)
    with pytest.raises(NectarError, match="damaged"):
        store.unpack(replace(layout, bits=told), tensors)


def test_a_header_longer_than_the_file_is_refused(saved):
    path, model = saved
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])
    with pytest.raises(NectarError):
        Nectar.load(path, model)


def test_other_files_are_not_overwritten(saved):
    path, model = saved
    nectar = Nectar.load(path, model)
    letter = path.with_name("letter.txt")
    letter.write_text("dear reader")
    with pytest.raises(NectarError, match=r"not a \.nectar"):
        nectar.save(letter)
    assert letter.read_text() == "dear reader"


def test_a_full_disk_leaves_what_was_there(saved, monkeypatch):
    path, model = saved
    nectar, before = Nectar.load(path, model), path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NectarError, match="No space left"):
        nectar.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path, reason in ((tmp_path / "none.nectar", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(NectarError, match=reason):
            store.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_that_could_not_be_read_again_takes_no_place(tmp_path, value):
    path, nectar = tmp_path / "toy.nectar", toys.picked(toys.toy("llama"), toys.random_tokens(50), 10)
    nectar.save(path)
    before = path.read_bytes()
    with pytest.raises(NectarError, match="not finite"):
        Nectar(nectar.tensors, nectar.metadata | {"report": {"error": [value]}}).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
