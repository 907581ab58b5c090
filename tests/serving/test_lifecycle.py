"""Files on demand, errors in the engine, and an orderly end."""

import queue
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import openai
import pytest

from nectar_mlx import Nectar, NectarError, serve
from nectar_mlx.serving import decoding, server
from nectar_mlx.serving.admission import Settings
from nectar_mlx.serving.engine import Engine
from nectar_mlx.serving.job import Failed, Finished, Job, Started, Ticket
from nectar_mlx.serving.shelf import Shelf
from tests import toys

from .running import ENDLESS, QUESTIONS, Running, arguments, ask, wait_for


def test_files_that_cannot_be_served(books, tmp_path):
    (tmp_path / "red.nectar").write_bytes(books[1].path.read_bytes())
    args = arguments(books)
    args.nectars = [str(books[0].path), str(tmp_path / "red.nectar")]
    with pytest.raises(NectarError, match="same name"):
        serve.start(args)
    (tmp_path / "cut.nectar").write_bytes(books[1].path.read_bytes()[:-50])
    args.nectars = [str(tmp_path / "cut.nectar")]
    with pytest.raises(NectarError, match="cut short"):
        serve.start(args)
    (tmp_path / "empty").mkdir()
    args.nectars = [str(tmp_path / "empty")]
    with pytest.raises(NectarError, match=r"no \.nectar file"):
        serve.start(args)


def test_files_of_two_models(books, tmp_path):
    other = toys.book(tmp_path, "qwen3", name="other")
    with pytest.raises(NectarError, match="different models"):
        serve.start(arguments([*books, other]))


def test_a_port_in_use(books, running):
    with pytest.raises(NectarError, match="is in use: --port takes another one"):
        serve.start(arguments(books, "--port", str(running.port)))


@pytest.fixture(scope="module")
def shelf_of_12(tmp_path_factory):
    """A folder of 12 files on one model."""
    folder = tmp_path_factory.mktemp("shelf")
    return [toys.book(folder, name=f"book{n}", seed=n) for n in range(12)]


def test_a_folder_under_a_memory_limit(shelf_of_12):
    """Files are read when they are asked for, and put away again; answers are those of each file."""
    folder = str(shelf_of_12[0].path.parent)
    one = Nectar.read(shelf_of_12[0].path).nbytes
    server = Running(serve.make_parser().parse_args([folder, "--port", "0", "--memory", str(4 * one)]))
    try:
        client, question = server.client(), QUESTIONS[0]
        assert len(client.models.list().data) == 12 and server.engine.shelf.open == 1
        first = {n: ask(client, f"book{n}", question).choices[0].message.content for n in range(12)}
        assert len(set(first.values())) > 6, "or a mixed-up context would go unnoticed"
        assert wait_for(lambda: server.engine.shelf.open <= 4)

        def one_of(n):
            return ask(client, f"book{n % 12}", question).choices[0].message.content == first[n % 12]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(one_of, range(60)))
        assert wait_for(lambda: server.engine.shelf.open <= 4)
    finally:
        server.close()


def test_a_file_that_is_gone_is_one_error(shelf_of_12, tmp_path):
    import shutil

    for book in shelf_of_12[:2]:
        shutil.copy(book.path, tmp_path)
    server = Running(serve.make_parser().parse_args([str(tmp_path), "--port", "0"]))
    try:
        (tmp_path / "book1.nectar").write_bytes(b"junk")
        with pytest.raises(openai.InternalServerError) as failed:
            ask(server.client().with_options(max_retries=0), "book1", "x")
        assert failed.value.status_code == 503 and str(tmp_path) not in str(failed.value)
        assert ask(server.client(), "book0", "x").choices
    finally:
        server.close()


def test_the_model_is_fingerprinted_once(shelf_of_12, monkeypatch):
    from nectar_mlx import models

    calls = []
    monkeypatch.setattr(models, "fingerprint", lambda model, real=models.fingerprint: calls.append(1) or real(model))
    shelf = Shelf(str(shelf_of_12[0].folder), {book.path.stem: book.path for book in shelf_of_12})
    for name in shelf.files:
        shelf.get(name)
    assert len(calls) == 1 and shelf.open == 12
    used = shelf.get("book3")
    shelf.get("book4")
    shelf.shrink(0)
    assert shelf.open == 2 and shelf.get("book3") is used, "one that an answer still uses is not read again"
    del used
    shelf.put_away(shelf.files["book3"])
    shelf.shrink(0)
    assert shelf.open == 1


def run_jobs(engine, *jobs):
    """The last event of each."""
    waiting = []
    for job in jobs:
        events = queue.Queue()
        engine.submit(Ticket(job, events.put))
        waiting.append(events)
    last = []
    for events in waiting:
        event = events.get(timeout=120)
        while not isinstance(event, Failed | Finished):
            event = events.get(timeout=120)
        last.append(event)
    return last


@pytest.fixture
def engine(books):
    engine = Engine(lambda: Shelf(str(books[0].folder), {b.path.stem: b.path for b in books}), Settings())
    engine.start()
    yield engine
    assert engine.stop()
    assert engine.open == 0


GOOD = Job(name="red", prompt=[20, 21, 22], max_tokens=5)


def broken(*_):
    raise RuntimeError("broken on purpose")


def test_an_error_of_one_answer_ends_that_answer_alone(engine):
    bad = Job(name="red", prompt=[20, 21, 22], max_tokens=5, constraint=lambda: broken)
    never = Job(name="red", prompt=[20, 21], max_tokens=5, constraint=broken)
    unknown = Job(name="green", prompt=[20])
    found = run_jobs(engine, GOOD, bad, GOOD, never, unknown, GOOD)
    assert [type(event) for event in found] == [Finished, Failed, Finished, Failed, Failed, Finished]
    assert run_jobs(engine, GOOD) == [found[0]]


@pytest.mark.parametrize("part", ["read_piece", "_take"])
def test_an_error_in_a_step_ends_what_it_concerns(engine, monkeypatch, part):
    monkeypatch.setattr(decoding.AnswerSequence, part, broken)
    assert [type(event) for event in run_jobs(engine, GOOD, GOOD)] == [Failed, Failed]
    monkeypatch.undo()
    assert isinstance(run_jobs(engine, GOOD)[0], Finished)


def test_all_files_share_a_batch(engine, monkeypatch):
    """Those of one file side by side, so that its heads are asked once a layer."""
    seen = []

    def step(batch, real=decoding.Batch.step):
        seen.append((len(engine._batches), [member.ticket.job.name for member in batch.members]))
        return real(batch)

    monkeypatch.setattr(decoding.Batch, "step", step)
    jobs = [Job(name=name, prompt=[20 + i, 21], max_tokens=40) for i, name in enumerate(["red", "blue"] * 3)]
    together = run_jobs(engine, *jobs)
    assert all(isinstance(event, Finished) for event in together)
    assert {count for count, _ in seen} == {1}
    names = max((names for _, names in seen), key=len)
    assert set(names) == {"red", "blue"} and names == sorted(names, key=names.index)


def test_an_answer_that_fails_leaves_those_of_other_files_alone(engine, monkeypatch):
    def take(sequence, *args, real=decoding.AnswerSequence._take):
        return broken() if sequence.ticket.job.name == "blue" and sequence.count == 2 else real(sequence, *args)

    monkeypatch.setattr(decoding.AnswerSequence, "_take", take)
    blue = Job(name="blue", prompt=[20, 21], max_tokens=5)
    assert [type(event) for event in run_jobs(engine, GOOD, blue, GOOD)] == [Finished, Failed, Finished]


@pytest.mark.parametrize("part", ["_admit", "_decode", "_drop_cancelled"])
def test_an_error_in_the_engine_itself_ends_all_answers_but_not_the_thread(engine, monkeypatch, part):
    monkeypatch.setattr(Engine, part, broken)
    assert isinstance(run_jobs(engine, GOOD)[0], Failed)
    monkeypatch.undo()
    assert isinstance(run_jobs(engine, GOOD)[0], Finished)


def test_a_call_runs_in_the_engine(engine):
    assert engine.call(lambda: mx.array([1, 2]).sum().item()).result(10) == 3
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.call(broken).result(10)


def test_a_job_that_is_cancelled_while_it_waits(books):
    engine = Engine(lambda: Shelf(str(books[0].folder), {b.path.stem: b.path for b in books}), Settings(concurrency=1))
    engine.start()
    endless = Job(name="red", prompt=[20], max_tokens=4000, stops=(), sampling=GOOD.sampling)
    events: queue.Queue = queue.Queue()
    first, second = Ticket(endless, events.put), Ticket(GOOD, events.put)
    engine.submit(first)
    assert isinstance(events.get(timeout=120), Started)
    engine.submit(second)
    second.cancel()
    assert wait_for(lambda: engine.open <= 1)
    first.cancel()
    assert wait_for(lambda: engine.open == 0)
    assert engine.stop()


def started(books, *extra: str) -> tuple[subprocess.Popen, openai.OpenAI]:
    command = [sys.executable, "-m", "nectar_mlx", "serve", str(books[0].path), "--port", "0", *extra]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = next(line for line in process.stderr if line.startswith("serving"))
    port = int(line.rsplit(":", 1)[1].split("/")[0])
    return process, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(books, number):
    process, client = started(books)
    stream = ask(client, "red", QUESTIONS[0], stream=True, max_tokens=40, **ENDLESS)
    next(iter(stream))
    process.send_signal(number)
    assert len(list(stream)) > 10, "what was under way is finished"
    assert process.wait(timeout=60) == 0
    said = process.stderr.read()
    assert "stopping" in said and "Traceback" not in said and "ERROR" not in said


@pytest.mark.process
def test_a_second_signal_ends_it_at_once(tmp_path):
    book = toys.book(tmp_path, max_position_embeddings=1_000_000)
    process, client = started([book], "--log-level", "WARNING")
    stream = ask(client, "book", QUESTIONS[0], stream=True, max_tokens=900_000, **ENDLESS)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    next(line for line in process.stderr if "stopping" in line)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in process.stderr.read()


def test_a_request_that_is_cut_off_at_the_end_is_told(books, monkeypatch, caplog):
    monkeypatch.setattr(server, "_GRACE", 1)
    running = Running(arguments(books))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9"
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(head + b"\r\n\r\n{")
        assert wait_for(lambda: running.server._uvicorn.server_state.tasks)
        running.close()
        assert client.recv(1000).startswith(b"HTTP/1.1 503 ")
    assert "Cancel 1 running task" in caplog.text and "Traceback" not in caplog.text


def test_importing_the_command_is_quick():
    """The server's packages are imported when it starts."""
    code = "import nectar_mlx.serve, sys; print([m for m in ('starlette', 'uvicorn', 'msgspec') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert found.stdout.strip() == "[]"
