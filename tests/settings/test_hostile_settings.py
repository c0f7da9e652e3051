"""Settings that no run can have: each is refused in three parts, before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from demotools.errors import SettingsError
from trainer.cli import main
from trainer.settings.models import read_settings, set_key, shipped_recipes

DEMOS = "stages.0.off_policy"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused(result: Result, what: str) -> None:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert what in result.output and "where:" in result.output and "next:" in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in Path().iterdir()] in ([], ["mine.toml"])


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("run.seed=99999999999999999999999999999", "`run.seed`"),
        ("run.seed=true", "it must be a number"),
        ("run.seed=-1", "`run.seed`"),
        (f"run.seed={'9' * 5000}", "the value is invalid"),
        ("run.compile=3", "`run.compile`"),
        ("on_policy.environments=1e9", "`on_policy.environments`"),
        ("on_policy.rollout_len=99999999999", "`on_policy.rollout_len`"),
        ("on_policy.rollout_len=600000", "steps at once"),
        ("stages.0.rollout_len=600000", "steps at once"),
        ("on_policy.gamma=nan", "`on_policy.gamma`"),
        (f"{DEMOS}.rollouts=99999999999999999999", f"`{DEMOS}.rollouts`"),
        (f"{DEMOS}.rollout_len=99999999999", f"`{DEMOS}.rollout_len`"),
        (f"{DEMOS}.rollout_len=1000000", "steps at once"),
        (f'{DEMOS}.losses=[["a"]]', "names of losses"),
        (f"{DEMOS}.losses=[{{a=1}}]", "names of losses"),
        (f"{DEMOS}.losses=[]", f"`{DEMOS}.losses`"),
        (f"{DEMOS}.losses={{expert_ce=nan}}", "finite"),
        (f"{DEMOS}.losses={{expert_ce=inf}}", "finite"),
        (f"{DEMOS}.losses={{expert_ce=true}}", "it must be a number"),
        ("stages.0.max_demo_steps=99999999999999999999", "`stages.0.max_demo_steps`"),
        ("stages.0=5", "`stages.0`"),
        ("stages.7=5", "`7` is not one of the 1 items of this list"),
        (f"stages.{'9' * 5000}.repeats=5", "is not one of the 1 items of this list"),
        ("stages.0=", "`stages`"),
        ("optimizer.lr=1e38", "`optimizer.lr`"),
        ("optimizer.lr=true", "it must be a number"),
        ("optimizer.lr=inf", "`optimizer.lr`"),
        ("optimizer.lr=nan", "`optimizer.lr`"),
        ("optimizer.max_grad_norm=inf", "`optimizer.max_grad_norm`"),
        ("evaluation.episodes=99999999999999999999", "`evaluation.episodes`"),
        ("run.name=a\udcffb", "the value is invalid"),
        ("run.level=a\udcffb", "the value is invalid"),
        ("run.\udcff=b", "KEY=VALUE"),
        ('run.name="a\\u0000b"', "a short name without slashes"),
        ('run.name="a\\nb"', "a short name without slashes"),
        ("run.name=../up", "a short name without slashes"),
        ("run.name=..", "a short name without slashes"),
        ('run.name=""', "a short name without slashes"),
        (f"run.name={'x' * 300}", "a short name without slashes"),
        (f"model.deep={'[' * 9000}{']' * 9000}", "the value is invalid"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(override: str, what: str) -> None:
    assert_refused(CliRunner().invoke(main, ["run", "bc_small_cpu", "--set", override]), what)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("model.memory=-1", "memory must be from 1 to 8192"),
        ("model.memory=99999999999", "memory must be from 1 to 8192"),
        ("model.features=true", "features must be from 1 to 8192"),
        ("model={type='big', channels=0}", "channels must be from 1 to 8192"),
        ("model={type='big', instruction=5}", "instruction must be even"),
        ("optimizer.schedule={type='linear', to=inf}", "0 <= to <= 1"),
        ("optimizer.schedule={type='cosine', warmup=-1.0}", "0 <= warmup < 1"),
        ("optimizer.schedule={type='linear', env_steps=-5}", "a number of steps"),
        ("optimizer.schedule={type='linear', to='x'}", "the schedule rejects its settings"),
        ("optimizer.betas=[2.0, 3.0]", "the optimizer rejects its settings"),
        ("optimizer.weight_decay=nan", "the optimizer rejects its settings"),
    ],
)
def test_an_impossible_option_of_something_with_a_type_is_refused(override: str, what: str) -> None:
    arguments = ["run", "ppo", "--tiny", "--dry-run", "--set", "model.type=small"]
    arguments += ["--set", override, "--set", "run.device=cpu"]
    assert_refused(CliRunner().invoke(main, arguments), what)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("tiny = 5\n", "`tiny` is not a section"),
        (f"a = {'[' * 9000}{']' * 9000}\n", "not valid TOML"),
        (f"a = {'9' * 5000}\n", "not valid TOML"),
    ],
)
@pytest.mark.parametrize("tiny", [(), ("--tiny",)])
def test_an_impossible_recipe_is_refused(text: str, what: str, tiny: tuple[str, ...]) -> None:
    recipe = shipped_recipes()["bc_small_cpu.toml"].read_text("utf-8").partition("[tiny]")[0]
    Path("mine.toml").write_text(text + recipe, "utf-8")
    assert_refused(CliRunner().invoke(main, ["run", "mine.toml", *tiny]), what)


@pytest.mark.parametrize("text", [f"{'a.' * 3000}a = 1\n", '"a\\u0000" = 1\n'])
def test_a_key_that_no_recipe_can_have_is_refused_by_its_name(text: str) -> None:
    recipe = shipped_recipes()["bc_small_cpu.toml"].read_text("utf-8")
    Path("mine.toml").write_text(text + recipe, "utf-8")
    assert_refused(CliRunner().invoke(main, ["run", "mine.toml"]), "unknown key `a")


@pytest.mark.parametrize("command", [("evaluate", "--policy", "bot", "--level", "GoToObj")])
def test_more_episodes_than_there_are_seeds_are_refused(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*command, "--episodes", "99999999999999999999"])
    assert_refused(result, "99999999999999999999 episodes are too many")


def test_an_item_of_a_list_is_replaced_and_removed() -> None:
    tree = {"stages": [{"repeats": 1}, {"repeats": 2}]}
    set_key(tree, "stages.0", {"repeats": 9})
    assert tree == {"stages": [{"repeats": 9}, {"repeats": 2}]}
    set_key(tree, "stages.0", None)
    assert tree == {"stages": [{"repeats": 2}]}
    with pytest.raises(SettingsError, match="`x` is not one of the 1 items of this list"):
        set_key(tree, "stages.x", 5)


def test_a_name_of_several_words_in_any_script_is_plain() -> None:
    for name in ("two words", "naïve Läufe", "走る-1.2_x"):
        assert read_settings("ppo", [f"run.name={name}"]).run.name == name
