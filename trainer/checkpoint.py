"""Checkpoints: one file, written whole or not at all, read without running anything in it."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from demotools.errors import CheckpointError, from_os_error
from trainer.config import Settings, parsed_settings
from trainer.models import build_network

FORMAT = 1
FILE_NAME = "last.pt"
BEST = "best.pt"
FAILED = "failed.pt"
_COPIES = "after-*.pt"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors and plain values.

    settings   resolved TOML, which runs again as it is
    words      the vocabulary, in the order of the token ids
    model      state of the network
    training   state of everything else: optimizer, schedule, progress, streams, random generators
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
        import tomllib

        return parsed_settings(tomllib.loads(self.settings), self.path)

    def network(self) -> nn.Module:
        """The network with its weights, ready to act; CheckpointError where they do not fit."""
        named = self.parsed().model
        network = build_network(named.type, named.options, len(self.words))
        try:
            network.load_state_dict(self.model)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"the weights do not fit the network `{named.type}`",
                path=self.path,
                fix="use the version of the network that it was trained with",
            ) from error
        return network.eval()


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise from_os_error(error, path) from error


def keep_checkpoints(folder: Path, count: int, updates: int, *, best: bool) -> None:
    """Let the newest checkpoint stay as one of the last `count`, and as the best where it is.

    updates   of the weights so far, the number in the name of the copy

    DemotoolsError  the disk is full or cannot be written
    """
    newest = folder / FILE_NAME
    try:
        if best:
            _copy(newest, folder / BEST)
        if count > 1:
            _copy(newest, folder / _COPIES.replace("*", f"{updates:010}"))
            # the newest is there twice, under both names
            for old in sorted(folder.glob(_COPIES))[:-count]:
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


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, by its file or the folder of its run.

    CheckpointError  missing, damaged, or of a newer format
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            "there is no checkpoint",
            path=file,
            fix="name the folder of a run, or train one: `trainer run bc_small_cpu.toml`",
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            "this is not a checkpoint, or it is damaged",
            path=file,
            fix="name another checkpoint, or train again",
        ) from error
    form = content.get("format") if isinstance(content, dict) else None
    if not isinstance(form, int) or form > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {form}; this trainer reads up to {FORMAT}",
            path=file,
            fix="install a newer trainer, or name a file that `trainer run` wrote",
        )
    return Checkpoint(
        path=file,
        settings=content["settings"],
        words=tuple(content["words"]),
        model=content["model"],
        training=content["training"],
        versions=content["versions"],
    )
