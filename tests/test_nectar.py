"""The public face of a Nectar."""

from nectar_mlx import Nectar
from tests import toys


def test_it_says_what_it_is(tmp_path):
    nectar = toys.picked(toys.toy("llama"), toys.random_tokens(50), 10)
    cache = 3 * 2 * 2 * 2 * 16 * 50  # layers; keys and values; bytes; heads; numbers; tokens
    share = nectar.nbytes / cache
    assert (
        repr(nectar) == f"<Nectar: 50 tokens for toy, quadrature, {nectar.nbytes:,} bytes, {share:.2%} of the KV cache>"
    )
    tensors, metadata = nectar.tensors, nectar.metadata | {"chunks": [10, 15, 20]}
    assert repr(Nectar(tensors, metadata)).endswith("of the KV cache, 3 chunks>")
