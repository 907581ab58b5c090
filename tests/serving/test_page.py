"""The page in a real browser, in front of a real server with a toy model."""

import json
import os
import time
from pathlib import Path

import pytest

from nectar_mlx import serve
from nectar_mlx.library import Library, ModelFitter
from nectar_mlx.serving import openai_api
from tests import toys
from tests.library.cheap import FAST

from .browser import PROGRAM, Browser
from .running import Running

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine: the page is not tested"),
]
KEEPER = "The keeper Odalys mends the brass lamp each winter. She feeds a fox named Ferrin.\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of a library with one document, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("page")
    toys.save_model(toys.toy("llama"), folder / "model", toys.tokenizer())
    (folder / "keeper.md").write_text(KEEPER)
    library = Library(folder / "library")
    library.options = FAST
    library.add([folder / "keeper.md"], ModelFitter(str(folder / "model"), FAST))
    server = start(folder)
    yield folder, server
    server.close()


def start(folder: Path, port: int = 0) -> Running:
    options = ["--library", str(folder / "library"), "--port", str(port), "--log-level", "WARNING"]
    return Running(serve.make_parser().parse_args(["library", *options, "--max-tokens", "12"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def page(served, browser):
    """The page as a new visitor sees it."""
    browser.size(1200, 800)
    browser.open(f"http://127.0.0.1:{served[1].port}/")
    browser.run("localStorage.clear()")
    browser.run("document.querySelector('#clear').click()")
    browser.until("document.querySelectorAll('button.document:not(:disabled)').length >= 2", 60)
    yield browser
    assert browser.messages == []


def ask(page: Browser, question: str) -> None:
    page.run("document.querySelector('#question').focus()")
    page.type(question)
    page.press("Enter")


def ended(page: Browser, count: int = 1) -> None:
    page.until(f"document.querySelectorAll('.answer[aria-busy=false]').length === {count}")
    page.until("document.querySelector('#stop').hidden")


def test_an_answer_streams_with_its_document_and_sources(page):
    ask(page, "Which lamp does Odalys mend?")
    ended(page)
    assert page.text(".question") == "Which lamp does Odalys mend?" and page.text(".answer")
    assert page.text(".from") == "From keeper.md"
    page.click(".source")
    page.until("document.querySelector('#passage').open")
    assert page.text("#passage mark") == KEEPER.strip()
    page.press("Escape")
    page.until("!document.querySelector('#passage').open")


def test_none_of_the_documents_is_an_answer(page):
    ask(page, "How many zebras does Peru export?")
    ended(page)
    assert page.text(".answer") == "No document in the library is about this."


def test_a_question_that_names_no_document_says_so(page):
    ask(page, "Which lamp does Odalys mend?")
    ended(page)
    ask(page, "How many zebras does Peru export?")
    ended(page, 2)
    said = page.run("[...document.querySelectorAll('.from')].map(line => line.textContent)")
    assert said == ["From keeper.md", "The question names no document: still from keeper.md"]


def test_it_is_there_after_a_reload_and_exported(page, tmp_path):
    ask(page, "Which lamp does Odalys mend?")
    ended(page)
    said = page.text(".answer")
    page.call("Page.reload")
    page.until("document.querySelectorAll('button.document').length >= 2")
    assert page.text(".answer") == said and page.text(".source")
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#export")
    end = time.monotonic() + 10
    while not (tmp_path / "nectar.md").exists() and time.monotonic() < end:
        time.sleep(0.05)
    exported = (tmp_path / "nectar.md").read_text()
    assert "## Which lamp does Odalys mend?" in exported and "keeper.md" in exported and KEEPER.strip() in exported


def test_a_document_is_added_fitted_and_removed(served, page, tmp_path):
    (tmp_path / "ship.txt").write_text("The ship Marenka sailed from Riga with barley. Its captain was Tomas.\n")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    page.choose_files("#files", tmp_path / "broken.pdf")
    (tmp_path / "folder").mkdir()
    page.drop(tmp_path / "ship.txt", tmp_path / "folder")
    page.until("document.querySelector('#notices').innerText.includes('folder is a folder')")
    row = "[...document.querySelectorAll('#document-list > li')].find(li => li.innerText.includes('{}'))"
    page.until(f"{row.format('broken.pdf')}?.innerText.includes('not read')", 60)
    page.until(f"!!{row.format('ship.txt')}?.querySelector('.document:not(:disabled)')", 90)
    kept = served[0] / "library" / "documents"
    assert (kept / "ship.txt").stat().st_mode & 0o777 == 0o600
    ask(page, "Who was the captain of the Marenka?")
    ended(page)
    assert page.text(".from") == "From ship.txt"
    for name in ("ship.txt", "broken.pdf"):
        page.run(f"{row.format(name)}.querySelector('.remove').click()")
        page.until("document.querySelector('#confirm').open")
        page.click("#confirm .yes")
        page.until(f"!{row.format(name)}")
    assert os.listdir(kept) == []


def test_stop_and_errors(served, page, monkeypatch):
    server = served[1]
    monkeypatch.setattr(server.engine, "_decode", lambda real=server.engine._decode: (time.sleep(0.2), real()))
    ask(page, "Which lamp does Odalys mend?")
    page.until("document.querySelector('.answer').textContent.length > 0")
    page.press("Escape")
    ended(page)
    assert page.text(".note") == "Stopped."
    monkeypatch.undo()

    page.run("document.querySelector('#question').maxLength = 1e6")
    ask(page, "Odalys lamp " * 4000)
    ended(page, 2)
    assert "longer than the model's window" in page.text("li:last-child > .problem")


def test_a_server_that_is_gone_is_told_and_comes_back(tmp_path, browser):
    toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    serving = [*("library", "--library", str(tmp_path / "library"), "--model", str(tmp_path / "model"))]

    def serve_at(port: int) -> Running:
        args = serve.make_parser().parse_args([*serving, "--port", str(port), "--log-level", "WARNING"])
        return Running(args)

    server = serve_at(0)
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until("document.querySelector('#target').textContent === 'all documents'")
    ask(browser, "Anyone?")
    ended(browser)
    assert "empty" in browser.text(".answer")
    server.close()
    ask(browser, "Still there?")
    ended(browser, 2)
    assert "does not answer" in browser.text("li:last-child > .problem")
    browser.until("!document.querySelector('#problem').hidden")
    again = serve_at(server.port)
    try:
        browser.until("document.querySelector('#problem').hidden")
        browser.click("#turns > li:last-child > button")
        browser.until("document.querySelectorAll('.answer')[1].textContent.includes('empty')")
    finally:
        again.close()


def test_it_fits_a_phone_and_the_keyboard(page):
    page.size(320, 640)
    ask(page, "Which lamp does Odalys mend? " + "x" * 200)
    ended(page)
    assert page.run("document.documentElement.scrollWidth <= 320")
    page.run("document.body.focus(); document.querySelector('#question').blur()")
    reached = []
    for _ in range(12):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id || document.activeElement.className"))
    assert {"show-documents", "export", "clear", "source", "question", "send"} <= set(reached)
    page.click("#show-documents")
    assert page.run("document.querySelector('#documents').getBoundingClientRect().height") > 0
    assert page.run("document.documentElement.scrollWidth <= 320")


def test_text_is_inserted_as_text(page):
    """An answer, a name and a passage are others' words."""
    evil = "<img src=x onerror=alert(1)> `<b>` **<i>bold</i>** [a](javascript:alert(1))"
    rendered = page.run(
        f"import('/page/markdown.js').then(m => {{ const d = document.createElement('div');"
        f" d.append(m.render({json.dumps(evil)})); return d.innerHTML; }})"
    )
    assert "&lt;img" in rendered and "<img" not in rendered and "<a" not in rendered and "<i>" not in rendered


def test_the_first_token_is_shown_within_50_ms_of_the_server(page, monkeypatch):
    sent = []
    real = openai_api.event

    def noting(value):
        if any(choice["delta"].get("content") for choice in value.get("choices", [])):
            sent.append(time.time())
        return real(value)

    monkeypatch.setattr(openai_api, "event", noting)
    behind = []
    for _ in range(3):
        sent.clear()
        page.click("#clear")
        ask(page, "Which lamp does Odalys mend?")
        ended(page)
        shown = page.run("performance.timeOrigin + performance.getEntriesByName('first-text')[0].startTime")
        behind.append(shown - 1000 * sent[0])
    print(f"shown after the server wrote it, ms: {[round(ms, 1) for ms in behind]}")
    assert min(behind) < 50
