"""The log of a run: TensorBoard scalars, the same numbers as JSON lines, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from demotools.errors import DemotoolsError, from_os_error
from demotools.output import counted, read_regular
from trainer.run.tracking import TRACKERS, open_trackers
from trainer.settings.models import Axis
from trainer.settings.user_code import FOREIGN, error_text

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from trainer.acting.policy import Sample

Group = Literal[
    "onpolicy",
    "offpolicy",
    "train",
    "environment",
    "evaluation",
    "evaluation_sampled",
    "evaluation_loops",
]
Activity = Literal["data", "environment", "forward", "backward"]
MeterState = dict[Group, dict[str, list[float]]]
FILE_NAME = "log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
"""What `trainer evaluate` measured of a run's checkpoints, in lines like those of the log."""
BOARD_FOLDER = "tensorboard"
GIFS_FOLDER = "gifs"
"""Episodes of evaluations, a GIF each."""

_WHERE = {"group", "minutes", "env_steps", "demo_steps"}
_TEXTS = {"group", "checkpoint", "level"}
_AXES: dict[Group, Axis] = {
    "onpolicy": "env_steps",
    "offpolicy": "demo_steps",
    "environment": "env_steps",
}
_LARGEST = 1e300
_SHOWN_ROLLOUTS = 10
_RANGES = dict.fromkeys(("minutes", "env_steps", "demo_steps"), (0.0, 1e18))
_EPISODES = {"success": (0.0, 1.0), "episodes": (1.0, 1e18)}
_EVALUATION = {
    **_EPISODES,
    **dict.fromkeys(("interval_low", "interval_high"), (0.0, 1.0)),
    "episode_length": (0.0, 1e18),
}


class Stopwatch:
    """Where the time goes: seconds by activity since the last `shares`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextmanager
    def of(self, activity: Activity) -> Iterator[None]:
        """Counts the time inside the block."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._seconds[activity] = self._seconds.get(activity, 0.0) + elapsed

    def shares(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call, and `share_ACTIVITY` of them; then counts anew."""
        elapsed = time.perf_counter() - self._since
        shares = {f"share_{name}": value / elapsed for name, value in self._seconds.items()}
        self._seconds, self._since = {}, time.perf_counter()
        return elapsed, shares


class Meter:
    """Scalars of the present cycle by group, and those of the bar: of this cycle or the last.

    Success is of the episodes that ended in the last `_SHOWN_ROLLOUTS` rollouts: one has few.
    """

    def __init__(self) -> None:
        self._values: dict[Group, dict[str, list[float]]] = {}
        self._latest: dict[str, float] = {}
        self._ended: deque[tuple[float, float]] = deque(maxlen=_SHOWN_ROLLOUTS)

    def add(self, group: Group, scalars: Mapping[str, float]) -> None:
        """Note one value of each scalar."""
        if group == "environment":
            count = scalars.get("episodes", 0.0)
            self._ended.append((count, count * scalars.get("success", 0.0)))
        of_group = self._values.setdefault(group, {})
        for name, value in scalars.items():
            of_group.setdefault(name, []).append(value)
            self._latest[name.rpartition("/")[2] if group != "train" else name] = value

    def means(self) -> dict[Group, dict[str, float]]:
        """The means since the last call, by group; then begins anew."""
        values, self._values = self._values, {}
        # what this cycle did not measure (a loss of the stage before) is not of today
        of_cycle = {name.rpartition("/")[2] for of_group in values.values() for name in of_group}
        self._latest = {name: one for name, one in self._latest.items() if name in of_cycle}
        return {
            group: {name: sum(many) / len(many) for name, many in of_group.items()}
            for group, of_group in values.items()
            if of_group
        }

    def state(self) -> MeterState:
        """The scalars of a cycle that is under way; what `load_state` takes."""
        return {group: {**of_group} for group, of_group in self._values.items()}

    def load_state(self, state: MeterState) -> None:
        """Go on with a cycle."""
        self._values = {
            group: {name: list(many) for name, many in of_group.items()}
            for group, of_group in state.items()
        }

    def shown(self) -> dict[str, str]:
        """What the bar shows."""
        names = ("loss", "accuracy")
        shown = {name: f"{self._latest[name]:.3f}" for name in names if name in self._latest}
        episodes, successes = (sum(one[part] for one in self._ended) for part in (0, 1))
        if episodes:
            shown["success"] = f"{successes / episodes:.3f} of {counted(int(episodes), 'episode')}"
        return shown


def one_meter(states: Sequence[MeterState]) -> MeterState:
    """What the meters of several processes held, as of one: each value is the mean of theirs.

    >>> one_meter([{"train": {"loss": [1.0, 4.0]}}, {"train": {"loss": [3.0, 5.0], "rare": [2.0]}}])
    {'train': {'loss': [2.0, 4.5], 'rare': [2.0]}}
    """
    meter = MeterState()
    for group, name in dict.fromkeys((g, n) for state in states for g in state for n in state[g]):
        rows = zip_longest(*(state.get(group, {}).get(name, []) for state in states))
        there = ([value for value in row if value is not None] for row in rows)
        meter.setdefault(group, {})[name] = [sum(row) / len(row) for row in there]
    return meter


class RunLog:
    """The log of one run, in its folder; a context manager.

    A line of `log.jsonl` is `{"group", "minutes", "env_steps", "demo_steps", NAME: value, ...}`.
    It alone is what a run goes on from: the curves of TensorBoard, whose tags are GROUP/NAME, are
    drawn anew from it at every resume, and trackers get line n as step n, which they take
    only once. Values that are not finite are left out of all.

    axis      of curves that are not of one kind of steps alone
    projects  of the trackers that get the same numbers, by the key in `TRACKERS`
    config    the settings, for the trackers
    say       takes a line for the user
    """

    def __init__(
        self,
        folder: Path,
        *,
        axis: Axis = "demo_steps",
        projects: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._folder, self._axis, self._say = folder, axis, say
        self._board: SummaryWriter | None = None
        self._written: int | None = None
        file = folder / FILE_NAME
        there = file.read_bytes().count(b"\n") if file.is_file() else 0
        self._trackers = open_trackers(folder, projects, config or {}, there) if projects else {}
        try:
            # without a buffer: what was written is in the file, whatever becomes of the process
            self._lines = file.open("ab", buffering=0)
        except OSError as error:
            raise from_os_error(error, file) from error

    def write(
        self, group: Group, values: Mapping[str, float], *, where: Mapping[str, float]
    ) -> None:
        """One line, and one point of every curve of the group.

        where   `minutes`, `env_steps` and `demo_steps` so far

        DemotoolsError  the disk is full or cannot be written
        """
        number = self._begin()
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"group": group, **where, **finite}
        appended(self._lines, json.dumps(line).encode() + b"\n", self._folder / FILE_NAME)
        self._written = number + 1
        self._draw([line])
        tagged = {f"{group}/{name}": value for name, value in finite.items()}
        gifs = dict(_tagged_gifs(self._folder, line))
        for key, tracker in list(self._trackers.items()):
            try:
                tracker.log({**where, **tagged}, number, gifs)
            except FOREIGN as error:
                del self._trackers[key]
                self._say(f"{TRACKERS[key]} gets no more numbers of this run: {error_text(error)}")

    def size_bytes(self) -> int:
        """Of the lines so far."""
        return os.fstat(self._lines.fileno()).st_size

    def cut(self, size_bytes: int) -> None:
        """Forget the lines after these, in all logs: they were written after the checkpoint."""
        whole = (self._folder / FILE_NAME).read_bytes()[:size_bytes]
        self._lines.truncate(whole.rfind(b"\n") + 1)
        left = {_gif_prefix(line) for line in read_log(self._folder)}
        for gif in (self._folder / GIFS_FOLDER).glob("*.gif"):
            if gif.name.rpartition("-")[0] not in left:
                gif.unlink()
        self._begin()

    def _begin(self) -> int:
        """Open the board, with all that is in the log so far; how many lines that are."""
        if self._written is not None:
            return self._written
        lines = read_log(self._folder)
        try:
            self._board = _new_board(self._folder / BOARD_FOLDER)
        except (OSError, UnicodeError) as error:  # it takes only a path that is UTF-8
            self._stop_drawing(error)
        self._draw(lines)
        self._written = len(lines)
        return self._written

    def _draw(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The points of these lines, the last of which has just been written."""
        if self._board is None or not lines:
            return
        begun = time.time() - 60 * lines[-1]["minutes"]
        try:
            for line in lines:
                step = int(line[_AXES.get(line["group"], self._axis)])
                for name in line.keys() - _WHERE:
                    self._board.add_scalar(
                        f"{line['group']}/{name}",
                        line[name],
                        step,
                        walltime=begun + 60 * line["minutes"],
                    )
                for tag, gif in _tagged_gifs(self._folder, line):
                    _add_gif(self._board, tag, gif, step, begun + 60 * line["minutes"])
            self._board.flush()
        except OSError as error:  # of the thread that writes
            self._stop_drawing(error)

    def _stop_drawing(self, error: OSError | UnicodeError) -> None:
        self._board = None
        why = (getattr(error, "strerror", None) or str(error)).lower()
        self._say(
            f"TensorBoard's curves are no longer written ({why}); {FILE_NAME} has all numbers, "
            "and --resume rewrites the curves"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_more: object) -> None:
        self._lines.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as failed:
                self._stop_drawing(failed)
        for key, tracker in self._trackers.items():
            try:
                tracker.finish(failed=kind is not None)
            except FOREIGN as failed:
                self._say(f"{TRACKERS[key]} failed to finish this run: {error_text(failed)}")


def gif_path(folder: Path, group: Group, where: Mapping[str, float], number: int) -> Path:
    """The file of an evaluation's episode; the group's line in the log, written next, shows it.

    where   as of `RunLog.write`
    """
    return folder / GIFS_FOLDER / f"{_gif_prefix({'group': group, **where})}-{number}.gif"


def _gif_prefix(line: Mapping[str, Any]) -> str:
    return f"{line['group']}-{line['env_steps']:010.0f}-{line['demo_steps']:010.0f}"


def _tagged_gifs(folder: Path, line: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The GIFs that belong to a line of the log, by their tags."""
    if line["group"].startswith("evaluation"):
        for gif in sorted((folder / GIFS_FOLDER).glob(f"{_gif_prefix(line)}-*.gif")):
            yield f"{line['group']}/episode_{gif.stem.rpartition('-')[2]}", gif


def _add_gif(board: SummaryWriter, tag: str, gif: Path, step: int, walltime: float) -> None:
    """Show a GIF as it is: `add_video` would draw it anew, and needs moviepy for it."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    content = read_regular(gif)
    width, height = (int.from_bytes(content[at : at + 2], "little") for at in (6, 8))
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    writer: Any = board.file_writer  # torch says nothing of its type
    writer.add_summary(summary, step, walltime)


def appended(stream: FileIO, line: bytes, file: Path) -> None:
    """Append a line to a file, or nothing of it.

    stream   opened to append, without a buffer

    DemotoolsError  the disk is full or cannot be written
    """
    before, rest = os.fstat(stream.fileno()).st_size, memoryview(line)
    try:
        while rest:
            rest = rest[stream.write(rest) :]
    except OSError as error:
        stream.truncate(before)
        raise from_os_error(error, file) from error


def evaluation_group(sampled: Sample) -> Group:
    """The group of a measurement of success: with greedy actions, sampled ones, or in loops."""
    if sampled == "loops":
        return "evaluation_loops"
    return "evaluation_sampled" if sampled else "evaluation"


def read_log(folder: Path, name: str = FILE_NAME) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that was cut by a kill is left out.

    name   of the file in its folder

    DemotoolsError  a line is not one that a run writes, or the file cannot be read
    """
    lines = read_regular(folder / name).split(b"\n")[:-1]
    return [_parsed(line, number, folder / name) for number, line in enumerate(lines, start=1)]


def _parsed(line: bytes, number: int, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(line.decode("utf-8"))
        if not isinstance(content, dict) or content.get("group") not in get_args(Group):
            raise ValueError("it belongs to no group of numbers that runs log")
        ranges = _RANGES | (_EVALUATION if content["group"].startswith("evaluation") else {})
        if content["group"] == "environment" and "success" in content:
            ranges |= _EPISODES
        for name in ranges.keys() | content.keys() - _TEXTS:
            low, high = ranges.get(name, (-_LARGEST, _LARGEST))
            value = content.get(name)
            # exactly these: true is an int too, and NaN lies in no range
            if not (type(value) is int or type(value) is float) or not low <= value <= high:
                raise ValueError(f"`{name}` is not a number from {low:g} to {high:g}")
        for name in _TEXTS & content.keys():
            if not isinstance(content[name], str):
                raise ValueError(f"`{name}` is not a text")
    except (ValueError, RecursionError) as error:
        raise DemotoolsError(
            f"the log is damaged: line {number} was not written by a run: {error}",
            path=file,
            fix="remove that line, or leave out this run",
        ) from error
    return content


def _new_board(folder: Path) -> SummaryWriter:
    """An empty one: a reader that has seen earlier points of this run throws them away."""
    from torch.utils.tensorboard.writer import SummaryWriter  # half a second: only runs need it

    for earlier in folder.glob("events.out.tfevents.*"):
        earlier.unlink()
    return SummaryWriter(str(folder), purge_step=0)


CURVE_FILE = "curve.png"
