"""The completion scripts, by the shells themselves; and `nectar doctor`."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nectar_mlx import __main__, cli, completion, doctor


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder, commands = tmp_path_factory.mktemp("completion"), list(completion.commands())
    for shell, write in completion._SCRIPTS.items():
        (folder / f"nectar.{shell}").write_text(write(commands) + "\n")
    (folder / "book.nectar").touch()
    return folder


def test_every_command_and_option_is_there(scripts):
    for path in scripts.glob("nectar.*"):
        text = path.read_text()
        assert all(name in text for name in __main__.COMMANDS), path
    assert "--max-tokens" in (scripts / "nectar.zsh").read_text()
    assert "-l max-tokens" in (scripts / "nectar.fish").read_text()


CASES = [
    ("nectar ev", ["evaluate"]),
    ("nectar ask --max", ["--max-tokens"]),
    ("nectar bench sel", ["selftest"]),
    ("nectar ask bo", ["book.nectar"]),
    ("nectar ask --kv-bits ", ["4", "8"]),
    ("nectar completion f", ["fish"]),
]


def shell(name: str, code: str, folder) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    start = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    done = subprocess.run([name, *start, "-c", code], capture_output=True, text=True, cwd=folder, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.process
@pytest.mark.parametrize("line, expected", CASES)
def test_bash(scripts, line, expected):
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"source nectar.bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _nectar; "
    assert sorted(shell("bash", code + 'printf "%s\\n" "${COMPREPLY[@]}"', scripts)) == expected


@pytest.mark.process
@pytest.mark.parametrize("line, expected", CASES)
def test_fish(scripts, line, expected):
    found = shell("fish", f"source nectar.fish; complete -C '{line}'", scripts)
    assert sorted(candidate.split("\t")[0] for candidate in found) == expected


ZSH = """
zmodload zsh/zpty
zpty it zsh -f -i
zpty -w it "PS1=; cd {folder}; autoload -Uz compinit; compinit -u -D; source ./nectar.zsh"
zpty -w it "zstyle ':completion:*' list-prompt ''; bindkey '^I' expand-or-complete; LISTMAX=1000; echo rea''dy"
zpty -m -r it whole '*ready*'
zpty -w -n it $'{line}\\t'
sleep 1
zpty -w -n it $'\\C-e\\C-u'
while zpty -r -t it some; do print -rn -- "$some"; sleep 0.1; done
"""


@pytest.mark.process
@pytest.mark.parametrize("line, expected", [case for case in CASES if len(case[1]) == 1])
def test_zsh(scripts, line, expected):
    shown = "\n".join(shell("zsh", ZSH.format(folder=scripts, line=line), scripts))
    common = line.split(" ")[-1]
    assert expected[0].removeprefix(common) in shown, shown


def test_a_shell_that_is_not_known(capsys):
    assert completion.main(["tcsh"]) == cli.FAULT
    assert capsys.readouterr().err.count("\n") == 1


def test_nectar_alone_explains_itself_in_ten_lines(capsys):
    assert __main__.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and max(map(len, lines)) < 80
    assert __main__.main(["aks"]) == cli.FAULT
    assert capsys.readouterr().err == "nectar: there is no command 'aks'; did you mean ask?\n"


@pytest.mark.parametrize("place", [(importlib, "import_module"), (doctor, "_work")])
def test_an_installation_without_what_computes_is_one_line(place, monkeypatch, capsys):
    def without(*_):
        raise ImportError(told)

    told = "libmlx.so: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(*place, without)
    assert __main__.main(["doctor"]) == cli.FAULT
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install '.[cpu]' in the clone" in err
    told = "no module named anything"
    with pytest.raises(ImportError, match="anything"):
        __main__.main(["doctor"])


@pytest.mark.process
@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_a_module_of_a_command_says_it_as_the_command_does(command, tmp_path):
    """Their modules import MLX, which is before their `main`."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"}

    def run(told):
        (tmp_path / "mlx/core.py").write_text(f"raise ImportError({told!r})")
        arguments = [sys.executable, "-m", f"nectar_mlx.{command}", "--help"]
        return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)

    done = run("libmlx.so: cannot open shared object file: No such file or directory")
    line = f"nectar {command}: MLX has nothing to compute with: pip install '.[cpu]' in the clone of nectar_mlx"
    assert done.returncode == cli.FAULT and done.stderr.count("\n") == 1 and done.stderr.startswith(line)
    assert "Traceback" in run("no module named anything").stderr


def test_the_doctor_tells_what_is_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NECTAR_CONFIG", str(tmp_path / "config.toml"))
    assert doctor.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["mlx"] and facts["machine"]["memory_bytes"] > facts["machine"]["free_memory_bytes"] > 0
    assert facts["kernels"]["backend"] in ("ops", "metal", "cuda") and facts["settings"]["exists"] is False
    assert set(facts["extras"]) == {"JSON and forced function calls", "charts", "text recognition"}
    (tmp_path / "config.toml").write_text("budget = 2")
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(doctor.blas, "loaded", None)
    monkeypatch.setattr(doctor.blas, "is_installed", lambda name: name == "mlx-cpu")
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr("nectar_mlx.installed.installed", list)
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "charts: yes" in out or "charts: not installed: pip install '.[plot]' in the clone" in " ".join(out.split())
    assert "! No optimised BLAS" in out and "pip install '.[cpu]' in the clone" in " ".join(out.split())
    assert "! No model" in out and "budget must be a text" in out
    monkeypatch.setattr(doctor.blas, "is_installed", lambda name: True)
    assert doctor.main([]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "/empty and the folder for temporary files cannot take its 25 MB" in out
