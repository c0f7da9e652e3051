"""Many environments stepped together, in this process or in several.

Environment e plays the seeds of its own stream one after another, so its episodes depend neither on
the number of other environments nor on the processes: `Group` has the environments of one process,
`Worker` is the same in another process. Observations are in memory shared by all processes; pipes
carry only the signal to step and the texts of new missions.

Processes are spawned, not forked: the trainer's threads hold locks that a fork would copy.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from ctypes import c_uint8
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Self
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.babyai.levels import level_names, read_manifest
from demotools.errors import DemotoolsError, LevelError, SettingsError
from demotools.recording.environment import level_environment_id, make_environment
from demotools.workers.processes import (
    SPAWN_ADVICE,
    signals_for_this_process_alone,
    what_hinders_spawning,
)
from trainer.acting.group import EnvironmentKind as EnvironmentKind
from trainer.acting.group import Group, Missions, Start, shown_of, steps_as_batch
from trainer.settings.models import LEVELS, LevelSettings
from trainer.settings.user_code import recipe_folders, search_recipe_folders

_SECONDS_TO_END = 5.0
_BATCHED_A_PROCESS = 128


@dataclass(frozen=True)
class EnvironmentStep:
    """What n environments show now, and how the last action went.

    cells           uint8 [n, *view], packed views of 7 x 7, or what the kind says
    direction       uint8 [n], 0 right, 1 down, 2 left, 3 up
    missions        n texts
    mask            uint8 [n], memory mask: 0 where this observation begins an episode, else 1
    seed            int64 [n], seed of the episode that this observation belongs to
    expert_action   int64 [n], what the bot advises now; -1 where it does not know or was not asked
    active          bool [n], False once there is no seed left for the environment to play
    reward          float32 [n], of the last action
    terminated      bool [n], whether it ended the episode by the level's rules
    truncated       bool [n], whether it ended the episode at the step limit
    final_cells, final_direction   where an episode ended: what its last observation showed
    """

    cells: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    missions: tuple[str, ...]
    mask: NDArray[np.uint8]
    seed: NDArray[np.int64]
    expert_action: NDArray[np.int64]
    active: NDArray[np.bool_]
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    final_cells: NDArray[np.uint8]
    final_direction: NDArray[np.uint8]


def seed_streams(seeds: range, count: int) -> list[range]:
    """The seeds dealt out to `count` environments in turn.

    >>> seed_streams(range(100, 107), 3)
    [range(100, 107, 3), range(101, 107, 3), range(102, 107, 3)]
    """
    return [range(seeds.start + number, seeds.stop, count) for number in range(count)]


def dealt_levels(levels: Sequence[LevelSettings], count: int) -> tuple[str, ...]:
    """The level of each of `count` environments: in proportion, evenly spread.

    SettingsError  a level would get none

    >>> levels = [LevelSettings(name="A", proportion=3), LevelSettings(name="B", proportion=1)]
    >>> "".join(dealt_levels(levels, 8))
    'AABAAABA'
    """
    share = np.array([level.proportion for level in levels])
    share /= share.sum()
    dealt = np.zeros(len(levels))
    names = []
    for number in range(count):
        # the one that is furthest behind
        chosen = int(np.argmax(share * (number + 1) - dealt))
        dealt[chosen] += 1
        names.append(levels[chosen].name)
    if not dealt.all():
        raise SettingsError(
            f"{count} environments are too few for {len(levels)} levels in these proportions",
            path="on_policy.environments",
            fix=f"use more, or give {levels[int(dealt.argmin())].name} a larger proportion",
        )
    return tuple(names)


class VectorEnvironment:
    """`count` environments of one kind over `processes` processes; a context manager.

    processes        0 or 1: in this process; at most one for every environment is started, and of
                     levels that step as a batch (`demotools.recording.batch`) one for every 128
    answer_seconds   after so long without an answer a process counts as hanging

    What making or stepping an environment raises is raised here; RemoteError where it was raised
    in another process; LevelError where a process died or hangs, and after `close`.
    """

    def __init__(
        self,
        kind: EnvironmentKind,
        count: int,
        *,
        processes: int = 1,
        answer_seconds: float = 120.0,
    ) -> None:
        self.count = count
        self._kind = kind
        self._missions = [""] * count
        self._answer_seconds = answer_seconds
        self._taken = np.zeros((count, 1), dtype=np.int64)
        """The actions of the present episodes, in the first `_taken_count` places of each row."""
        self._taken_count = np.zeros(count, dtype=np.int64)
        self._workers: list[Worker] = []
        self._groups: Sequence[Group | Worker] = self._workers
        shown = shown_of(kind.view)
        most = count if processes < 2 or not _is_batched(kind) else count // _BATCHED_A_PROCESS
        spans = _spans(count, max(1, min(processes, most)))
        if len(spans) == 1:
            self._shown = np.zeros(count, shown)
            self._groups = [Group(kind, spans[0], self._shown)]
        else:
            context = multiprocessing.get_context("spawn")
            memory: Any = context.RawArray(c_uint8, count * shown.itemsize)
            self._shown = np.frombuffer(memory, shown)
            self._workers.extend(Worker(kind, span, memory) for span in spans)

    def reset(
        self, streams: Sequence[range], taken: Sequence[Sequence[int]] | None = None
    ) -> EnvironmentStep:
        """Begin anew: environment e plays the seeds of `streams[e]`, one after another.

        taken   actions to be played at once in the first episode of each stream, which they must
                not end: with what `state` gave, everything is again as it was
        """
        assert len(streams) == self.count
        taken = [list(actions) for actions in taken or [()] * self.count]
        self._taken_count[:] = [len(actions) for actions in taken]
        self._taken = np.zeros((self.count, 1 + self._taken_count.max()), dtype=np.int64)
        for row, actions in zip(self._taken, taken, strict=True):
            row[: len(actions)] = actions
        for group in self._groups:
            part = slice(group.span.start, group.span.stop)
            group.send((streams[part], taken[part]))
        return self._gathered()

    def play(self, seeds: Sequence[int]) -> EnvironmentStep:
        """Begin anew: each of these seeds is played once, by whichever environment is free.

        Every process has its share of the seeds, so none waits for another.
        """
        self._taken_count[:] = 0
        for number, group in enumerate(self._groups):
            share = seeds[number :: len(self._groups)]
            group.send(([share], [()] * len(group.span)))
        return self._gathered()

    def step(self, actions: NDArray[np.int64]) -> EnvironmentStep:
        """Step every active environment; where an episode ends, the next one begins at once.

        actions   int64 [n], 0..6; ignored where an environment is not active
        """
        self._shown["action"] = actions
        for group in self._groups:
            group.send(None)
        step = self._gathered()
        if self._taken_count.max() == self._taken.shape[1]:
            self._taken = np.concatenate([self._taken, np.zeros_like(self._taken)], axis=1)
        self._taken[np.arange(self.count), self._taken_count] = actions
        self._taken_count += 1
        self._taken_count *= step.mask
        return step

    def state(self) -> dict[str, list[Any]]:
        """For `reset`: the seed of each environment's present episode, its actions so far."""
        return {
            "seed": self._shown["seed"].tolist(),
            "taken": [
                taken[:count].tolist()
                for taken, count in zip(self._taken, self._taken_count.tolist(), strict=True)
            ],
        }

    def _gathered(self) -> EnvironmentStep:
        if not self._groups:
            raise LevelError(
                "these environments are closed",
                path=_levels(self._kind, range(self.count)),
                fix="create new ones, or close them later",
            )
        for group in self._groups:
            for number, mission in group.receive(self._answer_seconds).items():
                self._missions[group.span.start + number] = mission
        shown = self._shown.copy()
        fields = {name: shown[name] for name in shown.dtype.fields or () if name != "action"}
        return EnvironmentStep(missions=tuple(self._missions), **fields)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._groups = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _is_batched(kind: EnvironmentKind) -> bool:
    """Whether environments of this kind step as a batch, so fast that pipes would cost more."""
    levels = {kind.level} if isinstance(kind.level, str) else set(kind.level)
    return kind.make == LEVELS and steps_as_batch([*map(make_environment, levels)], kind)


def _levels(kind: EnvironmentKind, span: range) -> str:
    return ", ".join(dict.fromkeys(map(kind.level_of, span)))


def _spans(count: int, processes: int) -> list[range]:
    """Consecutive environments for each process, as equal as can be.

    >>> _spans(5, 2)
    [range(0, 2), range(2, 5)]
    """
    bounds = [count * number // processes for number in range(processes + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class RemoteError(Exception):
    """What an environment raised in another process; its text is the traceback there."""


class Worker:
    """A Group in a process of its own.

    memory   of `shown_of`, of all environments
    """

    def __init__(self, kind: EnvironmentKind, span: range, memory: Any) -> None:
        self.span = span
        self._kind = kind
        self._seeds = np.frombuffer(memory, shown_of(kind.view))["seed"][span.start : span.stop]
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, kind, span, memory, recipe_folders()), daemon=True
        )
        # only here: the processes themselves do without torch
        from trainer.team import STOPPING

        # the loop needs its helpers until its state is whole
        with signals_for_this_process_alone(STOPPING):
            self.process.start()
        theirs.close()
        self._started = False
        _workers.add(self)

    def send(self, start: Start | None) -> None:
        """Have it begin anew, or take a step."""
        # that it is gone is noticed, and said, where the answer is awaited
        with suppress(OSError):
            self._connection.send(start)

    def receive(self, seconds: float) -> Missions:
        """Its answer: the missions that are new; raises where that is the answer, or there is none.

        seconds   to wait for it
        """
        try:
            if not self._connection.poll(seconds):
                self.process.kill()
                raise self._lost(f"did not answer for {seconds:.0f} seconds")
            reply: Missions | Exception = self._connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(_SECONDS_TO_END)
            if not self._started and (why := what_hinders_spawning()):
                raise SettingsError(
                    f"no environment process could be started: {why}",
                    path="processes",
                    fix=SPAWN_ADVICE,
                ) from error
            raise self._lost(f"died (exit code {self.process.exitcode})") from error
        self._started = True
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _lost(self, what: str) -> LevelError:
        seeds = " or ".join(map(str, self._seeds.tolist()))
        return LevelError(
            f"an environment process {what} at seed {seeds}",
            path=_levels(self._kind, self.span),
            fix="see its own message above; if it ran out of memory, use fewer environments",
        )

    def hang_up(self) -> None:
        """Tell it to end."""
        self._connection.close()

    def end(self) -> None:
        """Wait for its end, not for long."""
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


_workers: WeakSet[Worker] = WeakSet()


@atexit.register
def _end_all() -> None:
    # multiprocessing would send SIGTERM, which they do not see, and wait
    for worker in list(_workers):
        worker.hang_up()


def _serve(
    connection: Connection, kind: EnvironmentKind, span: range, memory: Any, folders: list[str]
) -> None:
    """A worker's life: one reply for every message, until the other end is closed.

    folders   see `recipe_folders`
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    search_recipe_folders(folders)
    group: Group | None = None
    while True:
        try:
            start: Start | None = connection.recv()
            reply: Missions | Exception
            try:
                shown = np.frombuffer(memory, shown_of(kind.view))[span.start : span.stop]
                group = group or Group(kind, span, shown)
                group.send(start)
                reply = group.receive(0)
            except DemotoolsError as error:
                reply = error
            except Exception:  # noqa: BLE001, whatever it is, it is raised where it is read
                reply = RemoteError(traceback.format_exc())
            connection.send(reply)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def check_playable(level: str) -> None:
    """LevelError where the level is one without an environment, ManifestError where unknown."""
    if ":" in level:
        return  # known once its module has been imported
    try:
        level_environment_id(level)
    except LevelError as error:
        playable = [name for name in level_names() if read_manifest(name).environment_id]
        raise LevelError(
            error.what, path=error.path, fix=f"choose one of {', '.join(playable)}"
        ) from error


def check_named(actions: int, level: str) -> None:
    """LevelError where a level has actions that have no names, which could not be shown."""
    if actions > len(ACTIONS):
        raise LevelError(
            f"it has {actions} actions, but only {len(ACTIONS)} have names that can be shown",
            path=level,
            fix="measure it with `trainer evaluate`, and remove evaluation.gifs",
        )
