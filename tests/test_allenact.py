"""Every block of docs/coming_from_allenact.md runs as it stands, on less data and fewer steps."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from trainer.run.log import read_log
from trainer.settings.models import Settings, read_settings

PAGE = Path(__file__).parents[1] / "docs" / "coming_from_allenact.md"
BLOCKS: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.S)
FILES = {
    found[1]: text
    for _, text in BLOCKS
    if (found := re.match(r"# (\w+\.(?:toml|py))\n", text)) is not None
}
SMALL = ("model.type=small", "on_policy.environments=4", "on_policy.rollout_len=8")
SHORT = {
    "offpolicy.toml": (
        *("stages.0.max_env_steps=128", "stages.0.off_policy.rollouts=4"),
        *("stages.0.off_policy.rollout_len=8", "stages.0.off_policy.updates=2"),
    ),
    "ppo_only.toml": ("stages.0.max_env_steps=128",),
    "dagger_ppo.toml": ("stages.0.max_env_steps=64", "stages.1.max_env_steps=64"),
}


@pytest.fixture
def place(bot_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page and a store, in which the page's lines are typed."""
    shutil.copytree(bot_data / "GoToLocal.zarr", tmp_path / "data" / "GoToLocal.zarr")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setenv("DEMOTOOLS_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str) -> str:
    """What a line of the shell prints."""
    program, *arguments = shlex.split(line)
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout + done.stderr


def fragments() -> list[dict[str, Any]]:
    """The pieces of TOML that are not whole files."""
    return [
        tomllib.loads(text)
        for language, text in BLOCKS
        if language == "toml" and text not in FILES.values()
    ]


def read(recipe: str, *overrides: str) -> Settings:
    return read_settings(recipe, overrides)


def test_the_page_has_a_block_for_each_of_theirs() -> None:
    assert set(FILES) >= {"cloning.py", *SHORT}
    assert len(BLOCKS) - len(FILES) >= 8


@pytest.mark.usefixtures("place")
def test_the_experiment_is_the_recipe_that_ships() -> None:
    ours = read("offpolicy.toml").model_dump()
    theirs = read("bc_offpolicy.toml", "model.type=big", "stages.0.off_policy.store=GoToLocal")
    assert ours == theirs.model_dump()


def test_a_piece_of_a_file_says_what_the_file_says() -> None:
    whole = tomllib.loads(FILES["offpolicy.toml"])
    iterator, _, loss = fragments()[:3]
    stage = whole["stages"][0]["off_policy"]
    assert iterator["stages"]["off_policy"].items() <= stage.items()
    assert loss["losses"].items() <= whole["losses"].items()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHORT)
def test_a_recipe_of_the_page_trains(recipe: str, place: Path) -> None:
    options = [f"--set {setting}" for setting in (*SMALL, *SHORT[recipe])]
    typed(f"trainer run {recipe} -m 1 -q -o run {' '.join(options)}")
    assert (place / "run" / "last.pt").exists()


@pytest.mark.slow
def test_their_iterator_as_one_of_ones_own_trains(place: Path) -> None:
    (named,) = (piece for piece in fragments() if "iterator" in str(piece))
    own = f"stages.0.off_policy.iterator={named['stages']['off_policy']['iterator']}"
    options = [f"--set {setting}" for setting in (*SMALL, *SHORT["offpolicy.toml"], own)]
    typed(f"trainer run offpolicy.toml -m 1 -q -o run {' '.join(options)}")
    lines = [line for line in read_log(place / "run") if line["group"] == "offpolicy"]
    assert len(lines) == 4
    assert lines[0]["loss"] == pytest.approx(1.95, abs=0.1)  # of seven actions, untrained


@pytest.mark.slow
def test_cloning_and_ppo_go_into_one_stage(place: Path) -> None:
    both = FILES["ppo_only.toml"] + BLOCKS[-1][1].replace("GoToObj", "GoToLocal")
    (place / "both.toml").write_text(both, "utf-8")
    less = (*SHORT["ppo_only.toml"], *SHORT["offpolicy.toml"][1:])
    options = [f"--set {setting}" for setting in (*SMALL, *less)]
    typed(f"trainer run both.toml -m 1 -q -o run {' '.join(options)}")


@pytest.mark.slow
def test_their_loss_as_a_loss_of_ones_own_gives_what_the_built_in_one_gives(place: Path) -> None:
    options = [f"--set {setting}" for setting in (*SMALL, *SHORT["offpolicy.toml"])]
    losses: list[list[float]] = []
    for name, loss in (("ours", ()), ("own", ("--set losses.expert_ce.type=cloning:expert_ce",))):
        typed(f"trainer run offpolicy.toml -m 1 -q -o {name} {' '.join((*options, *loss))}")
        lines = [line["loss"] for line in read_log(place / name) if line["group"] == "offpolicy"]
        losses.append(lines)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 4


@pytest.mark.usefixtures("place")
def test_the_iterator_gives_the_tutorials_batches() -> None:
    (code,) = (text for language, text in BLOCKS if "batches = Expert" in text)
    exec(compile(code.replace("128", "4"), str(PAGE), "exec"), {})


@pytest.mark.slow
def test_the_lines_of_the_shell_work(place: Path) -> None:
    lines = [
        line.removeprefix("$ ")
        for language, text in BLOCKS
        if language == "console"
        for line in text.splitlines()
    ]
    options = [f"--set {setting}" for setting in (*SMALL, *SHORT["offpolicy.toml"])]
    for line in lines:
        if "fetch" in line:  # what it fetches from a server is tested in tests/fetch
            typed("demotools fetch --help")
            continue
        line = line.replace("--episodes 1000", "--episodes 20").replace("-m 8", "-m 1 -q")
        typed(f"{line} {' '.join(options)}" if "trainer run" in line else line)
    assert (place / "data" / "GoToLocal-small.zarr").is_dir()
    assert (place / "curve.png").stat().st_size > 0
