"""What a run says while it runs: TensorBoard scalars, the same numbers as JSON lines, one bar."""

from __future__ import annotations

import importlib
import json
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from tqdm import tqdm

from demotools.errors import SettingsError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Group = Literal["onpolicy", "offpolicy", "train", "environment", "evaluation"]
Axis = Literal["env_steps", "demo_steps"]
Activity = Literal["data", "environment", "forward", "backward"]
FILE_NAME = "log.jsonl"
BOARD_FOLDER = "tensorboard"


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
    """Scalars of the present cycle by group, and the latest ones for the bar."""

    def __init__(self) -> None:
        self._values: dict[Group, dict[str, list[float]]] = {}
        self._latest: dict[str, float] = {}

    def add(self, group: Group, scalars: Mapping[str, float]) -> None:
        """Note one value of each scalar."""
        of_group = self._values.setdefault(group, {})
        for name, value in scalars.items():
            of_group.setdefault(name, []).append(value)
            self._latest[name.rpartition("/")[2] if group != "train" else name] = value

    def means(self) -> dict[Group, dict[str, float]]:
        """The means since the last call, by group; then begins anew."""
        values, self._values = self._values, {}
        return {
            group: {name: sum(many) / len(many) for name, many in of_group.items()}
            for group, of_group in values.items()
            if of_group
        }

    def shown(self) -> dict[str, str]:
        """What the bar shows."""
        names = ("loss", "accuracy", "success")
        return {name: f"{self._latest[name]:.3f}" for name in names if name in self._latest}


class RunLog:
    """The log of one run, in its folder; a context manager.

    TensorBoard tags are GROUP/NAME; each group's x-axis is in steps of its own kind. A line of
    `log.jsonl` is `{"group", "minutes", "env_steps", "demo_steps", NAME: value, ...}`.

    project   of Weights & Biases, which gets the same numbers; None: it is left alone
    """

    def __init__(self, folder: Path, project: str | None = None) -> None:
        self._weights_and_biases: Any = None
        if project is not None:
            self._weights_and_biases = weights_and_biases().init(
                project=project, name=folder.resolve().name, dir=str(folder)
            )
        self._lines = (folder / FILE_NAME).open("a", encoding="utf-8")
        self._board = _summary_writer(folder)

    def write(
        self,
        group: Group,
        values: Mapping[str, float],
        *,
        axis: Axis,
        where: Mapping[str, float],
    ) -> None:
        """One line, and one point of every curve of the group.

        where   `minutes`, `env_steps` and `demo_steps` so far; `axis` is the curves' own
        """
        self._lines.write(json.dumps({"group": group, **where, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, int(where[axis]))
        if self._weights_and_biases is not None:
            tagged = {f"{group}/{name}": value for name, value in values.items()}
            self._weights_and_biases.log({**where, **tagged})

    def size_bytes(self) -> int:
        """Of the lines so far."""
        return self._lines.tell()

    def cut(self, size_bytes: int) -> None:
        """Forget the lines after these: they were written after the checkpoint."""
        self._lines.truncate(min(size_bytes, self.size_bytes()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._board.close()
        if self._weights_and_biases is not None:
            self._weights_and_biases.finish()


def resident_mib() -> dict[str, float]:
    """`resident_mib`: the memory that this process holds now; empty where no system file tells."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return {}
    pages = int(status.read_text("ascii").split()[1])
    return {"resident_mib": pages * resource.getpagesize() / 2**20}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that was cut by a kill is left out."""
    lines = (folder / FILE_NAME).read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def progress_bar(stage: str, axis: Axis, *, total: int, done: int, quiet: bool) -> tqdm[NoReturn]:
    """The bar of a stage, counting the steps of its budget; not shown where nobody looks."""
    return tqdm(
        total=total,
        initial=done,
        desc=stage,
        unit=f" {axis.replace('_', ' ')}",
        unit_scale=True,
        disable=True if quiet else None,
    )


def _summary_writer(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard.writer import SummaryWriter  # half a second: only runs need it

    return SummaryWriter(str(folder / BOARD_FOLDER))


def weights_and_biases() -> Any:
    """Its package; SettingsError where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise SettingsError(
            "Weights & Biases is not installed",
            path="run.wandb",
            fix="pip install 'demotools[wandb]', or remove the setting",
        ) from error
