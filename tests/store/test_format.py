"""Files of every version stay readable, and no altered byte of one goes unnoticed (docs/format.md).

`tests/data` holds a file of each version, as it was written then: a toy of one layer, fitted to 74 tokens.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, store
from nectar_mlx.retrieval import KeyFile, find_keys, kv_path
from nectar_mlx.store import load, tensor_file
from tests import toys

DATA = Path(__file__).parents[1] / "data"
QUERIES = np.linspace(-2, 2, 2 * 3 * 16, dtype=np.float32).reshape(2, 3, 16)
# Of each file: its kind, the outputs of the first query (two entries a head), and all log-normalizers. The rounding of
# a fit is the file's own, so that other figures would mean that it is read otherwise than it was written.
WRITTEN = {
    "nectar-1-absolute": (
        "quadrature",
        [-0.04624, 0.01172, 0.1518, -0.3384],
        [6.961, 5.461, 4.512, 4.42, 5.145, 6.495],
    ),
    "nectar-1": ("quadrature", [-0.01846, 0.01233, 0.1813, -0.3405], [6.815, 5.353, 4.448, 4.477, 5.383, 6.937]),
    "hybrid-nectar-1": ("hybrid", [-0.03914, -0.005555, 0.1775, -0.3439], [6.942, 5.479, 4.57, 4.594, 5.496, 7.048]),
}
WRITTEN |= {name.replace("nectar-1", "nectar-2"): WRITTEN[name] for name in ("nectar-1", "hybrid-nectar-1")}
WRITTEN["hybrid-kv-4"] = WRITTEN["hybrid-nectar-2"]  # the same file, with keys of the next version


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_every_version_is_read(name):
    kind, output, log_normalizer = WRITTEN[name]
    nectar = Nectar.read(DATA / f"{name}.nectar")
    assert nectar.layout.kind == kind and len(nectar.prefix) == 74 and nectar.metadata["source"] == "fox.txt"
    bank = nectar.banks[0].without_retrieval()
    partial = bank.apply(bank.parameters, mx.array(QUERIES))
    np.testing.assert_allclose(np.array(partial.output)[:, 0, :2].ravel(), output, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(np.array(partial.log_normalizer).ravel(), log_normalizer, rtol=1e-3)
    if kind == "hybrid":
        path = find_keys(DATA / f"{name}.nectar", nectar.digest)
        keys = load.key_file(path, nectar=nectar.digest, shape=(1, 2, 74), head_dim=16)
        assert keys is not None and keys.read(0, np.array([[0], [73]]))[0].shape == (2, 1, 16)


def test_there_is_a_file_of_the_version_that_is_written():
    kinds = {tensor_file.metadata(path)["format"] for path in DATA.iterdir()}
    assert {store.file.FORMAT, store.kv_file.FORMAT} <= kinds


@pytest.fixture
def book(tmp_path):
    """A .nectar and its keys, of the version that is written."""
    for path in DATA.glob("hybrid-kv-4*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "hybrid-kv-4.nectar"


def test_any_changed_byte_is_refused(book):
    """In a .nectar, header and padding included, whatever byte is another one."""
    content = book.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(end), *range(end, len(content), 37), *range(len(content) - 40, len(content))]:
        for bit in (1, 4) if at < end else (1,):
            book.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            with pytest.raises(NectarError):
                Nectar.read(book)
    for cut in (content[:-1], content + b"\0", content[:-32]):
        book.write_bytes(cut)
        with pytest.raises(NectarError):
            Nectar.read(book)


def alterations(metadata):
    """The metadata with one value of one field another one: (where, metadata)."""
    for name, text in metadata.items():
        if name in ("geometry", "layout"):
            fields = json.loads(text)
            for field, value in fields.items():
                other = f"{value}x" if isinstance(value, str) else [7] if isinstance(value, list) else (value or 1) * 2
                yield f"{name}.{field}", metadata | {name: json.dumps(fields | {field: other})}
        yield name, metadata | {name: text.replace("1", "2") if "1" in text else f"{text} "}


def test_any_changed_metadata_are_refused(book):
    """27 alterations of a field, each with tensors and whole-file checksum that are right."""
    metadata, tensors = tensor_file.metadata(book), store.read(book)[0]
    tried = list(alterations(metadata))
    for where, changed in tried:
        tensor_file.write_sealed(book, tensors, changed)
        with pytest.raises(NectarError):
            Nectar.read(book)
            pytest.fail(f"{where} was accepted")
    assert len(tried) >= 27
    tensor_file.write_sealed(book, tensors, metadata)
    Nectar.read(book)


@pytest.mark.parametrize("field", ["n_layers", "n_kv_heads", "head_dim", "scale"])
def test_layout_and_geometry_agree(book, field):
    """Also where all checksums are right."""
    tensors, metadata = store.read(book)
    store.write(book, tensors, metadata | {"layout": metadata["layout"] | {field: 2 * metadata["layout"][field]}})
    with pytest.raises(NectarError):
        Nectar.read(book)


def test_changed_metadata_of_the_keys_are_refused(book):
    path, nectar = find_keys(book, store.tensors_digest(book)), Nectar.read(book)
    metadata = tensor_file.metadata(path)
    arrays, _ = tensor_file.map_arrays(path)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    for name, text in metadata.items():
        tensor_file.write(path, arrays, metadata | {name: text.replace("8", "9") if "8" in text else f"{text}0"})
        with pytest.warns(UserWarning, match="alone"):
            assert load.key_file(path, nectar=nectar.digest, shape=(1, 2, 74), head_dim=16) is None


def test_a_later_version_says_what_to_do(book):
    tensors, metadata = tensor_file.read(book), tensor_file.metadata(book)
    tensor_file.write(book, tensors, metadata | {"format": "nectar-3"})
    with pytest.raises(NectarError, match=r"later version .*newer nectar_mlx"):
        Nectar.read(book)


def test_a_file_cannot_be_passed_off_as_of_the_first_version(book):
    tensors, metadata = tensor_file.read(book), tensor_file.metadata(book)
    tensor_file.write(book, tensors, metadata | {"format": "nectar-1"})
    with pytest.raises(NectarError, match="damaged"):
        Nectar.read(book)


# ---- a .nectar and its keys


def another_hybrid():
    """Another fit than those in the files, with keys of its own."""
    before = Nectar.read(DATA / "hybrid-nectar-2.nectar")
    kept = load.key_file(
        find_keys(DATA / "hybrid-nectar-2.nectar", before.digest), nectar=before.digest, shape=(1, 2, 74), head_dim=16
    )
    other = Nectar(before.tensors | {"prefix": before.tensors["prefix"][::-1]}, before.metadata)
    other.metadata["prefix_sha256"] = store.file.prefix_digest(other.tensors)
    other.keys = KeyFile.of([kept.layer(0)], small=kept.small, nectar=other.digest)
    return other


def keys_that_answer(path):
    nectar = Nectar.read(path)
    return (
        load.key_file(find_keys(path, nectar.digest), nectar=nectar.digest, shape=(1, 2, 74), head_dim=16) is not None
    )


@pytest.mark.parametrize("name", ["nectar-1", "nectar-2"])
@pytest.mark.parametrize("killed", [None, "keys", "nectar", "clean"])
def test_whenever_it_is_killed_a_file_and_its_keys_belong_together(tmp_path, monkeypatch, name, killed):
    """An old pair, of this version or the first, is replaced by a new one."""
    path = tmp_path / "book.nectar"
    for suffix in DATA.glob(f"hybrid-{name}.nectar*"):
        shutil.copy(suffix, tmp_path / suffix.name.replace(f"hybrid-{name}", "book"))
    old, new = store.tensors_digest(path), another_hybrid()
    steps = {
        "keys": "nectar_mlx.store.kv_file.KeyFile.write",
        "nectar": "nectar_mlx.store.write",
        "clean": "nectar_mlx.nectar_file.remove_stale_keys",
    }
    if killed is None:
        new.save(path)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(steps[killed], lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                new.save(path)
    assert store.tensors_digest(path) == (new.digest if killed in (None, "clean") else old)
    assert keys_that_answer(path)
    new.save(path)
    assert store.tensors_digest(path) == new.digest and keys_that_answer(path)
    assert [p.name for p in tmp_path.glob("*.kv")] == [kv_path(path, new.digest).name], "nothing else is left"


def test_keys_of_others_are_left_alone(tmp_path):
    others = ["book.nectar.kv", "book.nectar.notes.kv", "other.nectar.kv", "book.nectar.0123456789abcdef.kv.bak"]
    for name in others:
        (tmp_path / name).write_text("mine")
    toys.picked(toys.toy("llama"), toys.random_tokens(40), 5).save(tmp_path / "book.nectar")
    assert {p.name for p in tmp_path.iterdir()} == {"book.nectar", *others}
