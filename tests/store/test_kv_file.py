"""The .kv file: rows come back as they were, and nothing but the file of this very .nectar is ever believed."""

import os
import warnings
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, ask, store
from nectar_mlx.core.quantize import dequantize, quantize
from nectar_mlx.fitting import prefill
from nectar_mlx.heads.hybrid import ANCHORS, anchor_positions
from nectar_mlx.mlxlm import attention_patch
from nectar_mlx.retrieval import KeyFile, kv_path, sketch, sources
from nectar_mlx.store import Layout
from tests import toys

L, K, N, D = 2, 3, 37, 32
SHAPE = (L, K, N)
TIE = "0123456789abcdef"


def layers(seed=0):
    random = np.random.default_rng(seed)
    return [tuple(mx.array(random.normal(size=(K, N, D)).astype(np.float32)) for _ in range(2)) for _ in range(L)]


@pytest.fixture
def path(tmp_path):
    KeyFile.of(layers(), small={"note": np.arange(5, dtype=np.int32)}, nectar=TIE).write(tmp_path / "x.nectar.kv")
    return tmp_path / "x.nectar.kv"


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_rows_hold_what_the_type_can_hold(tmp_path, bits, head_dim):
    random = np.random.default_rng(1)
    pair = [mx.array(random.normal(size=(K, 9, head_dim)).astype(np.float32)) for _ in range(2)]
    KeyFile.of([tuple(pair)], small={}, nectar=TIE, bits=bits).write(tmp_path / "kv")
    found = KeyFile.open(tmp_path / "kv", nectar=TIE, shape=(1, K, 9)).layer(0)
    for x, y in zip(pair, found, strict=True):
        expected = x.astype(mx.bfloat16) if bits == 16 else dequantize(quantize(x, bits=8), bits=8)
        assert np.array_equal(np.array(expected.astype(mx.float32)), np.array(y))


def test_any_rows_of_any_layer(path):
    keys, memory = KeyFile.open(path, nectar=TIE, shape=SHAPE), KeyFile.of(layers(), small={}, nectar=TIE)
    at = np.random.default_rng(2).integers(0, N, (K, 4, 6))
    assert keys.mapped is not None and keys.small["note"].tolist() == [0, 1, 2, 3, 4]
    for layer in range(L):
        whole = memory.layer(layer)
        for x, y in zip(whole, keys.read(layer, at), strict=True):
            assert np.array_equal(np.array(x)[np.arange(K)[:, None, None], at], np.array(y))


def test_a_row_costs_its_bytes_and_a_checksum(path):
    assert KeyFile.open(path, nectar=TIE, shape=SHAPE).format.nbytes == 2 * D + 2 * 2 * (D // 32) + 4
    assert path.stat().st_size < L * K * N * (2 * D + 8) + 800


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "text", "cut", "longer", "foreign", "shape", "header"])
def test_what_is_not_the_files_own_is_refused(path, what):
    content = path.read_bytes()
    tie, shape = TIE, SHAPE
    if what in ("missing", "folder"):
        path.unlink()
    if what == "folder":
        path.mkdir()
    if what == "foreign":
        tie = "f" + TIE[1:]
    if what == "shape":
        shape = (L, K, N - 1)
    changed = {
        "empty": b"",
        "text": b"no file of keys at all",
        "cut": content[:-40],
        "longer": content + b"x",
        "header": content[:8] + bytes(len(content) - 8),
    }
    if what in changed:
        path.write_bytes(changed[what])
    with pytest.raises(NectarError):
        KeyFile.open(path, nectar=tie, shape=shape)


def test_a_changed_byte_is_noticed_when_it_is_read(path):
    content = bytearray(path.read_bytes())
    content[-3000] ^= 4
    path.write_bytes(content)
    keys = KeyFile.open(path, nectar=TIE, shape=SHAPE)
    with pytest.raises(NectarError, match="damaged"):
        for layer in range(L):
            keys.layer(layer)


def test_a_file_that_is_cut_short_while_it_is_open_is_one_line(path):
    """To read mapped memory behind a file's end ends the process."""
    keys = KeyFile.open(path, nectar=TIE, shape=SHAPE)
    os.truncate(path, 100)
    with pytest.raises(NectarError, match="cut short while it was open"):
        keys.layer(0)


@pytest.mark.parametrize("words", [(0, 1), (2, 5), (0, 1, 2, 3), (1, 16)])
def test_flipped_signs_do_not_hide_each_other(path, words):
    keys = KeyFile.open(path, nectar=TIE, shape=SHAPE)
    rows = np.array(keys.rows)
    for word in words:
        rows[0, 1, 7, 4 * word + 3] ^= 0x80
    changed = replace(keys, rows=rows)
    changed.layer(1)
    with pytest.raises(NectarError, match="damaged"):
        changed.layer(0)


@pytest.mark.parametrize("version", [b"nectar-kv-2", b"nectar-kv-3"])
def test_a_file_of_this_version_is_none_of_those_before(path, version):
    """Whose checksums cover less: one changed digit would take them away."""
    path.write_bytes(path.read_bytes().replace(b"nectar-kv-4", version))
    with pytest.raises(NectarError, match="metadata"):
        KeyFile.open(path, nectar=TIE, shape=SHAPE)


def test_a_changed_byte_of_the_router_is_noticed_at_once(path):
    content = bytearray(path.read_bytes())
    at = content.index(np.arange(5, dtype=np.int32).tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(NectarError, match="checksum"):
        KeyFile.open(path, nectar=TIE, shape=SHAPE)


def test_rows_that_changed_places_are_noticed():
    keys = KeyFile.of(layers(), small={}, nectar=TIE)
    keys.rows[0, 0, [3, 4]] = keys.rows[0, 0, [4, 3]]
    with pytest.raises(NectarError):
        keys.layer(0)


class Book:
    """A toy model and its retrieval .nectar with the keys beside it."""

    def __init__(self, folder):
        self.tokenizer, self.model = toys.tokenizer(), toys.toy("llama")
        self.folder = toys.save_model(self.model, folder / "model", self.tokenizer)
        self.path = folder / "book.nectar"
        self.text = "the quick brown fox, the answer is here. " * 9
        from nectar_mlx.mlxlm import prompts

        prefix = prompts.prefix(self.tokenizer, self.text)
        geometry = attention_patch.route(self.model)
        context = prefill.read_text(self.model, prefix, geometry)
        at = mx.array(anchor_positions(len(prefix)))
        heads = [
            {f"anchor_{n}": head[n][at] for n in ("keys", "values")}
            for bank in context.banks
            for head in bank.unstack()
        ]
        layout = Layout(kind="retrieval", bits=8, n_layers=len(context.banks), n_kv_heads=2, head_dim=16,
                        scale=geometry.scale)  # fmt: skip
        provenance = toys.provenance(self.model, self.tokenizer, str(self.folder))
        nectar = toys.build(layout, heads, prefix=prefix, geometry=geometry, provenance=provenance, report={},
                            offsets=context.offsets)  # fmt: skip
        asked = [np.random.default_rng(0).normal(size=(2, 50, 16)) for _ in context.banks]
        pairs = [(b.parameters["keys"], b.parameters["values"]) for b in context.banks]
        small = sketch.build([k for k, _ in pairs], asked, scale=geometry.scale) | sources.arrays(
            self.tokenizer, self.text, prefix
        )
        nectar.keys = KeyFile.of(pairs, small=small, nectar=nectar.digest)
        nectar.save(self.path)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return Book(tmp_path_factory.mktemp("kept"))


def answer(nectar, model, tokens, **options):
    return np.array(model(mx.array([tokens]), cache=nectar.make_cache(**options))[0, -1])


def test_a_nectar_finds_its_keys_and_reads_as_much_as_it_is_told(book):
    nectar = Nectar.load(book.path, book.model, book.tokenizer)
    tokens = nectar.prompt(book.tokenizer, "who?")
    full = np.array(book.model(mx.array([nectar.prefix + tokens]))[0, -1])
    errors = [np.abs(answer(nectar, book.model, tokens, exact_fraction=e) - full).mean() for e in (0, 0.3, 1.0)]
    assert errors[0] > 1.5 * errors[1] > 15 * errors[2] > 0
    count = int(0.3 * len(nectar.prefix)) - ANCHORS
    assert {bank.count for bank in nectar.hybrid_banks(0.3)} == {count}
    assert nectar.hybrid_banks(0.3) is nectar.hybrid_banks(0.3), "or a batch could not share it"
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(NectarError):
            nectar.make_cache(exact_fraction=wrong)


@pytest.mark.parametrize("what", ["missing", "cut", "foreign"])
def test_without_its_keys_it_answers_alone_and_says_so(book, tmp_path, what):
    path = tmp_path / "copy.nectar"
    path.write_bytes(book.path.read_bytes())
    if what != "missing":
        content = bytearray(toys.key_file(book.path).read_bytes())
        if what == "foreign":
            content = content.replace(bytes(Nectar.read(book.path).digest, "ascii"), b"0" * 64)
        kv_path(path, store.tensors_digest(path)).write_bytes(content[: -99 if what == "cut" else None])
    with pytest.warns(UserWarning, match="alone"):
        nectar = Nectar.load(path, book.model, book.tokenizer)
    tokens = nectar.prompt(book.tokenizer, "who?")
    whole = Nectar.load(book.path, book.model, book.tokenizer)
    assert np.array_equal(answer(nectar, book.model, tokens), answer(whole, book.model, tokens, exact_fraction=0))
    with pytest.raises(NectarError, match="no exact keys"):
        nectar.make_cache(exact_fraction=0.1)


def test_a_whole_file_is_loaded_without_a_warning(book):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Nectar.load(book.path, book.model, book.tokenizer)


def test_damage_ends_an_answer_with_one_line(book, tmp_path, capsys):
    path = tmp_path / "copy.nectar"
    path.write_bytes(book.path.read_bytes())
    content = bytearray(toys.key_file(book.path).read_bytes())
    rows = Nectar.load(book.path, book.model, book.tokenizer).keys.rows
    content[-rows.nbytes :: 40] = bytes(b ^ 1 for b in content[-rows.nbytes :: 40])
    kv_path(path, store.tensors_digest(path)).write_bytes(content)
    assert ask.main([str(path), "who?", "--exact", "0.5", "--max-tokens", "3"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_kinds_without_keys_refuse_to_read_exactly(tmp_path):
    model = toys.toy("llama")
    nectar = toys.picked(model, toys.random_tokens(70), 14)
    assert nectar.hybrid_banks() == []
    with pytest.raises(NectarError, match="hybrid"):
        nectar.make_cache(exact_fraction=0.01)


def test_mlx_lm_goes_on_from_what_was_read(book):
    """Chunked prompts, copies and trimmed conversations give the tokens of a fresh start."""
    import copy

    from mlx_lm.models.cache import trim_prompt_cache

    nectar = Nectar.load(book.path, book.model, book.tokenizer)
    tokens = nectar.prompt(book.tokenizer, "who is the quick brown fox?")
    options = {"max_tokens": 8}
    cache = nectar.make_cache(exact_fraction=0.4)
    whole = mlx_lm.generate(book.model, book.tokenizer, tokens, prompt_cache=cache, **options)
    steps = mlx_lm.generate(
        book.model,
        book.tokenizer,
        tokens,
        prompt_cache=nectar.make_cache(exact_fraction=0.4),
        prefill_step_size=3,
        **options,
    )
    assert steps == whole
    again = copy.deepcopy(cache)
    assert again[0].record is again[1].record is not cache[0].record
    trim_prompt_cache(again, again[0].size())
    assert mlx_lm.generate(book.model, book.tokenizer, tokens, prompt_cache=again, **options) == whole
    from mlx_lm.generate import batch_generate

    caches = [nectar.make_cache(exact_fraction=0.4) for _ in range(2)]
    prompts = [tokens, nectar.prompt(book.tokenizer, "the answer?")]
    found = batch_generate(book.model, book.tokenizer, prompts, prompt_caches=caches, **options)
    assert found.texts[0] == whole


def test_what_was_read_is_counted(book):
    nectar = Nectar.load(book.path, book.model, book.tokenizer)
    cache = nectar.make_cache(exact_fraction=0.4)
    tokens = nectar.prompt(book.tokenizer, "who?")
    book.model(mx.array([tokens]), cache=cache)
    assert cache[0].record.steps == 0, "the question is not the answer"
    for token in (9, 10, 11):
        book.model(mx.array([[token]]), cache=cache)
    record, bank = cache[0].record, nectar.hybrid_banks(0.4)[0]
    assert record.steps == 3
    router = bank.selector.step_bytes(bank.count)
    rows = 2 * bank.count * nectar.keys.format.nbytes
    assert record.bytes_per_token == 3 * (rows + router + nectar.nbytes // 3)
    assert 0 < record.mass.sum() < 3 * 3 * 4
    assert record.mass[anchor_positions(len(nectar.prefix))].sum() == 0
