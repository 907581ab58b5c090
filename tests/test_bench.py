"""The commands of `bench` on a toy shape, and the arithmetic of the roofline."""

import json

import mlx.core as mx
import pytest

from nectar_mlx import bench, kernels, measure, roofline

TOY = ["decode", "--shape", "toy", "--contexts", "1k,2k"]


def test_decode_reports_every_method_at_every_context(capsys):
    assert bench.main([*TOY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["context"], row["method"]) for row in result["rows"]] == [
        (context, method) for context in (1024, 2048) for method in measure.KEEPERS
    ]
    assert all(row["step_ms"] > 0 and row["bytes"] > row["attention_bytes"] > 0 for row in result["rows"])


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
    assert len(lines) == 2 + 2 + 2


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*TOY, "--methods", "magic"], "--methods magic: choose from"),
        (["decode", "--shape", "toy", "--contexts", "1k,many"], "--contexts 1k,many"),
        (["decode", "--shape", "toy", "--contexts", "0"], "--contexts 0"),
        ([*TOY, "--live", "0"], "--live"),
        ([*TOY, "--batch", "-1"], "--batch"),
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
    """With a kernel that answers zeros, every check is red and the command fails."""
    monkeypatch.setattr(kernels, "backend", lambda: "metal")
    monkeypatch.setattr(bench, "_cases", lambda: bench_cases()[:3])
    monkeypatch.setattr(kernels, "decode", lambda packed, queries, *_, **__: mx.zeros_like(queries))
    monkeypatch.setitem(measure.SHAPES, "qwen3-1.7b", measure.SHAPES["toy"])
    assert bench.main(["selftest"]) == 2
    out = capsys.readouterr().out
    assert "0 of 3 kernels right" in out
    assert "| quadrature | 64 |" in out


bench_cases = bench._cases


def test_roofline_by_hand():
    shape = measure.SHAPES["qwen3-1.7b"]
    reads = roofline.step_bytes(shape, 8192, live=0, nodes=100)
    assert reads["full"] == 28 * 8 * 8192 * 128 * 2 * 2
    assert reads["ours"] == 28 * 8 * 100 * (128 * 2 * 2 + 4)
    assert reads["ours, int8"] == 28 * 8 * 100 * ((128 + 4 * 2) * 2 + 4)
    line = next(line for line in roofline.table(shape).splitlines() if line.startswith("| M2 |"))
    assert float(line.split("|")[3]) == pytest.approx(shape.cache_bytes(8192 + 64) / 100e9 * 1e3, abs=0.01)
