"""What is refused before torch is loaded, and where a run lies that was not told where to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from demotools.cli import main as generated
from demotools.errors import DemotoolsError
from tests.terminal import in_terminal
from trainer.cli import main
from trainer.run.folder import claimed, no_checkpoint, run_folder
from trainer.run.session import resolved
from trainer.settings.models import read_settings, toml_of
from trainer.settings.user_code import foreign_names

PARTS = """
from trainer.learning.networks.small import SmallNetwork

class Mine(SmallNetwork):
    pass
"""


def typed(*arguments: str) -> Result:
    """What the command line says where torch cannot be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        return CliRunner().invoke(main, [*arguments])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEMOTOOLS_DATA", str(tmp_path))


def test_the_stores_of_all_levels_are_looked_for_before_torch_is_loaded() -> None:
    for there in ("GoToLocal", "GoToObj-small"):
        options = ["--episodes", "2", "--workers", "1", "--name", there]
        assert CliRunner().invoke(generated, ["generate", "GoToObj", *options]).exit_code == 0
    levels = "run.level=['GoToLocal','GoToObj','PutNextLocal']"
    refused = typed("run", "bc_offpolicy", "--set", levels)
    assert refused.exit_code == 1
    assert "there is no such demo store" in refused.stderr and "PutNextLocal" in refused.stderr


def test_a_small_store_that_lies_aside_is_the_one_that_auto_takes(bot_data: Path) -> None:
    # an overwrite was killed between its renames
    shutil.copytree(bot_data / "GoToLocal.zarr", ".GoToLocal-small.zarr.old")
    assert "torch is not installed" in typed("run", "bc_offpolicy").stderr
    settings, _reasons = resolved(read_settings("bc_offpolicy", ["run.device=cpu"]), Path())
    assert settings.store_names() == ["GoToLocal-small"]


def run_that_lies_there() -> None:
    Path("runs/BabyAIGoToObjPPO").mkdir(parents=True)
    Path("runs/BabyAIGoToObjPPO/last.pt").touch()


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("run nosuch", "there is no such recipe"),
        ("run ppo --set run.seedd=1", "unknown key `run.seedd`"),
        ("run ppo", "there is already a run in this folder"),
        ("run bc_small_cpu --dry-run", "there is no such demo store"),
        ("run bc_1000_demos", "there is no such demo store"),
        ("evaluate nosuch", "there is no checkpoint"),
        ("watch nosuch.pt", "there is no checkpoint"),
        ("export nosuch.pt --to onnx", "there is no checkpoint"),
        ("push nosuch hf:me/policy", "there is no checkpoint"),
        ("evaluate --policy bot --level Nope", "there is no such level"),
    ],
)
def test_what_cannot_begin_is_refused_before_torch_is_loaded(command: str, what: str) -> None:
    run_that_lies_there()
    result = typed(*command.split())
    assert result.exit_code == 1
    assert what in result.stderr


@pytest.mark.parametrize("checkpoint", ["folder", "weights.pt"])
@pytest.mark.parametrize("command", ["evaluate", "watch", "export --to onnx"])
def test_a_level_that_there_is_not_is_refused_before_torch_is_loaded(
    command: str, checkpoint: str
) -> None:
    def written(*overrides: str) -> None:
        settings = toml_of(read_settings("ppo", overrides))
        Path("folder").mkdir(exist_ok=True)
        Path("folder/last.pt").touch()
        Path("folder/settings.toml").write_text(settings, "utf-8")
        torch.save({"settings": settings, "model": torch.zeros(3)}, "weights.pt")

    written()
    arguments = [*command.split(), checkpoint, "--level"]
    assert "there is no such level" in typed(*arguments, "Nope").stderr
    assert "cannot be played" in typed(*arguments, "PutNext").stderr
    assert "torch is not installed" in typed(*arguments, "GoToObj").stderr
    written("on_policy.environment=mine:make")  # it may know a level of this name
    assert "torch is not installed" in typed(*arguments, "Nope").stderr


def test_where_several_seeds_were_trained_their_runs_are_named() -> None:
    run_that_lies_there()
    Path("runs/BabyAIGoToObjPPO").rename("runs/seed-3")
    assert no_checkpoint(Path("runs/last.pt")).fix == "name one run, such as runs/seed-3"


@pytest.mark.parametrize("option", ["--dry-run", "--overwrite", "--resume", "--tiny", "-o other"])
def test_a_run_that_lies_there_hinders_no_other(option: str) -> None:
    run_that_lies_there()
    assert "torch is not installed" in typed("run", "ppo", *option.split()).stderr


def test_of_processes_that_train_together_only_the_first_asks_for_an_empty_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_that_lies_there()
    monkeypatch.setenv("RANK", "1")
    assert "torch is not installed" in typed("run", "ppo").stderr


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "boss"),
        (["optimizer.lr=1e-3", "run.seed = 3"], "boss,lr=1e-3,seed=3"),
        (["run.seed=3", "run.seed=4"], "boss,seed=4"),
        (
            ["stages.0.repeats=2", "stages.1.repeats=3"],
            "boss,stages.0.repeats=2,stages.1.repeats=3",
        ),
        (["stages.0.off_policy.augment=['mirror', 'retype']"], "boss,augment=mirror_retype"),
        (["optimizer.max_grad_norm="], "boss,max_grad_norm="),
        (["run.wandb=babyai", "evaluation.episodes=10", "run.keep=2"], "boss"),
        (["run.name=boss", "run.seed=3"], "boss"),
        (["stages.0.off_policy.store=../../elsewhere/x.zarr"], "boss,store=.._.._elsewhere_x.zarr"),
    ],
)
def test_variants_of_a_recipe_lie_side_by_side(overrides: list[str], name: str) -> None:
    assert run_folder("boss", overrides) == Path("runs", name)


def test_the_order_of_overrides_makes_no_other_folder_and_many_make_a_short_name() -> None:
    many = [f"optimizer.option_of_the_optimizer_{number}={number}" for number in range(20)]
    first, second = run_folder("boss", many, tiny=True), run_folder("boss", [*many, "run.seed=2"])
    assert first != second
    assert max(len(first.name), len(second.name)) < 40
    two = ["run.seed=3", "optimizer.lr=1"]
    assert run_folder("boss", two) == run_folder("boss", two[::-1])


@pytest.mark.slow
def test_a_module_beside_the_recipe_is_found_from_any_working_directory(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "mine.toml"
    recipe.parent.mkdir()
    settings = read_settings("ppo", ["model.type=beside:Mine", "run.device=cpu"], tiny=True)
    assert foreign_names(settings)
    recipe.write_text(toml_of(settings), "utf-8")
    (recipe.parent / "beside.py").write_text(PARTS, "utf-8")

    def trainer(folder: str, *arguments: str) -> str:
        Path(folder).mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *arguments, "-m", "1", "-q"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    trainer("a", "run", str(recipe), "-o", str(tmp_path / "run"))
    assert "not imported" in trainer("b", "evaluate", str(tmp_path / "run"), "--episodes", "2")
    told = trainer("b", "evaluate", str(tmp_path / "run"), "--episodes", "2", "--trust")
    assert "of 2 episodes" in told
    again = trainer("b", "run", str(tmp_path / "run" / "settings.toml"), "--trust", "-o", "again")
    assert again == "" and Path("b/again/last.pt").exists()


@pytest.mark.slow
def test_neither_training_nor_evaluation_loads_torchs_compiler_nor_looks_for_garbage_in_it() -> (
    None
):
    program = (
        "import gc, sys\n"
        "from trainer.cli import main\n"
        "for command in ('run ppo --tiny -o run', 'evaluate run --episodes 1 -m 1'):\n"
        "    main([*command.split(), '-q'], standalone_mode=False)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 50_000\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize("option", ["", "-q"])
def test_a_terminal_is_told_when_torch_takes_long_to_load(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("torch.py").write_text("import time\ntime.sleep(1)\nraise ImportError\n", "utf-8")
    program = "import trainer.cli as cli\ncli._PATIENCE_SECONDS = 0.0\ncli.main()\n"
    Path("impatient.py").write_text(program, "utf-8")
    Path("w.pt").touch()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with in_terminal("impatient", "evaluate", "w.pt", *option.split()) as (process, terminal):
        assert process.wait(60) == 1
        said = os.read(terminal, 65536)
    assert said.startswith(b"error: " if option else b"loading torch\r\n")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("evaluate x.pt --seeds 5 --episodes 20", "counts them: give only one"),
        ("evaluate x.pt --level GoTo --level GoToObj", "one level a call, not GoTo, GoToObj"),
        ("watch x.pt -n 3 -o a.gif --level GoTo --level GoToObj", "one level a call"),
    ],
)
def test_what_would_go_unnoticed_is_refused(line: str, what: str) -> None:
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2 and what in result.output, result.output


def test_who_names_a_folder_of_runs_or_the_run_itself_is_told_what_to_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "settings.toml").write_text("", "utf-8")
    (run / "last.pt").write_bytes(b"")
    named = CliRunner().invoke(main, ["evaluate", str(tmp_path / "runs")]).output
    assert f"name one run, such as {run}" in named
    continued = CliRunner().invoke(main, ["run", str(run)]).output
    assert f"trainer run {run / 'settings.toml'} -o {run} --resume" in continued


def test_a_run_that_cannot_be_written_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(DemotoolsError) as caught,
        claimed(tmp_path / "file" / "run", new=False, overwrite=False),
    ):
        pass
    assert caught.value.path == str(tmp_path / "file" / "run")
