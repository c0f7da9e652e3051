"""Checkpoints that are not, and what the commands say of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from demotools.errors import CheckpointError
from trainer.cli import main
from trainer.run.checkpoint import read_checkpoint, write_checkpoint
from trainer.run.folder import CHECKPOINT_FILE as FILE_NAME

Content = dict[str, Any]
RECIPE = ("ppo", "--tiny", "-m", "1", "-q", "--set", "run.device=cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, only to be read."""
    folder = tmp_path_factory.mktemp("run") / "a"
    result = CliRunner().invoke(main, ["run", *RECIPE, "-o", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "a"))


def assert_refused(result: Result, what: str) -> None:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert what in result.output and "next:" in result.output
    assert "Traceback" not in result.output


def evaluated(path: Path) -> Result:
    return CliRunner().invoke(main, ["evaluate", str(path), "--episodes", "1", "-m", "1", "-q"])


def resumed(folder: Path) -> Result:
    return CliRunner().invoke(main, ["run", *RECIPE, "-o", str(folder), "--resume"])


def rewritten(folder: Path, change: Callable[[Content], object]) -> Path:
    path = folder / FILE_NAME
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def set_line(content: Content, key: str, line: str) -> None:
    """Another line in the place of a key's in the settings."""
    content["settings"] = re.sub(rf"(?m)^{key} = .*$", line, content["settings"], count=1)


@pytest.mark.parametrize("text", [b"hello", b"", b"PK\x03\x04", b"\x80\x02}.", os.urandom(999)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "text.pt"
    path.write_bytes(text)
    assert_refused(evaluated(path), "this is not a checkpoint, or a damaged one")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: content.pop("settings"), "`settings`"),
        (lambda content: content.pop("model"), "`model`"),
        (lambda content: content.update(words=5), "`words`"),
        (lambda content: content.update(words=[]), "`words`"),
        (lambda content: content.update(settings=5), "`settings`"),
        (lambda content: content.update(settings="a = "), "its settings: "),
        (lambda content: content.update(settings="a = " + "[" * 5000), "its settings: "),
        (lambda content: content.update(settings="[run]\nname = 3"), "its settings: "),
        (lambda content: set_line(content, "level", ""), "its settings: "),
        (lambda content: set_line(content, "seed", f"seed = {10**30}"), "its settings: "),
        (lambda content: set_line(content, "seed", f"seed{'.a' * 3000} = 1"), "its settings: "),
        (lambda content: content.update(model=5), "`model`"),
        (lambda content: content.update(model={}), "the weights do not fit the network"),
        (lambda content: content["model"].update(more=5), "the weights do not fit the network"),
        (lambda content: content.update(format=-1), "`format`"),
        (lambda content: content.update(format=True), "`format`"),
        (lambda content: content.update(format=99), "the checkpoint has format 99"),
        (lambda content: content.clear(), "`format`"),
        (
            lambda content: content["model"]["actor.0.bias"].fill_(torch.nan),
            "the weights `actor.0.bias` are not finite",
        ),
    ],
)
def test_a_checkpoint_without_something_it_must_hold_is_refused(
    folder: Path, change: Callable[[Content], object], what: str
) -> None:
    assert_refused(evaluated(rewritten(folder, change)), what)


def test_a_flipped_byte_of_the_weights_is_noticed(folder: Path) -> None:
    path = folder / FILE_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_refused(evaluated(path), "damaged one: the checksum of ")


@pytest.mark.parametrize(
    ("kept", "what"), [(0.5, "its end is missing, as in an interrupted"), (0, "it is empty")]
)
def test_half_a_download_is_said_to_be_that(folder: Path, kept: float, what: str) -> None:
    content = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(content[: int(kept * len(content))])
    result = evaluated(folder)
    assert_refused(result, f"or a damaged one: {what}")
    assert "BadZipFile" not in result.output


class Commanding:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch canary",)


def test_a_checkpoint_that_would_run_code_is_said_to_be_unsafe_in_our_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = rewritten(folder, lambda content: content["training"].update(more=Commanding()))
    result = evaluated(path)
    assert_refused(result, f"it names {os.name}.system, which could run code; nothing was run")
    assert "do not load this file with anything else" in result.output
    assert "will likely succeed" not in result.output and not Path("canary").exists()


def test_wherever_a_checkpoint_is_damaged_it_is_refused_or_read_whole(folder: Path) -> None:
    path = folder / FILE_NAME
    whole, content = read_checkpoint(path), path.read_bytes()
    places = [*range(0, 400, 7), *range(len(content) - 4000, len(content), 131)]
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except CheckpointError:
            refused += 1
            continue
        assert read.settings == whole.settings
        assert all(read.model[name].equal(values) for name, values in whole.model.items())
    assert refused > 10


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(model={}),
        lambda content: content["model"].popitem(),
        lambda content: content.update(training=5),
        lambda content: content.update(training={}),
        lambda content: content["training"].update(processes=[]),
        lambda content: content["training"].update(processes=[5]),
        lambda content: content["training"]["processes"][0].update(random=torch.zeros(3)),
        lambda content: content["training"]["processes"][0].update(random=5),
        lambda content: content["training"]["optimizer"].clear(),
        lambda content: content["training"]["optimizer"].update(param_groups=[]),
        lambda content: content["training"].update(schedule=5),
        lambda content: content["training"].update(progress={}),
        lambda content: content["training"]["progress"].update(stage=-1),
        lambda content: content["training"]["progress"].update(stage=10**30),
        lambda content: content["training"]["progress"].update(updates="x"),
        lambda content: content["training"]["progress"].update(minutes=torch.nan),
        lambda content: content["training"].update(log_bytes=-1),
    ],
)
def test_a_run_is_not_resumed_from_state_that_does_not_fit(
    folder: Path, change: Callable[[Content], object]
) -> None:
    rewritten(folder, change)
    log = (folder / "log.jsonl").read_bytes()
    assert_refused(resumed(folder), FILE_NAME)
    assert (folder / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("key", ["seed", "taken", "memory"])
def test_a_stage_is_not_resumed_from_state_that_does_not_fit(folder: Path, key: str) -> None:
    def change(content: Content) -> None:
        progress = content["training"]["progress"]
        progress.update(stage=0, stage_env_steps=1)
        content["training"]["processes"][0]["stage"] = {"collector": {key: 5}}

    rewritten(folder, change)
    assert_refused(resumed(folder), "the state of this stage in the checkpoint is damaged")


def test_a_lone_file_says_what_it_is_of_and_nothing_that_it_names_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Path(__file__).parents[2] / "benchmarks" / "weights" / "GoToLocal-1000.pt"
    whole = read_checkpoint(trained)
    shown = CliRunner().invoke(main, ["info", str(trained)])
    assert shown.exit_code == 0, shown.output
    for said in ("level    GoToLocal", "network  maze, ", "demo steps", "weights alone"):
        assert said in shown.output
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("raise SystemExit('run')")
    (old,) = re.findall(r'^level = "GoToLocal"$', whole.settings, re.MULTILINE)
    settings = whole.settings.replace('type = "maze"', 'type = "evil:Network"')
    settings = settings.replace(old, 'level = "a\\u001b[2J"')
    given: dict[str, Any] = {"words": whole.words, "model": whole.model, "training": whole.training}
    write_checkpoint(Path("theirs.pt"), settings=settings, **given)
    shown = CliRunner().invoke(main, ["info", "theirs.pt"])
    assert shown.exit_code == 0, shown.output
    assert "network  evil:Network, " in shown.output and r"level    a\x1b[2J" in shown.output
    found = json.loads(CliRunner().invoke(main, ["info", "theirs.pt", "--json"]).output)
    assert found["network"] == "evil:Network" and found["weights"] > 500_000
