"""Levels that are not BabyAI's: minigrid's and one's own, with words of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from demotools.babyai.vocabulary import WORDS
from demotools.cli import main as demotools_main
from trainer.cli import main
from trainer.run.checkpoint import read_checkpoint
from trainer.run.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")
DOOR = "MiniGrid-DoorKey-5x5-v0"
OWN = """
import gymnasium
from minigrid.envs import EmptyEnv

class Zelda(EmptyEnv):
    def gen_obs(self):
        return {**super().gen_obs(), "mission": "rescue the princess"}

gymnasium.register("Zelda-v0", lambda **more: Zelda(size=5, max_steps=9, **more))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run("ppo", "-o", "a")` trains for seconds, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def trainer_run(*arguments: str) -> Result:
        tiny = ("--tiny", "-m", "1", "--data-dir", str(tmp_path))
        result = CliRunner().invoke(main, ["run", *arguments, *tiny])
        assert result.exit_code == 0, result.output
        return result

    return trainer_run


def levels(*names: str) -> list[object]:
    """The first as a fast test, the others as slow ones."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize(
    "name", levels("Fetch-5x5-N2", "Empty-5x5", "DoorKey-5x5", "KeyCorridorS3R1", "MultiRoom-N2-S4")
)
def test_minigrids_levels_train_by_the_name_alone(run: Callable[..., Result], name: str) -> None:
    said = run("ppo", "-o", "a", "--set", f"run.level=MiniGrid-{name}-v0").output
    assert f"MiniGrid-{name}-v0: success" in said
    if name != "KeyCorridorS3R1":  # all its words are BabyAI's
        assert "words beyond BabyAI's" in said
    resumed = CliRunner().invoke(main, ["evaluate", "a", "--episodes", "2", "-m", "1"])
    assert resumed.exit_code == 0, resumed.output


def test_an_id_that_a_module_registers_is_a_level_and_words_may_be_given(
    run: Callable[..., Result],
) -> None:
    Path("castle.py").write_text(OWN, "utf-8")
    level = "run.level=castle:Zelda-v0"
    said = run("ppo", "-o", "a", "--set", level).output
    assert "words beyond BabyAI's: 2, rescue, princess" in said
    assert read_checkpoint(Path("a"), trust=True).words == (*WORDS, "rescue", "princess")
    words = ("--set", 'model.words=["ganon", "princess", "rescue"]')
    run("ppo", "-o", "b", "--set", level, *words)
    assert read_checkpoint(Path("b"), trust=True).words[len(WORDS) :] == (
        "ganon",
        "princess",
        "rescue",
    )
    wrong = CliRunner().invoke(main, ["run", "ppo", "--set", level, "--set", 'model.words=["A b"]'])
    assert wrong.exit_code == 1 and "one word in lower case" in wrong.output
    missing = CliRunner().invoke(main, ["run", "ppo", "-o", "c", "--set", "run.level=nowhere:A-v0"])
    assert missing.exit_code == 1 and "the module of the level cannot" in missing.output


@pytest.mark.slow
def test_doorkey_from_the_expert_to_a_clone_to_ppo_and_by_dagger(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    generate = ["generate", DOOR, "--episodes", "20", "--data-dir", str(tmp_path), "-q"]
    assert CliRunner().invoke(demotools_main, generate).exit_code == 0
    plain = ("--set", "stages.0.off_policy.store=auto", "--set", "stages.0.off_policy.augment=[]")
    run("bc_small_cpu", "-o", "clone", "--set", f"run.level={DOOR}", *plain)
    said = run("ppo", "-o", "ppo", "--set", f"run.level={DOOR}", "--init-from", "clone").output
    assert "weights: all" in said and "new words" not in said
    run("dagger_then_ppo", "-o", "dagger", "--set", f"run.level={DOOR}")
    agreement = [line for line in read_log(Path("dagger")) if "expert_ce/accuracy" in line]
    assert agreement
