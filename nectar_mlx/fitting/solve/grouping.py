"""Which heads are trained side by side."""

from collections.abc import Sequence

_UNEVEN = 1.03  # times an even share: less is not worth moving a head


def groups(sizes: Sequence[float], *, room: float, launch: float) -> list[list[int]]:
    """Indices of heads, split so that a step over all groups takes least; the largest heads first.

    A group pads its heads to the largest of them, so it costs launch + members · largest, in the unit of sizes; it
    has at most `room` of members · largest, or a single member.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    best, start = [0.0], [0]  # for the first j heads in that order: the least cost, and where their last group starts
    for j in range(1, len(order) + 1):
        choices = [
            (best[i] + launch + (j - i) * sizes[order[i]], i)
            for i in range(j)
            if i == j - 1 or (j - i) * sizes[order[i]] <= room
        ]
        cost, i = min(choices)
        best.append(cost)
        start.append(i)
    members: list[list[int]] = []
    j = len(order)
    while j:
        members.insert(0, order[start[j] : j])
        j = start[j]
    return members


def evened(parts: Sequence[Sequence[int]], costs: Sequence[float]) -> list[list[int]]:
    """Parts of about equal cost, with as few heads moved from one to another as do. costs: of all heads."""
    evened = [list(part) for part in parts]
    even = sum(costs) / len(parts)
    while True:
        loads = [sum(costs[head] for head in part) for part in evened]
        largest, smallest = loads.index(max(loads)), loads.index(min(loads))
        excess = loads[largest] - loads[smallest]
        movable = [head for head in evened[largest] if 0 < costs[head] < excess]
        if loads[largest] <= _UNEVEN * even or not movable:
            return evened
        moved = min(movable, key=lambda head: abs(costs[head] - excess / 2))
        evened[largest].remove(moved)
        evened[smallest].append(moved)
