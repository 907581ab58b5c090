"""Web pages: what they show, what is not their text, and pages made to do harm."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nectar_mlx.documents.html import html_text
from tests.documents.makers import report_of, text_of, write


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>One\n  two</p><p>three<br>four</p>", "One two\n\nthree\nfour"),
        ("a &amp; b &lt;c&gt; &eacute;&nbsp;d &#8212; e", "a & b <c> é\u00a0d — e"),
        ("<h1>A <em>b</em></h1>text<h3>c</h3>", "# A b\n\ntext\n\n### c"),
        ("<ul><li>a</li><li><p>b</p></li></ul>after", "- a\n- b\n\nafter"),
        ("<ol><li>a<ol><li>x<li>y</ol><li>b</ol>", "1. a\n  1. x\n  2. y\n2. b"),
        ("<ol start=5><li>a<li>b</ol>", "5. a\n6. b"),
        ("<table><tr><th>k<th>v<tr><td>1<td></td><td>a<br>b</td></tr></table>z", "k | v\n1 |  | a b\n\nz"),
        ("<table><tr><td><h2>Mail</h2><p>text<table><tr><td>a<td>1</table></table>", "## Mail\n\ntext\n\na | 1"),
        ("<pre>\n  x = 1\n    y\n</pre>after  all", "  x = 1\n    y\n\nafter all"),
        ("<script>if (a<b) x()</script><style>p{}</style><title>t</title>seen<template><p>x</template>", "seen"),
        ("<div>a<div>b</div>c</div>", "a\n\nb\n\nc"),
        ("<p>unclosed <b>bold", "unclosed bold"),
        ("a<!-- hidden -->b<?php x ?>", "ab"),
        ("wo<b>rd</b>s and <i>more</i> words", "words and more words"),
        ("</ul></li></table><li>stray", "- stray"),
        ("<noscript><p>no</noscript>yes", "yes"),
        ("<p>1.</p><p>-</p>", "1.\n\n-"),
        (
            "10<sup>6</sup> H<sub>2</sub>O, a word<sup>1</sup>. The end.<sup>2</sup> 1<sup>st</sup>",
            "10^6 H2O, a word^1. The end.[2] 1st",
        ),
        ("so <math><mi>E</mi><mo>=</mo><mi>m</mi><msup><mi>c</mi><mn>2</mn></msup></math> joules", "so E=mc^2 joules"),
        ("<math><mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mn>2</mn></mfrac><mi>h</mi></math>", "(a+b)/2 h"),
        ("<math><msqrt><mi>x</mi></msqrt><msub><mi>y</mi><mn>1</mn></msub></math>", "√(x)y_1"),
        ("<ruby>漢<rt>kan</rt></ruby>字", "漢(kan)字"),
        ("<p>a<img alt='E = mc²'>b<img alt=''><img>", "a[E = mc²]b"),
        ("<p style='display:none'>preheader</p><p hidden>x</p><p>seen</p>", "seen"),
    ],
)
def test_text(html: str, text: str) -> None:
    assert html_text(html)[0] == text


@pytest.mark.parametrize(
    "unclosed",
    ["<svg><path>", "<svg>", "<button>", "<select><option>", "<title>", "<textarea>", "<template>", "<object>",
     "<iframe>", "<noscript>", "<script>x()\n", "<style>p{}\n", "<!-- ", "<![ ", "<?x ", "<canvas>", "<math><mi>"],
)  # fmt: skip
def test_what_is_not_closed_hides_nothing(unclosed: str) -> None:
    text, _ = html_text(f"<p>before</p>{unclosed}<p>behind</p><p>the end</p>")
    assert text.startswith("before") and text.endswith("behind\n\nthe end")


@pytest.mark.parametrize(
    ("furniture", "what"),
    [
        ("<nav><a>Home</a></nav>", "navigation"),
        ("<div role='navigation'>Home</div>", "navigation"),
        ("<footer>Imprint</footer>", "the footer"),
        ("<div class='cookie-banner'>We use cookies</div>", "a cookie notice"),
        ("<div id='gdpr-consent'><button>OK</button>We care</div>", "a cookie notice"),
    ],
)
def test_what_is_not_the_text_is_left_out(furniture: str, what: str, tmp_path: Path) -> None:
    assert html_text(f"{furniture}<main><p>The text.</p></main>") == ("The text.", [what])
    path = write(tmp_path / "a.html", f"<p>The text.</p>{furniture}{furniture}")
    assert report_of(path).describe() == f"a.html: 9 characters; left out: {what} (2 times)"


def test_a_page_of_nothing_else_is_read() -> None:
    assert html_text("<nav><p>Only this</p></nav>") == ("Only this", [])
    assert html_text("<article><p>a</p><footer>by me</footer></article>") == ("a\n\nby me", [])


def test_declared_encoding(tmp_path: Path) -> None:
    page = '<html><meta charset="koi8-r"><p>Привет</p></html>'
    assert text_of(write(tmp_path / "a.html", page.encode("koi8-r"))) == "Привет"
    page = '<meta http-equiv="Content-Type" content="text/html; charset=no-such-encoding"><p>café</p>'
    assert text_of(write(tmp_path / "b.htm", page.encode("cp1252"))) == "café"


@pytest.mark.parametrize(
    "part",
    ["<div>", "<ul><li>x", "<ol><li>", "<a ", "<![ x", "<!--", "<script>", "<form><div></form>", "<svg>", "<b><p>x",
     "<table><tr><td>", "<", "&", "<select>", "<font color=a>x<p>", "<sup>", "<math><msup>", "<ruby><rt>x", "</p>",
     "<blockquote>", "<a a='", "<p><div>", "<template>", "<td>x", "<dd><span>", "<noscript>", "<textarea>", "</script"],
)  # fmt: skip
def test_time_is_linear_and_the_text_not_longer(part: str) -> None:
    html = part * (300_000 // len(part))
    start = time.process_time()
    text, _ = html_text(html)
    assert time.process_time() - start < 3
    assert len(text) < 4 * len(html)


def test_many_attributes_take_linear_time() -> None:
    start = time.process_time()
    assert html_text("<a " + " ".join(f"a{n}=1" for n in range(60_000)) + ">x</a>")[0] == "x"
    assert html_text("<a " + " ".join(f"a{n}" for n in range(60_000)) + ">x</a>")[0] == "x"
    assert time.process_time() - start < 2


@given(st.text(alphabet="<>/abulipretdh1 &;\n'\"=!-", max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_page_can_be_read(html: str) -> None:
    html_text(html)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<table><tr><th>City<th colspan=2>People<th>Area<tr><td rowspan=2>Graz<td>226<td>261<td>127<tr><td>5"
            "<td>6<td>7</table>",
            "City | People |  | Area\nGraz | 226 | 261 | 127\n | 5 | 6 | 7",
        ),
        ("<ol><li value=9>nine<li>ten</ol><ul><li value=4>dot</ul>", "9. nine\n10. ten\n\n- dot"),
        (
            "<table><caption>C</caption><thead><tr><th>a<th>b</thead><tbody><tr><td>1<td>2</tbody></table>z",
            "C\n\na | b\n1 | 2\n\nz",
        ),
        ('<div hidden="until-found">found</div><p hidden>not</p>', "found"),
        (f'<p>a</p><img alt="a barn" src="data:image/png;base64,{"A" * 100_000}"><p>b', "a\n\n[a barn]\n\nb"),
        (f'<p style="background:url(data:image/png;base64,{"A" * 100_000})">a</p>', "a"),
    ],
)
def test_what_a_reader_sees(html: str, text: str) -> None:
    assert html_text(html)[0] == text


@pytest.mark.parametrize("cell", ["<td colspan=999>x", "<td rowspan=999>x", "<td rowspan=99 colspan=99>x"])
def test_cells_that_take_much_stay_bounded(cell: str) -> None:
    text, _ = html_text("<table>" + ("<tr>" + cell * 100) * 100)
    assert text.count("x") == 10_000 and len(text) < 200_000


def test_a_title_heads_a_page_without_headings(tmp_path: Path) -> None:
    page = "<title>Ferries &amp;\n more</title>%s<p>Departs 9:15</p>"
    assert text_of(write(tmp_path / "a.html", page % "")) == "# Ferries & more\n\nDeparts 9:15"
    assert text_of(write(tmp_path / "b.html", page % "<h1>Times</h1>")) == "# Times\n\nDeparts 9:15"
