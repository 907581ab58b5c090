"""The page: whole, self-contained, safe with hostile text, and drawn by a real browser where there is one."""

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nectar_mlx import NectarError
from nectar_mlx.evaluation import charts, report

FIGURES = {"tokens": 400, "accuracy_gap": 0.01, "accuracy_gap_interval": [0.0, 0.02]}


def method(name, nbytes, kl, file="book.nectar", error=0.1, seconds=1.5):
    figures = {
        **FIGURES,
        "kl": kl,
        "kl_interval": [0.8 * kl, 1.2 * kl],
        "agree": 0.9,
        "agree_interval": [0.88, 0.92],
        "gap_closed": 1 - kl / 0.3,
        "gap_closed_interval": [0.9 - kl, 1 - kl],
    }
    kinds = {"on-context": figures, "off-context": {**figures, "kl": kl / 2}}
    return {
        "method": name, "file": file, "bytes": nbytes, **figures, "kinds": kinds, "error": error, "seconds": seconds,
        "detail": "64 keys a head",
    }  # fmt: skip


def make(**changes):
    result = {
        "files": {"book.nectar": {"bytes": 480_000, "source": "book.txt", "layout": {"kind": "quadrature", "bits": 8},
                                  "config": {"budget": 0.02, "seed": 0}, "nectar_mlx": "0.1.0",
                                  "report": {"sizes": [[3], [9], [27], [81], [5], [6]], "seconds": {"read": 1.0},
                                             "queries": 900}}},
        "model": "SmolLM2-135M-Instruct", "context_tokens": 6030, "cache_bytes": 138_931_200,
        "geometry": {"n_kv_heads": 3},
        "questions": [{"question": "Who?", "kind": "on-context", "tokens": 30}] * 4,
        "methods": [method("nectar", 480_000, 0.01), method("nectar", 120_000, 0.03, "small.nectar"),
                    method("no context", 0, 0.3, error=None), method("sinks + window", 470_000, 0.1),
                    method("Attention Matching", 479_000, 0.02), method("8-bit KV cache", 73_800_000, 1e-5)],
        "heads": [0.1, 0.02, 0.3, 0.004, 0.05, 0.0], "correlation": {"error, accuracy gap": 0.8, "error, KL": None},
        "answers": {"by": "all-MiniLM-L6-v2", "answers": 4, "again": 0.8, "questions": 4,
                    "again_interval": [0.7, 0.9], "nothing": 0.4, "nothing_interval": [0.3, 0.5],
                    "files": {"book.nectar": {"similarity": 0.81, "similarity_interval": [0.7, 0.9]},
                              "small.nectar": {"similarity": 0.79, "similarity_interval": [0.7, 0.9]}}},
        "examples": [{"question": "Who is <Filby>?", "full": "A man with red hair.", "again": "He argues.",
                      "files": {"book.nectar": "A red-haired man & guest."}, "nothing": "I do not know."}],
        "facts": [{"method": "full cache", "found": 0.5, "found_interval": [0, 1],
                   "right": [[0.2, True], [None, False]]}],
        "seconds": {"read": 2.0, "answer": 9.0}, "peak_bytes": 900_000_000,
    }  # fmt: skip
    return {**result, **changes}


class Outline(HTMLParser):
    """Every tag and attribute; unclosed paragraphs and cells are HTML's own business."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.values = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [f"{k}={v}" for k, v in attrs]


def test_the_page_is_whole_and_self_contained():
    page = report.page(make())
    outline = Outline(page)
    assert outline.tags.count("svg") >= 4 and outline.tags.count("article") == 1
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert not re.search(r"https?://|url\(|@import|\$", page)
    assert "96.7%" in page and "480 KB" in page and "prefers-color-scheme: dark" in page and "@media print" in page


def test_text_cannot_become_markup():
    hostile = "<script>alert(1)</script>"
    told = dict.fromkeys(("question", "full", "again", "nothing"), hostile)
    result = make(examples=[{**told, "files": {hostile: hostile}}])
    result["methods"][3]["detail"] = hostile
    result["files"]["book.nectar"]["source"] = hostile
    assert "script" not in Outline(report.page(result)).tags


@pytest.mark.parametrize(
    "changes",
    [
        {"examples": [], "answers": {}, "facts": []},
        {"heads": [], "correlation": {"error, accuracy gap": None}},
        {"methods": [method("nectar", 480_000, 0.01), method("no context", 0, 0.3, error=None)]},
        {"methods": [method("nectar", 480_000, 0.0, error=0.0), method("no context", 0, 0.0, error=None)]},
    ],
    ids=["no answers", "no heads", "no baselines", "exact"],
)
def test_what_is_missing_is_left_out(changes):
    assert report.page(make(**changes)).rstrip().endswith("</html>")


def test_the_table_is_grouped_by_the_sizes_of_the_files():
    page = report.page(make())
    expected = (
        "At most 120 KB",
        ">small.nectar <",
        "At most 480 KB",
        ">book.nectar <",
        "Other sizes",
        ">8-bit KV cache <",
    )
    places = [page.index(text) for text in expected]
    assert places == sorted(places)
    one = make(methods=[method("nectar", 480_000, 0.01), method("no context", 0, 0.3, error=None)])
    assert "At most" not in report.page(one)


def test_files_of_several_kinds_are_told_by_their_names():
    methods = [
        method("nectar, quadrature", 480_000, 0.01),
        method("nectar, mlp", 479_000, 0.02, "deep.nectar"),
        method("no context", 0, 0.3, error=None),
        method("nectar, quadrature, 1.0% read", 490_000, 0.005),
    ]
    files = make()["files"]
    page = report.page(make(methods=methods, files=files | {"deep.nectar": {"layout": {"kind": "mlp"}}}))
    assert ">deep.nectar <" in page and ">book.nectar, 1.0% read <" in page
    drawing = charts.curve(methods, 138_931_200)
    assert drawing.count("class=own") == 3 and drawing.count("label-own") == 3 and "--accent" in drawing


def test_the_curve_has_a_mark_a_method_and_size():
    drawing = charts.curve(make()["methods"], 138_931_200)
    assert drawing.count("<circle") == 5 and drawing.count("no context") == 1
    for value in re.findall(r'c[xy]="([\d.-]+)"', drawing):
        assert 0 <= float(value) <= 944


TIMED = [
    method("nectar, quadrature", 480_000, 0.01, "long.nectar", seconds=31.0),
    method("nectar, quadrature", 120_000, 0.03, "small.nectar", seconds=29.0),
    method("nectar, quadrature", 479_000, 0.02, "quick.nectar", seconds=9.0),
    method("nectar, mlp", 470_000, 0.05, "networks.nectar", seconds=60.0),
    method("no context", 0, 0.3, error=None),
    method("Attention Matching", 479_000, 0.04),
    method("sinks + window", 479_000, 0.1),
]


def test_time_is_drawn_for_files_of_the_first_ones_size():
    drawing = charts.times(TIMED)
    for name in ("long", "quick", "networks"):
        assert f">{name}</text>" in drawing
    assert ">small</text>" not in drawing and drawing.count("<circle") == 3
    assert "Attention Matching 0.040" in drawing and "sinks" not in drawing, "beside the closest baseline"
    files = {f"{name}.nectar": make()["files"]["book.nectar"] for name in ("long", "small", "quick", "networks")}
    assert "Fidelity against time" in report.page(make(methods=TIMED, files=files))
    assert charts.times(make()["methods"]) == "" and "against time" not in report.page(make())


def test_of_files_of_one_size_the_line_goes_through_the_closest():
    line = charts.lowest(sorted(TIMED[:3], key=lambda m: m["bytes"]), "bytes")
    assert [m["file"] for m in line] == ["small.nectar", "long.nectar"]


def test_labels_do_not_overlap():
    methods = [method(f"method {i}", 1000 + i, 0.1) for i in range(14)]
    drawing = charts.curve(methods, 100_000)
    heights = sorted(float(y) for y in re.findall(r'class=label x="[\d.]+" y="([\d.]+)"', drawing))
    assert len(heights) == 14 and all(b - a > 15 for a, b in itertools.pairwise(heights))


def test_an_axis_spans_its_values():
    axis = charts.Axis.around([10, 1000], 0, 300)
    assert 0 < axis(10) < axis(100) < axis(1000) < 300 and axis(100) == pytest.approx(150)
    assert axis.ticks()[0] >= axis.low and axis.ticks()[-1] <= axis.high


def test_sizes_for_a_person():
    sizes = [charts.size(n) for n in (12, 4_800, 480_000, 138_931_200, 2.5e9)]
    assert sizes == ["12 B", "4.8 KB", "480 KB", "139 MB", "2.5 GB"]


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(NectarError, match="cannot write"):
        report.write(make(), tmp_path / "no" / "page.html")


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    widths = []
    for result in (make(), make(methods=TIMED)):
        report.plot(result, tmp_path / "plot.png")
        picture = (tmp_path / "plot.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        widths.append(int.from_bytes(picture[16:20]))
    assert widths[1] > 1.5 * widths[0], "time gets a panel of its own"


def test_the_plot_tells_bytes_though_all_marks_are_at_one_place(tmp_path):
    pytest.importorskip("matplotlib")
    alike = make(methods=[method("nectar", 487_748, 0.03), method("BM25 passages", 477_360, 1.0)])
    report.plot({**alike, "cache_bytes": 8_363_520}, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {size} -->" in drawn for size in ("500 KB", "1 MB", "5 MB"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1100, 480])
def test_a_browser_lays_it_out_inside_the_window(tmp_path, width):
    # A probe, for this test alone, writes what the browser measured into the page.
    probe = """<script>addEventListener("load", () => {
        const wide = [...document.querySelectorAll("body *")].filter(
            e => !e.closest(".wide") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1);
        const marks = [...document.querySelectorAll("circle")].filter(e => e.getBoundingClientRect().width > 3);
        document.body.innerHTML = JSON.stringify({wide: wide.map(e => e.className || e.tagName), marks: marks.length,
            page: document.documentElement.scrollWidth, window: innerWidth});
    });</script>"""
    path = tmp_path / "page.html"
    path.write_text(report.page(make()) + probe)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    measured = json.loads(re.search(r"<body>(\{.*?\})</body>", done.stdout, re.S).group(1))
    assert measured["wide"] == [] and measured["page"] <= measured["window"]
    assert measured["marks"] >= 10


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_it(tmp_path):
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    report.write(make(), path)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1600"]
    subprocess.run([*command, f"--screenshot={shot}", Path(path).as_uri()], capture_output=True, timeout=120)
    assert shot.stat().st_size > 40_000, "a blank page is far smaller"


def test_files_that_do_not_say_how_long_they_took():
    files = {f"{name}.nectar": make()["files"]["book.nectar"] for name in ("long", "small", "quick", "networks")}
    known = report.page(make(methods=TIMED, files=files))
    unknown = report.page(make(methods=[{**m, "seconds": 0.0} for m in TIMED], files=files))
    for text in ("against time", "<td>31.0</td>", ", 31 s,"):
        assert text in known and text not in unknown
    assert "<td>0.0</td>" not in unknown and ", 0 s" not in unknown
