"""Runs that begin with the weights of another: cloning, then PPO from the checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from demotools.babyai.vocabulary import WORDS
from trainer.cli import main
from trainer.learning.networks.small import SmallNetwork
from trainer.run.checkpoint import read_checkpoint
from trainer.run.export import export_policy
from trainer.run.folder import seed_runs
from trainer.run.initial import take_weights
from trainer.run.log import read_log
from trainer.run.published import write_policy
from trainer.run.state import Run, new_run
from trainer.settings.models import read_settings, toml_of

PAGE = Path(__file__).parents[2] / "docs/pipelines.md"
TINY = ("--tiny", "-m", "1", "--set", "run.device=cpu", "--set", "evaluation.episodes=2")
STILL = ("--set", "optimizer.lr=1e-30")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clone(bot_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cloned run, only to be read."""
    folder = tmp_path_factory.mktemp("runs") / "clone"
    words = ["bc_small_cpu", *TINY, "-o", str(folder), "--data-dir", str(bot_data)]
    result = CliRunner().invoke(main, ["run", *words])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(bot_data: Path, tmp_path: Path) -> Callable[..., Result]:
    """`run("ppo", "-o", "a")` trains a little; folders are under the test's own."""

    def trainer_run(*words: str) -> Result:
        here = Path.cwd()
        os.chdir(tmp_path)
        try:
            return CliRunner().invoke(main, ["run", *words, *TINY, "--data-dir", str(bot_data)])
        finally:
            os.chdir(here)

    return trainer_run


def weights(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder, trust=True).model


def rewritten(clone: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the clone's checkpoint in which something was changed."""
    content = torch.load(clone / "last.pt", weights_only=True)
    change(content)
    target.mkdir()
    torch.save(content, target / "last.pt")
    return target


def begun(*overrides: str, words: tuple[str, ...] = WORDS) -> Run:
    small = ("run.device=cpu", "model.type=small", "run.seed=7")
    return new_run(read_settings("ppo", [*small, *overrides], tiny=True), {}, words, Path())


def test_the_two_lines_of_the_page_clone_and_go_on_by_ppo(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    section = PAGE.read_text("utf-8").split("## Cloning, then PPO from the weights\n")[1]
    block = re.search(r"```\n(.*?)```", section, re.S)
    assert block is not None
    lines = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    assert len(lines) == 2
    # the clone learns: both draw the same weights, which must not be those that are compared
    for learns, (program, command, *rest) in zip((True, False), lines, strict=True):
        assert (program, command) == ("trainer", "run")
        result = run(*rest, *(() if learns else STILL))
        assert result.exit_code == 0, result.output
    count = sum(one.numel() for one in SmallNetwork(len(WORDS)).parameters())
    cloned = tmp_path / "runs/clone/last.pt"
    assert f"network: small, as in {cloned}" in result.output
    assert (
        f"weights: all {count:,} of {cloned}, trained on GoToLocal for 256 demo steps and "
    ) in result.output
    assert "optimizer, schedule and counters start afresh" in result.output
    first, second = weights(tmp_path / "runs/clone"), weights(tmp_path / "runs/ppo")
    # with such a rate the weights of the second stay what they were taken as
    assert all(torch.equal(first[name], second[name]) for name in first)
    begins = read_log(tmp_path / "runs/ppo")[0]
    assert begins["demo_steps"] == 0 and begins["env_steps"] == 32


def test_a_run_that_began_with_weights_is_resumed_without_them_and_keeps_their_name(
    run: Callable[..., Result], clone: Path, tmp_path: Path
) -> None:
    more = rewritten(clone, tmp_path / "more", lambda content: content["words"].append("giraffe"))
    grown = torch.load(more / "last.pt", weights_only=True)
    embedding = grown["model"]["instruction.words.weight"]
    grown["model"]["instruction.words.weight"] = torch.cat([embedding, embedding[-1:]])
    torch.save(grown, more / "last.pt")
    line = ("ppo", "-o", "a", "--set", "run.deterministic=true")
    assert run(*line, "--init-from", "more").exit_code == 0
    shutil.rmtree(more)
    resumed = run(*line, "--resume", "--set", "stages.0.max_env_steps=192")
    assert resumed.exit_code == 0, resumed.output
    assert read_checkpoint(tmp_path / "a").parsed().run.init_from == str(more)
    assert read_checkpoint(tmp_path / "a").words == (*WORDS, "giraffe")
    elsewhere = run(*line, "--resume", "--init-from", "elsewhere")
    assert elsewhere.exit_code == 1 and "`run.init_from`" in elsewhere.output


def test_seeds_that_have_begun_keep_what_they_began_with(clone: Path, tmp_path: Path) -> None:
    for seed, begun in ((1, clone), (2, "")):
        folder = tmp_path / f"a/seed-{seed}"
        folder.mkdir(parents=True)
        settings = read_settings("ppo", [f"run.init_from={begun}"])
        (folder / "settings.toml").write_text(toml_of(settings), "utf-8")
        (folder / "last.pt").touch()

    def begins(*, resume: bool, init_from: str | None = None) -> list[str]:
        runs = seed_runs(
            "1-3", "ppo", tiny=True, init_from=init_from, output=tmp_path / "a", resume=resume
        )
        return [folder.name for folder, own in runs if f'run.init_from="{clone}"' in own]

    assert begins(resume=True) == ["seed-3"]
    assert begins(resume=False) == begins(resume=True, init_from="other") == []


@pytest.mark.slow
def test_a_seed_that_is_begun_later_begins_with_the_weights_of_the_others(
    run: Callable[..., Result], clone: Path, tmp_path: Path
) -> None:
    line = ("ppo", "-o", "a", "-q", *STILL)
    assert run(*line, "--seeds", "1", "--init-from", str(clone)).exit_code == 0
    more = run(*line, "--seeds", "1-2", "--resume")
    assert more.exit_code == 0, more.output
    first, second = weights(clone), weights(tmp_path / "a/seed-2")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_handed_on_know_for_how_many_steps_they_were_trained(
    clone: Path, tmp_path: Path
) -> None:
    alone, pushed = tmp_path / "policy.pt", tmp_path / "pushed"
    export_policy(clone, "weights", alone)
    saved = read_checkpoint(clone)
    said = take_weights(begun(), saved)
    assert ", trained on GoToLocal for 256 demo steps and " in said
    steps = {"demo_steps": 256, "env_steps": saved.training["progress"]["env_steps"]}
    pushed.mkdir()
    write_policy(
        pushed,
        settings=saved.settings,
        words=saved.words,
        model=saved.model,
        versions={},
        steps=steps,
    )
    for place in (alone, pushed):
        assert read_checkpoint(place).steps() == steps
        assert (
            take_weights(begun(), read_checkpoint(place))
            .replace(str(alone), str(saved.path))
            .replace(str(pushed / "model.safetensors"), str(saved.path))
            == said
        )
    second = rewritten(
        clone,
        tmp_path / "second",
        lambda c: c.update(settings=c["settings"].replace("[run]", '[run]\ninit_from = "first"')),
    )
    assert " env steps after those of first; " in take_weights(begun(), read_checkpoint(second))
    older = rewritten(clone, tmp_path / "older", lambda c: c.update(training={}))
    anybodys = rewritten(clone, tmp_path / "anybodys", lambda c: c["training"].update(progress=5))
    for folder in (older, anybodys):
        told = take_weights(begun(), read_checkpoint(folder))
        assert ", trained on GoToLocal for an unknown number of steps; " in told
    zero = rewritten(
        clone,
        tmp_path / "zero",
        lambda c: c["training"]["progress"].update(demo_steps=0, env_steps=-1),
    )
    assert ", trained on GoToLocal for no steps; " in take_weights(begun(), read_checkpoint(zero))


def test_weights_alone_are_not_resumed_from(
    run: Callable[..., Result], clone: Path, tmp_path: Path
) -> None:
    shutil.copytree(clone, tmp_path / "a")
    export_policy(clone, "weights", tmp_path / "a/last.pt", overwrite=True)
    result = run("bc_small_cpu", "-o", "a", "--resume", "--set", "stages.0.max_demo_steps=512")
    assert result.exit_code == 1 and "this has only weights" in result.output


def test_words_that_the_weights_lack_begin_as_drawn(clone: Path) -> None:
    checkpoint = read_checkpoint(clone)
    run = begun(words=(*WORDS, "giraffe", "gnu"))
    drawn = {name: values.clone() for name, values in run.network.state_dict().items()}
    said = take_weights(run, checkpoint)
    assert "random for 2 new words: giraffe, gnu;" in said
    for name, values in run.network.state_dict().items():
        known = checkpoint.model[name]
        assert torch.equal(values[: len(known)], known)
        assert torch.equal(values[len(known) :], drawn[name][len(known) :])


@pytest.mark.parametrize(
    ("change", "overrides", "what"),
    [
        (
            lambda content: content["words"].__setitem__(3, "giraffe"),
            (),
            f"different vocabulary: word 4 is `giraffe` there but `{WORDS[3]}` here",
        ),
        (lambda _: None, ("model.type=film",), "belong to the network `small`, not `film`"),
        (
            lambda _: None,
            ("model={type='small', memory=64}",),
            "`actor.0.weight` is (64, 128), not (64, 64)",
        ),
        (
            lambda _: None,
            ("model={type='auto', memory=64, instruction=128}",),
            "not (64, 64); different from theirs: model.instruction, model.memory",
        ),
        (
            lambda content: content["model"]["actor.0.bias"].fill_(torch.inf),
            (),
            "the weights `actor.0.bias` are not finite",
        ),
        (lambda content: content["model"].popitem(), (), "is missing, not ("),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    change: Callable[[dict[str, Any]], object],
    overrides: tuple[str, ...],
    what: str,
    run: Callable[..., Result],
    clone: Path,
    tmp_path: Path,
) -> None:
    other = rewritten(clone, tmp_path / "other", change)
    changed = [word for one in overrides for word in ("--set", one)]
    result = run("ppo", "-o", "a", "--init-from", "other", *changed)
    assert result.exit_code == 1, result.output
    assert what in result.output and "\n  next:  " in result.output
    assert str(other / "last.pt") in result.output
    assert not (tmp_path / "a").exists()


def test_what_the_other_run_names_is_imported_only_where_its_network_is_taken_and_trusted(
    run: Callable[..., Result], clone: Path, tmp_path: Path
) -> None:
    def foreign(content: dict[str, Any]) -> None:
        named = content["settings"].replace(
            'type = "expert_cross_entropy"', 'type = "no.such:loss"'
        )
        content["settings"] = named.replace('type = "small"', 'type = "no.such:Network"')

    rewritten(clone, tmp_path / "other", foreign)
    result = run("ppo", "-o", "a", "--init-from", "other", "--dry-run")
    assert result.exit_code == 1
    assert 'was not imported: model.type = "no.such:Network"' in result.output
    assert "no.such:loss" not in result.output
    trusted = run("ppo", "-o", "a", "--init-from", "other", "--trust")
    assert "the network cannot be imported" in trusted.output
    missing = run("ppo", "-o", "a", "--init-from", "nowhere")
    assert missing.exit_code == 1 and "there is no checkpoint" in missing.output


def test_other_settings_of_the_network_that_change_no_shape_are_told(clone: Path) -> None:
    said = take_weights(begun("model={type='small', memory=128}"), read_checkpoint(clone))
    assert "; different model.memory; " in said


def test_keys_beside_auto_hold_for_the_network_of_the_weights(
    run: Callable[..., Result], clone: Path
) -> None:
    auto = "model={type='auto', memory=128, actions=7}"
    result = run("ppo", "--init-from", str(clone), "--set", auto, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "; different model.actions, model.memory; " in result.output
    network = result.output.partition("[model]\n")[2].partition("\n\n")[0]
    assert sorted(network.splitlines()) == ["actions = 7", "memory = 128", 'type = "small"']
    strange = run("ppo", "--init-from", str(clone), "--set", "model={type='auto', endpool=true}")
    assert strange.exit_code == 1 and "unknown key `endpool`" in strange.output
