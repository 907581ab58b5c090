import numpy as np
import pytest

from nectar_mlx.fitting.solve.grouping import evened, groups


def cost(split, sizes, launch):
    return sum(launch + len(g) * max(sizes[i] for i in g) for g in split)


def test_every_head_is_in_one_group_and_groups_fit():
    sizes = np.random.default_rng(0).integers(1, 500, 90).tolist()
    split = groups(sizes, room=2000, launch=50)
    assert sorted(i for g in split for i in g) == list(range(90))
    assert all(len(g) == 1 or len(g) * max(sizes[i] for i in g) <= 2000 for g in split)


def test_equal_heads_share_a_group_and_a_giant_has_its_own():
    assert groups([7] * 5, room=100, launch=1) == [[0, 1, 2, 3, 4]]
    assert groups([1, 1, 1000, 1], room=5000, launch=10) == [[2], [0, 1, 3]]
    assert groups([300], room=100, launch=1) == [[0]]
    assert groups([], room=100, launch=1) == []


@pytest.mark.parametrize("launch", [0, 3, 40])
def test_no_other_split_is_cheaper(launch):
    sizes = [9, 8, 8, 5, 3, 3, 1]
    cheapest = min(
        cost([[*range(a, b)] for a, b in zip([0, *cuts], [*cuts, 7], strict=True)], sizes, launch)
        for mask in range(64)
        for cuts in [[i + 1 for i in range(6) if mask >> i & 1]]
    )
    assert cost(groups(sizes, room=1000, launch=launch), sizes, launch) == cheapest


def test_parts_become_even_with_few_heads_moved():
    costs = np.random.default_rng(0).exponential(size=90) ** 2  # some heads cost far more than others
    parts = [range(90)[part::4] for part in range(4)]
    made = evened(parts, costs.tolist())
    assert sorted(head for part in made for head in part) == list(range(90))
    loads = [costs[part].sum() for part in made]
    assert max(costs[list(part)].sum() for part in parts) > 0.3 * costs.sum() > 1.1 * max(loads)
    assert sum(head not in parts[number] for number, part in enumerate(made) for head in part) < 20


def test_a_head_that_costs_more_than_a_share_stays():
    assert evened([[0, 1], [2]], [10.0, 1.0, 1.0]) == [[0], [2, 1]]
    assert evened([[0], []], [1.0]) == [[0], []]
