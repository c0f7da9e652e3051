"""Record the expert bot to a demo store: the first N episodes that it solves, in seed order.

Seeds are played in parts of a fixed size, each by one process, which also writes it. The store
depends only on the parts and their order: any number of processes, killed at any moment and
restarted, gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from demotools.babyai.cells import VIEW_SIZE
from demotools.babyai.levels import SEEDS, Split
from demotools.errors import LevelError, SettingsError, printable_text
from demotools.output import counted, progress_bar
from demotools.recording.bot import (
    PLAIN,
    REPLANS_AT_MOST,
    Episode,
    Failure,
    Style,
    can_play,
    expert_name,
    is_bots,
    record_episode,
)
from demotools.recording.environment import (
    level_environment_id,
    make_environment,
    playable_manifest,
)
from demotools.recording.subgoals import SUBGOALS
from demotools.store.building import StoreBuilder, read_lengths, read_notes, read_part, write_part
from demotools.store.reading import Episodes
from demotools.workers.processes import (
    Workers,
    bounded_workers,
    opened_workers,
    processor_count,
)

# A level that the bot solves less often than this, seen over this many seeds, is refused.
RATE_AT_LEAST = 0.05
_SEEDS_TO_JUDGE = 200
_PARTS, _LEAST_SEEDS, _MOST_SEEDS = 64, 16, 500


@dataclass(frozen=True)
class Recording:
    """What determines a store of bot episodes: equal recordings give equal bytes."""

    level: str
    environment_id: str
    split: Split
    episodes: int
    first_seed: int
    style: Style = PLAIN
    spans: tuple[tuple[int, int], ...] = ()
    """The seeds to be played, each span without its end; empty: all from `first_seed` on."""

    @property
    def part_seeds(self) -> int:
        """Seeds in a part: at least some 64 parts, so that processes end together."""
        return min(max(self.episodes // _PARTS, _LEAST_SEEDS), _MOST_SEEDS)

    @property
    def parts(self) -> range | None:
        """The parts that there are; None where there is no last one."""
        count = sum(stop - start for start, stop in self.spans)
        return range(-(-count // self.part_seeds)) if self.spans else None

    def seeds(self, part: int) -> Sequence[int]:
        """The seeds of one part, ascending."""
        skipped, size = part * self.part_seeds, self.part_seeds
        if not self.spans:
            return range(self.first_seed + skipped, self.first_seed + skipped + size)
        seeds: list[int] = []
        for start, stop in self.spans:
            seeds += range(start, stop)[skipped : skipped + size - len(seeds)]
            skipped = max(skipped - (stop - start), 0)
        return seeds

    def job(self) -> dict[str, Any]:
        """The recording and all that its bits depend on, JSON values."""
        packages = {name: version(name) for name in ("minigrid", "numpy")}
        # only what is not as usual: a recording goes on when there are new ways to record
        usual, style = asdict(PLAIN), asdict(self.style)
        return {
            "command": "generate",
            **{key: value for key, value in vars(self).items() if key != "style" and value != ()},
            **{key: value for key, value in style.items() if value != usual[key]},
            **({"arrays": self.style.arrays} if self.style.arrays else {}),
            **packages,
            "replans": REPLANS_AT_MOST,
            "parts": [_PARTS, _LEAST_SEEDS, _MOST_SEEDS],
        }


@dataclass(frozen=True)
class Recorded:
    """A finished recording: its store, and what became of the seeds."""

    path: Path
    episodes: int
    seeds: range
    failures: dict[str, int]
    """How many seeds the bot failed on, by reason."""
    failures_kept: bool

    def text(self) -> str:
        """What was recorded, for a person."""
        lines = [
            f"recorded {printable_text(self.path)}: {counted(self.episodes, 'episode')}, "
            f"seeds {self.seeds.start} <= seed < {self.seeds.stop}"
        ]
        for reason, number in self.failures.items():
            became = "not solved" if self.failures_kept else "left out"
            lines.append(f"  {became} {counted(number, 'seed')}: {reason}")
        return "\n".join(lines)


def planned_recording(
    level: str,
    episodes: int | None = None,
    *,
    split: Split = "train",
    first_seed: int | None = None,
    style: Style = PLAIN,
    seeds: Sequence[int] | None = None,
) -> Recording:
    """The recording of the first `episodes` solved episodes from `first_seed` on.

    episodes        None, with `seeds`: all that are solved
    first_seed      None means the split's first
    seeds           to be played instead, each once

    ManifestError   there is no such level
    LevelError      the level has no environment
    SettingsError   no episodes asked for, or the seeds leave those of the split
    """
    spans = () if seeds is None else _spans(sorted(seeds))
    if seeds:
        first_seed = min(seeds)
        episodes = min(episodes or len(seeds), len(seeds))
    if episodes is None or episodes < 1:
        raise SettingsError(
            f"cannot record {episodes} episodes", path="--episodes", fix="record at least 1"
        )
    allowed = SEEDS[split]
    first = allowed.start if first_seed is None else first_seed
    stop = spans[-1][1] if spans else first + episodes
    if first not in allowed or stop > allowed.stop:
        raise SettingsError(
            f"the seeds {first} <= seed < {stop} are not all in the {split} split, "
            f"{allowed.start} <= seed < {allowed.stop}",
            path="--seeds" if spans else "--seed",
            fix=f"use seeds from {allowed.start} on",
        )
    environment_id = level_environment_id(level)
    level = playable_manifest(level).level
    environment = make_environment(level)
    if not can_play(environment):
        raise LevelError(
            "no expert can play this level: the bot plays BabyAI's levels, and the search expert "
            "plays minigrid's levels with a goal, an object to pick up or a door to open",
            path=level,
            fix="record another level, for example MiniGrid-DoorKey-5x5-v0",
        )
    if style.subgoals and not is_bots(environment):
        raise SettingsError(
            "the expert of this level has no subgoals; only BabyAI's bot does",
            path="--subgoals",
            fix="drop it, or record a BabyAI level",
        )
    return Recording(level, environment_id, split, episodes, first, style, spans)


def _spans(seeds: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending seeds as spans without their ends.

    >>> _spans([3, 4, 5, 9])
    ((3, 6), (9, 10))
    """
    numbers = np.array(seeds, np.int64)
    ends = np.flatnonzero(np.diff(numbers) > 1)
    starts = numbers[np.concatenate([[0], ends + 1])].tolist()
    stops = (numbers[np.concatenate([ends, [len(numbers) - 1]])] + 1).tolist()
    return tuple(zip(starts, stops, strict=True))


def generate(
    recording: Recording,
    path: Path,
    *,
    workers: int | None = None,
    dask: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Recorded:
    """Record the bot into a store at `path`, going on where an earlier call was ended.

    workers      processes; None means one for every processor, but fewer for little work
    dask         the address of a Dask scheduler, whose workers play instead

    LevelError   the bot cannot solve the level
    StoreError   the store exists, or parts of another recording of that name do; another process
                 is making it
    """
    with StoreBuilder(path, recording.job(), overwrite=overwrite, costly=True) as builder:
        parts = -(-recording.episodes // recording.part_seeds)
        processes = bounded_workers(workers or _enough(recording), parts)
        with opened_workers(processes, builder.parts, dask=dask) as pool:
            _record_parts(recording, builder, pool, quiet=quiet)
        seeds, failures = _cut_to_size(recording, builder)
        found = sum(len(read_lengths(builder.parts, part)) for part in builder.finished_parts())
        manifest = playable_manifest(recording.level)
        builder.finish(
            **manifest.store_attributes(split=recording.split),
            source=_source(recording, seeds, failures),
            subgoals=SUBGOALS if recording.style.subgoals else (),
        )
    return Recorded(path, found, seeds, failures, recording.style.failures)


def _source(recording: Recording, seeds: range, failures: dict[str, int]) -> dict[str, Any]:
    job, style = recording.job(), recording.style
    return {
        "kind": "bot",
        "bot": expert_name(make_environment(recording.level)),
        **{key: job[key] for key in ("minigrid", "numpy", "replans")},
        **({"noise": style.noise, "burst": style.burst} if style.noise else {}),
        **({"failures_kept": True} if style.failures else {}),
        "seeds": [seeds.start, seeds.stop],
        "failures": failures,
    }


def _record_parts(
    recording: Recording, builder: StoreBuilder, workers: Workers, *, quiet: bool
) -> None:
    """Play seeds, a part at a time on each worker, until there are episodes enough."""
    solved = {part: len(read_lengths(builder.parts, part)) for part in builder.finished_parts()}
    parts = (part for part in recording.parts or count() if part not in solved)
    under_way: dict[Future[int], int] = {}
    done = min(sum(solved.values()), recording.episodes)
    bar = progress_bar(recording.episodes, recording.level, "episodes", quiet=quiet, done=done)
    with bar:
        while (found := sum(solved.values())) < recording.episodes:
            # no part is begun that may turn out to be one too many
            hoped = found + len(under_way) * recording.part_seeds
            if hoped < recording.episodes and len(under_way) < workers.at_once:
                if (part := next(parts, None)) is not None:
                    under_way[workers.submit(play_part, recording, part)] = part
                    continue
                if not under_way:
                    break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                solved[under_way.pop(future)] = future.result()
            bar.update(min(sum(solved.values()), recording.episodes) - bar.n)
            _refuse_if_unsolvable(recording, solved)


def _refuse_if_unsolvable(recording: Recording, solved: dict[int, int]) -> None:
    # the first seeds alone decide, so that the number of processes does not
    judged = range(-(-_SEEDS_TO_JUDGE // recording.part_seeds))
    if not all(part in solved for part in judged):
        return
    seeds = len(judged) * recording.part_seeds
    rate = sum(solved[part] for part in judged) / seeds
    if rate < RATE_AT_LEAST:
        raise LevelError(
            f"the bot cannot solve this level: {rate:.1%} of {seeds} episodes",
            path=recording.level,
            fix="record another level, or convert another expert's demonstrations",
        )


def play_part(folder: Path, recording: Recording, part: int) -> int:
    """Play the seeds of one part, write it into `folder`; the number of episodes solved."""
    seeds = recording.seeds(part)
    if seeds[-1] >= SEEDS[recording.split].stop:
        raise LevelError(
            f"the {recording.split} seeds are used up, because the bot fails on too many",
            path=recording.level,
            fix="start with a lower --seed",
        )
    # a new environment for every part: nothing can leak from the episodes of another
    environment = make_environment(recording.level)
    played = [record_episode(environment, seed, recording.style) for seed in seeds]
    solved = [
        Episodes.one(one.mission, one.seed, one.cells, one.direction, one.action, one.optional)
        for one in played
        if isinstance(one, Episode)
    ]
    failures = [
        (one.seed, one.reason if isinstance(one, Failure) else one.failure)
        for one in played
        if isinstance(one, Failure) or one.failure
    ]
    episodes = Episodes.concatenated([Episodes.none((VIEW_SIZE, VIEW_SIZE)), *solved])
    write_part(folder, part, episodes, {"failures": failures})
    return len(solved)


def _cut_to_size(recording: Recording, builder: StoreBuilder) -> tuple[range, dict[str, int]]:
    """Cut the last part to the episodes asked for: the seeds that were played, and the failures."""
    wanted = recording.episodes
    failures: Counter[str] = Counter()
    stop = recording.first_seed
    for part in builder.finished_parts():
        found = read_notes(builder.parts, part)["failures"]
        episodes = read_part(builder.parts, part)
        stop = recording.seeds(part)[-1] + 1
        if len(episodes.length) >= wanted:
            stop = int(episodes.seed[wanted - 1]) + 1
            found = [failure for failure in found if failure[0] < stop]
            write_part(builder.parts, part, episodes.take(np.arange(wanted)), {"failures": found})
        failures.update(reason for _seed, reason in found)
        wanted -= len(episodes.length)
    return range(recording.first_seed, stop), dict(sorted(failures.items()))


def _enough(recording: Recording) -> int:
    """As many processes as there are processors; but starting one costs some 500 episodes."""
    return min(processor_count(), 1 + recording.episodes // 500)
