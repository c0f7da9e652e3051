"""Experiment trackers that also receive the log of a run: Weights & Biases, MLflow, trackio.

Each is imported only if a setting names it. A run has an id there, kept in its folder, under which
a resumed run continues. Line n of the log is step n, which each tracker accepts only once.
"""

from __future__ import annotations

import importlib
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from demotools.errors import DemotoolsError, SettingsError, installing
from demotools.output import written_whole
from trainer.settings.models import setting_leaves
from trainer.settings.user_code import FOREIGN, error_text

TRACKERS = {"wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "trackio"}
"""Keys of the section `run`, each of which names a project, and what they are called."""
ID_FILES = tuple(f"{key}-id.txt" for key in TRACKERS)
_MOST_AT_ONCE = 100


class Tracker(Protocol):
    """A run that is open in another program."""

    def log(self, values: Mapping[str, float], step: int, gifs: Mapping[str, Path]) -> None:
        """Note what line number `step` of the log holds; what has been noted before is dropped.

        gifs   of episodes, by their tags; a program that has no place for them leaves them out
        """

    def finish(self, *, failed: bool) -> None:
        """The run ends."""


class _WeightsAndBiases:
    """It drops steps that it has."""

    def __init__(self, package: Any, folder: Path, project: str, config: Any, _lines: int) -> None:
        self._package = package
        self._run = package.init(
            project=project,
            name=folder.resolve().name,
            id=_id(folder, "wandb", lambda: secrets.token_hex(8)),
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def log(self, values: Mapping[str, float], step: int, gifs: Mapping[str, Path]) -> None:
        videos = {tag: self._package.Video(str(gif), format="gif") for tag, gif in gifs.items()}
        self._run.log({**values, **videos}, step=step)

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """It would keep a step twice: the last one that it has is asked for."""

    def __init__(self, package: Any, folder: Path, project: str, config: Any, _lines: int) -> None:
        self._entities, self._client = package.entities, package.MlflowClient()
        self._last = -1

        def begun() -> str:
            known = self._client.get_experiment_by_name(project)
            found = known.experiment_id if known else self._client.create_experiment(project)
            run = self._client.create_run(found, run_name=folder.resolve().name)
            params = [
                self._entities.Param(key, str(value)[:500])
                for key, value in setting_leaves(config).items()
            ]
            for first in range(0, len(params), _MOST_AT_ONCE):
                batch = params[first : first + _MOST_AT_ONCE]
                self._client.log_batch(run.info.run_id, params=batch)
            return str(run.info.run_id)

        self._id = _id(folder, "mlflow", begun)
        history = self._client.get_metric_history(self._id, "minutes")
        self._last = max((metric.step for metric in history), default=-1)
        self._client.update_run(self._id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int, gifs: Mapping[str, Path]) -> None:
        if step > self._last:
            now = int(1000 * time.time())
            metrics = [self._entities.Metric(key, values[key], now, step) for key in values]
            self._client.log_batch(self._id, metrics=metrics)
            for gif in gifs.values():
                self._client.log_artifact(self._id, str(gif), "gifs")

    def finish(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class _Trackio:
    """It would keep a step twice: what the log held when the run was opened has been noted."""

    def __init__(self, package: Any, folder: Path, project: str, config: Any, lines: int) -> None:
        self._lines = lines
        name = _id(folder, "trackio", lambda: f"{folder.resolve().name}-{secrets.token_hex(4)}")
        self._run = package.init(
            project=project, name=name, config=config, resume="allow", embed=False
        )

    def log(self, values: Mapping[str, float], step: int, _gifs: Mapping[str, Path]) -> None:
        if step >= self._lines:
            self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:  # noqa: ARG002 - it makes no difference
        self._run.finish()


_KINDS: dict[str, Callable[..., Tracker]] = {
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def open_trackers(
    folder: Path, projects: Mapping[str, str], config: Mapping[str, Any], lines: int
) -> dict[str, Tracker]:
    """This run in each of these programs, by key.

    projects   by the key of the program
    config     all settings, for the programs to show
    lines      of the log, when the run is opened

    SettingsError  one is not installed, or does not begin
    """
    opened: dict[str, Tracker] = {}
    for key, project in projects.items():
        package = tracking_package(key)
        try:
            opened[key] = _KINDS[key](package, folder, project, dict(config), lines)
        except DemotoolsError:
            raise
        except FOREIGN as error:
            raise SettingsError(
                f"{TRACKERS[key]} does not start: {error_text(error)}",
                path=f"run.{key}",
                fix="log in with `wandb login`, set WANDB_MODE=offline, or remove the setting"
                if key == "wandb"
                else "check where it writes to, or remove the setting",
            ) from error
    return opened


def tracking_package(key: str) -> Any:
    """The package of a program; SettingsError where it is not installed."""
    try:
        return importlib.import_module(key)
    except ImportError as error:
        raise SettingsError(
            f"{TRACKERS[key]} is not installed",
            path=f"run.{key}",
            fix=f"{installing(key)}, or remove the setting",
        ) from error


def _id(folder: Path, key: str, begun: Callable[[], str]) -> str:
    """The id of this run in a program; where it has none yet, the one that `begun` gives."""
    file = folder / f"{key}-id.txt"
    if not file.exists():
        name = begun()
        with written_whole(file) as stream:
            stream.write(name.encode())
    return file.read_text("utf-8").strip()
