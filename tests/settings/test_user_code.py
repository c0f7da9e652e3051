"""A user's own parts that fail: each is a message that names the part and the cause."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trainer.cli import main

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

def constant_loss():
    return lambda model, batch, memory: LossResult(torch.zeros(()), {}, memory, 1)

def forgetful_loss():
    return lambda model, batch, memory: LossResult(model(batch, memory).logits.sum(), {}, None, 1)

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


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise KeyError('gone')", "KeyError: 'gone' (parts_"),
        ("def broken(:", "SyntaxError: "),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = '\\ud800'.encode()", "UnicodeEncodeError"),
    ],
)
@pytest.mark.parametrize(
    "override", ["losses.ppo={type='PARTS:x'}", "on_policy.environment=PARTS:x"]
)
def test_a_module_that_cannot_be_imported_is_told_with_its_cause(
    attempt: Callable[..., Result], override: str, text: str, cause: str
) -> None:
    assert_refused(attempt(override, text), "cannot be imported: ", cause, "where: type = 'parts_")


@pytest.mark.parametrize("name", [":", ".:x", "..:x", "os:", ":x", "a..b:x", "os:path.", "a b:c"])
def test_a_name_that_names_nothing_is_refused(attempt: Callable[..., Result], name: str) -> None:
    result = attempt(f"losses.ppo={{type='{name}'}}")
    assert_refused(result, f"`{name}` names nothing that can be imported")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("losses.ppo={type='PARTS:number'}", "the loss is not callable but int"),
        ("losses.ppo={type='builtins:dict'}", "the loss does not say what it takes"),
        ("losses.ppo={type='PARTS:failing'}", "OSError: the disk is gone (parts_"),
        ("losses.ppo={type='PARTS:leaving'}", "SystemExit: 0"),
        ("losses.ppo={type='PARTS:loss_of_none'}", "the loss gives NoneType, which"),
        ("losses.ppo={type='PARTS:failing_loss'}", "the loss fails: OSError: the disk is gone"),
        ("losses.ppo={type='PARTS:leaving_loss'}", "the loss fails: SystemExit: 0"),
        (
            "losses.ppo={type='PARTS:empty_loss'}",
            "NoneType, not a trainer.learning.losses.LossResult",
        ),
        ("losses.ppo={type='PARTS:number_loss'}", "`loss` that is not a tensor"),
        ("losses.ppo={type='PARTS:wide_loss'}", "`loss` that is not a tensor"),
        ("losses.ppo={type='PARTS:constant_loss'}", "without a gradient"),
        ("losses.ppo={type='PARTS:forgetful_loss'}", "a memory that is not like"),
        ("model={type='PARTS:failing'}", "the network refuses its settings: OSError"),
        ("model={type='PARTS:loss_of_none'}", "the network refuses its settings: TypeError"),
        ("model={type='PARTS:environment_of_five'}", "the network gives int, not a torch.nn"),
        ("model={type='PARTS:Forgetful'}", "no method `initial_memory`"),
        ("optimizer.schedule={type='PARTS:environment_of_none'}", "the schedule gives NoneType"),
        ("on_policy.environment=PARTS:number", "the environment is not callable but int"),
        ("on_policy.environment=PARTS:environment_of_none", "the environment gives NoneType"),
        ("on_policy.environment=PARTS:environment_of_five", "the environment gives int"),
        ("on_policy.environment=PARTS:of_two", "cannot be made: TypeError: "),
        ("on_policy.environment=PARTS:failing", "cannot be made: OSError: the disk is gone"),
        ("on_policy.environment=PARTS:leaving", "cannot be made: SystemExit: 0"),
    ],
)
def test_a_part_that_fails_or_gives_something_else_is_told_with_its_cause(
    attempt: Callable[..., Result], override: str, what: str
) -> None:
    assert_refused(attempt(override), what, "parts_" if "PARTS" in override else "")


def test_a_part_may_lie_inside_a_class(attempt: Callable[..., Result]) -> None:
    result = attempt("losses.ppo={type='PARTS:Deep.ppo', clip=0.2}")
    assert result.exit_code == 0, result.output
