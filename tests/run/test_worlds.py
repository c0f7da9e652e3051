"""Levels that are not BabyAI's: minigrid's and one's own, with words of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from demotools.babyai.vocabulary import WORDS
from demotools.cli import main as demotools_main
from demotools.errors import ManifestError
from demotools.recording.environment import playable_manifest
from trainer.cli import main
from trainer.run.checkpoint import read_checkpoint
from trainer.run.loading import load_policy
from trainer.run.log import read_log
from trainer.settings.user_code import made_environment

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
    assert "2 words beyond BabyAI's: rescue, princess" in said
    assert read_checkpoint(Path("a"), trust=True).words == (*WORDS, "rescue", "princess")
    words = ("--set", 'model.words=["ganon", "princess", "rescue"]')
    run("ppo", "-o", "b", "--set", level, *words)
    assert read_checkpoint(Path("b"), trust=True).words[len(WORDS) :] == (
        "ganon",
        "princess",
        "rescue",
    )
    wrong = CliRunner().invoke(main, ["run", "ppo", "--set", level, "--set", 'model.words=["A b"]'])
    assert wrong.exit_code == 1 and "one lower-case word" in wrong.output
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


ODD = """
import gymnasium
from gymnasium import spaces
from minigrid.envs import EmptyEnv
from minigrid.wrappers import RGBImgPartialObsWrapper


class Three(gymnasium.ActionWrapper):
    def __init__(self, environment):
        super().__init__(environment)
        self.action_space = spaces.Discrete(3)

    def action(self, action):
        assert action < 3
        return action


def wide(level):
    return Three(EmptyEnv(size=5, max_steps=9, agent_view_size=9))


def coloured(level):
    return RGBImgPartialObsWrapper(EmptyEnv(size=5, max_steps=9), tile_size=4)


def mixed(level):
    return EmptyEnv(size=5, max_steps=9, agent_view_size=9 if level == "wide" else 7)


def bare(level):
    return gymnasium.make("CartPole-v1")
"""
NETWORK = """
import torch
from torch import nn
from trainer.learning.networks.base import Output


class Eyes(nn.Module):
    def __init__(self, vocabulary_size, *, view):
        super().__init__()
        self.view = nn.Linear(view[0] * view[1] * view[2], 8)

    def initial_memory(self, rollouts):
        return torch.zeros(rollouts, 1)

    def forward(self, batch, memory):
        seen = self.view(batch["cells"].flatten(2).float() / 255)
        return Output(seen[..., :7], seen[..., 7], memory)
"""


@pytest.mark.parametrize("network", ["small", "film"])
def test_views_of_any_size_and_other_numbers_of_actions_are_learned_from(
    run: Callable[..., Result], network: str
) -> None:
    Path("odd.py").write_text(ODD, "utf-8")
    wide = ("--set", "on_policy.environment=odd:wide", "--set", "run.level=wide")
    run("ppo", "-o", "a", *wide, "--set", f"model.type={network}")
    settings = Path("a/settings.toml").read_text("utf-8")
    assert "actions = 3" in settings and "9,\n" in settings
    for more in ([], ["--sample"], ["--policy", "random"]):
        common = ["a", "--episodes", "2", "-m", "1", "--trust", *more]
        done = CliRunner().invoke(main, ["evaluate", *common])
        assert done.exit_code == 0, done.output
    watched = CliRunner().invoke(main, ["watch", "a", "--episodes", "1", "--trust", "--json"])
    assert watched.exit_code == 0, watched.output
    policy = load_policy("a", trust=True)
    environment = made_environment("odd:wide", "wide")
    assert policy.act(environment.reset(seed=1)[0]) in range(3)
    resumed = CliRunner().invoke(
        main, ["run", "ppo", "--tiny", "-m", "1", "-o", "a", "--resume", *wide]
    )
    assert resumed.exit_code == 0, resumed.output


def test_images_go_to_a_network_that_says_that_it_takes_them(run: Callable[..., Result]) -> None:
    Path("odd.py").write_text(ODD, "utf-8")
    Path("eyes.py").write_text(NETWORK, "utf-8")
    run(
        *("ppo", "-o", "a", "--set", "on_policy.environment=odd:coloured"),
        *("--set", "model.type=eyes:Eyes"),
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["model.type=big", "on_policy.environment=odd:wide"], "`big` takes views of 7 x 7 cells"),
        (["on_policy.environment=odd:coloured"], "it takes views of cells"),
        (["on_policy.environment=odd:bare"], "this environment does not have minigrid's interface"),
        (
            ["on_policy.environment=odd:wide", "model.view=[7, 7]"],
            "the network is built for model.view = [7, 7], but GoToObj has 9 x 9",
        ),
        (
            ["on_policy.environment=odd:mixed", 'run.level=["narrow", "wide"]'],
            "narrow has views of 7 x 7 and 7 actions, wide views of 9 x 9 and 7 actions",
        ),
    ],
)
def test_what_a_network_does_not_take_is_refused_by_name_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.py").write_text(ODD, "utf-8")
    settings = [part for setting in arguments for part in ("--set", setting)]
    result = CliRunner().invoke(main, ["run", "ppo", "--tiny", "-m", "1", "-o", "a", *settings])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert what in result.output and "\n  next:  " in result.output
    assert "Error:" not in result.output
    assert not Path("a").exists()


def test_a_misspelt_level_of_minigrids_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ManifestError) as refused:
        playable_manifest("MiniGrid-DorKey-5x5-v0")
    assert refused.value.fix.startswith("did you mean MiniGrid-DoorKey-5x5-v0")
    with pytest.raises(ManifestError) as refused:
        playable_manifest("GoToNowhere")
    assert "? A gymnasium id" in refused.value.fix
