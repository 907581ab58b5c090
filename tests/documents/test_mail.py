"""Mails and mailboxes."""

import base64
import time
from email.message import EmailMessage
from functools import partial
from pathlib import Path

import pytest

from nectar_mlx import documents
from nectar_mlx.documents import formats, ocr
from tests.documents.makers import column, pdf, report_of, text_of, write

PLAIN = (
    "Subject: Lunch\nFrom: Ann <ann@x.org>\nTo: bob@x.org\nDate: Mon, 1 Jan 2024 12:00:00 +0000\n\nThe code is 4711."
)


def test_a_plain_mail(tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "a.eml", PLAIN)) == (
        "# Lunch\n\nFrom: Ann <ann@x.org>\nTo: bob@x.org\nDate: Mon, 1 Jan 2024 12:00:00 +0000\nSubject: Lunch"
        "\n\nThe code is 4711."
    )


def mail(**options: str) -> EmailMessage:
    message = EmailMessage()
    message["Subject"] = options.get("subject", "Grüße aus Köln")
    message["From"] = "Jörg Müller <joerg@x.org>"
    message.set_content(options.get("text", "Der Schlüssel liegt unter der Matte."), cte="base64")
    return message


def test_headers_and_text_are_decoded(tmp_path: Path) -> None:
    text = text_of(write(tmp_path / "a.eml", bytes(mail())))
    assert text == (
        "# Grüße aus Köln\n\nFrom: Jörg Müller <joerg@x.org>\nSubject: Grüße aus Köln"
        "\n\nDer Schlüssel liegt unter der Matte."
    )


def test_of_alternatives_one_is_read(tmp_path: Path) -> None:
    message = mail(text="plain")
    message.add_alternative("<p>rich</p>", subtype="html")
    assert text_of(write(tmp_path / "a.eml", bytes(message))).endswith("\n\nplain")
    only = EmailMessage()
    only["Subject"] = "x"
    only.set_content(" ")
    only.add_alternative("<p>only <b>rich</b></p>", subtype="html")
    assert text_of(write(tmp_path / "b.eml", bytes(only))).endswith("\n\nonly rich")


def test_attachments_are_read_or_named(tmp_path: Path) -> None:
    message = mail()
    message.add_attachment(pdf(column(["The annex."])), maintype="application", subtype="pdf", filename="annex.pdf")
    message.add_attachment(b"\x89PNG\r\n", maintype="image", subtype="png", filename="Bild ä.png")
    message.add_attachment("a;b", filename="table.csv")
    path = write(tmp_path / "a.eml", bytes(message))
    text, report = text_of(path), report_of(path)
    assert text.endswith("## Attachment annex.pdf\n\nThe annex.\n\n## Attachment table.csv\n\na;b")
    assert report.left_out == [
        f"attachment Bild ä.png (6 bytes): a picture, and no text recognition is installed: {ocr.advice()}"
    ]
    assert base64.b64encode(b"%PDF").decode()[:5] not in text


def test_a_mail_in_a_mail(tmp_path: Path) -> None:
    outer = mail(text="outer")
    outer.add_attachment(mail(text="inner"))
    assert "outer" in (text := text_of(write(tmp_path / "a.eml", bytes(outer)))) and "inner" in text


def test_parts_that_are_nested_too_deep_are_named(tmp_path: Path) -> None:
    data = "Content-Type: text/plain\n\ninnermost"
    for n in range(30):
        data = f"Content-Type: multipart/mixed; boundary=b{n}\n\n--b{n}\n\nlevel {n}\n--b{n}\n{data}\n--b{n}--\n"
    path = write(tmp_path / "a.eml", f"Subject: Deep\n{data}")
    assert "level 29" in (text := text_of(path)) and "innermost" not in text
    assert report_of(path).left_out == ["2 parts nested more than 20 deep"]


def test_a_header_that_is_cut_is_named(tmp_path: Path) -> None:
    many = ",\n ".join(f"reader{number}@example.org" for number in range(200))
    path = write(tmp_path / "a.eml", f"From: a@b.org\nTO: {many}\nX-Long: {many}\n\nHello.")
    assert "reader10@" in (text := text_of(path)) and "reader199@" not in text and text.endswith("Hello.")
    assert report_of(path).left_out == ["the header TO behind its first 2,000 characters"]


def test_a_mailbox(tmp_path: Path) -> None:
    mails = [
        f"From ann@x.org Mon Jan  1 00:00:00 2024\n{PLAIN.replace('4711', str(n))}\n\n>From here on\n\n" for n in (1, 2)
    ]
    path = write(tmp_path / "a.mbox", "".join(mails))
    text, report = text_of(path), report_of(path)
    assert [(place.unit, place.name) for place in report.places] == [("mail", "1 Lunch"), ("mail", "2 Lunch")]
    assert text[report.places[1].start : report.places[1].end].endswith("The code is 2.\n\nFrom here on")
    assert report_of(write(tmp_path / "Inbox", "".join(mails))).kind == "mbox"


def test_a_line_that_starts_with_from_is_no_mail(tmp_path: Path) -> None:
    data = f"From a@x.org Mon Jan  1 00:00:00 2024\n{PLAIN}\n\nFrom here on it is dull.\n"
    assert len(report_of(write(tmp_path / "a.mbox", data)).places) == 1
    assert len(report_of(write(tmp_path / "b.mbox", PLAIN)).places) == 1


def test_bytes_in_headers(tmp_path: Path) -> None:
    data = b"Subject: caf\xe9\nContent-Type: text/plain; charset=no-such\n\ncaf\xc3\xa9"
    assert text_of(write(tmp_path / "a.eml", data)) == "# café\n\nSubject: café\n\ncafé"


@pytest.mark.parametrize(
    "data",
    [
        b"no mail at all",
        b"\0" * 100,
        b"Subject: =?x?b?!!?=\n\n",
        b"Subject: =?utf-7?q?" + b"+AAA-" * 10 + b"?=\nContent-Type: multipart/mixed; boundary=\n\n--\n--",
        b"Content-Type: text/plain; charset*=x''%ff\n\n\xff\xff\xff",
        b"Content-Transfer-Encoding: base64\nMIME-Version: 1.0\n\n!!!",
    ],
)
def test_damaged(data: bytes, tmp_path: Path) -> None:
    reading = documents.read([write(tmp_path / "a.eml", data), write(tmp_path / "b.txt", "x")])
    assert "\n" not in reading.summary()


def test_hostile_mails_take_linear_time(tmp_path: Path) -> None:
    start = time.process_time()
    nested = "".join(f"Content-Type: multipart/mixed; boundary=b{n}\n\n--b{n}\n" for n in range(3000))
    many = "Content-Type: multipart/mixed; boundary=b\n\n" + "--b\n\nx\n" * 5000
    header = "Subject: " + "=?utf-8?q?a?= " * 30_000 + "\n\nx"
    folded = "Subject: x\n" + " y\n" * 50_000 + "\nx"
    for number, data in enumerate((nested, many, header, folded)):
        write(tmp_path / f"{number}.eml", "MIME-Version: 1.0\n" + data)
    assert len(documents.read([tmp_path]).files) == 4
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("A paragraph that was \nwrapped.\n\nAnother one.", "A paragraph that was wrapped.\n\nAnother one."),
        ("> quoted text \n> goes on\nanswer", "> quoted text goes on\nanswer"),
        ("one \n> other\n-- \nSig", "one \n> other\n-- \nSig"),
    ],
)
def test_flowed_text(body: str, text: str, tmp_path: Path) -> None:
    head = "Subject: s\nContent-Type: text/plain; charset=utf-8; format=flowed"
    assert text_of(write(tmp_path / "a.eml", f"{head}\n\n{body}")).partition("Subject: s\n\n")[2] == text
    joined = f"{head}; delsp=yes\n\n長い文章 \nです。"
    assert text_of(write(tmp_path / "b.eml", joined)).endswith("長い文章です。")


def test_signatures_are_no_attachments_and_forwarded_mails_have_their_headers(tmp_path: Path) -> None:
    outer = mail(text="outer")
    outer.add_attachment(mail(text="inner", subject="The inner one"))
    outer.add_attachment(b"abc", maintype="application", subtype="pgp-signature", filename="signature.asc")
    path = write(tmp_path / "a.eml", bytes(outer))
    assert "## The inner one\n\n" in text_of(path) and "abc" not in text_of(path)
    assert report_of(path).left_out == []


def test_many_parameters_of_a_kind_take_no_time(tmp_path: Path) -> None:
    data = "Subject: x\nContent-Type: text/plain; " + "a*0=b;" * 20_000 + "\n\nthe text"
    start = time.process_time()
    assert text_of(write(tmp_path / "a.eml", data)).endswith("the text")
    assert time.process_time() - start < 1


def test_documents_in_one_file_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_Room", partial(formats._Room, characters=25))
    message = mail(text="x")
    for number in range(4):
        message.add_attachment("ten chars!", filename=f"{number}.txt")
    path = write(tmp_path / "a.eml", bytes(message))
    assert text_of(path).count("ten chars!") == 2
    assert "too much in one file" in report_of(path).left_out[-1]


@pytest.mark.parametrize(
    "head",
    [
        b"Subject: =?utf-8?B?A?= x",
        b"Subject: =?\xe9?Q?a?=",
        b'Subject: x\nContent-Type: text/plain; charset="\xe9"',
        b'Subject: x\nContent-Disposition: inline; filename="=?utf-8?B?A?="',
    ],
)
def test_a_damaged_header_costs_no_text(head: bytes, tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "a.eml", head + b"\nFrom: a@b.c\n\nThe text.")).endswith("The text.")
