"""Initial weights from another run: the setting `run.init_from`.

Only weights are taken. Optimizer, schedule and counters start afresh, and no code that the other
run's settings name is imported, except the network's own (`model.type = "auto"` takes the other
run's network, and imports its code only if that is trusted).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demotools.errors import CheckpointError
from demotools.exchange.hub import on_hub
from trainer.run.checkpoint import Checkpoint, read_checkpoint
from trainer.run.state import Run
from trainer.settings.models import ModelSettings, Named
from trainer.settings.user_code import check_trusted

_SHOWN = 3


def initial_place(name: str) -> str:
    """What `run.init_from` names, so that it is the same from every working directory."""
    return name if on_hub(name) else str(Path(name).resolve())


def initial_checkpoint(name: str) -> Checkpoint:
    """The checkpoint that `run.init_from` names: a file, the folder of a run, or one on the hub.

    CheckpointError  there is none, or it is damaged
    FetchError       the hub does not give it
    """
    # trusted: of all that it holds, only the network is looked at, and the weights taken
    return read_checkpoint(Path(name), trust=True)


def network_of(checkpoint: Checkpoint, *, trust: bool) -> tuple[ModelSettings, str]:
    """The network of a checkpoint as a setting, and what to say of it.

    CheckpointError  that network is code of somebody's, which is not trusted, or larger than its
                     weights
    """
    saved = checkpoint.parsed()
    check_trusted(saved, checkpoint.path, trust=trust, of="model.")
    checkpoint.check_sizes(saved.model)
    return saved.model, f"network: {saved.model.type}, as in {checkpoint.path}"


def longest_words(words: tuple[str, ...], checkpoint: Checkpoint) -> tuple[str, ...]:
    """The vocabulary of a run, with the words that a checkpoint has beyond it."""
    return checkpoint.words if checkpoint.words[: len(words)] == words else words


def take_weights(run: Run, checkpoint: Checkpoint) -> str:
    """Give the network of a run that begins the weights of a checkpoint; what to say of it.

    The vectors of words that the run has beyond the checkpoint's stay as they were drawn.

    CheckpointError  the checkpoint is of another network or vocabulary, or its weights are not
                     finite
    """
    named, saved = run.settings.model, checkpoint.parsed()
    if named.type != saved.model.type:
        raise CheckpointError(
            f"the weights belong to the network `{saved.model.type}`, not `{named.type}`",
            path=checkpoint.path,
            fix='set model.type = "auto" to use the network of these weights',
        )
    for number, (ours, theirs) in enumerate(zip(run.words, checkpoint.words, strict=False)):
        if ours != theirs:
            raise CheckpointError(
                f"the weights belong to a different vocabulary: word {number + 1} is "
                f"`{theirs}` there but `{ours}` here",
                path=checkpoint.path,
                fix="use weights that were trained on stores of the same origin",
            )
    taken = replace(checkpoint, model=_with_new_words(run, checkpoint))
    differing = sorted({key for key, _ in {*_options(named)} ^ {*_options(saved.model)}})
    keys = ", ".join(f"model.{key}" for key in differing)
    try:
        taken.load_weights(run.network)
    except CheckpointError as error:
        if not differing:
            raise
        raise CheckpointError(
            f"{error.what}; different from theirs: {keys}",
            path=checkpoint.path,
            fix='remove what changes their shapes; model.type = "auto" takes the rest from them',
        ) from error
    taken.check_finite(run.network)
    if run.average is not None:
        run.average.begin()
    count = sum(map(Tensor.numel, run.network.parameters()))
    parts = [
        f"weights: all {count:,} of {checkpoint.path}, trained on "
        f"{', '.join(saved.run.level_names)}{_steps(checkpoint)}"
        + (f" after those of {saved.run.init_from}" if saved.run.init_from else "")
    ]
    if new := run.words[len(checkpoint.words) :]:
        more = ", …" if len(new) > _SHOWN else ""
        parts.append(f"random for {len(new)} new words: {', '.join(new[:_SHOWN])}{more}")
    if differing:
        parts.append(f"different {keys}")
    return "; ".join([*parts, "optimizer, schedule and counters start afresh"])


def _with_new_words(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """The weights of a checkpoint, with those of the run where they are of words beyond its own."""
    new = len(run.words) - len(checkpoint.words)
    weights, rows = dict(checkpoint.model), len(run.words) + 1  # one more for the padding
    for name, drawn in run.network.state_dict().items() if new else ():
        known = weights.get(name)
        if not isinstance(known, Tensor) or drawn.shape[:1] != (rows,):
            continue
        if known.shape == (rows - new, *drawn.shape[1:]):
            weights[name] = torch.cat([known, drawn[-new:].to(known)])
    return weights


def _options(named: Named) -> list[tuple[str, str]]:
    return [(key, repr(value)) for key, value in named.options.items()]


def _steps(checkpoint: Checkpoint) -> str:
    """How long its run had been trained."""
    steps = checkpoint.steps()
    if steps is None:
        return " for an unknown number of steps"
    shown = [f"{n:,} {kind.replace('_', ' ')}" for kind, n in steps.items()]
    return f" for {' and '.join(shown) or 'no steps'}"
