"""What an interrupted fit left is found again; what cannot be read counts as not there."""

import mlx.core as mx
import pytest

from nectar_mlx.errors import NectarError
from nectar_mlx.fitting.checkpoint import Checkpoint, Plan
from nectar_mlx.fitting.samples.self_study import Conversation

PLAN = Plan([(3,), (5,)], 0.1, 1.5)
CONVERSATIONS = [Conversation([1, 2], [3], "held_out"), Conversation([4])]


@pytest.fixture
def checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "fit")
    checkpoint.claim({"seed": 0}, [1, 2, 3])
    return checkpoint


def heads(seed):
    return {seed + i: {"keys": mx.full((2, 4), float(seed + i)), "bias": mx.zeros(2)} for i in range(2)}


def test_what_was_kept_comes_back(checkpoint):
    assert checkpoint.load_plan() is None and checkpoint.load_conversations() == [] and checkpoint.load_heads() == {}
    checkpoint.save_plan(PLAN)
    checkpoint.save_conversations(CONVERSATIONS)
    for group in (heads(0), heads(2)):
        checkpoint.save_heads(group)
    again = Checkpoint(checkpoint.folder)
    again.claim({"seed": 0}, [1, 2, 3])
    assert again.load_plan() == PLAN and again.load_conversations() == CONVERSATIONS
    found = again.load_heads()
    assert sorted(found) == [0, 1, 2, 3] and mx.array_equal(found[3]["keys"], mx.full((2, 4), 3.0))


def test_only_the_rest_of_a_finished_part_is_kept(checkpoint):
    checkpoint.save_plan(PLAN)
    (checkpoint.spill() / "train.samples").mkdir()
    checkpoint.save_chunk({"layers.0.sizes": mx.array([[3]])}, {"errors": [0.5], "windows": {}})
    assert {p.name for p in checkpoint.folder.iterdir()} == {"fit.json", "done.safetensors"}
    arrays, report = checkpoint.load_chunk()
    assert arrays["layers.0.sizes"].tolist() == [[3]] and report == {"errors": [0.5], "windows": {}}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b"3", b'{"a": 1}', b"[1]"])
@pytest.mark.parametrize("name", ["plan.json", "conversations.json"])
def test_what_cannot_be_read_is_not_there(checkpoint, name, content):
    checkpoint.save_plan(PLAN)
    checkpoint.save_conversations(CONVERSATIONS)
    (checkpoint.folder / name).write_bytes(content)
    assert checkpoint.load_plan() == (None if name == "plan.json" else PLAN)
    assert checkpoint.load_conversations() == ([] if name == "conversations.json" else CONVERSATIONS)


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_heads_and_parts_that_are_cut_short_are_not_there(checkpoint, cut):
    for group in (heads(0), heads(2)):
        checkpoint.save_heads(group)
    path = checkpoint.folder / "heads-2.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert sorted(checkpoint.load_heads()) == [0, 1]
    checkpoint.save_chunk({"x": mx.zeros(3)}, {})
    path = checkpoint.folder / "done.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert checkpoint.load_chunk() is None


def test_another_fits_folder_is_refused(checkpoint):
    for settings, prefix in (({"seed": 1}, [1, 2, 3]), ({"seed": 0}, [1, 2])):
        with pytest.raises(NectarError, match="other settings"):
            Checkpoint(checkpoint.folder).claim(settings, prefix)


def test_where_it_cannot_be_told_whose_the_work_is_it_starts_anew(checkpoint):
    checkpoint.save_plan(PLAN)
    checkpoint.save_heads(heads(0))
    (checkpoint.folder / "fit.json").write_text('{"config"')
    again = Checkpoint(checkpoint.folder)
    again.claim({"seed": 1}, [1, 2, 3])
    assert again.load_plan() is None and again.load_heads() == {}
    again.save_plan(PLAN)
    Checkpoint(checkpoint.folder).claim({"seed": 1}, [1, 2, 3])
    assert again.load_plan() == PLAN


def test_a_full_disk_is_an_error_with_its_reason(checkpoint, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    checkpoint.save_plan(PLAN)
    monkeypatch.setattr("os.fsync", full)
    for save in (
        lambda: checkpoint.save_plan(PLAN._replace(share=0.2)),
        lambda: checkpoint.save_conversations(CONVERSATIONS),
        lambda: checkpoint.save_heads(heads(0)),
        lambda: checkpoint.save_chunk({"x": mx.zeros(3)}, {}),
    ):
        with pytest.raises(NectarError, match=r"cannot write .*: No space left"):
            save()
    assert {p.name for p in checkpoint.folder.iterdir()} == {"fit.json", "plan.json"}
    assert checkpoint.load_plan() == PLAN


def test_without_a_folder_nothing_is_kept():
    checkpoint = Checkpoint(None)
    checkpoint.claim({}, [1])
    checkpoint.save_plan(PLAN)
    checkpoint.save_heads(heads(0))
    assert checkpoint.load_plan() is None and checkpoint.load_heads() == {} and checkpoint.load_chunk() is None
    folder = checkpoint.spill()
    assert folder.is_dir() and checkpoint.spill() == folder
    checkpoint.clear()
    assert not folder.exists()
