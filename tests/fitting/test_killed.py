"""Fits that are killed, interrupted, or started twice; and a disk that fills while they work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from nectar_mlx import NectarError, fit, models
from nectar_mlx.fitting import checkpoint, pipeline, prefill
from nectar_mlx.fitting.checkpoint import Checkpoint
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.samples import sampling, self_study
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.mlxlm import attention_patch
from tests import toys
from tests.fitting.killing import TOY
from tests.fitting.toy_fit import FAST, TEXT, shallow

ROOT = Path(__file__).parents[2]
CONFIG = FitConfig(**FAST | {"budget": 0.5, "context_tokens": 150})


def kill(folder, *arguments):
    command = [sys.executable, "-m", "tests.fitting.killing", str(folder), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.process
@pytest.mark.parametrize(
    "work, options",
    [
        ("fit", []),
        ("update", []),
        *(pytest.param("fit", [option], marks=pytest.mark.slow) for option in ("--layerwise", "--keep-study")),
        pytest.param("add", [], marks=pytest.mark.slow),
    ],
)
def test_a_killed_command_gives_the_same_files(tmp_path, work, options):
    figures = kill(tmp_path, work, "--kills", 3, "--seed", 5, *(["--", *TOY, *options] if options else []))
    assert figures["identical"] == figures["kills"] == 3 and figures["wrong"] == [], figures


@pytest.mark.slow
@pytest.mark.process
def test_fits_killed_at_fifty_moments_give_the_same_file(tmp_path):
    figures = kill(tmp_path, "--kills", 50)
    assert figures["identical"] == 50 and figures["kept"] > 10, figures


@pytest.mark.slow
@pytest.mark.process
def test_a_real_model_too(tmp_path):
    few = ["--queries", "1500", "--steps", "20", "--context-tokens", "200", "--budget", "4%"]
    figures = kill(tmp_path, "--kills", 3, "--model", models.DEMO, "--", *few)
    assert figures["identical"] == 3 and figures["kept"] > 0, figures


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [21, 24, 27, 33])
def test_sampling_goes_on_in_the_middle_of_a_batch(tokenizer, stop_at):
    """Answers end and are dropped from the batch at different times, before the interruption and after it."""
    model = shallow()
    context = prefill.read_text(model, toys.random_tokens(40), attention_patch.route(model))

    def sample(batch, **options):
        sampling.sample_answers(
            model, context, batch, stop=set(range(0, 320, 9)), max_tokens=16, temperature=1.0,
            chances=sampling.chances(3, range(10), 16), **options,
        )  # fmt: skip
        return batch

    def batch():
        return [Conversation(toys.random_tokens(20 + i // 2, seed=i)) for i in range(10)]

    def stop(at):
        if at == stop_at:
            raise Stop

    whole, part = sample(batch()), batch()
    assert len({len(c.answer) for c in whole}) > 4
    with pytest.raises(Stop):
        sample(part, progress=stop)
    assert 0 < sum(len(c.answer) for c in part) < sum(len(c.answer) for c in whole)
    told = []
    assert sample(part, at=stop_at, progress=told.append) == whole
    assert told[0] == stop_at + 1, "what was sampled before is not sampled again"


def test_a_batch_whose_answers_have_all_ended_is_left_as_it_is(tokenizer):
    model = shallow()
    context = prefill.read_text(model, toys.random_tokens(40), attention_patch.route(model))
    batch = [Conversation([9, 10, 11], [12, 13])]
    options = {"stop": {13}, "max_tokens": 16, "temperature": 1.0, "chances": sampling.chances(3, [0], 16)}
    sampling.sample_answers(model, context, batch, at=4, progress=pytest.fail, **options)
    assert batch == [Conversation([9, 10, 11], [12, 13])]


def test_an_interrupted_batch_of_a_fit_is_continued(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    model, steps, sample = shallow(), [], sampling.sample

    def counted(*arguments, **options):
        steps.append(1)
        if len(steps) == stop_at:
            raise Stop
        return sample(*arguments, **options)

    monkeypatch.setattr(sampling, "sample", counted)
    stop_at = None
    whole = toys.fit(model, tokenizer, TEXT, config=CONFIG)
    needed, stop_at = len(steps), len(steps) + len(steps) // 3
    with pytest.raises(Stop):
        toys.fit(model, tokenizer, TEXT, config=CONFIG, checkpoint=Checkpoint(tmp_path / "part"))
    resumed = toys.fit(model, tokenizer, TEXT, config=CONFIG, checkpoint=Checkpoint(tmp_path / "part"))
    assert resumed.digest == whole.digest and len(steps) == 2 * needed + 1, "only the interrupted step came twice"


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("command")
    toys.save_model(shallow(), folder / "model", tokenizer)
    (folder / "book.txt").write_text(TEXT)
    return folder


def command(folder, output, *more):
    named = ["--model", str(folder / "model"), "--context", str(folder / "book.txt"), "--output", str(output)]
    return [*named, "--queries", "300", "--steps", "10", "--context-tokens", "150", "--budget", "0.5", *more]


def interrupted(folder, output, monkeypatch, *more, during="train_heads"):
    """A fit that ends with Ctrl-C when that function of the pipeline is called."""
    with monkeypatch.context() as patch:
        patch.setattr(f"nectar_mlx.fitting.stages.{during}", lambda *a, **k: signal.raise_signal(signal.SIGINT))
        assert fit.main(command(folder, output, *more)) == 130


def test_the_same_command_continues_and_fresh_does_not(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "x.nectar"
    interrupted(folder, output, monkeypatch)
    assert "is kept in" in capsys.readouterr().err and (tmp_path / "x.nectar.partial" / "plan.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample", lambda *a, **k: pytest.fail("answers were sampled again"))
        assert fit.main(command(folder, output)) == 0
    first = output.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.nectar"]
    interrupted(folder, output, monkeypatch)
    answers = []
    with monkeypatch.context() as patch:
        sample_answers = sampling.sample_answers
        patch.setattr(self_study, "sample_answers", lambda *a, **k: answers.append(1) or sample_answers(*a, **k))
        assert fit.main(command(folder, output, "--fresh")) == 0
    assert answers and output.read_bytes() == first


def test_other_options_start_anew_in_one_line_and_resume_refuses(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "x.nectar"
    interrupted(folder, output, monkeypatch)
    capsys.readouterr()
    assert fit.main(command(folder, output, "--seed", "1", "--resume")) == 2
    err = capsys.readouterr().err
    assert "a fit with other settings (seed), which --resume cannot continue" in err
    assert "the same command continues" not in err
    assert (tmp_path / "x.nectar.partial" / "plan.json").exists()
    assert fit.main(command(folder, output, "--seed", "1")) == 0
    assert "starting anew" in capsys.readouterr().err


def test_where_nothing_is_kept_nothing_is_said(folder, tmp_path, capsys, monkeypatch):
    interrupted(folder, tmp_path / "x.nectar", monkeypatch, during="collect")
    assert "kept" not in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_second_fit_to_the_same_output_is_one_line(folder, tmp_path, capsys):
    output = tmp_path / "x.nectar"
    arguments = command(folder, output, "--queries", "100000")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "nectar_mlx.fit", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "x.nectar.partial" / "fit.json").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert fit.main(command(folder, output)) == 2
        assert f"another fit to the same output is running (process {process.pid})" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    assert fit.main(command(folder, output)) == 0, "the lock of a killed process holds nobody up"


def test_a_disk_without_room_is_refused_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "free_space", lambda folder: 1000)
    assert fit.main(command(folder, tmp_path / "x.nectar")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the fit writes about" in line and "free some" in line and list(tmp_path.iterdir()) == []


@contextmanager
def mounted(place, size):
    """A file system of its own."""
    place.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("a file system cannot be mounted here: this takes root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "400k") as disk:
        yield disk


@pytest.fixture
def large_disk(tmp_path):
    with mounted(tmp_path / "disk", "8m") as disk:
        yield disk


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("work", ["update", "add"])
def test_a_disk_that_fills_leaves_what_update_and_add_had(tmp_path, large_disk, work):
    figures = kill(tmp_path, work, "--kills", 4, "--full")
    assert figures["identical"] == 4 and figures["stopped"] > 0 and figures["wrong"] == [], figures


def test_a_disk_that_fills_leaves_what_was_finished(tokenizer, small_disk):
    """Wherever it fills: the fit ends with one line, and with room it continues to the same file."""
    model = shallow()
    whole = toys.fit(model, tokenizer, TEXT, config=CONFIG)
    whole.save(small_disk.parent / "whole.nectar")
    expected = (small_disk.parent / "whole.nectar").read_bytes()
    output, filler, stopped = small_disk / "x.nectar", small_disk / "filler", set()
    for room in (4, 16, 48, 110, 160):  # KiB: each stage of a fit meets the end once
        shutil.rmtree(small_disk / "part", ignore_errors=True)
        output.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - room * 1024))
        kept = Checkpoint(small_disk / "part")
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "free_space", lambda folder: 1 << 40)
                toys.fit(model, tokenizer, TEXT, config=CONFIG, checkpoint=kept).save(output)
        except NectarError as error:
            assert "No space left on device" in str(error) and "\n" not in str(error)
            stopped.add((bool(kept.load_conversations()), bool(kept.load_plan()), len(kept.load_heads())))
        filler.unlink()
        toys.fit(model, tokenizer, TEXT, config=CONFIG, checkpoint=kept).save(output)
        assert output.read_bytes() == expected
        assert not [p for p in small_disk.rglob(".nectar-*")]
    assert len(stopped) >= 3, stopped
