"""`nectar add`, `list`, `remove`, `update`, and `ask` and `chat` with the library."""

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from nectar_mlx import Nectar, __main__, cli, from_library, installed, models, serve, store, update
from nectar_mlx.fitting.config import effort
from nectar_mlx.installed import Installed
from nectar_mlx.library import Library, ModelFitter, routing
from tests import toys
from tests.documents.makers import column, pdf_pages, shown
from tests.library.cheap import CheapFitter
from tests.serving.running import Running

ROOT = Path(__file__).parents[2]
LEASE = ["The landlord is Adele Kuhn.", "The rent is 930 euros a month.", "Pets are allowed."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toys.save_model(toys.toy("llama"), tmp_path_factory.mktemp("toy") / "model", toys.tokenizer())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The library's folder, empty."""
    monkeypatch.setenv("NECTAR_LIBRARY", str(tmp_path / "library"))
    return tmp_path / "library"


@pytest.fixture
def cheap(monkeypatch):
    """Commands fit without a model."""
    fitters = []

    def make(name, options, *, adapter, log):
        fitters.append(CheapFitter(name))
        return fitters[-1]

    monkeypatch.setattr(from_library, "ModelFitter", make)
    return fitters


@pytest.fixture
def filled(folder, tmp_path, model):
    """Two exact documents."""
    (tmp_path / "herons.txt").write_text("The heron Olga was ringed in 1987. " + "Herons stand in water. " * 200)
    (tmp_path / "kettle.txt").write_text("The copper kettle costs 90 crowns. " + "Tea is poured hot. " * 250)
    paths = [tmp_path / "herons.txt", tmp_path / "kettle.txt"]
    Library(folder).add(paths, ModelFitter(str(model), {"kind": "exact", "context_tokens": 60}))
    return folder


def run(*argv):
    return __main__.main([str(argument) for argument in argv])


def assert_one_line(capsys, *parts):
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in parts), err


def test_a_folder_is_added_listed_updated_removed(folder, cheap, notes, capsys):
    (notes / "bad.pdf").write_bytes(b"%PDF-1.4 no more")
    assert run("add", notes, "--model", "some", "--budget", "3%", "--json") == 0
    out, err = capsys.readouterr()
    done = json.loads(out)
    assert len(done["fitted"]) == 7 and list(done["failed"]) == [str(notes / "bad.pdf")]
    assert "8 files: 7 read, 0 known, 1 cannot be read" in err and f"{notes / 'bad.pdf'}: " in err
    assert "(7 documents to go)" in err and "7 documents fitted" in err
    assert Library(folder).options == {"budget": 0.03}
    assert run("list") == 0
    out, err = capsys.readouterr()
    assert out.count("ready") == 7 and "bad.pdf     not read: " in out and "fitted on some" in err
    assert run("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed["documents"]) == 8 and listed["model"] == "some"
    (notes / "long 0.txt").write_text("changed " * 900)
    assert run("update") == 0
    err = capsys.readouterr().err
    assert cheap[-1].fitted == ["long 0.txt"] and "1 read, 6 known" in err
    assert "(1 document to go)" in err and "1 document fitted" in err
    assert run("remove", notes, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["documents"]) == 8
    assert run("list") == 0 and capsys.readouterr().out == ""


def test_list_tells_a_damaged_file(folder, cheap, notes, capsys):
    assert run("add", notes, "--model", "some") == 0
    files = {document.name: document.file for document in Library(folder).documents()}
    cut, gone = files["long 0.txt"], files["long 1.txt"]
    cut.write_bytes(cut.read_bytes()[:-9])
    gone.unlink()
    changed = next(file for name, file in files.items() if name.startswith("note"))
    changed.write_bytes(changed.read_bytes().replace(b"crowns", b"towels", 1))
    hurt = {name for name, file in files.items() if file in (cut, gone, changed)}
    capsys.readouterr()
    assert run("list", "--json") == 0
    listed = {document["name"]: document for document in json.loads(capsys.readouterr().out)["documents"]}
    assert {name for name, document in listed.items() if document["state"] == "damaged"} == hurt
    assert {document["state"] for document in listed.values()} == {"damaged", "ready"}
    assert run("list") == 0
    out, err = capsys.readouterr()
    assert "damaged: its file is not a .nectar or .kv file, or is cut short (its arrays do not fill it)" in out
    assert "damaged: its metadata do not match their checksum" in out
    assert "damaged: its file cannot be read (No such file or directory)" in out
    assert "`nectar update` fits again what is damaged" in err
    assert run("update") == 0 and run("list") == 0
    assert "damaged" not in capsys.readouterr().out


def test_list_reads_only_those_files_that_were_changed(folder, cheap, notes, monkeypatch, capsys):
    """A changed byte within a tensor is seen where the file's time of change tells of it; else by `update`."""

    def states():
        assert run("list", "--json") == 0
        listed = json.loads(capsys.readouterr().out)["documents"]
        return {document["name"]: (document["state"], document["reason"]) for document in listed}

    def flip(file, **times):
        data = bytearray(file.read_bytes())
        data[-40] ^= 1  # the checksum takes the last 32
        file.write_bytes(data)
        os.utime(file, **times)

    assert run("add", notes, "--model", "some") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(store, "check_whole", lambda path: pytest.fail("all of it is read"))
        assert {state for state, _ in states().values()} == {"ready"}
    files = {document.name: document.file for document in Library(folder).documents()}
    flip(files["long 0.txt"])
    before = files["long 1.txt"].stat().st_mtime_ns
    flip(files["long 1.txt"], ns=(before, before))
    found = states()
    assert found.pop("long 0.txt") == ("damaged", "its bytes do not match its checksum")
    assert {state for state, _ in found.values()} == {"ready"}
    restored = files["note 0.md"]
    os.utime(restored, ns=(1, 1))
    assert states()["note 0.md"][0] == "ready"
    assert run("update") == 0 and sorted(cheap[-1].fitted) == ["long 0.txt", "long 1.txt"]
    capsys.readouterr()
    monkeypatch.setattr(store, "check_whole", lambda path: pytest.fail("what update has read is read again"))
    assert {state for state, _ in states().values()} == {"ready"}


@pytest.mark.process
def test_what_needs_no_model_imports_none_of_its_libraries(folder, cheap, notes):
    assert run("add", notes, "--model", "some") == 0
    code = (
        "import sys; from nectar_mlx.__main__ import main; print(main(['list']), main(['remove', sys.argv[1]]), "
        "[name for name in ('mlx_lm', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(notes / "long 0.txt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 0 []", done.stdout + done.stderr


def test_update_can_watch(folder, cheap, notes, monkeypatch, capsys):
    assert run("add", notes, "--model", "some") == 0
    looks = iter(range(4))

    def sleep(seconds):
        assert seconds == 2.5
        if (look := next(looks)) == 1:
            (notes / "new.txt").write_text("The lynx lives in the wood. " * 300)
        elif look == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(update, "time", SimpleNamespace(sleep=sleep))
    capsys.readouterr()
    assert run("update", "--watch", "--every", "2.5") == cli.INTERRUPTED
    err = capsys.readouterr().err
    assert cheap[-1].fitted == ["new.txt"] and err.count(" files: ") == 2, "a look without news says nothing"


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["add", "."], ["--model Qwen3-1.7B"]),
        (["add", "/nonexistent", "--model", "some"], ["no such file"]),
        (["add", ".", "--model", "some", "--budget", "much"], ["a budget is"]),
        (["add", ".", "--model", "some", "--effort", "much"], ["unknown effort"]),
        (["add", ".", "--model", "some", "--kind", "odd"], ["unknown kind"]),
        (["add"], ["nectar add --help"]),
        (["update"], ["is empty", "nectar add"]),
        (["list"], ["0 documents", "nectar add"]),
        (["update", "--every", "0"], ["more than 0"]),
        (["remove"], ["say what to remove"]),
        (["remove", "nothing.txt"], ["not in the library"]),
        (["ask", "library", "Who?"], ["is empty", "nectar add"]),
        (["chat", "library"], ["is empty", "nectar add"]),
        (["ask", "book.nectar", "Who?", "--library", "somewhere"], ["--library is for"]),
        (["list", "--library", "/dev/null/library"], ["there is no library in /dev/null/library"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, cheap, argv, parts, monkeypatch, capsys):
    monkeypatch.setattr(installed, "installed", lambda: [])
    assert run(*argv) == (cli.DONE if argv == ["list"] else cli.FAULT)
    assert_one_line(capsys, *parts)


def test_the_first_documents_are_fitted_on_the_machines_model(folder, cheap, notes, monkeypatch, capsys):
    """As by `nectar fit`; later calls take the library's."""
    monkeypatch.setattr(installed, "installed", lambda: [Installed("here", "hub's cache", 1)])
    assert run("add", notes) == 0 and cheap[-1].identity.name == "here"
    assert "model: here (hub's cache)" in capsys.readouterr().err
    monkeypatch.setattr(installed, "installed", lambda: [])
    assert run("update") == 0 and cheap[-1].identity.name == "here"


def test_a_library_without_a_fitted_document(folder, notes, capsys):
    with pytest.raises(KeyboardInterrupt):
        Library(folder).add([notes], CheapFitter(raising=KeyboardInterrupt()))
    assert run("ask", "library", "What does the copper pipe cost?") == cli.FAULT
    assert_one_line(capsys, "no document of the library is fitted yet")


def test_ask_goes_to_the_right_document_and_says_which(filled, capsys):
    assert run("ask", "library", "In which year was the heron Olga ringed?", "--max-tokens", 3) == 0
    out, err = capsys.readouterr()
    assert out and "from herons.txt\n" in err
    assert run("ask", "library", "What does the copper kettle cost?", "--max-tokens", 3, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["document"] == "kettle.txt" and answer["log_odds"] > 0 and answer["answer_tokens"] > 0
    assert answer["candidates"][0]["path"].endswith("/kettle.txt")
    assert max(Library(filled).documents(), key=lambda document: document.used).name == "kettle.txt"


CODE = "What is the access code of the Harwick depot?"


@pytest.fixture
def depot(folder, tmp_path, model):
    """Exact documents, two of which share a question's words: one has the answer, the other has more of the words."""
    texts = {
        "codes": "Harwick depot, access code: 4417. " + "Herons stand in water. " * 200,
        "letter": "Nobody says what the access code of the Harwick depot is. " + "Tea is poured hot. " * 250,
        "kettle": "The copper kettle costs 90 crowns. " + "Boats lie in the harbour. " * 200,
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    paths = [tmp_path / f"{name}.txt" for name in texts]
    Library(folder).add(paths, ModelFitter(str(model), {"kind": "exact", "context_tokens": 60}))
    return folder


def test_of_documents_that_share_a_questions_words_one_answers_and_the_other_is_named(depot, monkeypatch, capsys):
    def first_sentence(nectar, model, tokenizer, question):
        assert question == CODE
        return "It is 4417." if "codes" in nectar.metadata["source"] else "The access code of the Harwick depot is 90."

    monkeypatch.setattr(Nectar, "first_sentence", first_sentence)
    assert Library(depot).route(CODE).best.document.name == "letter.txt", "words alone are wrong"
    assert run("ask", "library", CODE, "--max-tokens", 3, "--json") == 0
    out, err = capsys.readouterr()
    assert "from codes.txt (close to it: letter.txt)" in err
    supports = {candidate["document"]: candidate["support"] for candidate in json.loads(out)["candidates"]}
    assert supports["codes.txt"] > 0.5 and supports["letter.txt"] == 0
    assert run("ask", "library", "What does the copper kettle cost?", "--max-tokens", 3) == 0
    assert "from kettle.txt\n" in capsys.readouterr().err


def test_a_close_document_whose_file_cannot_be_read_is_named(depot, capsys):
    letter = next(d for d in Library(depot).documents() if d.name == "letter.txt")
    letter.file.write_bytes(letter.file.read_bytes()[:-100])
    run("ask", "library", CODE, "--max-tokens", 3)
    assert capsys.readouterr().err.startswith("the fitted file of letter.txt is not a .nectar or .kv file")
    letter.file.unlink()
    run("ask", "library", CODE, "--max-tokens", 3)
    assert "the file of letter.txt is gone: `nectar update` fits it again" in capsys.readouterr().err


def test_documents_that_are_only_asked_have_no_verdict_told(depot, monkeypatch, capsys):
    monkeypatch.setattr(Nectar, "faithful", False)
    monkeypatch.setattr(Nectar, "verdict", "Far from the text.")
    monkeypatch.setattr(Nectar, "first_sentence", lambda *_: "It is 4417.")
    assert run("ask", "library", CODE, "--max-tokens", 3) == 0
    err = capsys.readouterr().err
    assert err.count("Far from the text.") == 1 and "codes.txt: Far from the text." in err


def test_a_very_long_question_is_not_asked_behind_close_documents(depot, monkeypatch, capsys):
    monkeypatch.setattr(Nectar, "first_sentence", lambda *_: pytest.fail("it would be read for each document"))
    assert run("ask", "library", f"{CODE} " * 300, "--max-tokens", 3) == 2
    err = capsys.readouterr().err
    assert "the model's window" in err and "Traceback" not in err


def test_the_server_decides_by_the_same_answers(depot, monkeypatch, capsys):
    seen = []

    def support(question, answers, texts):
        seen.append((question, list(answers), [text[:20] for text in texts]))
        return [0.0, 1.0]

    monkeypatch.setattr(routing, "support", support)
    assert run("ask", "library", CODE, "--max-tokens", 3) == 0
    assert "from codes.txt (close to it: letter.txt)" in capsys.readouterr().err
    arguments = serve.make_parser().parse_args(["library", "--port", "0", "--log-level", "WARNING"])
    with contextlib.closing(Running(arguments)) as running:
        body = {"model": "library", "max_tokens": 3, "messages": [{"role": "user", "content": CODE}]}
        status, reply = running.post("/v1/chat/completions", body)
    assert status == 200 and reply["document"] == "codes.txt" and reply["close"] == ["letter.txt"]
    assert seen[0] == seen[1] and any(seen[0][1])


@pytest.mark.parametrize("name", ["boat.txt", "renamed.txt"])
def test_sources_are_of_the_document_alone_though_others_share_its_file(folder, tmp_path, model, capsys, name):
    """Whatever it is called since it was fitted, and also from a server."""
    (tmp_path / "boat.txt").write_text("The deposit of the boat is 80 crowns. It lies in the harbour.")
    (tmp_path / "bill.txt").write_text("The plumber asked for 90 crowns, and for a deposit of 9 crowns.")
    paths = [tmp_path / "boat.txt", tmp_path / "bill.txt"]
    Library(folder).add(paths, ModelFitter(str(model), {"kind": "exact"}))
    if name != "boat.txt":
        paths[0].rename(tmp_path / name)
        Library(folder).add([tmp_path / name], ModelFitter(str(model), {"kind": "exact"}))
    assert len({document.file for document in Library(folder).documents()}) == 1
    question = "What is the deposit of the boat?"
    assert run("ask", "library", question, "--json", "--max-tokens", 3) == 0
    assert {source["document"] for source in json.loads(capsys.readouterr().out)["sources"]} == {name}
    arguments = serve.make_parser().parse_args(["library", "--port", "0", "--log-level", "WARNING"])
    with contextlib.closing(Running(arguments)) as running:
        for target in ("library", name):
            said = [{"role": "user", "content": question}]
            body = {"model": target, "max_tokens": 3, "sources": True, "messages": said}
            status, reply = running.post("/v1/chat/completions", body)
            assert status == 200 and {source["document"] for source in reply["sources"]} == {name}


@pytest.fixture
def pair(folder, tmp_path, model):
    """Two exact documents in one file, and the fitter."""
    (tmp_path / "boat.txt").write_text("The deposit of the boat is 80 crowns. It lies in the harbour.")
    (tmp_path / "bill.txt").write_text("The plumber asked for 90 crowns, and for a deposit of 9 crowns.")
    fitter = ModelFitter(str(model), {"kind": "exact"})
    Library(folder).add([tmp_path / "boat.txt", tmp_path / "bill.txt"], fitter)
    assert len({document.file for document in Library(folder).documents()}) == 1
    return fitter


BOAT = "What is the deposit of the boat?"


def test_what_shared_a_file_with_what_is_removed_says_what_to_do(pair, tmp_path, capsys):
    """Its file held what was removed, which must not answer any more."""
    assert run("remove", tmp_path / "bill.txt") == 0
    assert "boat.txt: no answers until `nectar update` has fitted it again" in capsys.readouterr().err
    assert run("list") == 0
    out, err = capsys.readouterr()
    assert "boat.txt  waiting" in out and "`nectar update` fits what waits" in err
    assert run("ask", "library", BOAT) == cli.FAULT
    assert_one_line(capsys, "no document of the library is fitted yet: `nectar update`")
    (tmp_path / "tea.txt").write_text("Tea is poured hot. " * 300)
    assert run("add", tmp_path / "tea.txt", "--kind", "exact") == 0
    assert run("ask", "library", BOAT, "--max-tokens", 3) == 0, "a later add fits it, too"


def test_a_server_neither_answers_from_what_was_removed_nor_lists_all_documents_for_each_question(
    pair, folder, tmp_path, model, monkeypatch
):
    (tmp_path / "tea.txt").write_text("Tea is poured hot. " * 300)
    Library(folder).add([tmp_path / "tea.txt"], ModelFitter(str(model), {"kind": "exact", "context_tokens": 60}))
    arguments = serve.make_parser().parse_args(["library", "--port", "0", "--log-level", "WARNING"])
    with contextlib.closing(Running(arguments)) as running:

        def ask(name):
            body = {"model": name, "max_tokens": 3, "messages": [{"role": "user", "content": BOAT}]}
            status, reply = running.post("/v1/chat/completions", body)
            return status, reply["error"]["message"] if status != 200 else ""

        with monkeypatch.context() as patch:
            patch.setattr(Library, "documents", lambda self: pytest.fail("all documents are listed"))
            assert ask("boat.txt")[0] == ask("bill.txt")[0] == 200
        Library(folder).remove([tmp_path / "bill.txt"])
        assert ask("bill.txt") == (404, "there is no model 'bill.txt'; there are: tea.txt")
        waiting = "boat.txt has no fitted file (waiting): `nectar update` fits it"
        assert ask("boat.txt") == (404, waiting) and ask("library") == (400, waiting)
        Library(folder).update(pair)
        assert ask("boat.txt")[0] == 200, "without a question to the library before"


@pytest.mark.parametrize("known", [True, False])
def test_a_renamed_document_has_its_new_name_in_the_file_that_is_not_fitted_again(
    folder, tmp_path, model, monkeypatch, known
):
    """Also where the library does not know what the file calls it."""
    texts = {
        "boat": "The boat lies in the harbour.",
        "bill": "The plumber asked for 90 crowns.",
        "long": "A hen. " * 700,
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    fitter = ModelFitter(str(model), {"kind": "exact", "context_tokens": 200})
    library = Library(folder)
    library.add([tmp_path / f"{name}.txt" for name in texts], fitter)
    for name in ("boat", "long"):
        (tmp_path / f"{name}.txt").rename(tmp_path / f"{name} 2.txt")
    if not known:
        with sqlite3.connect(library.folder.database) as rows:
            rows.execute("DROP TABLE named")
        library = Library(folder)
    monkeypatch.setattr(ModelFitter, "fit", lambda *_, **__: pytest.fail("it is fitted again"))
    library.add([tmp_path / "boat 2.txt", tmp_path / "long 2.txt"], fitter)
    loaded, tokenizer = models.load(str(model))
    files = {document.file for document in library.documents()}
    found = {store.source(file): Nectar.load(file, loaded, tokenizer) for file in files}
    assert len(files) == 2 and {"long 2.txt"} < found.keys()
    both = next(file for source, file in found.items() if source != "long 2.txt")
    assert {file.name for file in both.text(tokenizer).files} == {"boat 2.txt", "bill.txt"}
    said = f"{texts['boat']} {texts['bill']}"
    cited = both.cite(tokenizer, "Where is the boat?", said, [])
    assert [source.document for source in cited.sources] == ["boat 2.txt", "bill.txt"]
    before = {file: file.stat().st_mtime_ns for file in files}
    library.update(fitter)
    assert before == {file: file.stat().st_mtime_ns for file in files}, "once"


def _killed(*_args, **_kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["written", "moved", "fitted"])
def test_a_kill_leaves_no_wrong_name(folder, tmp_path, model, monkeypatch, moment):
    """Nor anything else, also where the document has its old name again."""
    (tmp_path / "a.txt").write_text("A hen. " * 700)
    library, fitter = Library(folder), ModelFitter(str(model), {"kind": "exact", "context_tokens": 60})
    library.add([tmp_path / "a.txt"], fitter)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    with monkeypatch.context() as patch:
        if moment == "written":
            patch.setattr("nectar_mlx.library.folder.Folder.publish", _killed)
        if moment == "moved":
            patch.setattr("nectar_mlx.library.folder.shutil.rmtree", _killed)
        if moment == "fitted":
            library.documents()[0].file.unlink()
            patch.setattr("nectar_mlx.library.naming.rename_all", lambda *_: None)
            patch.setattr("nectar_mlx.library.naming.note", _killed)
        with pytest.raises(KeyboardInterrupt):
            library.add([tmp_path / "b.txt"], fitter)
    if moment == "fitted":  # the claim is of a process that is gone
        with sqlite3.connect(folder / "library.db") as rows:
            rows.execute("UPDATE volumes SET owner = '' WHERE state = 'fitting'")
    (tmp_path / "b.txt").rename(tmp_path / "a.txt")
    library.add([tmp_path / "a.txt"], fitter)
    (document,) = library.documents()
    assert store.source(document.file) == document.name == "a.txt"
    assert list((folder / "work").iterdir()) == []


def test_the_name_of_a_removed_document_goes_though_an_equal_one_stays(folder, tmp_path, model):
    for name in ("an heir.txt", "b.txt"):
        (tmp_path / name).write_text("A hen. " * 700)
    library = Library(folder)
    fitter = ModelFitter(str(model), {"kind": "exact", "context_tokens": 60})
    library.add([tmp_path / "an heir.txt", tmp_path / "b.txt"], fitter)
    library.remove([tmp_path / "an heir.txt"])
    (document,) = library.documents()
    assert document.state == "ready" and b"heir" not in document.file.read_bytes()


def test_none_of_them_is_an_answer(filled, capsys):
    question = "Who composed the opera about the barber?"
    assert run("ask", "library", question) == 0
    out, err = capsys.readouterr()
    assert out.startswith("None of the 2 documents in the library is about this.") and err == ""
    assert run("ask", "library", question, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["answer"] is None and answer["document"] is None
    assert answer["log_odds"] is None or answer["log_odds"] < 0
    assert run("ask", "library", question, "--sources") == 0
    assert capsys.readouterr().err == "", "there is no answer that a passage could say"
    assert run("ask", "library", question, "--cite") == 0
    assert capsys.readouterr().err == "", "none is written"


def test_what_could_not_be_read_is_not_counted_among_the_documents_that_are_not_about_it(filled, cheap, capsys):
    (old := filled.parent / "old.doc").write_bytes(b"an old one")
    assert run("add", old) == 0 and "not read" not in capsys.readouterr().out
    assert run("ask", "library", "Who composed the opera about the barber?") == 0
    out = capsys.readouterr().out
    assert out.startswith("None of the 2 documents") and "1 more could not be read" in out


def test_chat_goes_from_document_to_document(filled, monkeypatch, capsys):
    turns = "Who composed it?\nWhen was the heron Olga ringed?\nand why?\nWhat does the copper kettle cost?\n/history\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    assert run("chat", "library", "--max-tokens", 3) == 0
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "document" in line or line.startswith("from ")]
    assert lines == ["from herons.txt", "the question names no document: still from herons.txt", "from kettle.txt"]
    assert out.startswith("None of the 2 documents") and out.count("user: ") == 3


def test_chat_begins_though_the_file_that_was_used_last_is_damaged(filled, monkeypatch, capsys):
    question = "When was the heron Olga ringed?"
    library = Library(filled)
    used = library.route("What does the copper kettle cost?").best.document
    library.touch(used)
    used.file.write_bytes(used.file.read_bytes()[:-1])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
    assert run("chat", "library", "--max-tokens", 3) == 0
    assert "from herons.txt" in capsys.readouterr().err


def test_a_file_that_was_tampered_with_is_one_line(filled, capsys):
    for path in (filled / "volumes").iterdir():
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)
    assert run("ask", "library", "When was the heron Olga ringed?") == cli.FAULT
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the fitted file of herons.txt is damaged: " in told and told.endswith("; `nectar update` fits it again")


def test_the_model_in_use_answers_in_another_thread(filled):
    """A server may route in one thread and add in another."""
    found = []
    thread = threading.Thread(target=lambda: found.append(Library(filled).route("What does the copper kettle cost?")))
    thread.start()
    thread.join()
    assert found[0].best.document.name == "kettle.txt"


def test_an_effort_is_kept_until_another_is_given(folder, cheap, tmp_path):
    (tmp_path / "a.txt").write_text("Olga has a heron.")
    for given, kept in [
        (["--effort", "quick", "--budget", "3%"], effort("quick") | {"budget": 0.03}),
        ([], effort("quick") | {"budget": 0.03}),
        (["--effort", "best", "--steps", "7"], effort("best") | {"budget": 0.03, "steps": 7}),
        (["--effort", "normal"], {"budget": 0.03}),
    ]:
        assert run("add", tmp_path / "a.txt", "--model", "some", *given) == 0
        assert Library(folder).options == kept


def test_the_settings_name_the_library_the_model_and_the_budget(tmp_path, monkeypatch, cheap, capsys):
    monkeypatch.delenv("NECTAR_LIBRARY", raising=False)
    (tmp_path / "config.toml").write_text(f'model = "one"\nbudget = "3%"\nlibrary = "{tmp_path}/chosen"\n')
    monkeypatch.setenv("NECTAR_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "note.txt").write_text("The heron Olga was ringed in 1987.")
    assert __main__.main(["add", str(tmp_path / "note.txt")]) == 0
    assert [fitter.identity.name for fitter in cheap] == ["one"]
    library = Library(tmp_path / "chosen")
    assert len(library.documents()) == 1 and library.options == {"budget": 0.03}
    capsys.readouterr()
    assert __main__.main(["list"]) == 0 and "note.txt" in capsys.readouterr().out
    assert __main__.main(["remove", str(tmp_path / "note.txt")]) == 0
    assert library.documents() == []
    monkeypatch.setenv("NECTAR_LIBRARY", str(tmp_path / "other"))  # nearer than the settings
    assert __main__.main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["library"] == str(tmp_path / "other")
    assert __main__.main(["add", str(tmp_path / "note.txt"), "--budget", "5%", "--model", "two"]) == 0
    assert Library(tmp_path / "other").options == {"budget": 0.05} and cheap[-1].identity.name == "two"


@pytest.mark.parametrize("command", [["list"], ["update"], ["remove", "a.txt"], ["ask", "library", "What?"]])
def test_a_mistyped_library_is_named_and_not_made(tmp_path, capsys, command):
    assert __main__.main([*command, "--library", str(tmp_path / "libary")]) != 0
    assert "there is no library in" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "libary").exists()


def test_sources_name_the_document_and_its_page(folder, tmp_path, model, capsys):
    (tmp_path / "lease.pdf").write_bytes(pdf_pages([shown(column([line])) for line in LEASE]))
    (tmp_path / "note.txt").write_text("The plumber Otto Brandt charged 184 euros for the boiler.")
    fitter = ModelFitter(str(model), {"kind": "exact"})
    Library(folder).add([tmp_path / "lease.pdf", tmp_path / "note.txt"], fitter)
    for document in Library(folder).documents():  # both in one file
        assert document.shared == 1
    assert __main__.main(["ask", "library", "What is the rent?", "--json", "--max-tokens", "2"]) == 0
    source = json.loads(capsys.readouterr().out)["sources"][0]
    assert (source["document"], source["place"]) == ("lease.pdf", "page 2") and source["text"] == LEASE[1]
    assert __main__.main(["ask", "library", "What did the plumber charge?", "--json", "--max-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["document"] == "note.txt"


def test_the_list_of_what_is_not_fitted_yet_says_so(folder, cheap, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("unfittable")
    run("add", tmp_path / "note.txt", "--model", "some")
    capsys.readouterr()
    assert run("list") == 0 and ", to be fitted on some\n" in capsys.readouterr().err


def test_a_library_keeps_its_models_adapter(folder, tmp_path, model, capsys):
    (tmp_path / "herons.txt").write_text("The heron Olga was ringed in 1987. " + "Herons stand in water. " * 20)
    adapter = toys.adapter(tmp_path / "adapter")
    assert run("add", tmp_path / "herons.txt", "--model", model, "--adapter", adapter, "--kind", "exact") == 0
    assert Library(folder).identity.adapter == adapter
    assert run("ask", "library", "when was the heron Olga ringed?", "--max-tokens", 2, "--here") == 0
    capsys.readouterr()
    assert run("list") == 0 and f"fitted on {model} with the adapter {adapter}" in capsys.readouterr().err
    assert run("update", "--json") == 0 and not json.loads(capsys.readouterr().out)["fitted"]
    assert run("update", "--model", model, "--json") == 0, "a model that is named is taken without an adapter"
    assert json.loads(capsys.readouterr().out)["fitted"] == ["herons.txt"]
    assert Library(folder).identity.adapter == ""
