"""The commands of `bench` on a toy shape, and the arithmetic of the roofline."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from nectar_mlx import bench
from nectar_mlx.benchmarks import cache_variants, checks, measure, measure_decode, measure_fit, roofline, tune
from nectar_mlx.core.attention import Partial
from nectar_mlx.kernels import DecodeKernel
from nectar_mlx.sparse import kernel, sparse_attention

TOY = ["decode", "--shape", "toy", "--contexts", "1k,2k", "--rounds", "1"]


def test_decode_reports_every_method_at_every_context(capsys):
    assert bench.main([*TOY, "--json", "--rounds", "2"]) == 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2 * len(cache_variants.VARIANTS), "a method's figures are told after every round"
    result = json.loads(out)
    assert [(row["context"], row["method"]) for row in result["rows"]] == [
        (context, method) for context in (1024, 2048) for method in cache_variants.VARIANTS
    ]
    assert all(row["step_ms"] > 0 and row["bytes"] > row["attention_bytes"] > 0 for row in result["rows"])
    assert all(row["step_quartiles_ms"][0] <= row["step_ms"] <= row["step_quartiles_ms"][1] for row in result["rows"])
    assert [row["method"] for row in result["growth"]] == list(cache_variants.VARIANTS)


def test_decode_is_immune_to_a_host_that_changes(capsys, monkeypatch):
    """On a host that gets half as fast from round to round, a step takes as long behind any context; with the full
    cache twice as long behind twice the tokens."""
    calls = []

    def seconds(variant, repeats):
        tokens = variant.caches[0].offset - variant.live if isinstance(variant, cache_variants.Full) else 1024
        calls.append(repeats)
        return 2.0 ** ((len(calls) - 1) // 4) * tokens / 1024  # four cells a round

    monkeypatch.setattr(measure_decode, "works_of", lambda *_: {"queued_step": seconds})
    monkeypatch.setattr(measure_decode, "row_of", lambda cell, *_: {"seconds": cell.timings["queued_step"].seconds})
    assert bench.main([*TOY, "--json", "--methods", "full,fused", "--rounds", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    full, fused = result["growth"]
    assert (fused["method"], fused["from"], fused["to"], fused["queued_step"]) == ("fused", 1024, 2048, [0, 0, 0])
    assert full["queued_step"] == [1, 1, 1]
    assert max(result["rows"][1]["seconds"]) == 8 * min(result["rows"][1]["seconds"])


def test_decode_counts_the_bytes_that_are_read(capsys):
    assert bench.main([*TOY, "--json", "--attention-only", "--methods", "full,4-bit cache,fused", "--live", "10"]) == 0
    rows = {(r["context"], r["method"]): r for r in json.loads(capsys.readouterr().out)["rows"]}
    heads, row = 2 * 2, 64 * 4  # layers x KV heads; keys and values of one token
    assert rows[1024, "full"]["attention_bytes"] == heads * (1024 + 10) * row
    assert rows[1024, "4-bit cache"]["attention_bytes"] == heads * (1024 + 10) * row * 4.5 / 16
    nodes = sum(655 * (2 if k % 2 else 8) // 5 for k in range(2)) * 2
    fused = rows[1024, "fused"]["attention_bytes"]
    assert nodes * (row + 4) <= fused - heads * 10 * row <= 1.02 * nodes * (row + 4)
    assert fused == rows[2048, "fused"]["attention_bytes"]
    assert "step_ms" not in rows[1024, "full"]


def test_decode_as_a_table(capsys):
    assert bench.main([*TOY, "--methods", "full"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[2].startswith("| context | method |")
    assert len(lines) == 2 + 2 + 2 + 3 + 2 + 1
    assert lines[-1].startswith("| full | 1024 | 2048 | +")


def test_decode_leaves_out_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(measure, "memory", lambda: 1 << 20)
    assert bench.main([*TOY, "--attention-only", "--json", "--methods", "full,stock"]) == 0
    full, stock, *_ = json.loads(capsys.readouterr().out)["rows"]
    assert "attention_ms" not in full
    assert "attention_ms" in stock


def test_decode_plots(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench.main([*TOY, "--methods", "full", "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000


FIT = ["fit", "--shape", "toy", "--layers", "1", "--contexts", "200,300", "--queries", "300", "--steps", "3"]


def test_fit_reports_every_stage_at_every_context(capsys, monkeypatch):
    real = measure_fit.stages
    monkeypatch.setattr(measure_fit, "stages", lambda m, s, n, config: real(m, s, n, replace(config, **SHORT)))
    assert bench.main([*FIT, "--budget", "0.2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2 * len(measure_fit.STAGES), "a stage is reported as soon as it is over"
    result = json.loads(out)
    rows = result["rows"]
    assert [(row["context"], row["stage"]) for row in rows] == [(n, s) for n in (200, 300) for s in measure_fit.STAGES]
    for context in (200, 300):
        first = next(row for row in rows if row["context"] == context)
        assert all(row["prefills"] == row["seconds"] / first["seconds"] for row in rows if row["context"] == context)
        assert sum(row["share"] for row in rows if row["context"] == context) == pytest.approx(1)
    assert all(row["seconds"] > 0 for row in rows)
    assert all(
        row["peak_memory"] > measure.SHAPES["toy"].vocabulary * 128 * 2 for row in rows
    )  # the embedding at least
    assert (result["layers"], result["queries"], result["steps"]) == (1, 300, 3)


SHORT = {"conversations": 2, "answer_tokens": 4, "trial_steps": 2}


def test_fit_as_a_table_and_a_plot(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    stages = [{"stage": name, "seconds": 2.0, "peak_memory": 10**9} for name in measure_fit.STAGES]
    monkeypatch.setattr(measure_fit, "stages", lambda *_: stages)
    assert bench.main([*FIT, "--plot", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[4] == "| 200 | prefill | 2.00 | 1.0 | 20% | 1.00 |"
    assert len(lines) == 2 + 2 + 2 * len(measure_fit.STAGES)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_fit_leaves_out_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(measure, "memory", lambda: 1 << 10)
    assert bench.main(FIT) == 2
    assert "ask for fewer tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*TOY, "--methods", "magic"], "--methods magic: choose from"),
        (["decode", "--shape", "toy", "--contexts", "1k,many"], "--contexts 1k,many"),
        (["decode", "--shape", "toy", "--contexts", "0"], "--contexts 0"),
        ([*TOY, "--live", "0"], "--live"),
        ([*TOY, "--batch", "-1"], "--batch"),
        ([*TOY, "--rounds", "0"], "--rounds 0: at least 1"),
        ([*FIT, "--steps", "0"], "--steps 0: at least 1"),
        ([*FIT, "--budget", "3"], "budget of 3"),
        (["fly"], "invalid choice"),
    ],
)
def test_what_a_user_can_get_wrong(capsys, arguments, says):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1


def test_selftest_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setenv("NECTAR_KERNEL", "ops")
    assert bench.main(["selftest"]) == 2
    assert "use a Mac" in capsys.readouterr().err


def test_selftest_says_which_kernel_is_wrong(capsys, monkeypatch):
    """With a kernel that answers zeros, its checks are red and the command fails; with a right one they are green."""
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    decoding, sparse = checks.cases()[:3], checks.sparse_cases()[:3]
    monkeypatch.setattr(checks, "cases", lambda: decoding)
    monkeypatch.setattr(checks, "sparse_cases", lambda: sparse)
    monkeypatch.setattr(kernel, "attention", on_the_cpu)
    monkeypatch.setattr(DecodeKernel, "attend", lambda kernel, queries, *_, **__: mx.zeros_like(queries))
    monkeypatch.setitem(measure.SHAPES, "qwen3-1.7b", measure.SHAPES["toy"])
    assert bench.main(["selftest"]) == 2
    out = capsys.readouterr().out
    assert "3 of 6 kernels right" in out
    wrong, first_calls = out.split("Seconds of the first call")
    assert "| quadrature | 64 |" in wrong and "sparse" not in wrong
    lines = [line for line in first_calls.splitlines() if line.startswith(("| quadrature", "| sparse"))]
    counts = [len(line.split("|")[-2].split("/")) for line in lines]
    assert counts == [1, 1, 1, 2, 2, 2], "of sparse kernels: forwards / backwards"
    monkeypatch.setattr(kernel, "attention", lambda *given, **options: zeros(on_the_cpu(*given, **options)))
    assert bench.main(["selftest"]) == 2
    out = capsys.readouterr().out
    assert "0 of 6 kernels right" in out and "| sparse fixed | 64 |" in out.split("Seconds")[0]


def test_selftest_goes_on_when_a_text_does_not_compile(capsys, monkeypatch):
    decoding, sparse = checks.cases()[:2], checks.sparse_cases()[:1]
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    monkeypatch.setattr(checks, "cases", lambda: decoding)
    monkeypatch.setattr(checks, "sparse_cases", lambda: sparse)
    monkeypatch.setattr(measure, "timed", lambda *_, **__: 1.0)
    monkeypatch.setitem(measure.SHAPES, "qwen3-1.7b", measure.SHAPES["toy"])
    assert bench.main(["selftest"]) == 2
    wrong = capsys.readouterr().out.split("Seconds of the first call")[0]
    assert "0 of 3 kernels right, largest error inf" in wrong
    assert wrong.count("| inf | [metal_kernel]") == 3, "MLX has no Metal here, and says so"


def test_tune_sweeps_every_choice(capsys, monkeypatch):
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    monkeypatch.setattr(tune, "BLOCKS", (64, 96))
    monkeypatch.setattr(tune, "FLIGHTS", (2, 4))
    monkeypatch.setattr(tune, "NODES", 200)
    seen = []

    def decode(kernel, queries, *_, **__):
        if kernel.packed.form.tile == 1:
            return None
        seen.append(kernel.packed.form)
        return queries

    def timed(work, **_):
        before = len(seen)
        mx.eval(work())
        calls = len(seen) - before
        return calls / 1000 if calls else 1.0  # what else is timed is the bandwidth

    monkeypatch.setattr(DecodeKernel, "attend", decode)
    monkeypatch.setattr(measure, "timed", timed)
    assert bench.main(["selftest", "--tune", "--shape", "toy"]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith(("| float16", "| int8"))]
    assert len(lines) == len(err.splitlines()) == 2 * (1 + 2 * 2 * 2)
    assert lines[0] == "| float16 | 4 | 2 | 96 | 2.000 | * |", "the toy's two layers, at first as the library has it"
    assert err.count("does not work") == sum(line.endswith("| – |  |") for line in lines) == 8
    assert {(form.flight, form.tile, form.blocks) for form in seen} >= {(2, 2, 64), (4, 2, 64), (2, 2, 96), (4, 2, 96)}


def on_the_cpu(queries, keys, values, **options):
    """The same by plain operations, in the kernel's place."""
    return sparse_attention(*(x.astype(mx.float32) for x in (queries, keys, values)), **options)


def zeros(part):
    return Partial(*(x * 0 for x in part))


def test_roofline_by_hand():
    shape = measure.SHAPES["qwen3-1.7b"]
    reads, nodes = roofline.step_bytes(shape, 8192, live=0), roofline.nodes_of(shape, 8192)
    assert reads["full"] == 28 * 8 * 8192 * 128 * 2 * 2
    # 2% of 512 bytes a token, at 4.11 bits a number, 0.8 bytes of grids and 2 of bias.
    assert nodes == pytest.approx(0.02 * 8192 * 512 / (256 * 4.11 / 8 + 2.8), rel=0.01)
    assert reads["ours"] == 28 * 8 * nodes * ((128 + 4 * 2) * 2 + 4)
    line = next(line for line in roofline.table(shape).splitlines() if line.startswith("| M2 |"))
    assert float(line.split("|")[3]) == pytest.approx(shape.cache_bytes(8192 + 64) / 100e9 * 1e3, abs=0.01)
