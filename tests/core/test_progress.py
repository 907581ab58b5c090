"""One progress of many stages, and its estimate of the end."""

import pytest

from nectar_mlx.core.progress import Overall, Stage

EXPECTED = [Stage("read", 10), Stage("sample", 40), Stage("train", 50)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def run(task, clock, description, seconds, *, steps=10):
    """A stage, and the status after every step of it."""
    with task(description, steps) as update:
        for step in range(1, steps + 1):
            clock.now += seconds / steps
            update(step)
            yield task.status()


@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0])
def test_after_a_tenth_the_end_is_known_on_a_machine_of_any_speed(clock, slower):
    task = Overall(clock)
    task.expect(EXPECTED)
    statuses = [s for stage in EXPECTED for s in run(task, clock, stage.description, slower * stage.seconds)]
    assert clock.now == pytest.approx(100 * slower)
    for status in statuses:
        if status.elapsed > 0.1 * clock.now:
            assert status.total_seconds == pytest.approx(clock.now, rel=0.3)
            assert status.share == pytest.approx(status.elapsed / clock.now, abs=0.1)
    assert [s.share for s in statuses] == sorted(s.share for s in statuses)
    assert max(s.share for s in statuses) == 0.99, "while something is under way it is not done"
    assert statuses[-1].stage == statuses[-1].stages == 3


def test_the_first_seconds_of_a_busy_machine_tell_no_wild_end(clock):
    """It takes twice as long as expected, its first report comes late, and something came before."""
    task = Overall(clock)
    clock.now += 4
    task.expect(EXPECTED)
    totals = []

    def wait(seconds):
        for _ in range(round(seconds / 0.5)):
            clock.now += 0.5
            totals.append(task.status().total_seconds)

    for stage in EXPECTED:
        with task(stage.description, 5) as update:
            wait(0.1 * stage.seconds)
            for step in range(1, 6):
                wait(1.9 * stage.seconds / 5)
                update(step)
    assert min(totals) > clock.now / 2.1 and max(totals) < 1.2 * clock.now


def test_between_two_reports_the_end_stays_unless_time_runs_out(clock):
    task = Overall(clock)
    task.expect(EXPECTED)
    with task("read", 10) as update:
        clock.now += 2
        update(2)
        first = task.status().total_seconds
        assert first == pytest.approx(100)
        clock.now += 7
        assert task.status().total_seconds == first
        clock.now += 21
        assert task.status().total_seconds == pytest.approx(30 + 90), "what follows is still to come"


def test_a_stage_that_comes_alone_tells_its_end_when_some_of_it_is_done(clock):
    task = Overall(clock)
    totals = [status.total_seconds for status in run(task, clock, "load", 100, steps=100)]
    assert set(totals[:4]) == {None} and totals[5:] == pytest.approx([100] * 95)


def test_a_stage_that_is_left_out_takes_no_time(clock):
    task = Overall(clock)
    task.expect(EXPECTED)
    first, *_, last = run(task, clock, "train", 50)
    assert (first.stage, first.stages) == (1, 1) and last.total_seconds == pytest.approx(50)


def test_a_stage_that_comes_again_takes_as_long_as_before(clock):
    task = Overall(clock)
    task.expect([Stage("try", 10), Stage("train", 20)])
    *_, status = [s for _ in range(3) for s in run(task, clock, "try", 10)]
    assert (status.stage, status.stages) == (3, 4) and status.total_seconds == pytest.approx(50)
    *_, status = run(task, clock, "train", 20)
    assert status.stage == 4 and status.elapsed == pytest.approx(50)


def test_what_was_not_expected_is_shown_without_an_end(clock):
    task = Overall(clock)
    assert task.status().description == ""
    *_, status = run(task, clock, "load", 10, steps=4)
    assert status.description == "load" and status.share == 0.99 and status.total_seconds == pytest.approx(10)
    *_, status = run(task, clock, "more", 10, steps=4)
    assert status.total_seconds is None


def test_a_stage_without_units_and_one_that_reports_too_much(clock):
    task = Overall(clock)
    task.expect(EXPECTED)
    with task("read", 0) as update:
        assert task.status().share == 0
        update(7)
        assert task.status().share <= 0.99
