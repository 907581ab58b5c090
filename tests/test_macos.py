"""The files for a Mac, with stand-ins for its programs: no Mac has run them."""

import json
import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nectar_mlx import NectarError, agent, ask, serve
from nectar_mlx.core.folders import cache_folder
from tests import toys

FOLDER = Path(__file__).parent.parent / "examples" / "macos"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
WORKFLOW = FOLDER / "Ask Nectar.workflow" / "Contents"
QUESTION = "who is the \"fox\"? $(touch hacked) `touch hacked` 'x' -n"
OSASCRIPT = """#!{python}
import json, sys
shown = sys.argv[sys.argv.index("end run") + 1:]
with open("{shown}", "a") as file:
    file.write(json.dumps(shown) + "\\n")
if len(shown) == 1 and shown[0].startswith("Ask about"):
    import os
    if os.path.exists("{shown}.cancel"):
        sys.exit(1)
    print({question!r})
"""


class Mac:
    """A home with `nectar` in ~/.local/bin, the scripts in place, and an osascript that writes down what it shows."""

    def __init__(self, home: Path):
        self.home, self.shown = home, home / "shown.jsonl"
        self.shown.touch()
        tools, programs = home / "tools", home / ".local" / "bin"
        self.scripts = home / "Library" / "Scripts" / "nectar"
        shutil.copytree(FOLDER, self.scripts)
        for folder in (tools, programs):
            folder.mkdir(parents=True)
        osascript = OSASCRIPT.format(python=sys.executable, shown=self.shown, question=QUESTION)
        self.write(tools / "osascript", osascript)
        # A new home's cache has no BLAS, and making it ready takes longer than an answer.
        self.nectar(f'export NECTAR_CACHE="{cache_folder()}"; exec "{sys.executable}" -m nectar_mlx "$@"')

    def nectar(self, line: str) -> None:
        self.write(self.home / ".local" / "bin" / "nectar", f"#!/bin/sh\n{line}\n")

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *command: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """A command as Automator and launchd run it: next to nothing in the environment."""
        env = {"HOME": str(self.home), "PATH": f"{self.home}/tools:/usr/bin:/bin", **environment}
        return subprocess.run(
            ["env", "-i", *(f"{k}={v}" for k, v in env.items()), *command],
            cwd=self.home,
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def dialogs(self) -> list[list[str]]:
        return [json.loads(line) for line in self.shown.read_text().splitlines()]


@pytest.fixture
def mac(tmp_path):
    return Mac(tmp_path)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return toys.book(tmp_path_factory.mktemp("book"), max_position_embeddings=256)  # which ends an answer


def answer(book, capsys) -> str:
    assert ask.main([str(book.path), QUESTION, "--quiet"]) == 0
    return capsys.readouterr().out


@pytest.mark.process
def test_the_answer_alone_goes_to_stdout(mac, book, capsys):
    expected = answer(book, capsys)
    script = str(mac.scripts / "ask.sh")
    of_arguments = mac.run(script, *QUESTION.split(" "), NECTAR_FILE=str(book.path))
    of_stdin = mac.run(script, text=QUESTION, NECTAR_FILE=str(book.path))
    for done in (of_arguments, of_stdin):
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    assert not (mac.home / "hacked").exists()


@pytest.mark.process
def test_a_dialog_asks_and_another_answers(mac, book, capsys):
    done = mac.run(str(mac.scripts / "ask-dialog.sh"), str(book.path))
    assert done.returncode == 0, done.stderr
    assert mac.dialogs == [["Ask about book"], ["book", answer(book, capsys).strip("\n")]]
    assert not (mac.home / "hacked").exists()


@pytest.mark.process
def test_a_cancelled_dialog_asks_nothing(mac):
    (mac.home / "shown.jsonl.cancel").touch()
    done = mac.run(str(mac.scripts / "ask-dialog.sh"), "missing.nectar")
    assert done.returncode == 0 and mac.dialogs == [["Ask about missing"]]


@pytest.mark.process
def test_what_is_wrong_is_shown_in_its_last_line(mac):
    mac.nectar('echo notice >&2; echo "nectar ask: $3: no such file" >&2; exit 2')
    mac.run(str(mac.scripts / "ask-dialog.sh"), "missing.nectar")
    assert mac.dialogs[1] == ["missing", "No answer: nectar ask: missing.nectar: no such file"]


@pytest.mark.process
def test_without_nectar_a_line_says_where_it_was_looked_for(mac):
    (mac.home / ".local" / "bin" / "nectar").unlink()
    done = mac.run(str(mac.scripts / "ask.sh"), "who")
    assert done.returncode == 127 and done.stdout == "" and "~/.local/bin" in done.stderr


@pytest.mark.process
@pytest.mark.parametrize(
    "place", [".local/share/uv/tools/nectar-mlx/bin", "Library/Application Support/pipx/venvs/nectar-mlx/bin"]
)
def test_it_is_found_in_usual_places(mac, place):
    (mac.home / ".local" / "bin" / "nectar").unlink()
    (mac.home / place).mkdir(parents=True)
    mac.write(mac.home / place / "nectar", '#!/bin/sh\necho "found $1"\n')
    assert mac.run(str(mac.scripts / "nectar.sh"), "it").stdout == "found it\n"


@pytest.mark.process
def test_the_quick_action_shows_the_answer_to_the_selected_text(mac, book, capsys):
    action = plistlib.loads((WORKFLOW / "document.wflow").read_bytes())["actions"][0]["action"]
    parameters = action["ActionParameters"]
    assert parameters["shell"] == "/bin/sh" and parameters["inputMethod"] == 0  # the text is on stdin
    done = mac.run("/bin/sh", "-c", parameters["COMMAND_STRING"], text=QUESTION, NECTAR_FILE=str(book.path))
    assert done.returncode == 0, done.stderr
    assert mac.dialogs == [[answer(book, capsys).strip("\n")]]
    mac.run("/bin/sh", "-c", parameters["COMMAND_STRING"], text=QUESTION, NECTAR_FILE="/missing.nectar")
    assert mac.dialogs[1] == ["No answer: nectar ask: /missing.nectar: no such file"]


def test_the_quick_action_is_offered_for_text():
    (service,) = plistlib.loads((WORKFLOW / "Info.plist").read_bytes())["NSServices"]
    assert service["NSMessage"] == "runWorkflowAsService" and service["NSSendTypes"] == ["public.utf8-plain-text"]


@pytest.mark.process
@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the JavaScript")
def test_the_javascript_asks_about_the_selection(mac, tmp_path):
    harness = tmp_path / "harness.js"
    harness.write_text(
        (FOLDER / "ask-selection.js").read_text().split("\n", 1)[1]
        + """
const shown = [];
let clipboard = "old";
const app = {
    theClipboard: () => clipboard,
    displayDialog: (text) => (shown.push(text), { textReturned: "what's this?" }),
    doShellScript: (line) =>
        require("child_process").execFileSync("/bin/sh", ["-c", line.replace(/\\|.*/, "")]).toString(),
};
globalThis.delay = () => {};
globalThis.Application = () => ({ keystroke: () => { clipboard = "it's $(touch hacked)"; } });
Application.currentApplication = () => app;
run();
console.log(JSON.stringify(shown));
"""
    )
    done = subprocess.run(["node", str(harness)], capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout) == ["Ask about the selection", "what's this?\n\nit's $(touch hacked)"], done.stderr
    assert not (tmp_path / "hacked").exists()


@pytest.mark.process
@pytest.mark.parametrize("state, first", [("exit 0", "🍯"), ("exit 7", "🍯 off")])
def test_the_menu_bar_tells_whether_the_server_runs(mac, state, first):
    mac.write(mac.home / "tools" / "curl", f"#!/bin/sh\n{state}\n")
    lines = mac.run(str(mac.scripts / "nectar.10s.sh")).stdout.splitlines()
    assert lines[:2] == [first, "---"] and lines[-1].startswith("Ask | ")


@pytest.mark.process
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.process
@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_the_zsh_function_takes_a_question_mark(mac):
    mac.nectar('printf "%s\\n" "$@"')
    script = f"setopt aliases; source {mac.scripts}/nectar.zsh\nask Who is -x Filby?"
    (mac.home / "run.zsh").write_text(script)
    done = mac.run("zsh", "-f", "run.zsh", PATH=f"{mac.home}/.local/bin:/usr/bin:/bin")
    assert done.stdout.split("\n")[3:] == ["--", "Who", "is", "-x", "Filby?", ""], done.stderr


@pytest.mark.process
@pytest.mark.skipif(shutil.which("swiftc") is None, reason="there is no Swift here")
def test_the_swift_example_compiles(tmp_path):
    source = FOLDER.parent / "swift" / "Ask.swift"
    command = ["swiftc", "-parse-as-library", str(source), "-o", str(tmp_path / "Ask")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_the_readme_names_every_file():
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.iterdir():
        assert path.name == "README.md" or path.name in text
    assert (FOLDER.parent / "swift" / "Ask.swift").exists()


@pytest.fixture
def launchd(monkeypatch, tmp_path):
    """A Mac's launchctl that writes down its calls; its exit code is the list's first entry."""
    calls, code = [], [0]

    def run(command, **options):
        calls.append(command[1:])
        return subprocess.CompletedProcess(command, code[0], "", "Bootstrap failed: 5" if code[0] else "")

    monkeypatch.setattr(agent.sys, "platform", "darwin")
    monkeypatch.setattr(agent.subprocess, "run", run)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NECTAR_API_KEY", "secret")
    return calls, code


def test_the_agent_is_written_loaded_and_removed(launchd, book, tmp_path, monkeypatch, capsys):
    calls, _ = launchd
    arguments = [str(book.path), "--port", "8099", "--install-agent"]
    monkeypatch.setattr(sys, "argv", ["nectar", "serve", *arguments])
    assert serve.main(arguments) == 0
    path = tmp_path / "Library" / "LaunchAgents" / "org.nectar-mlx.serve.plist"
    told = plistlib.loads(path.read_bytes())
    command = [sys.executable, "-m", "nectar_mlx", "serve", str(book.path), "--port", "8099"]
    assert told["ProgramArguments"] == command and told["WorkingDirectory"] == os.getcwd()
    assert told["EnvironmentVariables"]["NECTAR_API_KEY"] == "secret" and path.stat().st_mode & 0o777 == 0o600
    assert [call[0] for call in calls] == ["bootout", "bootstrap"] and calls[1][2] == str(path)
    assert serve.main(["--remove-agent"]) == 0
    assert not path.exists() and calls[-1][0] == "bootout"
    assert "secret" not in capsys.readouterr().err


def test_an_agent_that_could_not_run_is_refused(launchd, book, tmp_path, monkeypatch):
    calls, code = launchd
    with pytest.raises(NectarError, match="no such file"):
        agent.install([str(tmp_path / "missing.nectar")], log=print, arguments=[])
    assert calls == []
    code[0] = 5
    with pytest.raises(NectarError, match="bootstrap failed: Bootstrap failed: 5"):
        agent.install([str(book.path)], log=print, arguments=[])
    monkeypatch.setattr(agent.sys, "platform", "linux")
    with pytest.raises(NectarError, match="on a Mac"):
        agent.remove(log=print)
