import mlx_lm
import pytest

from nectar_mlx import Nectar
from tests import toys

from .running import QUESTIONS, TOKENS, Running, arguments


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """Two contexts on one model."""
    folder = tmp_path_factory.mktemp("books")
    return [toys.book(folder, name=name, seed=seed) for seed, name in enumerate(["red", "blue"])]


@pytest.fixture(scope="session")
def answers(books):
    """What one request alone gets, by book and question."""
    model, tokenizer = mlx_lm.load(str(books[0].folder))
    found = {}
    for book in books:
        nectar = Nectar.load(book.path, model, tokenizer)
        for question in QUESTIONS:
            prompt, cache = nectar.prompt(tokenizer, question), nectar.make_cache()
            found[book.path.stem, question] = mlx_lm.generate(
                model, tokenizer, prompt, max_tokens=TOKENS, prompt_cache=cache
            )
    assert all(found["red", q] != found["blue", q] for q in QUESTIONS), "or a mixed-up context would go unnoticed"
    return found


@pytest.fixture(scope="module")
def running(books):
    server = Running(arguments(books, "--max-body", "100000", "--log-level", "WARNING"))
    yield server
    server.close()
