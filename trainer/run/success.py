"""Measures the success of a run's network, during training and at the end, and of any checkpoint.

A network has several figures: with its most probable actions (greedy), with actions sampled from
its probabilities (sampled), as it acts while learning from its own rollouts, and sampled only in
loops.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from demotools.babyai.levels import EVALUATION_SEED
from demotools.errors import DemotoolsError, from_os_error
from demotools.output import write_output
from trainer.acting.evaluate import Evaluation, evaluate_levels
from trainer.acting.policy import NetworkPolicy, Policy, RandomPolicy, Sample
from trainer.acting.vector import check_playable
from trainer.learning.building import available_device
from trainer.run.checkpoint import Checkpoint, named_checkpoint
from trainer.run.log import (
    EVALUATIONS_FILE,
    FILE_NAME,
    Group,
    appended,
    evaluation_group,
    gif_path,
)
from trainer.run.state import Progress, Run, Stage
from trainer.settings.models import LEVELS, OF_EXPERTS, Device, ModelSettings, Settings
from trainer.team import limit_threads, processors_each


def measure(run: Run) -> None:
    """Play the episodes that the section `evaluation` asks for; log and print the result."""
    settings = run.settings.evaluation
    if settings is None or run.log is None:
        return
    training = run.network.training
    run.network.eval()
    try:
        for sampled in _wanted(run.settings):
            policy = NetworkPolicy(run.network, run.words, sample=sampled)
            group = evaluation_group(sampled)
            with run.judged():
                result = evaluate_levels(
                    policy,
                    run.settings.run.level_names,
                    settings.episodes,
                    sampled=sampled,
                    make=run.settings.environment,
                    view=run.settings.model.view,
                    processes=run.workers,
                    quiet=run.quiet,
                )
                if settings.gifs:
                    _draw(run, policy, settings.gifs, group)
            run.log.write(group, result.scalars(), where=run.progress.where())
            run.say(result.text())
    finally:
        run.network.train(training)
        run.watch.shares()  # this was no time of training


def _draw(run: Run, policy: NetworkPolicy, count: int, group: Group) -> None:
    """Keep the first episodes of a measurement as GIFs, `count` of each level."""
    from trainer.acting.watched import played_episodes, watched_gif  # what draws, for few runs

    episodes = [
        episode
        for level in run.settings.run.level_names
        for episode in played_episodes(
            policy,
            level,
            range(EVALUATION_SEED, EVALUATION_SEED + count),
            make=run.settings.environment,
            view=run.settings.model.view,
            critic=trains_critic(run.settings),
            quiet=run.quiet,
        )
    ]
    for number, episode in enumerate(episodes):
        content = watched_gif([episode], quiet=run.quiet)
        path = gif_path(run.folder, group, run.progress.where(), number)
        path.parent.mkdir(exist_ok=True)
        write_output(path, content, overwrite=True)


def measure_if_due(run: Run, stage: Stage, before: Progress, *, ending: bool) -> None:
    """Measure where the last cycle went past a multiple of `evaluation.every` steps of its stage.

    Not at the end of the last stage, which is measured in any case.

    ending   whether the run has been asked to stop
    """
    settings, progress = run.settings.evaluation, run.progress
    last = progress.stage == len(run.settings.stages) - 1
    over = ending or (last and progress.finished(stage.settings))
    if settings is None or settings.every is None or over:
        return
    now, then = (one.steps_of(stage.settings) for one in (progress, before))
    if now // settings.every > then // settings.every:
        measure(run)


def _wanted(settings: Settings) -> list[Sample]:
    """Whether actions are sampled, of each measurement."""
    assert settings.evaluation is not None
    sample = settings.evaluation.sample
    if sample is None:
        sample = "both" if any(stage.losses for stage in settings.stages) else False
    return [False, True] if sample == "both" else [sample]


def trains_critic(settings: Settings) -> bool:
    """Whether any loss of a run trains the critic: all but ours that learn from an expert do."""
    used = {name for stage in settings.stages for name in stage.loss_names}
    return any(settings.losses[name].type not in OF_EXPERTS for name in used)


def measured_success(
    checkpoint: Path | Checkpoint | None,
    reference: str | None,
    level: str | None,
    episodes: int,
    *,
    seeds: Sequence[int] | None = None,
    sample: Sample = False,
    device: Device = "cpu",
    workers: int | None = None,
    trust: bool = False,
    quiet: bool = True,
) -> tuple[Evaluation, str]:
    """The success of a checkpoint, or of the reference `bot` or `random` in its place.

    checkpoint   one that was read is not read again; None: only with a reference and a level
    level        None: those that the checkpoint was trained on
    seeds        of the environment, in place of those of evaluation
    sample       draw actions, always or only in "loops"; else the most probable ones are taken
    workers      processes that play, at most; None: one per processor
    trust        whether code that the checkpoint's settings name is run
    returns      the figures, and what there is to say of them
    """
    limit_threads()
    saved = named_checkpoint(checkpoint, trust=trust) if checkpoint is not None else None
    make, trained_on, model = LEVELS, tuple[str, ...](), ModelSettings(type="auto")
    if saved is not None:
        settings = saved.parsed()
        make, trained_on = settings.environment, settings.run.level_names
        model = settings.model
    policy: Policy | Literal["bot"]
    if reference is not None:
        policy = "bot" if reference == "bot" else RandomPolicy(actions=model.actions)
    else:
        assert saved is not None
        policy = NetworkPolicy(
            saved.network().to(available_device(device, "--device")), saved.words, sample=sample
        )
    played = (level,) if level else trained_on
    for name in played if make == LEVELS else ():
        check_playable(name)
    result = evaluate_levels(
        policy,
        played,
        episodes,
        seeds=seeds,
        sampled=sample if reference is None else False,
        make=make,
        view=model.view,
        processes=workers or processors_each(),
        quiet=quiet,
    )
    said = []
    if result.first_seed < EVALUATION_SEED:
        said.append("stores and training may contain these episodes: their seeds are below 2e9")
    if saved is not None and reference is None:
        said.append(_added_to_run(saved, result, usual=seeds is None and played == trained_on))
    return result, "\n".join(filter(None, said))


def _added_to_run(saved: Checkpoint, result: Evaluation, *, usual: bool) -> str:
    """Append a line to the evaluations of the run that a checkpoint lies in; what to say of it.

    usual   whether it is what a run measures itself: its own level, and the seeds of evaluation
    """
    folder, progress = saved.path.parent, saved.training.get("progress")
    known = Progress().where()
    if not (folder / FILE_NAME).is_file() or not isinstance(progress, dict):
        return ""
    if not all(type(progress.get(name)) in (int, float) for name in known):
        return ""
    line: dict[str, Any] = {
        "group": evaluation_group(result.sampled),
        **{name: progress[name] for name in known},
        "checkpoint": saved.path.name,
        **({} if usual else {"level": result.level, "first_seed": result.first_seed}),
        **result.scalars(),
    }
    file = folder / EVALUATIONS_FILE
    try:
        with file.open("ab", buffering=0) as stream:
            appended(stream, json.dumps(line).encode() + b"\n", file)
    except (OSError, DemotoolsError) as error:
        why = error if isinstance(error, DemotoolsError) else from_os_error(error, file)
        return f"not added to the run: {why.what} ({file})"
    drawn = "" if usual else ", but not plotted: another level, or other seeds"
    return f"added to {file}{drawn}"
