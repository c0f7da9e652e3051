"""The state of a run and of its current stage, and their progress."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from demotools.errors import SettingsError
from demotools.output import progress_bar
from demotools.store.reading import Store
from trainer.acting.collect import Collector
from trainer.acting.policy import NetworkPolicy
from trainer.acting.vector import EnvironmentKind, VectorEnvironment, dealt_levels
from trainer.batch import Batch, batch_missions
from trainer.data.augment import Augmenter
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.data.own_iterator import OwnIterator
from trainer.data.sources import Source, StageSources, shared_subgoals, stage_sources
from trainer.learning.building import (
    Schedule,
    Unit,
    WeightAverage,
    build_loss,
    build_network,
    build_optimizer,
    build_schedule,
    compile_network,
    try_optimizer,
)
from trainer.learning.losses import (
    Loss,
    LossStep,
    held_by,
    loss_states,
    loss_weights,
    masked_cross_entropy,
    needs_expert,
)
from trainer.learning.networks.base import memory_of, output_of
from trainer.run.checkpoint import fitting
from trainer.run.log import Meter, RunLog, Stopwatch
from trainer.settings.models import SUBGOALS, Named, OnPolicySettings, Settings, StageSettings
from trainer.team import ALONE, Team


@dataclass
class Progress:
    """How far a run has come.

    in_cycle        whether a cycle is under way, its rollout taken, or was when a budget of demo
                    steps was spent: a larger budget goes on in the midst of it
    cycle_updates   off-policy updates done in it
    minutes         of training, over all sessions of the run
    stage_over      whether the stage's rule of early stopping has ended it
    best_hold_out   the least cross-entropy on the stage's hold-out store
    in_vain         for how many cycles there has been no better one
    best_success    of training episodes, at any checkpoint
    """

    stage: int = 0
    env_steps: int = 0
    demo_steps: int = 0
    stage_env_steps: int = 0
    stage_demo_steps: int = 0
    in_cycle: bool = False
    cycle_updates: int = 0
    updates: int = 0
    minutes: float = 0.0
    stage_over: bool = False
    best_hold_out: float = math.inf
    in_vain: int = 0
    best_success: float = 0.0

    def add(self, *, env_steps: int = 0, demo_steps: int = 0) -> None:
        """Count steps, of the run and of the stage."""
        self.env_steps += env_steps
        self.stage_env_steps += env_steps
        self.demo_steps += demo_steps
        self.stage_demo_steps += demo_steps

    def steps_of(self, stage: StageSettings) -> int:
        """Steps of the present stage's budget that are done."""
        return self.stage_env_steps if stage.axis == "env_steps" else self.stage_demo_steps

    def finished(self, stage: StageSettings) -> bool:
        """Whether the present stage's budget is spent, or its rule of early stopping has ended it.

        Environment steps are spent in whole cycles, demo steps batch by batch.
        """
        cycle_to_end = self.in_cycle and stage.axis == "env_steps"
        return self.stage_over or (self.steps_of(stage) >= stage.budget and not cycle_to_end)

    def next_stage(self) -> None:
        """The stage is done."""
        self.stage += 1
        self.stage_env_steps = self.stage_demo_steps = self.cycle_updates = 0
        self.in_cycle = False
        self.stage_over, self.best_hold_out, self.in_vain = False, math.inf, 0

    def where(self) -> dict[str, float]:
        """Where a line of the log stands."""
        return {
            "minutes": self.minutes,
            "env_steps": self.env_steps,
            "demo_steps": self.demo_steps,
        }


@dataclass
class Run:
    """All that a run holds from its first step to its last, and how far it has come.

    sources     what each stage plays of the stores
    losses      the network with all losses of a batch
    by_name     every loss that a stage uses, made once for all of them
    average     of the network's weights; None where no setting asks for it
    workers     processes that play, at most
    say         takes a line for the user
    log         None before it is open, and in a process that does not write
    restored    state of the stage that a checkpoint was taken in, until the stage takes it up
    on_save     is given the folder after every checkpoint
    """

    settings: Settings
    folder: Path
    stores: dict[str, Store]
    sources: StageSources
    words: tuple[str, ...]
    network: nn.Module
    losses: LossStep
    by_name: dict[str, Loss]
    optimizer: Optimizer
    schedule: Schedule
    progress: Progress
    team: Team
    workers: int
    quiet: bool
    say: Callable[[str], None]
    log: RunLog | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    meter: Meter = field(default_factory=Meter)
    restored: Mapping[str, Any] | None = None
    on_save: Callable[[Path], object] = lambda _folder: None
    average: WeightAverage | None = None

    def judged(self) -> AbstractContextManager[None]:
        """Inside, the network has the weights that it is measured with."""
        return self.average.in_place() if self.average is not None else nullcontext()

    @property
    def weights(self) -> list[nn.Parameter]:
        """All that is trained: of the network, then of losses that have weights."""
        return [*self.network.parameters(), *loss_weights(self.by_name)]

    @property
    def environments(self) -> range:
        """The numbers of this process's environments among those of all."""
        on_policy = self.settings.on_policy
        count = on_policy.environments if on_policy is not None else 0
        return self.team.share(count, "on_policy.environments")

    def of_names(self, names: Iterable[str]) -> dict[str, Loss]:
        """The losses of these names."""
        return {name: self.by_name[name] for name in names}

    def asks_expert(self, stage: StageSettings) -> str:
        """What in a stage's rollouts asks an expert; empty where nothing does."""
        if any(map(needs_expert, self.of_names(stage.losses).values())):
            return "cross-entropy against the expert"
        return "teacher forcing" if stage.teacher_forcing is not None else ""


def new_run(
    settings: Settings,
    stores: dict[str, Store],
    words: tuple[str, ...],
    folder: Path,
    team: Team = ALONE,
    *,
    workers: int = 1,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _line: None,
) -> Run:
    """A run at its beginning, weights drawn by its seed, on its device; nothing is written yet.

    SettingsError  a network, loss, optimizer or schedule does not exist or refuses its keys, or
                   no episode fits a filter
    """
    if settings.run.deterministic != torch.are_deterministic_algorithms_enabled():
        # it loads torch's compiler, which takes as long as all else: not without need
        torch.use_deterministic_algorithms(settings.run.deterministic)
    torch.manual_seed(settings.run.seed)
    network = build_network(settings.model.type, settings.model.options, len(words))
    network.to(settings.run.device)
    if settings.run.compile:
        compile_network(network, settings.model.type)
    by_name = made_losses(settings, network, stores)
    loss_states(by_name)  # what no checkpoint can hold is refused now
    if team.rank:
        # the same weights everywhere, but every process draws actions of its own
        torch.manual_seed(settings.run.seed + 1_000_003 * team.rank)
    if team.world > 1:
        check_minibatches(settings, team)
    plans = [stage_plan(stage, settings.on_policy) for stage in settings.stages]
    units: tuple[Unit, ...] = get_args(Unit)
    planned = {unit: sum(getattr(plan, unit) for plan in plans) for unit in units}
    weights = [*network.parameters(), *loss_weights(by_name)]
    try_optimizer(settings.optimizer, weights, planned)
    optimizer = build_optimizer(settings.optimizer, weights)
    progress = Progress()
    schedule = build_schedule(
        settings.optimizer.schedule, optimizer, planned, lambda unit: getattr(progress, unit)
    )

    def say_above_bar(line: str) -> None:
        with tqdm.external_write_mode():
            say(line)

    return Run(
        settings=settings,
        folder=folder,
        stores=stores,
        sources=stage_sources(settings, stores),
        words=words,
        network=network,
        losses=LossStep(network, bfloat16=settings.run.precision == "bfloat16"),
        by_name=by_name,
        average=WeightAverage(network, settings.run.ema) if settings.run.ema else None,
        optimizer=optimizer,
        schedule=schedule,
        progress=progress,
        team=team,
        workers=workers,
        quiet=quiet,
        say=say_above_bar,
    )


def made_losses(
    settings: Settings, network: nn.Module, stores: Mapping[str, Store]
) -> dict[str, Loss]:
    """The losses that stages use, in the order of their first use, on the run's device.

    SettingsError  one of subgoals is used with a store that has none, or a network without features
    """
    names = dict.fromkeys(name for stage in settings.stages for name in stage.loss_names)
    losses: dict[str, Loss] = {}
    for name in names:
        # weights of its own, whatever other losses draw, and the run's own stream left alone
        with torch.random.fork_rng():
            torch.manual_seed(settings.run.seed + zlib.crc32(name.encode()))
            named, sizes = settings.losses[name], tuple[int, ...]()
            if named.type == SUBGOALS:
                texts = subgoals_of(settings, name, stores)
                sizes = feature_size(network, settings), len(texts)
            losses[name] = build_loss(name, named, *sizes)
    for held in held_by(losses).values():
        if isinstance(held, nn.Module):
            held.to(settings.run.device)
    return losses


def subgoals_of(settings: Settings, loss: str, stores: Mapping[str, Store]) -> tuple[str, ...]:
    """What the codes of `subgoal` stand for in all stores that a loss learns from.

    SettingsError  one of them has no such array, or they number their subgoals differently
    """
    played = [
        stores[one.name]
        for stage in settings.stages
        if stage.off_policy and loss in stage.off_policy.losses
        for one in stage.off_policy.store
    ]
    for store in played:
        if "subgoal" not in store.optional:
            raise SettingsError(
                f"the loss `{loss}` learns the bot's subgoals, but this store has none",
                path=store.path,
                fix="record one with `demotools generate LEVEL --subgoals`, or train without "
                f"losses.{loss}",
            )
    if texts := shared_subgoals(played):
        return texts
    raise SettingsError(
        f"the stores of the loss `{loss}` number their subgoals differently"
        if played
        else f"the loss `{loss}` learns subgoals, but its stages name no store",
        path=f"losses.{loss}",
        fix="use stores recorded with --subgoals by the same version of demotools",
    )


def feature_size(network: nn.Module, settings: Settings) -> int:
    """The size of what actor and critic see, by asking the network about one step.

    SettingsError  it does not give that
    """
    device, shape = settings.run.device, (1, 1)
    step = {
        name: torch.zeros(shape, dtype=torch.uint8, device=device)
        for name in ("direction", "expert_action", "masks")
    }
    step["cells"] = step["masks"].new_zeros((*shape, *settings.model.view))
    step["mission"] = torch.zeros(shape, dtype=torch.int64, device=device)
    step["mission_tokens"] = torch.ones(shape, dtype=torch.int64, device=device)
    with torch.no_grad():
        features = output_of(network, step, memory_of(network, 1)).features
    if features is None:
        raise SettingsError(
            "the network does not return the input of actor and critic, which this loss needs",
            path=f"model.type = {settings.model.type!r}",
            fix="add `features` to its output (docs/own_parts.md), or train without that loss",
        )
    return features().shape[-1]


def check_minibatches(settings: Settings, team: Team) -> None:
    """That every process has a whole environment for each of its minibatches."""
    if settings.on_policy is None:
        return
    mine = len(team.share(settings.on_policy.environments, "on_policy.environments"))
    for number, stage in enumerate(settings.stages):
        if stage.losses and stage.minibatches > mine:
            raise SettingsError(
                f"{stage.minibatches} minibatches of whole environments are too many: each of the "
                f"{team.world} processes has only {mine} environments",
                path=f"stages.{number}.minibatches",
                fix=f"use at most {mine}, or increase on_policy.environments",
            )


@contextmanager
def open_log(run: Run) -> Iterator[None]:
    """The run's log is open inside, in the process that writes."""
    if not run.team.writes:
        yield
        return
    settings = run.settings
    with RunLog(
        run.folder,
        # a kind of steps that every cycle takes
        axis="demo_steps" if all(stage.off_policy for stage in settings.stages) else "env_steps",
        projects=settings.run.projects(),
        config=settings.tree(),
        say=run.say,
    ) as run.log:
        yield


_STATE = "the state of this stage in the checkpoint is damaged"


class StoreBatches:
    """The batches of a stage from its store, augmented, with all that must survive a resume.

    memory   of the network before the next batch, for each loss [B, memory size]
    """

    def __init__(self, run: Run, stage: StageSettings) -> None:
        assert stage.off_policy is not None
        self.settings = stage.off_policy
        self.losses = run.of_names(self.settings.losses)
        share = run.team.share(self.settings.rollouts, "off_policy.rollouts")
        self.memory = dict.fromkeys(self.losses, memory_of(run.network, len(share)))
        self._device = torch.device(run.settings.run.device)
        number = run.settings.stages.index(stage)  # equal stages play the same
        self._iterator: ExpertTrajectoryIterator | OwnIterator
        if self.settings.iterator is not None:
            self._iterator = _own_iterator(run, number, self.settings.iterator, len(share))
        else:
            self._iterator = ExpertTrajectoryIterator(
                run.sources[number],
                rollouts=self.settings.rollouts,
                rollout_len=self.settings.rollout_len,
                seed=run.settings.run.seed,
                layout="native",
                rank=run.team.rank,
                world=run.team.world,
                device=self._device,
                shuffle=self.settings.shuffle,
                augmenter=_augmenter(run, number) if self.settings.augment else None,
            )

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        if "mission_tokens" not in batch:  # as the augmenter gives them
            batch = batch_missions(batch, self._iterator.mission_tokens)
        return {name: values.to(self._device) for name, values in batch.items()}

    def state(self) -> dict[str, Any]:
        """Where the batches stand: plain values and tensors."""
        return {"iterator": self._iterator.state(), "memory": dict(self.memory)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; CheckpointError where it belongs to another store."""
        self._iterator.load_state(state["iterator"])
        self.carry(
            {
                name: torch.as_tensor(memory).to(self._device)
                for name, memory in state["memory"].items()
            }
        )

    def close(self) -> None:
        """End the thread that prepares batches: there are none after it."""
        if isinstance(self._iterator, ExpertTrajectoryIterator):
            self._iterator.close()

    def carry(self, memories: Mapping[str, Tensor]) -> None:
        """Memory after a batch; losses with equal ones share one, and so one pass of the next."""
        self.memory = {}
        for name, memory in memories.items():
            known = (one for one in self.memory.values() if torch.equal(one, memory))
            self.memory[name] = next(known, memory.detach())


def _own_iterator(run: Run, number: int, settings: Named, rollouts: int) -> OwnIterator:
    """The user's iterator of a stage, for so many rollouts of this process."""
    off_policy = run.settings.stages[number].off_policy
    assert off_policy is not None
    return OwnIterator(
        settings,
        f"stages.{number}.off_policy.iterator.type",
        stores=[source.store for source in run.sources[number]],
        words=run.words,
        rollouts=rollouts,
        rollout_len=off_policy.rollout_len,
        seed=run.settings.run.seed,
        rank=run.team.rank,
        world=run.team.world,
        quiet=run.quiet,
    )


def _augmenter(run: Run, number: int) -> Augmenter:
    """What applies a stage's symmetries."""
    off_policy = run.settings.stages[number].off_policy
    assert off_policy is not None
    subgoals = shared_subgoals([source.store for source in run.sources[number]])
    return Augmenter(off_policy.augment, run.words, seed=run.settings.run.seed, subgoals=subgoals)


class HoldOut:
    """The cross-entropy of a network on a store that it does not learn from.

    Every step of the store counts once.

    steps   so many of them at least, the same each time; None: all
    """

    def __init__(self, store: Store, network: nn.Module, steps: int | None = None) -> None:
        self._rollouts = min(_HOLD_OUT_ROLLOUTS, store.episodes)
        self._iterator = ExpertTrajectoryIterator(
            store, rollouts=self._rollouts, rollout_len=_HOLD_OUT_LEN, layout="native"
        )
        self._batches = None if steps is None else -(-steps // (self._rollouts * _HOLD_OUT_LEN))
        self._network = network

    def cross_entropy(self) -> float:
        """Against the expert's actions, in nats per step."""
        total, steps, memory = 0.0, 0, memory_of(self._network, self._rollouts)
        training = self._network.training
        self._network.eval()
        try:
            with torch.no_grad():
                for shown, counts in islice(self._iterator.one_pass(), self._batches):
                    batch = batch_missions(shown, self._iterator.mission_tokens)
                    # what is not of the first pass is no action to be predicted
                    batch["expert_action"] = batch["expert_action"].long().where(counts, -1)
                    batch = {name: values.to(memory.device) for name, values in batch.items()}
                    output = output_of(self._network, batch, memory)
                    loss, valid = masked_cross_entropy(
                        output.logits.float(), batch["expert_action"]
                    )
                    total, steps = total + loss.item() * int(valid), steps + int(valid)
                    memory = output.memory
        finally:
            self._network.train(training)
        return total / steps


@dataclass(frozen=True)
class Stage:
    """What one stage holds open; either half may be absent."""

    settings: StageSettings
    losses: dict[str, Loss]
    collector: Collector | None
    demos: StoreBatches | None
    hold_out: HoldOut | None
    bar: tqdm[NoReturn]

    @property
    def recent(self) -> list[bool]:
        """Which of the latest training episodes here succeeded."""
        return list(self.collector.recent) if self.collector is not None else []

    def state(self) -> dict[str, Any]:
        """What must survive a resume."""
        halves = {"collector": self.collector, "demos": self.demos}
        return {name: half.state() for name, half in halves.items() if half is not None}

    def advance(self, run: Run) -> None:
        """Move the bar to where the run is."""
        self.bar.set_postfix(run.meter.shown(), refresh=False)
        self.bar.update(run.progress.steps_of(self.settings) - self.bar.n)


@contextmanager
def open_stage(run: Run) -> Iterator[Stage]:
    """The present stage, its environments and its store open, where the progress says."""
    number = run.progress.stage
    settings, stage = run.settings, run.settings.stages[number]
    losses = run.of_names(stage.losses)
    with ExitStack() as stack:
        collector, demos, hold_out = None, None, None
        if settings.on_policy is not None:
            collector = _collector(run, stage, losses, stack)
            if run.restored is not None:
                with fitting(run.folder, _STATE):
                    collector.load_state(run.restored["collector"])
        if stage.off_policy is not None:
            demos = stack.enter_context(closing(StoreBatches(run, stage)))
            if run.restored is not None:
                with fitting(run.folder, _STATE):
                    demos.load_state(run.restored["demos"])
        rule = stage.early_stopping
        if rule is not None and rule.hold_out is not None:
            hold_out = HoldOut(run.stores[rule.hold_out], run.network, rule.hold_out_steps)
        run.restored = None
        bar = progress_bar(
            # whole rollouts or batches, often some more than its budget
            getattr(stage_plan(stage, settings.on_policy), stage.axis),
            f"stage {number + 1} of {len(settings.stages)}",
            stage.axis.replace("_", " "),
            quiet=run.quiet or not run.team.writes,
            done=run.progress.steps_of(stage),
        )
        yield Stage(stage, losses, collector, demos, hold_out, stack.enter_context(bar))


def _collector(
    run: Run, stage: StageSettings, losses: Mapping[str, Loss], stack: ExitStack
) -> Collector:
    """The stage's environments, this process's share of them, and the policy in them."""
    on_policy = run.settings.on_policy
    assert on_policy is not None
    here = run.environments
    return Collector(
        stack.enter_context(stage_environments(run, stage, here, processes=run.workers)),
        # without losses of its own the rollout only tracks success, as evaluation does
        NetworkPolicy(run.network, run.words, sample=bool(losses)),
        run.settings.run.seed + run.progress.stage,
        first=here.start,
        everywhere=on_policy.environments,
        forcing=stage.teacher_forcing,
        bootstrap=bool(losses),
    )


def stage_environments(
    run: Run, stage: StageSettings, numbers: range, *, processes: int
) -> VectorEnvironment:
    """The environments of a stage that have these numbers, of those of all processes."""
    on_policy = run.settings.on_policy
    assert on_policy is not None
    kind = EnvironmentKind(
        dealt_levels(run.settings.run.levels, on_policy.environments)[numbers.start : numbers.stop],
        on_policy.environment,
        expert=bool(run.asks_expert(stage)),
        view=run.settings.model.view,
    )
    return VectorEnvironment(kind, len(numbers), processes=processes)


def ends_early(run: Run, stage: Stage) -> bool:
    """Whether the stage's rule ends it now, after a cycle; the same answer in all processes.

    With a hold-out store, `progress.in_vain` is 0 afterwards if these weights are the best so far.
    """
    rule, progress = stage.settings.early_stopping, run.progress
    if rule is None:
        return False
    why = ""
    if stage.hold_out is not None:
        stage.bar.set_postfix_str("measuring the hold-out loss")
        # rounding differs from process to process: that of one counts for all
        with run.judged():
            value = run.team.gathered(stage.hold_out.cross_entropy())[0]
        run.meter.add("offpolicy", {"hold_out_loss": value})
        better = value < progress.best_hold_out
        progress.best_hold_out = min(value, progress.best_hold_out)
        progress.in_vain = 0 if better else progress.in_vain + 1
        if progress.in_vain >= (rule.patience or 1):
            why = (
                f"the hold-out loss on {rule.hold_out} has not fallen below "
                f"{progress.best_hold_out:.4f} for {progress.in_vain} cycles"
            )
    else:
        assert rule.success is not None
        recent = latest(run.team.gathered(stage.recent))[: rule.episodes]
        if len(recent) == rule.episodes and sum(recent) >= rule.success * rule.episodes:
            share = sum(recent) / len(recent)
            why = f"{share:.1%} of the last {rule.episodes} training episodes succeeded"
    if why:
        run.say(f"stage {progress.stage + 1} ends early: {why}")
    return bool(why)


def latest(by_rank: Sequence[Sequence[bool]]) -> list[bool]:
    """The episodes of all processes, the latest first, in turn one of each process.

    >>> latest([[False, True], [True, True, False]])
    [True, False, False, True, True]
    """
    turns = zip_longest(*(reversed(recent) for recent in by_rank))
    return [success for turn in turns for success in turn if success is not None]


_HOLD_OUT_ROLLOUTS, _HOLD_OUT_LEN = 128, 40


@dataclass(frozen=True)
class StagePlan:
    """How much of everything a stage does; a cycle is one environment rollout and what follows.

    updates   of the weights, by both kinds of loss
    """

    cycles: int
    env_steps: int
    demo_steps: int
    off_policy_updates: int
    on_policy_updates: int

    @property
    def updates(self) -> int:
        """Of the weights, by both kinds of loss."""
        return self.off_policy_updates + self.on_policy_updates

    def text(self, passes: float) -> str:
        """All that there is of it, for a person.

        passes   over the store; 0 where that is not known
        """
        shown = [f"{self.env_steps:,} env steps"] if self.env_steps else []
        if self.demo_steps:
            over = f" ({passes:.1f} passes over the store)" if passes else ""
            shown.append(f"{self.demo_steps:,} demo steps{over}")
        return ", ".join([*shown, f"{self.updates:,} updates"])


def stage_plan(stage: StageSettings, on_policy: OnPolicySettings | None) -> StagePlan:
    """What a stage does until its budget is spent."""
    rollout = 0
    if on_policy:
        rollout = on_policy.environments * (stage.rollout_len or on_policy.rollout_len)
    batch, updates = 0, 0
    if stage.off_policy:
        batch, updates = stage.off_policy.batch_steps, stage.off_policy.updates
    if stage.max_env_steps:
        cycles = -(-stage.max_env_steps // rollout)
        off_policy = cycles * updates
    else:
        off_policy = -(-(stage.max_demo_steps or 0) // batch)
        cycles = -(-off_policy // updates)
    return StagePlan(
        cycles=cycles,
        env_steps=cycles * rollout,
        demo_steps=off_policy * batch,
        off_policy_updates=off_policy,
        on_policy_updates=cycles * rollout_updates(stage),
    )


def passes_of(stage: StageSettings, plan: StagePlan, sources: Sequence[Source]) -> float:
    """Passes of a stage over what it plays; 0 where an iterator of the user's plays it."""
    steps = sum(source.steps for source in sources)
    own = stage.off_policy is None or stage.off_policy.iterator is not None
    return 0.0 if own else plan.demo_steps / steps


def rollout_updates(stage: StageSettings) -> int:
    """Updates that a stage makes on one environment rollout; the training loop counts by it."""
    return stage.repeats * stage.minibatches if stage.losses else 0
