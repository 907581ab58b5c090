"""Who may ask: hosts, origins, keys, types and sizes of bodies, and the time that a client may take."""

import http.client
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from nectar_mlx import NectarError, serve
from nectar_mlx.serving import connection, lingering, web

from .running import ENDLESS, QUESTIONS, Running, arguments, ask, wait_for

HELLO = {"model": "red", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(books, tmp_path_factory):
    """With a key, a name and an origin."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text("sésame\nnot this line\n")
    extra = ("--api-key-file", str(file), "--allowed-origins", "https://friend.example", "--allowed-hosts", "mac.home")
    server = Running(arguments(books, *extra, "--max-body", "20000", "--log-level", "WARNING"))
    yield server
    server.close()


KEY = {"Authorization": "Bearer sésame".encode().decode("latin-1")}


@pytest.mark.parametrize(
    "given, status",
    [
        *((KEY["Authorization"], 200), (KEY["Authorization"].replace("Bearer", "bearer"), 200), (None, 401), ("", 401)),
        *(("Bearer", 401), ("Bearer ", 401), ("Bearer sesame", 401), ("Basic abc", 401), ("Bearer \xff\xfe", 401)),
    ],
)
def test_a_key(guarded, given, status):
    headers = {} if given is None else {"Authorization": given}
    found, body, more = guarded.request("GET", "/v1/models", **headers)
    assert found == status
    assert (more["WWW-Authenticate"] == "Bearer") == (status == 401)
    assert "sésame".encode() not in body


def test_what_needs_no_key(guarded):
    assert guarded.request("GET", "/health")[0] == 200
    assert guarded.request("GET", "/")[0] == 200
    for path in ("/metrics", "/v1/models", "/api/tags", "/nothing"):
        assert guarded.request("GET", path)[0] == 401
    assert guarded.request("POST", "/", b"")[0] == 401


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "mac.home:8080"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://friend.example"}, 200),
        ({"Origin": "https://friend.example.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_hosts_and_origins(guarded, headers, status):
    named = KEY | headers
    assert guarded.request("GET", "/v1/models", **named)[0] == status
    assert guarded.request("POST", "/v1/chat/completions", HELLO, **named)[0] == status


def test_a_preflight(guarded):
    ours = guarded.request("OPTIONS", "/v1/chat/completions", Origin="https://friend.example")
    assert ours[0] == 204 and ours[2]["Access-Control-Allow-Origin"] == "https://friend.example"
    other = guarded.request("OPTIONS", "/v1/chat/completions", Origin="https://evil.example")
    assert other[0] == 403 and other[2]["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_must_be_json(running, kind):
    assert running.request("POST", "/v1/chat/completions", HELLO, Content_Type=kind)[0] == 415
    assert (
        running.request("POST", "/v1/chat/completions", HELLO, Content_Type="application/json; charset=utf-8")[0] == 200
    )


def test_pages_are_protected(running):
    for path in ("/", "/v1/models", "/nothing"):
        headers = running.request("GET", path)[2]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_an_oversized_body(running):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(running.client(), "red", "x" * 140_000)
    assert refused.value.status_code == 413
    chunked = iter([b"x" * 40_000] * 4)
    connected = http.client.HTTPConnection("127.0.0.1", running.port)
    connected.request("POST", "/v1/completions", chunked, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connected.getresponse().status == 413


JSON = "Host: localhost\r\nContent-Type: application/json\r\n"
TEXT = JSON.replace("application/json", "text/plain")
EVIL = JSON.replace("localhost", "evil.example")
CLOSE = f"{JSON}Connection: close\r\n"


def refused_while_sending(port: int, head: str, *, path: str = "/v1/completions", chunked: bool = False) -> bytes:
    """The whole answer to a request whose body of 200,000 bytes arrives in pieces, slowly."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connected:
        length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 200000"
        connected.sendall(f"POST {path} HTTP/1.1\r\n{head}{length}\r\n\r\n".encode())
        piece = b"x" * 20_000
        for _ in range(10):
            connected.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            time.sleep(0.005)
        if chunked:
            connected.sendall(b"0\r\n\r\n")
        pieces = []
        while piece := connected.recv(10_000):
            pieces.append(piece)
        return b"".join(pieces)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "head, path, status",
    [
        (JSON, "/v1/completions", 413),
        (CLOSE, "/v1/completions", 413),
        (TEXT, "/v1/completions", 415),
        (EVIL, "/v1/completions", 403),
        (JSON, "/nothing", 404),
        (JSON, "/health", 405),
    ],
    ids=["413", "413 close", "415", "403", "404", "405"],
)
def test_an_answer_reaches_a_client_that_still_sends(running, head, path, status, chunked, monkeypatch):
    monkeypatch.setattr(lingering, "SECONDS", 60.0)  # a busy machine may take some of them
    for _ in range(3):
        found = refused_while_sending(running.port, head, path=path, chunked=chunked)
        assert found.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in found.lower() and found.endswith(b"}")


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [False, True])
def test_no_oversized_body_is_reset(running, chunked, monkeypatch):
    monkeypatch.setattr(lingering, "SECONDS", 60.0)
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(refused_while_sending, running.port, JSON, chunked=chunked) for _ in range(50)]
        assert all(found.result().startswith(b"HTTP/1.1 413 ") for found in sent)


def test_a_refused_body_is_not_read_for_ever(running, monkeypatch):
    monkeypatch.setattr(lingering, "SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connected:
        connected.sendall(f"POST /v1/completions HTTP/1.1\r\n{JSON}Content-Length: 200000\r\n\r\n".encode())
        pieces = []
        while piece := connected.recv(10_000):
            pieces.append(piece)
        assert b"".join(pieces).startswith(b"HTTP/1.1 413 "), "and then an end, though the body has none"


def test_a_head_without_end_gets_its_answer(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connected:
        connected.sendall(b"GET /health HTTP/1.1\r\n" + b"X-A: %s\r\n" % (b"x" * 1_000) * 300)
        assert connected.recv(1_000).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("length", ["-5", "many", "1e3", "9" * 40])
def test_lying_lengths(running, length):
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connected:
        head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        connected.sendall(head.encode())
        connected.shutdown(socket.SHUT_WR)
        assert b" 4" in connected.recv(200)[:16]


def closed(connected: socket.socket) -> bool:
    connected.setblocking(False)
    try:
        return connected.recv(1000) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_slow_heads_are_given_up(running, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(130)]
    for connected in slow:
        connected.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
    assert running.request("GET", "/health")[0] == 200, "nobody else waits"

    def all_closed():
        for connected in list(slow):
            try:
                connected.sendall(b"a")
            except OSError:
                connected.close()
                slow.remove(connected)
        return not slow

    assert wait_for(all_closed)


def test_the_oldest_connection_without_a_head_makes_room(running, monkeypatch):
    monkeypatch.setattr(connection, "MAX_HEADLESS", 5)
    slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(8)]
    assert wait_for(lambda: closed(slow[0]) and closed(slow[1]))
    assert not closed(slow[7])
    for connected in slow:
        connected.close()


def test_a_slow_second_request_on_a_connection(running, monkeypatch):
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connected:
        connected.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connected.recv(4000)
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
        connected.sendall(b"GET /health HTTP/1.1\r\n")
        assert wait_for(lambda: closed(connected))


def test_a_body_that_does_not_arrive(running, monkeypatch):
    monkeypatch.setattr(web, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connected:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connected.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in connected.recv(200)[:16]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_left_frees_its_place(running, answers, stream):
    body = {**HELLO, "max_tokens": 3000, "stream": stream, **ENDLESS}
    for _ in range(3):
        connected = http.client.HTTPConnection("127.0.0.1", running.port)
        connected.request("POST", "/v1/chat/completions", web_json(body), {"Content-Type": "application/json"})
        assert wait_for(lambda: running.engine.open == 1)
        connected.close()
        assert wait_for(lambda: running.engine.open == 0)
    assert ask(running.client(), "red", QUESTIONS[0]).choices[0].message.content == answers["red", QUESTIONS[0]]


def web_json(body) -> bytes:
    import json

    return json.dumps(body).encode()


def test_too_many_open_requests(books):
    server = Running(arguments(books[:1], "--max-requests", "1", "--log-level", "WARNING"))
    try:
        with ask(server.client(), "red", "x", stream=True, max_tokens=3000, **ENDLESS) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError):
                ask(server.client(), "red", "x")
            assert [m.id for m in server.client().models.list()] == ["red"]
        assert wait_for(lambda: server.engine.open == 0)
        assert ask(server.client(), "red", "x").choices
    finally:
        server.close()


@pytest.mark.parametrize(
    "extra, complaint",
    [
        (["--host", "0.0.0.0"], "other machines.*NECTAR_API_KEY"),
        (["--host", "::"], "other machines"),
        (["--host", ""], "other machines"),
        (["--host", "no.such.host.invalid"], "no host"),
        (["--model", "/nonexistent/model"], "nonexistent"),
        (["--api-key-file", "/nonexistent"], "no key"),
        (["--api-key-file", "/dev/null"], "empty"),
        (["--port", "99999"], "cannot listen"),
        (["--temp", "nan"], "temperature"),
        (["--max-tokens", "0"], "at least 1"),
    ],
)
def test_refused_at_the_start(books, extra, complaint, monkeypatch):
    monkeypatch.delenv("NECTAR_API_KEY", raising=False)
    with pytest.raises(NectarError, match=complaint):
        serve.start(arguments(books, *extra))
