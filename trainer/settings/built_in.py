"""The trainer's own parts that a `type` can name, and their keys: known before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.settings.refusals import Problem, unknown_key, unknown_type

_KINDS = {
    "model.type": "network",
    "optimizer.type": "optimizer",
    "optimizer.schedule.type": "schedule",
    "on_policy.environment": "environment",
    "run.level": "module of the level",
}
_OF_ALL = ("lr", "weight_decay", "maximize", "foreach", "differentiable", "fused")
_OF_ADAM = (*_OF_ALL, "betas", "eps", "amsgrad", "capturable", "decoupled_weight_decay")
_SMALL = ("embedding", "features", "memory", "instruction", "view", "actions", "words")
_FILM = ("channels", "memory", "instruction", "view", "actions", "words")
_BIG = ("memory", "instruction", "channels", "embedding", "endpool", "words")
_MAZE = ("embedding", "features", "memory", "instruction", "channels", "heads", "search", "words")
_DECAY = ("to", "warmup", "env_steps", "demo_steps")

KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "network": {
        "auto": tuple(dict.fromkeys(_SMALL + _BIG)),  # which is one of these
        "small": _SMALL,
        "film": _FILM,
        "big": _BIG,
        "maze": _MAZE,
    },
    "optimizer": {
        "adam": _OF_ADAM,
        "adamw": _OF_ADAM,
        "sgd": (*_OF_ALL, "momentum", "dampening", "nesterov"),
    },
    "schedule": {"constant": (), "linear": _DECAY, "cosine": _DECAY},
    "loss": {
        "expert_cross_entropy": ("entropy_weight",),
        "ppo": ("clip", "clip_decay_steps", "value_weight", "entropy_weight", "target_kl"),
        "a2c": ("value_weight", "entropy_weight"),
        "subgoal_cross_entropy": (),
    },
}
"""By kind and name. Every network's `words` are those of its missions (docs/settings.md)."""


def kind_of(key: str) -> str:
    """What kind of thing the setting `key` names, in a word."""
    if key.endswith(".iterator.type"):
        return "iterator"
    return _KINDS.get(key, "loss" if key.startswith("losses.") else key.rpartition(".")[2])


def part_problems(parts: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Iterator[Problem]:
    """What is wrong with names of ours, and with the keys beside them.

    parts   a name and its options, by the setting that names it, as `losses.ce.type`
    """
    for key, (name, options) in parts.items():
        known = KEYS[kind_of(key)]
        if ":" in name:
            continue  # the user's, or torch's
        if name not in known:
            what = f"there is no {kind_of(key)} named `{name}`"
            yield Problem(key, what, unknown_type(name, known))
            continue
        keys = known[name]
        section = key.removesuffix(".type")
        beside = ("type", *keys)
        if section == "optimizer":
            beside += ("max_grad_norm", "schedule")
        for option in options.keys() - set(keys):
            yield unknown_key([*section.split("."), option], beside)
