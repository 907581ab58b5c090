"""The page in front of single files: no library, a key, others' words in names and answers, what breaks, two tabs."""

import json
import time

import pytest

from nectar_mlx.serving.job import Finished, Started, Written
from tests import toys

from .browser import PROGRAM, Browser
from .running import Running, arguments

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine: the page is not tested"),
]
EVIL = "<img src=x onerror=alert(1)>"
WORDS = (
    f"<script>alert(2)</script> {EVIL} [x](javascript:alert(3)) `<b>` **<i>bold</i>**\n\n```\n<svg onload=alert(4)>\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One file, whose name is markup, behind a key."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "key").write_text("the key\n")
    book = toys.book(folder, name=EVIL)
    running = Running(arguments([book], "--api-key-file", str(folder / "key"), "--log-level", "WARNING"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    browser.call("Page.setInterceptFileChooserDialog", enabled=False)
    yield browser
    browser.close()


@pytest.fixture
def page(server, browser):
    """With the key, and no conversation."""
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.run("sessionStorage.setItem('nectar.key', 'the key')")
    browser.run("document.querySelector('#clear').click()")
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until("!!document.querySelector('button.document:not(:disabled)')")
    yield browser
    assert browser.messages == []


@pytest.fixture
def says(server, monkeypatch):
    """Makes the engine say some pieces of text. after: is called when they are said, instead of an end."""

    def say(*pieces, after=None):
        def submit(ticket):
            for event in (Started(1, 0, None), *(Written(piece, "", []) for piece in pieces)):
                ticket.deliver(event)
            if after is None:
                ticket.deliver(Finished("stop", len(pieces), {}))
            else:
                after()

        monkeypatch.setattr(server.engine, "submit", submit)

    return say


def ask(page, question="Who?"):
    page.run("document.querySelector('#question').focus()")
    page.type(question)
    page.press("Enter")


def ended(page, count=1):
    page.until(f"document.querySelectorAll('.answer[aria-busy=false]').length === {count}")
    page.until("document.querySelector('#stop').hidden")


def test_the_key_is_asked_for(server, browser):
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.run("sessionStorage.clear()")
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until("document.querySelector('#key').open")
    browser.click("#key .close")
    browser.until("!document.querySelector('#problem').hidden")
    ask(browser)
    browser.until("document.querySelector('#key').open")
    assert browser.run("document.querySelector('#key-wrong').hidden")
    for key in ("wrong", "the key"):
        browser.run("document.querySelector('#key-value').focus()")
        browser.type(key)
        browser.press("Enter")
        if key == "wrong":
            browser.until("document.querySelector('#key').open && !document.querySelector('#key-wrong').hidden")
    browser.until("!!document.querySelector('button.document:not(:disabled)')")
    assert not browser.run("document.querySelector('#key').open") and browser.run(
        "document.querySelector('#problem').hidden"
    )
    assert browser.run("document.querySelector('#question').value") == "Who?", "what was typed is kept"
    assert browser.messages == []


def test_a_real_answer_from_a_file(page):
    ask(page, "who is the fox?")
    ended(page)
    assert page.text(".answer") and page.text("#target") == EVIL
    assert page.run("document.querySelector('#add').hidden") and not page.run("!!document.querySelector('.remove')")


def test_names_and_answers_are_text(page, says):
    said = [{"start": 0, "end": 3, "document": EVIL, "place": EVIL, "score": 1.0, "text": WORDS}]
    says(WORDS)
    ask(page, WORDS)
    ended(page)
    kept = f"JSON.parse(sessionStorage.getItem('nectar.conversation')).map(t => ({{...t, sources: {json.dumps(said)},"
    page.run(f"sessionStorage.setItem('nectar.conversation', JSON.stringify({kept} document: {json.dumps(EVIL)}}}))))")
    page.call("Page.reload")
    page.until("!!document.querySelector('.source')")
    page.click(".source")
    page.until("document.querySelector('#passage').open")
    assert EVIL in page.text(".document .name") and EVIL in page.text(".answer") and EVIL in page.text(".from")
    assert EVIL in page.text("#passage mark") and page.text(".question") == WORDS.strip()
    assert page.run("document.querySelectorAll('img, svg, body script, a[href^=javascript], i').length") == 0
    page.press("Escape")


def test_a_dropped_file_is_not_opened(page, tmp_path):
    (tmp_path / "new.txt").write_text("x")
    page.drop(tmp_path / "new.txt")
    page.until("!!document.querySelector('#notices .problem')")
    assert "nectar serve library" in page.text("#notices .problem")


def test_an_answer_that_breaks_off_says_so(server, page, says):
    loop_calls = []

    def abort():
        for connection in list(server.server._uvicorn.server_state.connections):
            if not connection.cycle or connection.cycle.response_complete:
                continue
            loop_calls.append(connection.loop.call_later(0.3, connection.transport.abort))

    says("It begins", after=abort)
    ask(page)
    ended(page)
    assert page.text(".answer") == "It begins" and "broke before" in page.text("li > .problem") and loop_calls
    says("It is whole")
    page.click("#turns li button")
    page.until("document.querySelector('.answer').textContent === 'It is whole'")
    assert not page.run("!!document.querySelector('li > .problem')")


def test_two_tabs_have_two_conversations(server, page, says):
    says("first")
    ask(page, "in the first tab")
    ended(page)
    with page.another_tab():
        page.open(f"http://127.0.0.1:{server.port}/")
        page.until("document.querySelector('#key').open")
        page.run("sessionStorage.setItem('nectar.key', 'the key')")
        page.call("Page.reload")
        page.until("!!document.querySelector('button.document:not(:disabled)')")
        assert page.text(".question") == "in the first tab"
        page.click("#clear")
        says("second")
        ask(page, "in the second tab")
        ended(page)
    page.call("Page.reload")
    page.until("!!document.querySelector('button.document:not(:disabled)')")
    assert page.text(".question") == "in the first tab"
    assert "in the second tab" in page.run("localStorage.getItem('nectar.conversation')"), "the last that changed"


def test_a_long_answer_leaves_the_page_usable(page, says):
    """The work of showing an answer grows with its length, not with its square."""
    pieces = [f"word{i} and **more** of it.\n" + "\n" * (i % 20 == 0) for i in range(4000)]
    says(*pieces)
    page.run(
        "(() => { const real = Element.prototype.replaceChildren; window.shown = 0; Element.prototype.replaceChildren ="
        " function (...all) { window.shown += this.parentElement?.id === 'turns'; return real.apply(this, all); } })()"
    )
    started = time.monotonic()
    ask(page)
    ended(page)
    shown = page.run("window.shown")
    print(f"{len(pieces)} pieces in {time.monotonic() - started:.1f} s, shown {shown} times")
    assert "word3999 and more of it." in page.text(".answer")
    assert 1 <= shown < len(pieces)
