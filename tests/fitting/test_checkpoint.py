"""What an interrupted fit left is found again; what cannot be read counts as not there."""

import os
import shutil

import mlx.core as mx
import pytest

from nectar_mlx.errors import NectarError
from nectar_mlx.fitting.checkpoint import Checkpoint, Plan
from nectar_mlx.fitting.samples.self_study import Conversation

PLAN = Plan([(3,), (5,)], 0.1, 1.5)
CLAIM = {"model": "a", "text": "b", "settings": {"seed": 0}}
CONVERSATIONS = [Conversation([1, 2], [3], "held_out"), Conversation([4])]


@pytest.fixture
def checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "fit")
    checkpoint.claim(CLAIM)
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
    again.claim(CLAIM)
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


def _full(folder, claim, part="layer-0"):
    checkpoint = Checkpoint(folder).part(part)
    checkpoint.claim(claim)
    checkpoint.save_plan(PLAN)
    checkpoint.save_conversations(CONVERSATIONS)
    checkpoint.decided("memory", lambda: 7)
    checkpoint.save_heads(heads(0))
    tensors = {"layers.0.sizes": mx.array([[3]])}
    shutil.copytree(checkpoint.folder, folder / "before")
    checkpoint.save_chunk(tensors, {"errors": []})
    shutil.copytree(folder / "before", checkpoint.folder, dirs_exist_ok=True)
    return checkpoint


@pytest.mark.parametrize("other", [(CLAIM | {"text": "z"}, "layer-0"), (CLAIM, "layer-1")])
def test_files_of_another_fit_or_part_are_not_there(tmp_path, other):
    mine, theirs = _full(tmp_path / "mine", CLAIM), _full(tmp_path / "theirs", *other)
    assert mine.load_chunk() and mine.load_plan() and mine.load_heads() and mine.load_conversations()
    swapped = [path for path in theirs.folder.iterdir() if path.name != "fit.json"]
    assert len(swapped) == 5
    for path in swapped:
        shutil.copy(path, mine.folder / path.name)
    again = Checkpoint(tmp_path / "mine").part("layer-0")
    again.claim(CLAIM)
    assert not (again.load_chunk() or again.load_plan() or again.load_heads() or again.load_conversations())
    assert again.decided("memory", lambda: 9) == 9


@pytest.mark.parametrize("changed", [{"model": "z"}, {"text": "z"}, {"settings": {"seed": 1}}, {"version": "2"}])
def test_another_fits_folder_is_refused_or_emptied(checkpoint, changed):
    (what,) = changed
    checkpoint.save_plan(PLAN)
    with pytest.raises(NectarError, match=f"other {what}"):
        Checkpoint(checkpoint.folder, must_match=True).claim(CLAIM | changed)
    assert checkpoint.load_plan() == PLAN
    said = []
    again = Checkpoint(checkpoint.folder, log=said.append)
    again.claim(CLAIM | changed)
    assert again.load_plan() is None and len(said) == 1 and f"other {what}" in said[0]
    again.claim(CLAIM | changed)
    assert len(said) == 1


def test_of_an_empty_folder_nothing_is_said(checkpoint):
    Checkpoint(checkpoint.folder, must_match=True, log=pytest.fail).claim(CLAIM | {"model": "z"})


@pytest.mark.parametrize("content", [b'{"config"', b"", b"null", b"[1]"])
def test_where_it_cannot_be_told_whose_the_work_is_it_starts_anew(checkpoint, content):
    checkpoint.save_plan(PLAN)
    checkpoint.save_heads(heads(0))
    (checkpoint.folder / "fit.json").write_bytes(content)
    again = Checkpoint(checkpoint.folder)
    again.claim(CLAIM)
    assert again.load_plan() is None and again.load_heads() == {}
    again.save_plan(PLAN)
    Checkpoint(checkpoint.folder).claim(CLAIM)
    assert again.load_plan() == PLAN


def test_any_changed_byte_is_noticed(checkpoint):
    """In every file: whatever byte is another one, that part is not there, and the others are."""

    def found(name):
        return {
            "plan.json": lambda: checkpoint.load_plan(),
            "conversations.json": lambda: checkpoint.load_conversations() or None,
            "heads-0.safetensors": lambda: checkpoint.load_heads() or None,
            "done.safetensors": lambda: checkpoint.load_chunk(),
        }[name]()

    checkpoint.save_chunk({"x": mx.zeros(3)}, {"errors": [0.5]})
    checkpoint.save_plan(PLAN)
    checkpoint.save_conversations(CONVERSATIONS)
    checkpoint.save_heads(heads(0))
    paths = [p for p in checkpoint.folder.iterdir() if p.name != "fit.json"]
    assert len(paths) == 4
    for path in paths:
        content = path.read_bytes()
        for at in range(0, len(content), 3):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert found(path.name) is None, (path.name, at)
        path.write_bytes(content)
        assert found(path.name) is not None


def test_answers_under_way_come_back_for_their_batch_alone(checkpoint, monkeypatch):
    monkeypatch.setattr("nectar_mlx.fitting.checkpoint.SAVE_SECONDS", 0.0)
    batch = [Conversation([1, 2], [3, 4]), Conversation([5, 6, 7])]
    checkpoint.save_answers(batch, seed=7, group=1, at=3)
    again = [Conversation([1, 2]), Conversation([5, 6, 7])]
    assert checkpoint.load_answers(again, seed=8) == (0, 0) and again[0].answer == []
    assert checkpoint.load_answers(again[:1], seed=7) == (0, 0)
    assert checkpoint.load_answers(again, seed=7) == (1, 3) and again == batch
    checkpoint.save_conversations(batch)
    assert checkpoint.load_answers(again, seed=7) == (0, 0), "a finished batch is kept elsewhere"


def test_between_savings_there_is_some_time(checkpoint):
    checkpoint.save_answers(CONVERSATIONS, seed=0, group=0, at=3)
    assert checkpoint.load_answers(CONVERSATIONS, seed=0) == (0, 0)


def test_what_was_decided_stays(checkpoint):
    assert checkpoint.decided("memory", lambda: 5) == 5
    again = Checkpoint(checkpoint.folder)
    again.claim(CLAIM)
    assert again.decided("memory", lambda: 6) == 5
    assert not checkpoint.holds_work() and Checkpoint(None).decided("memory", lambda: 6) == 6


def test_a_folder_has_one_holder(tmp_path):
    folder = tmp_path / "fit"
    with Checkpoint(folder).held():
        with pytest.raises(NectarError, match=rf"process {os.getpid()}\)"), Checkpoint(folder).held():
            pass
        Checkpoint(folder).claim(CLAIM)
        assert (folder / "fit.json").exists(), "the other took nothing away"
    assert not folder.exists(), "nothing was kept"
    with Checkpoint(folder).held():
        Checkpoint(folder).save_plan(PLAN)
    assert Checkpoint(folder).load_plan() == PLAN


def test_a_file_in_the_folders_place_is_one_line(tmp_path):
    (tmp_path / "fit").write_text("x")
    with pytest.raises(NectarError, match="cannot be used"), Checkpoint(tmp_path / "fit").held():
        pass
    assert (tmp_path / "fit").read_text() == "x"


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
    checkpoint.claim({})
    checkpoint.save_plan(PLAN)
    checkpoint.save_heads(heads(0))
    assert checkpoint.load_plan() is None and checkpoint.load_heads() == {} and checkpoint.load_chunk() is None
    folder = checkpoint.spill()
    assert folder.is_dir() and checkpoint.spill() == folder
    checkpoint.clear()
    assert not folder.exists()
