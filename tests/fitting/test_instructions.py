"""What is asked while studying."""

import itertools

import numpy as np
import pytest

from nectar_mlx.fitting.samples import instructions


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [40, 150])
def test_passages_lie_all_over_the_text(seed, count):
    """As many passages as make up the text once, or four times, leave less of it out than passages drawn anywhere,
    which leave 1/e of it, or 1/e^4."""
    tokens, seen = 1600, np.zeros(1600, int)

    class Numbers:
        @staticmethod
        def decode(ids, **options):
            seen[ids] += 1
            return "words"

    def passage(rng, at):
        return instructions.passage(Numbers(), range(tokens), rng, at)

    asked = list(itertools.islice(instructions.training(passage, seed=seed), round(count / 0.83)))
    assert len({question.split("words")[0] for question in asked}) > 10
    assert (seen == 0).mean() < (0.22 if count == 40 else 0.01)
    assert seen.max() <= 3 * count / 40 + 2
