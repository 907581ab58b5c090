"""Sentence embeddings: MiniLM where its file is at hand, the model's own states elsewhere."""

import numpy as np
import pytest

from nectar_mlx import NectarError
from nectar_mlx.core.folders import cache_folder
from nectar_mlx.evaluation import similarity
from tests import toys


def test_own_states_are_unit_vectors_and_equal_for_equal_texts():
    embed = similarity.own_states(toys.toy("llama"), toys.tokenizer())
    vectors = embed(["the quick fox", "a lazy dog is here", "the quick fox", ""])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[2] == pytest.approx(1) and vectors[0] @ vectors[1] < 0.99


def test_without_a_network_the_model_stands_in(monkeypatch):
    def refuse(log):
        raise NectarError("it cannot be fetched")

    monkeypatch.setattr(similarity, "fetch_minilm", refuse)
    said = []
    name, _ = similarity.load(toys.toy("llama"), toys.tokenizer(), log=said.append)
    assert "hidden states" in name and "cannot be fetched" in said[0]


def test_minilm_knows_what_means_the_same():
    folder = cache_folder() / f"all-MiniLM-L6-v2-{similarity._WHEEL_SHA256[:8]}"
    if not folder.exists():
        pytest.skip("MiniLM has not been fetched on this machine")
    embed = similarity.MiniLM(folder).embed
    horse, rider, stocks = embed(["A man rides a horse.", "Someone is riding a horse.", "Stocks fell on Tuesday."])
    assert np.linalg.norm(horse) == pytest.approx(1)
    # The figure that sentence-transformers gives for this pair, to the digits that do not depend on the machine.
    assert horse @ rider == pytest.approx(0.825, abs=0.002) and abs(horse @ stocks) < 0.1
