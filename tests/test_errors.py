"""What went wrong, and what to do about it."""

import copy
import pickle

import pytest

from nectar_mlx import store
from nectar_mlx.errors import FIT_AGAIN, NectarError
from tests import toys


def test_advice_is_apart_from_the_message_and_both_are_the_text():
    error = NectarError("the kettle is cold", advice="heat it")
    assert (error.message, error.advice, str(error)) == ("the kettle is cold", "heat it", "the kettle is cold; heat it")
    assert str(NectarError("the kettle is cold")) == "the kettle is cold"


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_copy_keeps_its_advice(copied):
    """A reader of documents raises in another process."""
    assert str(copied(NectarError("the kettle is cold", advice="heat it"))) == "the kettle is cold; heat it"


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:-7] + b"damaged"])
def test_a_damaged_file_is_to_be_fitted_again(tmp_path, damage):
    path = tmp_path / "toy.nectar"
    toys.picked(toys.toy("llama"), toys.random_tokens(50), 10).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(NectarError) as caught:
        store.read(path)
    assert caught.value.advice == FIT_AGAIN and FIT_AGAIN not in caught.value.message
