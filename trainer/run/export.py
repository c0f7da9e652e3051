"""Exports a trained policy: as ONNX, as TorchScript, or as its weights alone.

A graph computes one step of B environments, without the time dimension:

    image       uint8 [B, 7, 7, 3], as minigrid gives it, or views of the shape that was learned
    direction   uint8 [B]; absent where the network does not look at it
    mission     int64 [B, L], word ids from 1 on in the order of the words, 0 after the last
    mask        uint8 [B], 0 where the observation begins an episode, else 1
    memory      float32 [B, memory size], zeros at first, then the `memory_after` of the last step

    logits        float32 [B, 7]; the largest is the action
    value         float32 [B], the critic's
    memory_after  float32 [B, memory size]

It is traced, and written only after its outputs have matched the network's on the same episodes.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demotools.babyai.cells import ACTIONS, UNPACKING_TABLE
from demotools.babyai.levels import EVALUATION_SEED, MOST_EPISODES
from demotools.errors import CheckpointError, optional_package
from demotools.output import check_output, progress_bar, written_whole
from trainer.acting.policy import NetworkPolicy, Tokenizer
from trainer.acting.vector import EnvironmentKind, VectorEnvironment, check_playable, seed_streams
from trainer.learning.building import NETWORKS
from trainer.learning.networks.base import memory_of
from trainer.run.checkpoint import Checkpoint, named_checkpoint, write_checkpoint
from trainer.run.published import handed_on, steps_alone
from trainer.settings.models import LEVELS
from trainer.settings.user_code import users_code

Kind = Literal["onnx", "torch", "weights"]
SUFFIXES: dict[Kind, str] = {"onnx": ".onnx", "torch": ".torchscript", "weights": ".pt"}
TOLERANCE = 1e-5
"""How far a graph may be from the network: of 1, or of the value where that is larger."""
COMPARED_STEPS = 1000
_INPUTS = ("image", "direction", "mission", "mask", "memory")
_OUTPUTS = ("logits", "value", "memory_after")
_ENVIRONMENTS = 4
# GRUs of any number of words and rows, and ScatterElements, are in it; every runtime has it
_OPSET = 17

Played = Callable[[Mapping[str, NDArray[Any]]], list[NDArray[np.float32]]]
"""A step of a graph: the inputs by their names, to its three outputs."""
Graph = tuple[bytes, Played]
"""The content of a file, and what plays it."""


@dataclass(frozen=True)
class Exported:
    """The file of an exported policy.

    compared_steps       of an environment, on which it was compared with the network
    largest_difference   found there in logits and values; above 1, in relation to them
    """

    path: str
    kind: Kind
    size_bytes: int
    compared_steps: int
    largest_difference: float

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """All of it for a person."""
        made = f"made {self.path} ({self.size_bytes:,} bytes)"
        if not self.compared_steps:
            return made
        return (
            f"{made}: on {self.compared_steps:,} steps within {self.largest_difference:.1e} "
            "of the network"
        )


def export_policy(
    checkpoint: Path,
    kind: Kind,
    output: Path | None = None,
    *,
    level: str | None = None,
    half: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    quiet: bool = True,
) -> Exported:
    """Write the policy of a checkpoint, or of the folder of a run, to one file.

    kind     a graph for ONNX runtimes, or for torch alone; or a checkpoint of weights without
             the state of training, which everything of ours reads that reads checkpoints
    output   None: `policy` with the suffix of the kind, in the folder of the checkpoint
    level    that a graph is compared on; None: the one it was trained on
    half     of weights: in 16 bits each
    trust    whether code that its settings name is run

    CheckpointError  it cannot be read, its network is no graph, or the graph says something else
    LevelError       the level has no environment
    DemotoolsError   the package `onnx` or `onnxruntime` is missing; the file cannot be written
    """
    saved = named_checkpoint(checkpoint, trust=trust)
    path = output or saved.path.with_name(f"policy{SUFFIXES[kind]}")
    check_output(path, overwrite=overwrite)
    if kind == "weights":
        saved.network()  # that they fit it, and are finite
        write_checkpoint(
            path,
            settings=handed_on(saved.parsed()),
            words=saved.words,
            model={name: _halved(each) if half else each for name, each in saved.model.items()},
            training=steps_alone(saved.steps()),
        )
        return Exported(str(path), kind, path.stat().st_size, 0, 0.0)
    network = saved.network()
    view = saved.parsed().model.view
    step = _Step(network, packed=len(view) == 2)
    example = _example(network, len(saved.words), view)
    traced = _onnx_graph if kind == "onnx" else _torch_graph
    graph, played = _graph_of(saved, lambda: traced(step, example, _described(saved)))
    difference = _difference(saved, network, played, level, quiet=quiet)
    with written_whole(path) as stream:
        stream.write(graph)
    return Exported(str(path), kind, len(graph), COMPARED_STEPS, difference)


def _halved(values: Any) -> Any:
    floating = isinstance(values, Tensor) and values.is_floating_point()
    return values.half() if floating else values


class _Step(nn.Module):
    """One step of B environments; inputs and outputs are those of a graph."""

    def __init__(self, network: nn.Module, *, packed: bool) -> None:
        super().__init__()
        self.network = network
        self.packed = packed

    def forward(
        self, image: Tensor, direction: Tensor, mission: Tensor, mask: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen = image
        if self.packed:
            kind, colour, state = image.int().unbind(3)
            seen = (kind * 18 + colour * 3 + state).to(torch.uint8)
        batch = {
            "cells": seen[None],
            "direction": direction[None],
            "masks": mask[None],
            "mission": torch.arange(mission.shape[0], dtype=torch.int32)[None],
            "mission_tokens": mission,
        }
        output = self.network(batch, memory)
        return output[0][0], output[1][0], output[2]


def _example(network: nn.Module, words: int, view: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Inputs to trace with: two environments with missions of two lengths, one that begins."""
    return (
        torch.ones(2, *(view if len(view) == 3 else (*view, 3)), dtype=torch.uint8),
        torch.tensor([0, 3], dtype=torch.uint8),
        torch.tensor([[1, words, 1], [words, 0, 0]]),
        torch.tensor([0, 1], dtype=torch.uint8),
        memory_of(network, 2),
    )


def _described(saved: Checkpoint) -> dict[str, str]:
    """What goes into the file beside the graph."""
    return {
        "words": json.dumps(saved.words, ensure_ascii=False),
        "actions": json.dumps(ACTIONS),
        "level": " + ".join(saved.parsed().run.level_names),
        "settings": handed_on(saved.parsed()),
    }


def _graph_of(saved: Checkpoint, traced: Callable[[], tuple[bytes, Played]]) -> Graph:
    """What `traced` gives; CheckpointError where a network of ours is no graph."""
    named = saved.parsed().model.type
    with warnings.catch_warnings(), torch.no_grad(), users_code("model.type", named):
        # that a shape may become a constant is found out by the comparison
        warnings.simplefilter("ignore")
        try:
            return traced()
        except (RuntimeError, TypeError, ValueError) as error:
            if named not in NETWORKS:
                raise
            raise CheckpointError(
                f"the network `{named}` cannot be exported as a graph: {error}",
                path=saved.path,
                fix="export it with --to weights, and use it with `trainer.load_policy`",
            ) from error


def _onnx_graph(
    step: nn.Module, example: tuple[Tensor, ...], described: Mapping[str, str]
) -> Graph:
    onnx = optional_package("onnx", "onnx")
    runtime = optional_package("onnxruntime", "onnx")
    buffer = io.BytesIO()
    axes = {name: {0: "batch"} for name in (*_INPUTS, *_OUTPUTS)}
    axes["mission"][1] = "words"
    torch.onnx.export(
        *(step, example, buffer),  # type: ignore[arg-type]
        input_names=list(_INPUTS),
        output_names=list(_OUTPUTS),
        dynamic_axes=axes,
        opset_version=_OPSET,
        # the newer exporter would fix the number of words
        dynamo=False,
    )
    model = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, dict(described))
    content = model.SerializeToString()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1  # more would wait spinning while torch works
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    looked_at = {each.name for each in session.get_inputs()}

    def played(inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        given = {name: values for name, values in inputs.items() if name in looked_at}
        return list(session.run(list(_OUTPUTS), given))

    return content, played


def _torch_graph(
    step: nn.Module, example: tuple[Tensor, ...], described: Mapping[str, str]
) -> Graph:
    traced = torch.jit.trace(  # type: ignore[no-untyped-call]
        step.eval(), example, check_trace=False
    )
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files=dict(described))
    buffer.seek(0)
    again = torch.jit.load(buffer)  # type: ignore[no-untyped-call]

    def played(inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        with torch.no_grad():
            outputs = again(*(torch.from_numpy(inputs[name]) for name in _INPUTS))
        return [values.numpy() for values in outputs]

    return buffer.getvalue(), played


def _difference(
    saved: Checkpoint, network: nn.Module, played: Played, level: str | None, *, quiet: bool
) -> float:
    """How far a graph is from the network while both see the same 1,000 steps.

    Each carries its own memory along.

    CheckpointError  farther than they may be
    """
    settings = saved.parsed()
    played_level, view = level or settings.run.level_names[0], settings.model.view
    kind = EnvironmentKind(played_level, settings.environment, view=view)
    if kind.make == LEVELS:
        check_playable(played_level)
    policy = NetworkPolicy(network, saved.words)
    policy.reset(_ENVIRONMENTS)
    memory, largest = policy.memory.numpy(), 0.0
    seeds = range(EVALUATION_SEED, EVALUATION_SEED + MOST_EPISODES)
    rounds = range(COMPARED_STEPS // _ENVIRONMENTS)
    with VectorEnvironment(kind, _ENVIRONMENTS) as environments:
        seen = environments.reset(seed_streams(seeds, _ENVIRONMENTS))
        for _ in progress_bar(len(rounds), "compare", "rounds", quiet=quiet, items=rounds):
            row, tokens = Tokenizer(saved.words)(seen.missions)
            inputs = {
                "image": UNPACKING_TABLE[seen.cells] if len(view) == 2 else seen.cells,
                "direction": seen.direction,
                "mission": tokens[row].numpy(),
                "mask": seen.mask,
                "memory": memory,
            }
            theirs = played(inputs)
            action = policy.act(seen.cells, seen.direction, seen.missions, seen.mask, seen.seed)
            ours = (policy.logits.numpy(), policy.values.numpy())
            for their, our in zip(theirs[:2], ours, strict=True):
                apart = np.abs(their - our) / np.maximum(np.abs(our), 1)
                largest = max(largest, float(apart.max()))
            memory = theirs[2]
            seen = environments.step(action)
    if not largest <= TOLERANCE:
        raise CheckpointError(
            f"the graph's outputs differ from the network's by up to {largest:.1e}",
            path=saved.path,
            fix="export it with --to weights; your own network must compute only with tensors of "
            "the batch, and never read their values in Python",
        )
    return largest
