from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from demotools.errors import SettingsError
from trainer.settings.models import (
    parsed_settings,
    read_settings,
    recipe_summary,
    shipped_recipes,
    toml_of,
)

RECIPE = "bc_small_cpu.toml"
LOSSES = ("stages", 0, "off_policy", "losses")
ENV_BUDGET = ("stages.0.max_demo_steps=", "stages.0.max_env_steps=9")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_says_what_it_is_and_survives_a_round_trip(name: str) -> None:
    settings = read_settings(name)
    assert parsed_settings(tomllib.loads(toml_of(settings)), "again") == settings
    assert len(recipe_summary(shipped_recipes()[name])) > 20
    # which is there on every device, and need not be measured
    assert read_settings(name, tiny=True).run.precision == "float32"


def test_the_tutorials_recipe_has_the_tutorials_numbers() -> None:
    settings = read_settings("bc_offpolicy")
    (stage,) = settings.stages
    assert stage.off_policy is not None and settings.on_policy is not None
    assert (settings.optimizer.type, settings.optimizer.lr) == ("adam", 2.5e-4)
    assert settings.optimizer.max_grad_norm == 0.5
    assert stage.max_env_steps == 10_000_000
    assert (stage.off_policy.rollouts, stage.off_policy.rollout_len) == (128, 128)
    assert stage.off_policy.updates == 16
    assert settings.on_policy.rollout_len == 128 // 4
    assert (settings.on_policy.gamma, settings.on_policy.gae_lambda) == (0.99, 1.0)
    assert settings.run.save_every_env_steps == 10_000
    assert stage.losses == {} and stage.off_policy.augment == ()


def test_a_path_comes_before_a_shipped_name_and_the_suffix_may_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shipped_recipes()[RECIPE].read_text("utf-8").replace("GoToLocal", "GoToObj")
    monkeypatch.chdir(tmp_path)
    assert read_settings("bc_small_cpu").run.level == "GoToLocal"
    Path(RECIPE).write_text(text, "utf-8")
    assert read_settings(RECIPE).run.level == "GoToObj"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.lr=1e-3", ("optimizer", "lr"), 1e-3),
        ("run.level=GoToObj", ("run", "level"), "GoToObj"),
        ('run.name="two words"', ("run", "name"), "two words"),
        ("stages.0.max_demo_steps=1_000", ("stages", 0, "max_demo_steps"), 1000),
        ("stages.0.off_policy.augment=[]", ("stages", 0, "off_policy", "augment"), ()),
        ("stages.0.off_policy.losses={expert_ce=0.5}", LOSSES, {"expert_ce": 0.5}),
        ("evaluation=", ("evaluation",), None),
        ("run.save_every_demo_steps=", ("run", "save_every_demo_steps"), None),
    ],
)  # fmt: skip
def test_an_override_sets_one_key(
    override: str, path: tuple[str | int, ...], value: object
) -> None:
    place: object = read_settings(RECIPE, [override])
    for part in path:
        place = place[part] if isinstance(place, tuple) else getattr(place, str(part))  # type: ignore[index]
    assert place == value


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (["run.nme=x"], "unknown key `run.nme`", "did you mean name"),
        (["stages.0.off_policy.rolouts=3"], "`stages.0.off_policy.rolouts`", "rollouts"),
        (["on_policy.environmnets=3"], "unknown key `on_policy.environmnets`", "environments"),
        (["sages=3"], "unknown key `sages`", "stages"),
        (["off_policy.store=x"], "unknown key `off_policy`", "did you mean stages.0.off_policy?"),
        (["optimizer={learning_rate=1e-3}"], "unknown key `optimizer.learning_rate`", "mean lr?"),
        (["stages={max_demo_steps=9}"], "at `stages`: it must be a list", "write `[[stages]]`"),
        (["model.class='a:B'"], "unknown key `model.class`", "did you mean type?"),
        (["run.levle='GoToObj'"], "unknown key `run.levle`", "did you mean level"),
        (["stages.0.teacher_forcing={form=1, steps=9}"], "unknown key", "did you mean from?"),
        (["run.level=[{nmae='GoToObj'}]"], "unknown key `run.level.0.nmae`", "did you mean name?"),
        (["optimizer.lr=fast"], "optimizer.lr", "correct that key"),
        (["optimizer.lr=-1"], "optimizer.lr", "correct that key"),
        (["stages.0.max_env_steps=5"], "exactly one", "correct that key"),
        (["stages.0.max_demo_steps="], "exactly one", "correct that key"),
        (["stages.0.off_policy.losses=['expert']"], "did you mean expert_ce", ""),
        (["stages=[]"], "stages", ""),
        (["on_policy=", *ENV_BUDGET], "needs the section on_policy", ""),
        (["stages.0.off_policy.augment=['recolour']"], "augment", ""),
        (["stages.3.max_demo_steps=1"], "`3` is not one of the 1 items", "count from 0"),
        (["stages.first.losses=[]"], "`first` is not one of", "count from 0"),
        (["run.name.first=1"], "nothing to set inside", "--dry-run"),
        (["lr"], "not of the form KEY=VALUE", "--set"),
        (["run.save_every_env_steps=1"], "not both", ""),
        (["lr=1e-3"], "unknown key `lr`", "did you mean optimizer.lr?"),
        (["memory=64"], "unknown key `memory`", "did you mean model.memory?"),
        (["optimizer.learning_rate=1e-3"], "unknown key `optimizer.learning_rate`", "mean lr?"),
        (["on_policy.num_steps=8"], "unknown key `on_policy.num_steps`", "mean rollout_len? (docs"),
        (["num_train_processes=8"], "unknown key", "mean on_policy.environments? (docs"),
        (["stages.0.teacher_forcing={start=1, end=0, steps=9}"], "2 settings", "mean from? (docs"),
        (["losses.expert_ce.type=imitation"], "no loss named `imitation`", "expert_cross"),
        (["losses.expert_ce.type=PPO"], "no loss named `PPO`", "did you mean ppo?"),
        (["losses.x={type='ppo', clip_param=0.1}"], "`losses.x.clip_param`", "did you mean clip?"),
        (["optimizer.type=Adam"], "`optimizer.type`: there is no optimizer", "did you mean adam?"),
        (["optimizer.schedule.type=LinearDecay"], "no schedule named", "mean linear?"),
        (["model.type=maze2"], "no network named `maze2`", "did you mean maze?"),
        (["model={type='film', memry=64}"], "unknown key `model.memry`", "did you mean memory?"),
        (["model={type='maze', view=[5, 5]}"], "unknown key `model.view`", "the valid keys are"),
        (["model={type='auto', memry=64}"], "unknown key `model.memry`", "did you mean memory?"),
        (["optimizer={type='adam'}"], "at `optimizer.lr`: it is missing", "correct that key"),
        (["stages.0.losses='ppo'"], "it must be names of losses, like", "correct that key"),
        (["losses=3"], "it must be a section", "correct that key"),
        (["evaluation.sample='no'"], "it must be true or false, or it must be 'both'", ""),
        (["run.seed=-1", "lr=2"], "2 settings are invalid", "did you mean optimizer.lr?"),
        (["lr=2", "optimizer.type=Adam"], "2 settings are invalid", "did you mean adam?"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(overrides: list[str], what: str, fix: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        read_settings(RECIPE, overrides)
    assert what in refusal.value.what + refusal.value.fix
    assert fix in refusal.value.fix
    assert f"--set {overrides[0].partition('=')[0]}" in refusal.value.path
    assert "whole file" not in refusal.value.what and "Input should" not in refusal.value.what


def test_a_wrong_key_of_the_file_is_said_to_be_there_and_one_of_tiny_to_be_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.toml"
    text = shipped_recipes()[RECIPE].read_text("utf-8")
    path.write_text(text.replace("[tiny]", '[tiny]\n"run.seeds" = 3'), "utf-8")
    with pytest.raises(SettingsError, match=r"unknown key `run\.seeds`") as refusal:
        read_settings(str(path), tiny=True)
    assert refusal.value.path == f"{path}, in the section [tiny]"
    path.write_text(text.replace("[run]", "[run]\nseeds = 3"), "utf-8")
    with pytest.raises(SettingsError) as refusal:
        read_settings(str(path), ["run.level=GoToObj"])
    assert refusal.value.path == str(path)


def test_tiny_leaves_a_network_of_the_users_its_own_sizes() -> None:
    recipe = "bc_1000_demos"
    assert read_settings(recipe, tiny=True).model.options["features"] == 16
    assert read_settings(recipe, ["model.type=mine:Net"], tiny=True).model.options == {}


def test_tiny_is_refused_where_the_recipe_has_no_such_section(tmp_path: Path) -> None:
    path = tmp_path / "full.toml"
    path.write_text(shipped_recipes()[RECIPE].read_text("utf-8").partition("[tiny]")[0], "utf-8")
    assert read_settings(str(path)).run.level == "GoToLocal"
    with pytest.raises(SettingsError, match="no section \\[tiny\\]") as refusal:
        read_settings(str(path), tiny=True)
    assert refusal.value.path == str(path) and "drop --tiny" in refusal.value.fix


def test_a_recipe_that_does_not_exist_or_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such recipe") as refusal:
        read_settings("bc_smal_cpu")
    assert "bc_small_cpu.toml" in refusal.value.fix
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n", "utf-8")
    with pytest.raises(SettingsError, match="not valid TOML"):
        read_settings(str(broken))


def test_a_run_or_a_checkpoint_named_as_recipe_is_told_what_it_is_good_for(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("[run]\n", "utf-8")
    with pytest.raises(SettingsError, match="the folder of a run, not a recipe") as refusal:
        read_settings(str(tmp_path))
    assert f"{tmp_path / 'settings.toml'} -o {tmp_path} --resume" in refusal.value.fix
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"PK\x03\x04")
    with pytest.raises(SettingsError, match="a checkpoint, not a recipe") as refusal:
        read_settings(str(checkpoint))
    assert f"trainer evaluate {checkpoint}" in refusal.value.fix
    assert f"--init-from {checkpoint}" in refusal.value.fix
