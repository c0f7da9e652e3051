"""A user's own parts that fail: with their own traceback, and a note of the setting."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import trainer
from demotools.errors import SettingsError
from trainer.cli import main
from trainer.learning.building import LOSSES, NETWORKS, OPTIMIZERS, SCHEDULES, build_schedule
from trainer.run.session import dry_run
from trainer.settings.built_in import KEYS
from trainer.settings.models import LEVELS, SUBGOALS, Named
from trainer.settings.user_code import build, users_code

PARTS = """
import sys
import torch
from torch import nn
from trainer.learning.losses import LossResult
from trainer.learning.networks.small import SmallNetwork
from trainer.learning.losses import PPO

number = 5
loss_of_none = lambda: None
environment_of_none = lambda level: None
environment_of_five = lambda level: 5
of_two = lambda level, seed: None

class Deep:
    ppo = PPO

def failing(*arguments, **options):
    raise OSError("the disk is gone")

def leaving(*arguments, **options):
    sys.exit(0)

def failing_loss():
    return failing

def leaving_loss():
    return leaving

def empty_loss():
    return lambda model, batch, memory: None

def number_loss():
    return lambda model, batch, memory: LossResult(1.0, {}, memory, 1)

def wide_loss():
    return lambda model, batch, memory: LossResult(model(batch, memory).logits, {}, memory, 1)

class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradients):
        raise OSError("the disk is gone")

def failing_backward():
    def loss(model, batch, memory):
        output = model(batch, memory)
        return LossResult(Backward.apply(output.logits).mean(), {}, output.memory, 1)
    return loss

def constant_loss():
    return lambda model, batch, memory: LossResult(torch.zeros(()), {}, memory, 1)

def forgetful_loss():
    return lambda model, batch, memory: LossResult(model(batch, memory).logits.sum(), {}, None, 1)

def of_one(vocabulary_size):
    return 5

class Nameless(SmallNetwork):
    def initial_memory(self, rollouts):
        return torch.zeros(3, 3)

class Bare(SmallNetwork):
    def forward(self, batch, memory):
        return super().forward(batch, memory).logits

class Forgetful(nn.Module):
    def __init__(self, vocabulary_size):
        super().__init__()
"""
_numbers = itertools.count()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`attempt("losses.ppo={type='PARTS:x'}", text)` begins a run with the user's module PARTS."""
    monkeypatch.chdir(tmp_path)

    def run(override: str, text: str = PARTS) -> Result:
        module = f"parts_{next(_numbers)}"  # what was imported once stays
        Path(f"{module}.py").write_text(text, "utf-8")
        override = override.replace("PARTS", module)
        arguments = ["run", "ppo", "--tiny", "-m", "1", "-q", "-o", "run", "--set", override]
        return CliRunner().invoke(main, [*arguments, "--set", "run.device=cpu"])

    return run


def assert_refused(result: Result, *what: str) -> None:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output and "next:" in result.output
    for text in what:
        assert text in result.output
    assert not Path("run").exists()


def assert_raised(result: Result, kind: type[BaseException], what: str, setting: str) -> None:
    """The user's own error came through, with a note that names the setting."""
    assert type(result.exception) is kind, result.output
    assert what in str(result.exception)
    assert any(setting in note for note in getattr(result.exception, "__notes__", []))
    assert not Path("run").exists()


SETTINGS = {
    "losses.ppo={type='PARTS:x'}": "losses.ppo.type = 'parts_",
    "on_policy.environment=PARTS:x": "on_policy.environment = 'parts_",
}


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("raise KeyError('gone')", KeyError, "gone"),
        ("def broken(:", SyntaxError, "invalid syntax"),
        ("import sys\nsys.exit(0)", RuntimeError, "this code ended the program: exit(0)"),
        ("import no_such_module", ModuleNotFoundError, "No module named 'no_such_module'"),
        ("import os\nos.nothing", AttributeError, "nothing"),
        ("x = '\\ud800'.encode()", UnicodeEncodeError, "surrogates"),
        ("raise OSError('the disk is gone')", OSError, "the disk is gone"),
    ],
)
@pytest.mark.parametrize("override", SETTINGS)
def test_a_module_that_fails_while_it_is_imported_raises_its_own_error(
    attempt: Callable[..., Result], override: str, text: str, kind: type[Exception], what: str
) -> None:
    assert_raised(attempt(override, text), kind, what, SETTINGS[override])


@pytest.mark.parametrize("override", SETTINGS)
@pytest.mark.parametrize("text", ["y = 5", None])
def test_a_module_or_a_name_that_is_not_there_is_refused(
    attempt: Callable[..., Result], override: str, text: str | None
) -> None:
    if text is None:
        override = override.replace("PARTS", "no.such")
    result = attempt(override, text or "")
    where = SETTINGS[override.replace("no.such", "PARTS")].rpartition("'")[0]
    assert_refused(result, "cannot be imported: ", f"where: {where}")


def test_the_traceback_of_the_users_code_is_shown_and_last_the_setting(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss():\n    raise OSError('the disk is gone')\n")
    line = ["run", "ppo", "--tiny", "-m", "1", "--set", "losses.ppo={type='mine:loss'}"]
    result = subprocess.run(
        [sys.executable, "-m", "trainer", *line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert 'mine.py", line 2, in loss' in result.stderr
    assert result.stderr.endswith(
        "OSError: the disk is gone\n"
        "raised by your own code, named by the setting losses.ppo.type = 'mine:loss'\n"
    )


@pytest.mark.parametrize("name", [":", ".:x", "..:x", "os:", ":x", "a..b:x", "os:path.", "a b:c"])
def test_a_name_that_names_nothing_is_refused(attempt: Callable[..., Result], name: str) -> None:
    result = attempt(f"losses.ppo={{type='{name}'}}")
    assert_refused(result, f"`{name}` is not a name that can be imported")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("losses.ppo={type='PARTS:number'}", "the loss is int, which is not callable"),
        ("losses.ppo={type='PARTS:loss_of_none'}", "the loss returns NoneType, which"),
        ("model={type='PARTS:of_one'}", "the network returns int, not a torch.nn"),
        ("model={type='PARTS:Forgetful'}", "no method `initial_memory`"),
        ("optimizer.schedule={type='PARTS:environment_of_none'}", "the schedule returns NoneType"),
        ("on_policy.environment=PARTS:number", "the environment is int, which is not callable"),
        ("on_policy.environment=PARTS:environment_of_none", "the environment is NoneType"),
        ("on_policy.environment=PARTS:environment_of_five", "the environment is int"),
        ("losses.ppo={type='PARTS:empty_loss'}", "its interface: it returns NoneType, not a Loss"),
        ("losses.ppo={type='PARTS:number_loss'}", "the loss of its result is float, not a"),
        ("losses.ppo={type='PARTS:wide_loss'}", "the loss has shape ("),
        ("losses.ppo={type='PARTS:constant_loss'}", "the loss has no gradient"),
        ("losses.ppo={type='PARTS:forgetful_loss'}", "the memory of its result is NoneType"),
        ("model={type='PARTS:loss_of_none'}", "takes 0 positional arguments"),
        ("model={type='PARTS:Nameless'}", "not (4, size)"),
        ("model={type='PARTS:Bare'}", "it returns Tensor, not (logits, values, memory)"),
        ("on_policy.environment=PARTS:of_two", "<lambda>() missing 1 required positional"),
    ],
)
def test_a_part_of_another_kind_than_its_setting_wants_is_refused(
    attempt: Callable[..., Result], override: str, what: str
) -> None:
    result = attempt(override)
    assert_refused(result, what, "parts_")
    assert ("bug in the trainer" in result.output) == ("fails: " in result.output)
    if "does not follow its interface" in result.output or "fails: " in result.output:
        assert re.search(r"where: .* in .*parts_\d+\.py\n", result.output)


@pytest.mark.parametrize(
    ("override", "kind", "what"),
    [
        ("losses.ppo={type='builtins:dict'}", ValueError, "no signature found"),
        ("losses.ppo={type='PARTS:failing'}", OSError, "the disk is gone"),
        ("losses.ppo={type='PARTS:leaving'}", RuntimeError, "exit(0)"),
        ("losses.ppo={type='PARTS:failing_loss'}", OSError, "the disk is gone"),
        ("losses.ppo={type='PARTS:leaving_loss'}", RuntimeError, "exit(0)"),
        ("losses.ppo={type='PARTS:failing_backward'}", OSError, "the disk is gone"),
        ("model={type='PARTS:failing'}", OSError, "the disk is gone"),
        ("optimizer={type='PARTS:failing', lr=0.1}", OSError, "the disk is gone"),
        ("optimizer.schedule={type='PARTS:failing'}", OSError, "the disk is gone"),
        ("on_policy.environment=PARTS:failing", OSError, "the disk is gone"),
        ("on_policy.environment=PARTS:leaving", RuntimeError, "exit(0)"),
    ],
)
def test_a_part_that_fails_raises_its_own_error(
    attempt: Callable[..., Result], override: str, kind: type[Exception], what: str
) -> None:
    key = override.replace("={type", ".type").partition("=")[0]
    # a backward pass is not of one part alone: its note lists the settings, as TOML
    quote = '"' if "backward" in override else "'"
    name = "builtins:dict" if "builtins" in override else "parts_"
    assert_raised(attempt(override), kind, what, f"{key} = {quote}{name}")


OURS = Path(trainer.__file__).parent
LOOP = f"{OURS}/run/loop.py"


def told(code: str, file: str, name: str = "json:loads") -> Exception:
    """What becomes of an error in this code of this file, where a setting names `name`."""
    block = users_code("model.type", name)
    block.__enter__()
    try:
        exec(compile(code, file, "exec"))
    except (AttributeError, ArithmeticError, ValueError) as error:
        # without the line above
        raised = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
    try:
        block.__exit__(type(raised), raised, raised.__traceback__)
    except SettingsError as error:
        return error
    return raised


def test_a_mistake_that_may_be_the_trainers_is_told_as_such_with_its_line() -> None:
    slip = told("\nNone.step", LOOP)
    assert isinstance(slip, SettingsError)
    assert slip.what.endswith("no attribute 'step' (trainer/run/loop.py, line 2)")
    assert slip.fix.endswith("this is a bug in the trainer: please report it")
    other = told("\n1 / 0", LOOP)
    assert other.__notes__ == [
        "raised in trainer/run/loop.py, line 2, while using your own code, named by the setting "
        "model.type = 'json:loads'"
    ]


def test_code_in_a_folder_named_like_ours_is_the_users() -> None:
    theirs = told("raise ValueError('mine')", f"{OURS}_of_mine/part.py")
    assert type(theirs) is ValueError and theirs.__notes__[0].startswith("raised by your")


def test_code_of_ours_that_is_named_in_full_is_not_called_the_users() -> None:
    error = told("1 / 0", LOOP, LEVELS)
    assert type(error) is ZeroDivisionError and not hasattr(error, "__notes__")


def test_a_part_may_lie_inside_a_class(attempt: Callable[..., Result]) -> None:
    result = attempt("losses.ppo={type='PARTS:Deep.ppo', clip=0.2}")
    assert result.exit_code == 0, result.output


def test_what_is_known_of_our_parts_without_torch_is_what_they_are() -> None:
    assert KEYS["network"].keys() == {"auto", *NETWORKS}
    assert KEYS["schedule"].keys() == set(SCHEDULES)
    assert KEYS["loss"].keys() == LOSSES.keys()
    assert KEYS["optimizer"].keys() == OPTIMIZERS.keys()

    def keys(maker: Callable[..., object], given: int) -> set[str]:
        return set(list(inspect.signature(maker).parameters)[given:])

    for name, network in NETWORKS.items():
        assert keys(network, 1) | {"words"} == set(KEYS["network"][name])
    for name, loss in LOSSES.items():
        assert keys(loss, 2 if name == SUBGOALS else 0) == set(KEYS["loss"][name])
    for name, optimizer in OPTIMIZERS.items():  # an older torch may have fewer
        assert keys(optimizer, 1) <= set(KEYS["optimizer"][name])
    weights = torch.optim.SGD([torch.zeros(1)])
    for name in SCHEDULES:
        with pytest.raises(SettingsError) as refused:
            build_schedule(Named.model_validate({"type": name, "x": 1}), weights, {"updates": 9})
        listed = re.findall(r"\w+", refused.value.fix.partition("valid keys are ")[2])
        assert set(listed) == set(KEYS["schedule"][name])


ALMOST = """
class Loss:
    def loss(self, model, batch, memory): pass

def called_too_soon(model, batch, memory): pass

class Batches:
    def __init__(self, dataset, rollouts): pass

RATE = 5
"""


@pytest.mark.parametrize(
    ("key", "name", "what"),
    [
        ("losses.ppo", "MODULE.Loss", "did you mean `MODULE:Loss`?"),
        ("losses.ppo", "MODULE.py:Loss", "write it without .py: `MODULE:Loss`"),
        ("losses.ppo", "MODULE:loss", "correct the name; did you mean Loss?"),
        ("losses.ppo", "MODULE:RATE.loss", "put the module next to the recipe, or correct"),
        ("losses.ppo", "MODULE:xyzzy", "put the module next to the recipe, or correct the name"),
        ("losses.ppo", "MODULE:Loss", "is then called as `loss(model, batch, memory)`"),
        ("losses.ppo", "MODULE:called_too_soon", "requires `model`, `batch`, `memory`, which"),
        ("optimizer", "torch.optim.Adam", "did you mean `torch.optim:Adam`?"),
        ("stages.0.off_policy.iterator", "MODULE:Batches", "requires `dataset`, which"),
        ("stages.0.off_policy.iterator", "MODULE:Batches", "stores, rollouts, rollout_len, seed"),
    ],
)
def test_a_part_as_other_programs_have_it_is_told_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    module = f"almost_{next(_numbers)}"
    Path(f"{module}.py").write_text(ALMOST, "utf-8")
    name = name.replace("MODULE", module)
    given = {"rollouts": 2} if "iterator" in key else {}
    with pytest.raises(SettingsError) as caught:
        build(f"{key}.type", name, given, {})
    assert what.replace("MODULE", module) in str(caught.value)
    assert "bug in the trainer" not in str(caught.value)


def test_who_looks_for_an_array_that_a_batch_lacks_is_told_those_it_has() -> None:
    batch = {"cells": 1, "masks": 2}
    with (
        pytest.raises(KeyError) as caught,
        users_code("model.type", "json:loads", batch),
    ):
        raise KeyError("minigrid_ego_image")
    assert caught.value.__notes__[0] == "the batch holds cells, masks"


@pytest.mark.parametrize("looked_for", [(), (["cells"],), (7,), ("cells",)])
def test_a_key_error_of_something_else_stays_what_it_is(looked_for: tuple[object, ...]) -> None:
    with (
        pytest.raises(KeyError) as caught,
        users_code("model.type", "json:loads", {"cells": 1}),
    ):
        raise KeyError(*looked_for)
    assert caught.value.args == looked_for
    assert not any("the batch holds" in note for note in caught.value.__notes__)


ATTACHED = """
import torch

class Net(torch.nn.Module):
    def __init__(self, vocabulary_size):
        super().__init__()
        self.cell = torch.nn.GRUCell(49, 8)
        self.head = torch.nn.Linear(8, 8)

    def initial_memory(self, rollouts):
        return torch.zeros(rollouts, 8)

    def forward(self, batch, memory):
        outputs = []
        for cells, mask in zip(batch["cells"].flatten(2).float(), batch["masks"]):
            memory = self.cell(cells, memory * mask[:, None])
            outputs.append(self.head(memory))
        output = torch.stack(outputs)
        return output[..., :7], output[..., 7], memory
"""


def test_a_network_may_return_its_memory_with_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_store: Callable[..., object]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store(lengths=[5] * 8)
    name = f"attached_{next(_numbers)}"
    Path(f"{name}.py").write_text(ATTACHED, "utf-8")
    line = f"run bc_small_cpu --tiny -m 1 -q -o run --data-dir . --set model.type={name}:Net"
    unset = ("stages.0.off_policy.augment=[]", "on_policy=", "evaluation=", "stages.0.losses=")
    sets = [word for one in unset for word in ("--set", one)]
    result = CliRunner().invoke(main, [*line.split(), *sets])
    assert result.exit_code == 0, result.output


def test_a_loss_that_no_stage_uses_is_mentioned() -> None:
    told = dry_run("ppo", overrides=["losses.mine.type=a2c"], tiny=True, workers=1)
    assert "# no stage uses losses.mine\n" in told
    assert "uses losses.ppo" not in told
