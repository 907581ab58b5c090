"""The BLAS for MLX on Linux: chosen before mlx.core is imported, correct, and faster than MLX's own."""

import json
import os
import subprocess
import sys

import pytest

from nectar_mlx.core import blas

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not blas.is_installed("mlx-cpu"),
    reason="only MLX's Linux CPU build has a BLAS to replace",
)

MULTIPLY = """
import json, sys, time, warnings
warnings.simplefilter("error" if sys.argv[1] == "strict" else "ignore")
import nectar_mlx
import mlx.core as mx, numpy as np

def check(left, right):
    a, b = mx.random.normal(left), mx.random.normal(right)
    mx.eval(a, b)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        product = a @ b
        mx.eval(product)
        seconds.append(time.process_time() - start)
    exact = np.array(a, np.float64) @ np.array(b, np.float64)
    return {"seconds": min(seconds), "error": float(np.abs(np.array(product) - exact).max() / np.abs(exact).max())}

x = mx.random.normal((50, 30))
u, s, v = mx.linalg.svd(x, stream=mx.cpu)
print(json.dumps({
    "batched": check((30, 512, 64), (30, 64, 256)),
    "single": check((1024, 576), (576, 768)),
    "odd": check((3, 1, 37, 65), (3, 2, 65, 129)),
    "svd": float(mx.abs((u[:, :30] * s) @ v - x).max()),
}))
"""


def run(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.process
def test_replaces_the_reference_blas_and_stays_correct() -> None:
    # One thread and processor time, so that whatever else the machine computes does not count.
    fast, slow = (run(MULTIPLY, "strict", OPENBLAS_NUM_THREADS="1", **off) for off in ({}, {"NECTAR_BLAS": "off"}))
    assert fast.returncode == slow.returncode == 0, fast.stderr + slow.stderr
    fast_result, slow_result = json.loads(fast.stdout), json.loads(slow.stdout)
    for result in (fast_result, slow_result):
        assert max(result[case]["error"] for case in ("batched", "single", "odd")) < 3e-6
        assert result["svd"] < 1e-4
    assert slow_result["batched"]["seconds"] > 4 * fast_result["batched"]["seconds"]
    assert slow_result["single"]["seconds"] > 8 * fast_result["single"]["seconds"]


@pytest.mark.process
def test_the_packaged_library_comes_first_and_is_kept(tmp_path) -> None:
    code = "import sys, nectar_mlx.core.blas as b; print(next(b.candidates()), 'lief' in sys.modules)"
    first, second = (run(code, NECTAR_CACHE=str(tmp_path), NECTAR_BLAS="off").stdout.split() for _ in range(2))
    assert first[0] == second[0]
    assert first[0].startswith(str(tmp_path)) and first[0].endswith("libopenblas.so")
    assert (first[1], second[1]) == ("True", "False")
    assert blas.works(first[0])


@pytest.mark.process
def test_a_library_that_computes_wrong_is_refused(tmp_path) -> None:
    source, library = tmp_path / "wrong.c", tmp_path / "libwrong.so"
    source.write_text("void cblas_sgemm(void) {}\n")
    compiler = next((name for name in ("cc", "gcc", "clang", "clang-19") if _runs(name)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert not blas.works(str(library))
    done = run(
        "import nectar_mlx, mlx.core as mx; print((mx.ones((2, 2)) @ mx.ones((2, 2))).sum().item())",
        NECTAR_BLAS=str(library),
    )
    assert done.stdout.strip() == "8.0"
    assert "computes wrong results" in done.stderr


def _runs(program: str) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.process
@pytest.mark.parametrize("library", ["/nonexistent/libblas.so", __file__])
def test_a_named_library_that_cannot_be_loaded_is_told(library: str) -> None:
    done = run("import nectar_mlx, mlx.core", NECTAR_BLAS=library)
    assert done.returncode == 0
    assert f"NECTAR_BLAS={library} cannot be loaded" in done.stderr


@pytest.mark.process
def test_a_named_library_is_taken() -> None:
    packaged = next(blas.candidates())
    done = run("import nectar_mlx.core.blas as b, mlx.core; print(b.loaded)", NECTAR_BLAS=packaged)
    assert done.stdout.strip() == packaged
    assert not done.stderr


@pytest.mark.process
def test_warns_when_mlx_came_first() -> None:
    done = run("import mlx.core\nimport nectar_mlx")
    assert "import nectar_mlx before mlx" in done.stderr
    assert "<string>:2" in done.stderr


def test_leaves_other_systems_and_builds_alone(monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a library was loaded")

    monkeypatch.delenv("NECTAR_BLAS", raising=False)
    monkeypatch.setattr(blas.ctypes, "CDLL", refuse)
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    assert blas.use_fast_blas() is None
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.setattr(blas, "is_installed", lambda distribution: False)
    assert blas.use_fast_blas() is None


@pytest.mark.process
def test_a_cache_that_takes_nothing_leaves_a_copy_for_the_process(tmp_path) -> None:
    blocked, temporary = tmp_path / "file", tmp_path / "temporary"
    blocked.write_text("")
    temporary.mkdir()
    code = "import nectar_mlx, mlx.core, nectar_mlx.core.blas as b; print(b.loaded)"
    done = run(code, NECTAR_CACHE=str(blocked / "cache"), TMPDIR=str(temporary))
    assert done.stdout.startswith(str(temporary)) and not done.stderr
    assert not list(temporary.iterdir())  # gone with its process


@pytest.mark.process
def test_a_full_disk_keeps_no_part_of_the_library(tmp_path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))\n"  # of 25 MB
        "import nectar_mlx.core.blas as b; print(b.unprefixed_openblas())"
    )
    done = run(code, NECTAR_CACHE=str(tmp_path), NECTAR_BLAS="off")
    assert done.stdout.strip() == "None", done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("running, cores, idle", [(1, 8, 8), (3, 8, 6), (9, 8, 1), (40, 8, 1), (1, 1, 1)])
def test_threads_are_the_idle_cores(monkeypatch, running, cores, idle) -> None:
    monkeypatch.setattr(blas.Path, "read_text", lambda self: f"9.00 8.00 7.00 {running}/500 1234\n")
    monkeypatch.setattr(blas.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(blas.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert blas.idle_cores() == idle
    monkeypatch.setattr(blas.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert blas.idle_cores() == min(idle, 2)


@pytest.mark.process
def test_threads_that_the_user_chose_are_left_alone() -> None:
    code = "import nectar_mlx.core.blas as b, mlx.core; print(b.threads)"
    assert run(code, OPENBLAS_NUM_THREADS="2").stdout.strip() == "None"
    free = {name: value for name, value in os.environ.items() if name not in blas._THREADS_CHOSEN}
    done = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) >= 1
