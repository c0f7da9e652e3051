"""A policy goes to the hub (a stand-in on this machine), and plays from there as it did before."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from demotools.errors import CheckpointError, FetchError
from demotools.recording.environment import make_environment
from tests.run.test_export import written_policy
from tests.upload_server import TOKEN, Hub, Run, runner
from trainer.cli import main
from trainer.run.checkpoint import read_checkpoint
from trainer.run.loading import load_policy
from trainer.run.published import write_policy

pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")
pytest.importorskip("safetensors", reason="the extra hf is not installed")

QUICK = ("--episodes", "5", "-m", "1")


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    return runner(hub, tmp_path / "hub-home", "trainer")


@pytest.mark.slow
def test_a_pushed_policy_is_evaluated_to_the_same_figure(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    checkpoint = written_policy(tmp_path)
    pushed = run("push", str(checkpoint), "hf:me/policy", "--license", "mit", *QUICK)
    assert pushed.returncode == 0, pushed.stderr
    assert "/me/policy/commit/1" in pushed.stdout and hub.created[0].get("type") != "dataset"
    assert TOKEN not in pushed.stdout + pushed.stderr
    assert sorted(hub.files) == [
        "README.md",
        "evaluation.json",
        "model.safetensors",
        "policy.gif",
        "settings.toml",
        "vocabulary.json",
    ]
    measured = json.loads(hub.files["evaluation.json"])
    again = run("evaluate", "hf://me/policy", "--json", *QUICK, token=None)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == measured
    card = hub.files["README.md"].decode()
    header = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert json.loads(header["license"]) == "mit"
    results = json.loads(header["model-index"])[0]["results"][0]
    assert results["metrics"][0]["value"] == measured["success"]
    low, high = measured["interval"]
    assert f"95% interval {low:.1%} to {high:.1%}" in card and "policy.gif" in card
    begun = (
        "run",
        "ppo",
        "--tiny",
        "-m",
        "1",
        "--set",
        "run.device=cpu",
        "--set",
        "model.type=auto",
    )
    trained = run(*begun, "--init-from", "hf:me/policy", "-o", str(tmp_path / "on"), token=None)
    assert trained.returncode == 0, trained.stderr
    assert "weights: all " in trained.stdout and "hub-home" in trained.stdout
    # what lies beside the checkpoint is what lay there
    assert [file.name for file in tmp_path.iterdir() if "push" in file.name] == []


@pytest.mark.slow
def test_a_dry_run_makes_everything_and_needs_no_hub(tmp_path: Path) -> None:
    checkpoint = written_policy(tmp_path)
    tried = CliRunner().invoke(main, ["push", str(checkpoint), "hf:me/policy", "--dry-run", *QUICK])
    assert tried.exit_code == 0, tried.output
    assert re.search(r"would publish model.safetensors \(.* kB\), settings.toml", tried.output)
    assert [file.name for file in tmp_path.iterdir() if "push" in file.name] == []


def spoiling(level: str) -> object:
    """An environment in whose making the checkpoint that is being published breaks."""
    file = Path(os.environ["SPOILED"])
    file.write_bytes(bytes(file.stat().st_size))
    return make_environment(level)


@pytest.mark.slow
def test_what_is_published_is_what_was_measured_whatever_becomes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = f"on_policy.environment={__name__}:spoiling"
    checkpoint = written_policy(tmp_path, "small", 3.0, make)
    monkeypatch.setenv("SPOILED", str(checkpoint))
    line = ["push", str(checkpoint), "hf:me/policy", "--dry-run", "--trust", *QUICK]
    tried = CliRunner().invoke(main, line)
    assert tried.exit_code == 0, tried.output
    assert not any(checkpoint.read_bytes())


@pytest.mark.parametrize("place", ["hf:me", "hf:me/policy/more", "hf:/me"])
def test_a_place_that_is_no_model_is_refused(place: str) -> None:
    with pytest.raises(FetchError) as error:
        load_policy(place)
    assert error.value.fix == "write it as hf:OWNER/NAME"


@pytest.mark.slow
def test_a_policy_that_is_not_there_is_a_message(hub: Hub, run: Run) -> None:
    for place in ("hf:me/policy", "hf:me/policy@v9"):
        missing = run("evaluate", place, *QUICK)
        assert missing.returncode == 1 and "Traceback" not in missing.stderr, missing.stderr
        assert "next:" in missing.stderr
    assert hub.created == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published policy."""
    saved = read_checkpoint(written_policy(tmp_path))
    folder = tmp_path / "published"
    folder.mkdir()
    write_policy(folder, settings=saved.settings, words=saved.words, model=saved.model, versions={})
    return folder


def test_a_folder_of_published_files_is_read_like_a_run(folder: Path) -> None:
    saved, before = read_checkpoint(folder), read_checkpoint(folder.parent / "last.pt")
    assert saved.words == before.words and saved.settings == before.settings
    assert all((values == before.model[name]).all() for name, values in saved.model.items())
    saved.network()


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def of_code(folder: Path) -> None:
    settings = folder / "settings.toml"
    settings.write_text(settings.read_text().replace('"small"', '"os:system"'))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (replaced("model.safetensors", b"\x80\x02}."), "not a published policy"),
        (replaced("model.safetensors", b"\xff" * 64), "not a published policy"),
        (replaced("vocabulary.json", b"[" * 100_000), "not a published policy"),
        (replaced("vocabulary.json", b"[]"), "vocabulary.json does not hold an object"),
        (replaced("vocabulary.json", b'{"format": 1, "versions": {}, "words": [1]}'), "words"),
        (replaced("vocabulary.json", b'{"format": 9}'), "format 9"),
        (replaced("settings.toml", b"\xff"), "not a published policy"),
        (of_code, "names code"),
    ],
)
def test_a_spoiled_or_hostile_policy_is_refused_and_runs_nothing(
    folder: Path, spoil: Callable[[Path], object], what: str
) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(folder)
