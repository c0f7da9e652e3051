"""Checkpoints and run folders of somebody else: nothing that they name is imported or run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import trainer
from demotools.errors import CheckpointError, SettingsError
from trainer.cli import main
from trainer.run.checkpoint import read_checkpoint
from trainer.run.folder import CHECKPOINT_FILE as FILE_NAME
from trainer.settings.models import SETTINGS_FILE, parsed_settings, read_settings
from trainer.settings.user_code import (
    find,
    foreign_names,
    recipe_note,
    search_noted_folders,
    search_recipe_folders,
)

RECIPE = ("ppo", "--tiny", "-m", "1", "-q", "--set", "run.device=cpu")
CANARY = "from pathlib import Path\nPath('canary').touch()\n"
pytestmark = pytest.mark.usefixtures("one_thread")

Tree = dict[str, Any]

HOSTILE: dict[str, Tree] = {
    "a command as environment": {
        "on_policy": {"environment": "subprocess:getoutput"},
        "run": {"level": "touch canary"},
    },
    "a shell as environment": {
        "on_policy": {"environment": "os:system"},
        "run": {"level": "touch canary"},
    },
    "a module as environment": {"on_policy": {"environment": "canary_module:make"}},
    "a level that a module registers": {"run": {"level": "canary_module:Level-v0"}},
    "gymnasium's own import": {
        "on_policy": {"environment": "gymnasium:make"},
        "run": {"level": "canary_module:Level-v0"},
    },
    "gymnasium's other names": {
        "on_policy": {"environment": "gymnasium:spec"},
        "run": {"level": "canary_module:Level-v0"},
    },
    "gymnasium by its path": {
        "on_policy": {"environment": "gymnasium.envs.registration:make"},
        "run": {"level": "canary_module:BabyAI-GoToObj-v0"},
    },
    "our own packages, misused": {
        "on_policy": {"environment": "demotools.workers.processes:os.system"},
        "run": {"level": "touch canary"},
    },
    "a program as network": {
        "model": {
            "type": "os:spawnvp",
            "file": "touch",
            "args": ["touch", "canary"],
        }
    },
    "a module as network": {"model": {"type": "canary_module:Network"}},
    "a download as network": {"model": {"type": "torch.hub:load", "model": "canary"}},
    "a compiler as network": {"model": {"type": "torch.utils.cpp_extension:load"}},
    "a module as optimizer": {"optimizer": {"type": "canary_module:Optimizer"}},
    "torch, misused as optimizer": {"optimizer": {"type": "torch.optim:torch.hub.load"}},
    "torch's function as optimizer": {"optimizer": {"type": "torch.optim:sys.exit"}},
    "a module as schedule": {"optimizer": {"schedule": {"type": "canary_module:Schedule"}}},
    "torch, misused as schedule": {
        "optimizer": {"schedule": {"type": "torch.optim.lr_scheduler:warnings.warn"}}
    },
    "a class of torch that is none": {
        "optimizer": {"schedule": {"type": "torch.optim.lr_scheduler:Counter"}}
    },
    "a module as loss": {"losses": {"ppo": {"type": "canary_module:Loss"}}},
    "an unused loss": {"losses": {"other": {"type": "os:system"}}},
    "a name deep inside": {
        "optimizer": {"type": "torch.optim:NAdam", "part": {"parts": ["canary_module:Part"]}}
    },
    "a script beside": {"model": {"type": "canary_module:a.b.c"}},
}


def merged(tree: Tree, changes: Tree) -> Tree:
    """The tree with other values in it."""
    for key, value in changes.items():
        tree[key] = merged(tree.get(key, {}), value) if isinstance(value, dict) else value
    return tree


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, only to be read."""
    folder = tmp_path_factory.mktemp("run") / "a"
    result = CliRunner().invoke(main, ["run", *RECIPE, "-o", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, beside a module that tells when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("canary_module.py").write_text(CANARY, "utf-8")
    monkeypatch.delitem(sys.modules, "canary_module", raising=False)
    return Path(shutil.copytree(finished, tmp_path / "a"))


def poisoned(folder: Path, changes: Tree) -> str:
    """Put other settings into a run's checkpoint and settings.toml."""
    import tomli_w

    path = folder / FILE_NAME
    content = torch.load(path, weights_only=True)
    tree = read_settings(str(folder / "settings.toml")).model_dump(
        exclude_none=True, mode="json", by_alias=True
    )
    text = tomli_w.dumps(merged(tree, changes))
    content["settings"] = text
    torch.save(content, path)
    (folder / "settings.toml").write_text(text, "utf-8")
    return text


def assert_refused(result: Result) -> None:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert "names code from outside the trainer" in result.output, result.output
    assert "--trust" in result.output and "Traceback" not in result.output
    assert not Path("canary").exists()


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=list(HOSTILE))
def test_nothing_that_a_checkpoint_names_is_imported_or_run(folder: Path, changes: Tree) -> None:
    poisoned(folder, changes)
    commands = [
        ("evaluate", "a", "--episodes", "1", "-m", "1", "-q"),
        ("evaluate", "a", "--level", "GoToObj", "--episodes", "1", "-m", "1", "-q"),
        ("evaluate", "a", "--policy", "bot", "--episodes", "1", "-m", "1", "-q"),
        ("watch", "a", "--episodes", "1", "-q"),
        ("watch", "a", "--level", "GoToObj", "--episodes", "1", "-q"),
        ("run", "a/settings.toml", "--resume", "-o", "a", "-q"),
        ("run", "a/settings.toml", "--dry-run"),
        ("run", "a/settings.toml", "-o", "b", "-q"),
    ]
    for command in commands:
        assert_refused(CliRunner().invoke(main, [*command]))
    with pytest.raises(CheckpointError, match="names code from outside the trainer"):
        trainer.load_policy("a")
    # a recipe of the user's own is not changed by what somebody's checkpoint says
    result = CliRunner().invoke(main, ["run", *RECIPE, "-o", "a", "--resume"])
    assert result.exit_code == 1, result.output
    # `model.type = "auto"` would take the network that the checkpoint names
    taken = "names code from outside the trainer" if "model" in changes else "different settings"
    assert taken in result.output, result.output
    CliRunner().invoke(main, ["report", "a", "-o", "report.html", "-q"])
    CliRunner().invoke(main, ["plot", "a", "-o", "curve.png", "-q"])
    assert not Path("canary").exists()


def test_what_is_trusted_is_imported(folder: Path) -> None:
    poisoned(folder, {"model": {"type": "canary_module:Network"}})
    with pytest.raises(SettingsError, match="the network cannot be imported"):
        trainer.load_policy("a", trust=True)
    assert Path("canary").exists()


def test_a_trusted_environment_is_played(folder: Path) -> None:
    Path("canary_module.py").write_text(
        CANARY + "from demotools.recording.environment import make_environment as make\n", "utf-8"
    )
    poisoned(folder, {"on_policy": {"environment": "canary_module:make"}})
    for command in (["evaluate", "-m", "1"], ["watch"]):
        arguments = [*command, "a", "--episodes", "1", "-q", "--trust"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"type": "torch.optim:RAdam"}},
        {"optimizer": {"schedule": {"type": "torch.optim.lr_scheduler:StepLR", "step_size": 3}}},
        {"on_policy": {"environment": "gymnasium:make"}, "run": {"level": "BabyAI-GoToObj-v0"}},
        {"run": {"wandb": "team:project", "name": "a:b"}},
    ],
)
def test_names_of_torch_and_minigrid_need_no_trust(folder: Path, changes: Tree) -> None:
    poisoned(folder, changes)
    result = CliRunner().invoke(main, ["evaluate", "a", "--episodes", "1", "-m", "1", "-q"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("level", ["canary_module:BabyAI-GoToObj-v0", "../GoToObj", "GoToObj\n"])
def test_a_level_that_is_no_plain_name_is_refused(folder: Path, level: str) -> None:
    poisoned(folder, {"run": {"level": level}})
    for command in ("evaluate", "watch"):
        for arguments in (["a"], ["a", "--level", level]):
            result = CliRunner().invoke(main, [command, *arguments, "--episodes", "1", "-q"])
            assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    assert not Path("canary").exists()


def test_every_text_of_the_settings_counts_as_a_name_of_code_unless_it_is_known_to_be_plain() -> (
    None
):
    tree = read_settings("bc_and_ppo").model_dump(exclude_none=True, mode="json", by_alias=True)
    changed = parsed_settings(merged(tree, {"model": {"more": [{"deep": "os:system"}]}}), "x")
    assert foreign_names(changed) == ['model.more.0.deep = "os:system"']


def console_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`trainer` as it is installed, which does not search the working directory."""
    code = "import sys; sys.path.remove(''); from trainer.__main__ import run; run()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(trainer.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


STRAYS = ("triton", "tabulate", "wandb", "cv2", "pygments", "sympy_plots", "ppo", "moviepy")


@pytest.mark.slow
def test_modules_that_lie_in_the_working_directory_by_chance_are_not_imported(
    tmp_path: Path,
) -> None:
    for name in STRAYS:
        (tmp_path / f"{name}.py").write_text(f"open('canary-{name}', 'w')\n", "utf-8")
    result = console_script(tmp_path, "run", *RECIPE, "-o", "run")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("canary-*"))


def test_a_module_beside_the_recipe_wins_and_strays_stay_strays(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "mine.toml"
    recipe.parent.mkdir()
    text = (Path(trainer.__file__).parent / "recipes" / "ppo.toml").read_text("utf-8")
    recipe.write_text(text, "utf-8")
    # pyclbr exists in Python's library too
    (recipe.parent / "pyclbr.py").write_text(
        "from demotools.recording.environment import make_environment\n"
        "def make(level):\n"
        "    open('made', 'w')\n"
        "    return make_environment(level)\n",
        "utf-8",
    )
    (tmp_path / "triton.py").write_text("open('canary-triton', 'w')\n", "utf-8")
    arguments = ["run", "recipes/mine.toml", "--tiny", "-m", "2", "-q", "-o", "run"]
    arguments += ["--set", "on_policy.environment=pyclbr:make", "--set", "run.device=cpu"]
    result = console_script(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "made").exists() and not (tmp_path / "canary-triton").exists()


def test_modules_of_the_working_directory_are_found_again_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "own_part.py").write_text("class Net:\n    pass\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    note = recipe_note(read_settings("bc_small_cpu", ["model.type=own_part:Net"]))
    (tmp_path / "run" / SETTINGS_FILE).write_text(note, "utf-8")
    monkeypatch.chdir(tmp_path.parent)
    try:
        search_noted_folders(Path(tmp_path.name, "run"))
        find("model.type", "own_part:Net", {})
    finally:
        search_recipe_folders([])


def test_a_dry_run_imports_nothing_of_a_recipe_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("canary_dry.py").write_text(CANARY, "utf-8")
    for override in (
        "on_policy.environment=canary_dry:make",
        "losses.ppo={type='canary_dry:Loss'}",
        "model={type='canary_dry:Network'}",
        "optimizer.schedule={type='canary_dry:Schedule'}",
    ):
        arguments = ["run", *RECIPE, "--dry-run", "--set", override]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "# not imported in a dry run: " in result.output
        assert "canary_dry:" in result.output
        assert ("# parameters: " in result.output) == (not override.startswith("model"))
        assert not Path("canary").exists()


def test_a_small_file_cannot_ask_for_a_large_network(folder: Path) -> None:
    poisoned(folder, {"model": {"type": "big", "memory": 8192, "channels": 8192}})
    with pytest.raises(CheckpointError, match="the weights do not fit the network `big`"):
        within(2 << 30, "import trainer; trainer.load_policy('a')")


def test_a_small_file_cannot_announce_large_weights(folder: Path) -> None:
    path = folder / FILE_NAME
    content = torch.load(path, weights_only=True)
    content["model"] = {
        name: torch.zeros((), dtype=weights.dtype).expand(weights.shape)
        for name, weights in content["model"].items()
    }
    content["training"] = {}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="larger than the file"):
        trainer.load_policy("a")


def test_a_checkpoint_that_announces_more_than_it_has_is_refused(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 50_000_000)
    with pytest.raises(CheckpointError, match="announces 50,000,000 bytes, which is more"):
        read_checkpoint(path)


def within(size_bytes: int, code: str) -> None:
    """Run code in a process that may not have more address space than it has now, plus this."""
    prelude = (
        "import resource, torch, minigrid, trainer.acting.collect, trainer.run.checkpoint\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (now + {size_bytes},) * 2)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(trainer.__file__).parents[1])},
    )
    if result.returncode:
        raise CheckpointError(result.stderr, path="", fix="")
