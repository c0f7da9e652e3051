"""Checkpoints: one file, written whole or not at all, read without running anything in it."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.overrides import TorchFunctionMode

from demotools.errors import (
    CheckpointError,
    SettingsError,
    first_problem,
    from_os_error,
    printable_text,
)
from demotools.exchange.hub import on_hub
from demotools.output import open_regular, written_whole
from trainer.learning.building import NETWORKS, build_network
from trainer.run.folder import CHECKPOINT_FILE, COPIES, REPLACED, no_checkpoint
from trainer.run.published import WEIGHTS_FILE, downloaded_policy, policy_content
from trainer.settings.models import LEVELS, Named, Settings, parsed_settings, toml_tree
from trainer.settings.user_code import check_trusted, search_noted_folders

FORMAT = 1
_MISFITS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError)
"""What torch's and our own `load_state` raise on state of another shape."""


@dataclass(frozen=True)
class About:
    """What a checkpoint is of.

    environment   what makes those of the levels
    options       the keys beside the network's type
    weights       numbers in the network's state
    steps         see `Checkpoint.steps`
    resumable     whether it holds the state of training, too
    """

    path: str
    levels: tuple[str, ...]
    environment: str
    network: str
    options: dict[str, Any]
    weights: int
    steps: dict[str, int] | None
    resumable: bool
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        steps = (self.steps or {}).items()
        made_by = "" if self.environment == LEVELS else f", made by {self.environment}"
        lines = [
            self.path,
            f"  level    {', '.join(self.levels)}{made_by}",
            f"  network  {self.network}{f' ({options})' if options else ''}, "
            f"{self.weights:,} weights",
            "  steps    "
            + (", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in steps) or "not known"),
            f"  holds    {'the state of training, too' if self.resumable else 'weights alone'}",
            f"  made by  {', '.join(f'{name} {one}' for name, one in self.versions.items())}",
        ]
        return "\n".join(printable_text(line) for line in lines)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors and plain values.

    settings   resolved TOML, which runs again as it is
    words      the vocabulary, in the order of the token ids
    model      state of the network
    training   state of everything else: optimizer, schedule, progress, streams, random generators;
               of weights handed on alone no more than `progress`, with what `steps` gives
    versions   of the packages that wrote it
    """

    path: Path
    settings: str
    words: tuple[str, ...]
    model: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]

    def parsed(self) -> Settings:
        """The settings as an object."""
        return parsed_settings(toml_tree(self.settings, self.path), self.path)

    def steps(self) -> dict[str, int] | None:
        """`demo_steps` and `env_steps` of its run, without those of a run it began with.

        None where it does not say: weights that an older trainer exported, or anybody wrote.
        """
        progress = self.training.get("progress")
        if not isinstance(progress, dict):
            return None
        counts = {name: progress.get(name) for name in ("demo_steps", "env_steps")}
        return {name: n for name, n in counts.items() if type(n) is int and n > 0}

    def about(self) -> About:
        """What it is of; nothing that its settings name is imported."""
        settings = self.parsed()
        tensors = (one for one in self.model.values() if isinstance(one, torch.Tensor))
        return About(
            path=str(self.path),
            levels=settings.run.level_names,
            environment=settings.environment,
            network=settings.model.type,
            options=settings.model.options,
            weights=sum(one.numel() for one in tensors),
            steps=self.steps(),
            resumable=not self.training.keys() <= {"progress"},
            versions=self.versions,
        )

    def network(self) -> nn.Module:
        """The network with its weights, ready to act.

        CheckpointError  they do not fit it, or are not finite
        """
        named = self.parsed().model
        self.check_sizes(named)
        network = build_network(named.type, named.options, len(self.words))
        self.load_weights(network)
        self.check_finite(network)
        return network.eval()

    def check_finite(self, network: nn.Module) -> None:
        """CheckpointError where a weight that a network took from here is not finite."""
        for name, weights in network.named_parameters():
            if not weights.isfinite().all():
                raise CheckpointError(
                    f"the weights `{name}` are not finite",
                    path=self.path,
                    fix="use an earlier checkpoint, or train again with a lower optimizer.lr",
                )

    def check_sizes(self, named: Named) -> None:
        """Refuse a network of ours that is larger than the weights there are, before it is built.

        A file of a few bytes could else ask for all memory.
        """
        if named.type not in NETWORKS:
            return
        with (
            torch.device("meta"),
            _NoInitialisation(),
            fitting(self.path, f"the network `{named.type}`"),
        ):
            network = build_network(named.type, named.options, len(self.words))
        if what := self._wrong_shape(network):
            raise _misfit(self.path, f"{self._not_fitting()}: {what}")
        claimed = sum(w.nbytes for w in self.model.values() if isinstance(w, torch.Tensor))
        if claimed > self.path.stat().st_size:
            raise _misfit(self.path, f"{self._not_fitting()}: they are larger than the file")

    def _wrong_shape(self, network: nn.Module) -> str:
        """The first weights that are not those of a network; empty where all fit."""
        there = {name: getattr(weights, "shape", None) for name, weights in self.model.items()}
        wanted = {name: weights.shape for name, weights in network.state_dict().items()}
        wrong = [key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key)]
        name = min(wrong, default="")
        what = f"`{name}` is {_shape(there.get(name))}, not {_shape(wanted.get(name))}"
        return what if wrong else ""

    def _not_fitting(self) -> str:
        return f"the weights do not fit the network `{self.parsed().model.type}`"

    def load_weights(self, network: nn.Module) -> None:
        """Give a network the weights; CheckpointError where they do not fit it."""
        try:
            network.load_state_dict(self.model)
        except _MISFITS as error:
            what = self._wrong_shape(network) or _first_line(error)
            raise _misfit(self.path, f"{self._not_fitting()}: {what}") from error


class _NoInitialisation(TorchFunctionMode):
    """Inside, weights get no first values; without memory they need torch's compiler for them."""

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return {**dict(zip(["tensor"], args, strict=False)), **(kwargs or {})}["tensor"]
        return function(*args, **(kwargs or {}))


class _Content(BaseModel):
    """What the file of a checkpoint must hold."""

    model_config = ConfigDict(strict=True)

    format: Annotated[int, Field(ge=1)]
    versions: dict[str, str]
    settings: str
    words: Annotated[list[str], Field(min_length=1)]
    model: dict[str, Any]
    training: dict[str, Any]


@contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """CheckpointError, saying `what`, where state does not fit what it is put into."""
    try:
        yield
    except _MISFITS as error:
        raise _misfit(path, f"{what}: {_first_line(error)}") from error


def _misfit(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what,
        path=path,
        fix="use the versions that it was written with, name another checkpoint, or train again",
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def write_checkpoint(
    path: Path,
    *,
    settings: str,
    words: tuple[str, ...],
    model: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Write a checkpoint under its name only when whole; the one before stays until then.

    DemotoolsError  the disk is full or cannot be written
    """
    content = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("demotools", "torch", "minigrid", "numpy")},
        "settings": settings,
        "words": list(words),
        "model": dict(model),
        "training": dict(training),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with written_whole(path) as stream:
        stream.write(buffer.getbuffer())


def keep_checkpoints(folder: Path, count: int, updates: int) -> None:
    """Let the newest checkpoint stay as one of the last `count`.

    updates   of the weights so far, the number in the name of the copy

    DemotoolsError  the disk is full or cannot be written
    """
    newest = folder / CHECKPOINT_FILE
    try:
        if count > 1:
            _copy(newest, folder / COPIES.replace("*", f"{updates:010}"))
            # the newest is there twice, under both names
            for old in sorted(folder.glob(COPIES))[:-count]:
                old.unlink()
    except OSError as error:
        raise from_os_error(error, folder) from error


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)  # the source is replaced, never written into
    except OSError:
        shutil.copyfile(source, temporary)  # a file system without links
    temporary.replace(target)


def named_checkpoint(named: Path | Checkpoint, *, trust: bool) -> Checkpoint:
    """A checkpoint, or the folder of a run, that a user names to play; see `read_checkpoint`.

    named   one that was read is not read again
    trust   whether code that its settings name may be run, which also is looked for where its run
            found it
    """
    if isinstance(named, Checkpoint):
        checkpoint = named
        check_trusted(checkpoint.parsed(), checkpoint.path, trust=trust)
    else:
        checkpoint = read_checkpoint(named, trust=trust)
    if trust:
        search_noted_folders(checkpoint.path.parent)
    return checkpoint


def read_checkpoint(path: Path, *, trust: bool = False) -> Checkpoint:
    """A checkpoint, by its file, the folder of its run, or `hf:OWNER/NAME` for a published one.

    Nothing of what is stored in it is run.

    trust   whether its settings may name code that is not the trainer's, which whoever builds what
            they name then imports

    CheckpointError  missing, damaged, without something that it must hold, of a newer format, or
                     it names code and is not trusted
    FetchError       the hub does not give it
    """
    path = downloaded_policy(path.as_posix()) if on_hub(path) else path
    file = path
    if (path / WEIGHTS_FILE).is_file() and not (path / CHECKPOINT_FILE).exists():
        file = path / WEIGHTS_FILE
    elif path.is_dir():
        file = path / CHECKPOINT_FILE
        replaced = path / REPLACED / CHECKPOINT_FILE
        file = replaced if replaced.exists() and not file.exists() else file
    if not file.exists():
        raise no_checkpoint(file)
    raw = policy_content(path) if file == path / WEIGHTS_FILE else _content(file)
    form = raw.get("format") if isinstance(raw, dict) else None
    if type(form) is int and form > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {form}; this trainer reads up to {FORMAT}",
            path=file,
            fix="install a newer trainer, or name a file that `trainer run` wrote",
        )
    try:
        content = _Content.model_validate(raw)
        settings = parsed_settings(toml_tree(content.settings, file), file)
    except ValidationError as error:
        place, what = first_problem(error, "python")
        raise _not_a_checkpoint(file, f"at `{place}`: {what}") from error
    except (SettingsError, ValueError, RecursionError) as error:
        what = error.what if isinstance(error, SettingsError) else _first_line(error)
        raise _not_a_checkpoint(file, f"its settings: {what}") from error
    check_trusted(settings, file, trust=trust)
    return Checkpoint(
        path=file,
        settings=content.settings,
        words=tuple(content.words),
        model=content.model,
        training=content.training,
        versions=content.versions,
    )


def _content(file: Path) -> Any:
    """What torch has stored in a file, its checksums compared."""
    with open_regular(file) as stream:
        return _stored(stream, file)


def _stored(stream: IO[bytes], file: Path) -> Any:
    if not zipfile.is_zipfile(stream):
        stream.seek(0)
        begun = stream.read(4) == b"PK\3\4"
        why = (
            "its end is missing, as in an interrupted download"
            if begun
            else "it does not begin like a checkpoint"
        )
        raise _not_a_checkpoint(file, why if stream.tell() else "it is empty")
    try:
        with zipfile.ZipFile(stream) as archive:
            # torch compresses nothing: what announces more than the file holds is not its work
            announced = sum(member.file_size for member in archive.infolist())
            if announced > stream.seek(0, os.SEEK_END):
                why = f"it announces {announced:,} bytes, which is more than its size"
                raise _not_a_checkpoint(file, why)
            damaged = archive.testzip()
        if damaged is not None:
            raise _not_a_checkpoint(file, f"the checksum of {damaged} is wrong")
        stream.seek(0)
        return torch.load(stream, map_location="cpu", weights_only=True)
    # what zipfile and torch's unpickler raise on damaged files is no closed list: KeyError,
    # struct.error, zlib.error, NotImplementedError, AssertionError, ...
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _unsafe(file, error) from error
    except Exception as error:
        raise _not_a_checkpoint(file, _first_line(error)) from error


def _unsafe(file: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """What torch's unpickler refused; torch itself advises to load it without looking."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"it names {named[1]}" if named else "it contains more than tensors and settings"
    return CheckpointError(
        f"this is not a checkpoint of the trainer: {what}, which could run code; nothing was run",
        path=file,
        fix="do not load this file with anything else, in particular not with "
        "torch.load(weights_only=False); use one written by `trainer run`, from a trusted source",
    )


def _not_a_checkpoint(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"this is not a checkpoint, or a damaged one: {why}",
        path=file,
        fix="name another checkpoint, or train again",
    )


def _first_line(error: Exception) -> str:
    """The class of an error, and how its text begins."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
