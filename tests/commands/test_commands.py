"""The two command lines as a user meets them: help, examples, documentation, exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import demotools.cli

ROOT = Path(__file__).parents[2]


def command_lines() -> Iterator[tuple[str, click.Group]]:
    yield "demotools", demotools.cli.main
    try:
        import trainer.cli
    except ModuleNotFoundError:  # a Python without torch, see noxfile.py
        return
    yield "trainer", trainer.cli.main


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its whole name, groups included."""
    waiting: list[tuple[str, click.Command]] = list(command_lines())
    while waiting:
        name, command = waiting.pop(0)
        yield name, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for sub in command.list_commands(context):
                found = command.get_command(context, sub)
                assert found is not None
                waiting.append((f"{name} {sub}", found))


COMMANDS = dict(commands())


def help_text(name: str) -> str:
    """What `NAME --help` prints at 80 columns."""
    program, *path = name.split()
    group = dict(command_lines())[program]
    result = CliRunner().invoke(
        group, [*path, "--help"], prog_name=program, terminal_width=80, max_content_width=80
    )
    assert result.exit_code == 0, result.output
    return result.output


def commands_page() -> str:
    """docs/commands.md, made anew from the commands themselves."""
    parts = [
        "# All commands\n\nThe `--help` of every command, written by "
        "`python -m tests.commands.test_commands`.\n"
    ]
    parts += [f"## {name}\n\n```text\n{help_text(name)}```\n" for name in COMMANDS]
    return "\n".join(parts)


def test_the_page_of_commands_shows_the_real_help() -> None:
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    for name in COMMANDS:
        assert f"## {name}\n\n```text\n{help_text(name)}```\n" in page, (
            f"{name} has changed: run `python -m tests.commands.test_commands`"
        )


def examples(name: str) -> list[str]:
    block = re.search(r"\n\s+Examples?:\n((?:\s{4,}\S.*\n)+)", help_text(name))
    return [line.strip() for line in block[1].splitlines()] if block else []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_of_itself(name: str) -> None:
    lines = [line for line in examples(name) if not line.startswith("#")]
    assert any(line.startswith(name) for line in lines), f"{name} has no example"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_has_a_help_text_or_a_default(name: str) -> None:
    options = [p for p in COMMANDS[name].params if isinstance(p, click.Option)]
    assert all(option.help or option.show_default for option in options)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("demotools")])
def test_every_option_is_explained_in_a_sentence_and_every_word_means_one_thing(name: str) -> None:
    options = [p for p in COMMANDS[name].params if isinstance(p, click.Option)]
    for option in options:
        assert re.fullmatch(r"[A-Z].*\.", option.help or ""), f"{name}: {option.opts}"
        assert "[default" not in (option.help or ""), f"{name}: {option.opts}"
    words = {word: option.opts for option in options for word in option.opts}
    assert words.keys().isdisjoint({"--jobs", "--processes", "--force"})
    assert set(words.get("--yes", ["-y"])) >= {"-y"}
    assert set(words.get("--output", ["-o"])) >= {"-o"}


def test_the_help_of_trainer_cuts_no_summary() -> None:
    trainer = pytest.importorskip("trainer.cli")
    listed = CliRunner().invoke(trainer.main, ["--help"]).output.partition("Commands:")[2]
    assert len(listed.split("\n")) > 5 and "..." not in listed


def test_the_help_shows_every_command_of_demotools_in_a_group_and_cuts_no_summary() -> None:
    shown = help_text("demotools")
    assert "..." not in shown.partition("Options:")[2]
    titles = re.findall("^([A-Z].*):$", shown, re.MULTILINE)
    assert titles[1:] == ["Get data", "Shape it", "Look at it", "Share it"]
    names = [name.split()[1] for name in COMMANDS if re.fullmatch("demotools .+", name)]
    rows = re.findall(r"^  ([a-z]+)  +[A-Z].*", shown.partition("Get data:")[2], re.MULTILINE)
    assert sorted(rows) == sorted(names)


# What somebody types who has not read the help, and the line that it stands for.
GUESSES = {
    "filter GoToLocal --max-length 20": "select GoToLocal --max-len 20",
    "concat A B --dedup": "merge A B --dedupe",
    "split A --fraction 0.1": "split A --valid 0.1",
    "download GoToLocal --dry-run": "fetch GoToLocal --dry-run",
    "get GoToLocal --from a.pkl --force": "fetch GoToLocal --from a.pkl --overwrite",
    "record GoToLocal -n 100": "generate GoToLocal --episodes 100",
    "gen GoToLocal -n 100 -o mine": "generate GoToLocal --episodes 100 --name mine",
    "generate GoToLocal --num-episodes 9 --jobs 4": "generate GoToLocal --episodes 9 --workers 4",
    "generate GoToLocal --count 9 --processes 4": "generate GoToLocal --episodes 9 --workers 4",
    "convert a.pkl b.pkl -o both --replace": "convert a.pkl b.pkl --name both --overwrite",
    "sample GoToLocal -n 10": "shrink GoToLocal --episodes 10",
    "subset GoToLocal -n 10 -o few": "shrink GoToLocal --episodes 10 --name few",
    "zip GoToLocal --out a.zarr.zip": "archive GoToLocal --output a.zarr.zip",
    "unzip GoToLocal.zarr.zip": "unarchive GoToLocal.zarr.zip",
    "restore a.zarr.zip -o mine": "unarchive a.zarr.zip --name mine",
    "rm GoToLocal-small -y": "remove GoToLocal-small --yes",
    "delete GoToLocal-small -y": "remove GoToLocal-small --yes",
    "ls": "list",
    "inspect GoToLocal --json": "info GoToLocal --json",
    "view GoToLocal --episode 7": "show GoToLocal --episode 7",
    "check GoToLocal": "verify GoToLocal",
    "validate GoToLocal --replay -n 5": "verify GoToLocal --replay --episodes 5",
    "report GoToLocal --file page.html": "report GoToLocal --output page.html",
    "upload GoToLocal hf:me/demos": "push GoToLocal hf:me/demos",
    "convert a.pkl -m 2": "convert a.pkl --workers 2",
    "select GoToLocal --ended failed": "select GoToLocal --ended failure",
    "select GoToLocal --outcome solved,truncated": "select GoToLocal --ended success,truncation",
    "show GoToLocal --ended failed --random": "show GoToLocal --ended failure --random",
    "fetch GoToLocal --check": "fetch GoToLocal --check",
}


def meaning(line: str) -> tuple[str | None, dict[str, object]]:
    group = demotools.cli.main
    with group.make_context("demotools", [], resilient_parsing=True) as context:
        name, command, rest = group.resolve_command(context, shlex.split(line))
        assert command is not None
        context.resilient_parsing = False
        with command.make_context(name, rest, parent=context) as own:
            return command.name, own.params


@pytest.mark.parametrize("line", GUESSES)
def test_what_somebody_would_guess_works(line: str) -> None:
    assert meaning(line) == meaning(GUESSES[line])


def test_the_number_of_processes_of_trainer_is_guessed_alike() -> None:
    group = dict(command_lines()).get("trainer")
    if group is None:
        pytest.skip("a Python without torch")
    for option in ("-m", "--workers", "--num-workers", "--processes"):
        told = CliRunner().invoke(group, ["evaluate", "runs/a", option, "2", "--episodes", "0"])
        assert "'--episodes': 0 is not" in told.output  # and nothing else


JSON_LINES = [
    "generate GoToObj --episodes 2 --workers 1",
    "list",
    "info GoToObj",
    "show GoToObj",
    "report GoToObj",
    "verify GoToObj",
    "shrink GoToObj --episodes 1",
    "export GoToObj --to pickle",
    "convert BabyAI-GoToObj-v0_agent.pkl --workers 1 --name Converted",
    "archive GoToObj",
    "unarchive GoToObj.zarr.zip --name Restored",
    "fetch GoToObj --from GoToObj.zarr.zip --dry-run",
    "fetch GoToLocal GoToObjMaze --dry-run",
    "export GoToObj --to jsonl",
    "export GoToObj --to parquet",
    "import GoToObj.parquet --name Imported",
    "merge GoToObj Restored",
    "select GoToObj --first 1",
    "split GoToObj --valid 1",
    "card GoToObj -o README.md",
    "push GoToObj hf:me/demos --dry-run",
    "remove Restored GoToObj-small --yes",
]


def test_every_command_that_prints_figures_prints_them_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEMOTOOLS_DATA", str(tmp_path))
    has_hf = importlib.util.find_spec("pyarrow") is not None
    for line in JSON_LINES:
        if not has_hf and ("parquet" in line or line.startswith("push")):
            continue
        done = CliRunner().invoke(demotools.cli.main, [*line.split(), "--json"])
        assert done.exit_code == 0, done.output
        shown = list(texts_in(json.loads(done.stdout)))
        assert shown, line
        assert not [text for text in shown if re.search(r"\w\(\w+=|\w\(\[| object at 0x", text)]


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def test_help_is_a_word_too() -> None:
    asked = CliRunner().invoke(demotools.cli.main, ["help", "fetch"], prog_name="demotools")
    assert "Usage: demotools fetch" in asked.output
    version = CliRunner().invoke(demotools.cli.main, ["-V"])
    assert version.exit_code == 0 and "version" in version.output


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.count(" ") == 1])
def test_every_command_stands_in_the_readme_or_the_docs(name: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [page.read_text("utf-8") for page in pages if page.name != "commands.md"]
    assert any(f"`{name}" in text or f"$ {name}" in text for text in texts)


@pytest.mark.parametrize("name", [name for name, _group in command_lines()])
def test_a_command_line_says_its_version_and_refuses_wrong_usage_with_2(name: str) -> None:
    group = dict(command_lines())[name]
    version = CliRunner().invoke(group, ["--version"])
    assert re.search(r"\d+\.\d+\.\d+", version.output)
    assert CliRunner().invoke(group, ["no-such-command"]).exit_code == 2


def type_at_shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line with `$PYTHON` as this Python, its standard error in the output."""
    return subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", [name for name, _group in command_lines()])
def test_ctrl_c_during_the_imports_is_answered_without_a_traceback(name: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", name, "--help"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith(b"| numpy") or b"click.exceptions" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert b"Traceback" not in rest


def test_streams_that_the_shell_closed_do_no_harm(tmp_path: Path) -> None:
    line = f"$PYTHON -m demotools generate GoToObj --episodes 3 --data-dir {tmp_path}"
    assert type_at_shell(f"{line} <&- 2>&- >&-").returncode == 0
    assert (tmp_path / "GoToObj.zarr").is_dir()


def test_a_full_device_under_the_help_is_said_without_a_traceback() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    done = type_at_shell("$PYTHON -m demotools --help > /dev/full")
    assert done.returncode != 0
    assert "Traceback" not in done.stdout


if __name__ == "__main__":
    (ROOT / "docs" / "commands.md").write_text(commands_page(), "utf-8")


def test_what_commands_write_by_default_is_no_change_of_a_checkout() -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    outputs = {
        str(shown)
        for command in COMMANDS.values()
        for option in command.params
        if isinstance(option, click.Option) and option.name == "output"
        for shown in (option.default, option.show_default)
    }
    files = {name for name in outputs if re.fullmatch(r"[a-z]+\.[a-z]+", name)}
    assert "report.html" in files
    files |= {"runs/BabyAIGoToLocalBC/last.pt", "GoToLocal.zarr/zarr.json", "GoToLocal.zarr.zip"}
    asked = ["git", "check-ignore", *files]
    told = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(told.split()) == files
