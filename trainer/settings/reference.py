"""What every setting is: for people as a page (docs/settings.md), for editors as a JSON Schema.

Types, ranges and defaults are those of `trainer.settings.models`; here are units and meanings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trainer.settings.models import Settings

SCHEMA_FILE = "recipe.schema.json"
"""Lies beside the recipes that ship, whose first lines name it for editors."""

MEANINGS: dict[str, tuple[str, str]] = {
    # key: unit, meaning
    "run.name": ("", "name of the run, and of its folder under `runs`"),
    "run.level": ("", "the level that is trained for and measured on, or a list of names and tables: BabyAI's levels, or what `on_policy.environment` understands"),
    "run.level.N.name": ("", "of the level"),
    "run.level.N.proportion": ("", "of the environments, relative to the other levels"),
    "run.seed": ("", "of the weights, the order of the store's episodes, the environments and the actions"),
    "run.device": ("", "`auto`: a CUDA GPU if torch finds one, else the CPU; `mps` must be named"),
    "run.precision": (
        "",
        "in which the network is computed; weights stay float32; `auto`: bfloat16 on a CPU that "
        "multiplies in it at 1.5 times the rate or more, tried when a run begins",
    ),
    "run.compile": ("", "compile the parts of the network that gain by it"),
    "run.deterministic": ("", "use only torch's deterministic algorithms"),
    "run.init_from": ("", "checkpoint, or folder of a run, whose weights the run begins with; unset: random ones"),
    "run.ema": ("", "decay of an exponential moving average of the weights, which the checkpoint then acts with and is measured with; unset: the weights themselves"),
    "run.save_every_env_steps": ("env steps", "between checkpoints; not beside `save_every_demo_steps`"),
    "run.save_every_demo_steps": ("demo steps", "between checkpoints; not beside `save_every_env_steps`"),
    "run.keep": ("checkpoints", "how many of the latest are kept"),
    "run.wandb": ("", "project of Weights & Biases that gets the log too"),
    "run.mlflow": ("", "experiment of MLflow that gets the log too"),
    "run.trackio": ("", "project of trackio that gets the log too"),
    "model.type": ("", "the network: `auto` (`big` on a CUDA GPU, else `small`), one of ours, or `package.module:Name`; its arguments stand beside it"),
    "model.words": ("", "of missions beyond those of BabyAI and of the stores; unset: the environment's"),
    "optimizer.type": ("", "`adam`, `adamw`, `sgd`, `torch.optim:Name` or `package.module:Name`; its arguments stand beside it"),
    "optimizer.lr": ("", "learning rate, never exceeded by the schedule"),
    "optimizer.max_grad_norm": ("", "longer gradients are scaled down to this norm; unset: none are"),
    "optimizer.schedule.type": ("", "of the learning rate: `constant`, `linear`, `cosine`, `torch.optim.lr_scheduler:Name` or `package.module:Name`"),
    "on_policy.environments": ("environments", "stepped in parallel, in at most as many processes as `-m` says"),
    "on_policy.rollout_len": ("steps", "of each environment in a rollout"),
    "on_policy.gamma": ("", "discount of a reward one step later"),
    "on_policy.gae_lambda": ("", "of generalised advantage estimation: 0 one step, 1 whole returns"),
    "on_policy.normalise_advantages": ("", "bring the advantages of a rollout to mean 0 and deviation 1"),
    "on_policy.environment": ("", "`package.module:make`, called with `run.level`; gives a Gymnasium environment"),
    "losses.NAME.type": ("", "`expert_cross_entropy`, `subgoal_cross_entropy`, `ppo`, `a2c` or `package.module:Name`; its arguments stand beside it"),
    "stages.N.max_env_steps": ("env steps", "budget of the stage; exactly one of the two budgets"),
    "stages.N.max_demo_steps": ("demo steps", "budget of the stage; exactly one of the two budgets"),
    "stages.N.losses": ("", "on environment rollouts: names in `[losses]`, or weights by name"),
    "stages.N.rollout_len": ("steps", "in place of `on_policy.rollout_len` in this stage"),
    "stages.N.repeats": ("", "how often each rollout is learned from"),
    "stages.N.minibatches": ("minibatches", "into which the environments of a rollout are dealt"),
    "stages.N.teacher_forcing.from": ("probability", "that the expert acts, at the beginning of the stage"),
    "stages.N.teacher_forcing.to": ("probability", "that the expert acts, in the end"),
    "stages.N.teacher_forcing.steps": ("env steps", "of the stage over which it changes linearly"),
    "stages.N.early_stopping.success": ("share", "of training episodes that ends the stage; this or `patience`"),
    "stages.N.early_stopping.episodes": ("episodes", "the latest ones, of which that share is taken"),
    "stages.N.early_stopping.patience": ("cycles", "without a better loss on `hold_out` that end the stage"),
    "stages.N.early_stopping.hold_out": ("", "store that `patience` watches"),
    "stages.N.early_stopping.hold_out_steps": ("demo steps", "of `hold_out` that are looked at, always the same ones; unset: all"),
    "stages.N.off_policy.store": ("", "store by its name or path, or a list of names and tables; `auto`: the level's, the small twin without a GPU"),
    "stages.N.off_policy.store.N.name": ("", "of the store, or its path"),
    "stages.N.off_policy.store.N.proportion": ("", "of the rollouts, relative to the other stores"),
    "stages.N.off_policy.store.N.mission": ("", "regular expression to be found in the mission of an episode"),
    "stages.N.off_policy.store.N.min_length": ("steps", "of an episode, at least"),
    "stages.N.off_policy.store.N.max_length": ("steps", "of an episode, at most"),
    "stages.N.off_policy.store.N.min_seed": ("", "of an episode's environment, at least"),
    "stages.N.off_policy.store.N.max_seed": ("", "of an episode's environment, at most"),
    "stages.N.off_policy.iterator.type": ("", "`package.module:Name` that gives the batches in place of the trainer's own; its arguments stand beside it"),
    "stages.N.off_policy.rollouts": ("rollouts", "in parallel in a batch"),
    "stages.N.off_policy.rollout_len": ("steps", "of each rollout in a batch"),
    "stages.N.off_policy.updates": ("updates", "in a cycle, each on a batch of its own"),
    "stages.N.off_policy.losses": ("", "on batches from the store: names in `[losses]`, or weights by name"),
    "stages.N.off_policy.augment": ("", "symmetries of the level that are applied to episodes at random"),
    "stages.N.off_policy.shuffle": ("", "`windowed` reads stores larger than memory from front to back"),
    "evaluation.episodes": ("episodes", "unseen ones, played after the last stage"),
    "evaluation.every": ("steps", "of what the stage's budget counts, between measurements; unset: only after the last stage"),
    "evaluation.sample": ("", "draw actions from the policy's probabilities, take the most probable ones, or both; unset: both where a stage learns from its own rollouts, else the most probable"),
    "evaluation.gifs": ("episodes", "of each measurement and level, shown as GIFs on TensorBoard and kept in `gifs/`; unset: none"),
}  # fmt: skip
"""Unit and meaning of every setting; N is the number of a stage or store, NAME of a loss."""

_RANGES = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_NAMES = {"type": "array", "items": {"type": "string"}}


class Setting(NamedTuple):
    """A row of the reference: everything as text, `default` empty where the key must be given."""

    key: str
    type: str
    unit: str
    default: str
    meaning: str


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors: keys, types, ranges, defaults and meanings."""
    schema = _plain(Settings.model_json_schema())
    parts = schema["$defs"]
    for key, field, _required in _fields(schema, parts):
        unit, meaning = MEANINGS.get(key, ("", ""))
        if meaning:
            field["description"] = f"{meaning} ({unit})" if unit else meaning
    store, run = (parts[name]["properties"] for name in ("OffPolicySettings", "RunSettings"))
    for field, part in ((store["store"], "StoreSettings"), (run["level"], "LevelSettings")):
        one = {"anyOf": [{"type": "string"}, {"$ref": f"#/$defs/{part}"}]}
        _accept(field, {"type": "string"}, {"type": "array", "items": one})
    _accept(store["iterator"], {"type": "string"}, {"$ref": "#/$defs/Named"})
    for stage in ("OffPolicySettings", "StageSettings"):
        losses = parts[stage]["properties"]["losses"]
        _accept(losses, _NAMES, {"type": "object", "additionalProperties": {"type": "number"}})
    schema["properties"]["tiny"] = {
        "type": "object",
        "description": "what `--tiny` overrides, by the whole key in quotes",
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Recipe of the trainer"}
    return {**schema, **head}


def schema_text() -> str:
    """The schema as the file that ships."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def setting_rows() -> list[Setting]:
    """Every setting, in the order of a recipe."""
    schema = _plain(Settings.model_json_schema())
    return [
        Setting(
            key,
            _type_text(field),
            MEANINGS.get(key, ("", ""))[0],
            "" if required else _default_text(field.get("default")),
            MEANINGS.get(key, ("", ""))[1],
        )
        for key, field, required in _fields(schema, schema["$defs"])
    ]


def _accept(field: dict[str, Any], *kinds: Mapping[str, Any]) -> None:
    """Let a field be any of these, as the validators before pydantic's own let it."""
    kept: dict[str, Any] = {
        name: field[name] for name in ("description", "default") if name in field
    }
    field.clear()
    field.update(kept, anyOf=list(kinds))


def _plain(value: Any) -> Any:
    """A schema with the ranges as JSON Schema names them, without null, which TOML has not."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kinds = [kind for kind in value.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: item for key, item in value.items() if key not in ("anyOf", "title")}
    if rest.get("default", ...) is None:
        del rest["default"]
    if len(kinds) == 1:
        rest = {**kinds[0], **rest}
    elif kinds:
        rest["anyOf"] = kinds
    return {_RANGES.get(key, key): _plain(item) for key, item in rest.items()}


def _fields(
    schema: dict[str, Any], parts: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Key, schema, and whether it must be given, of every setting that holds a value."""
    for name, field in schema["properties"].items():
        key = f"{path}{name}"
        below, step = field, ""
        if "items" in field and "$ref" in field["items"]:
            below, step = field["items"], ".N"
        elif isinstance(field.get("additionalProperties"), dict):
            below, step = field["additionalProperties"], ".NAME"
        if step == ".N" and key in MEANINGS:
            yield key, field, name in schema.get("required", ())
        if "$ref" in below:
            part = parts[below["$ref"].rpartition("/")[2]]
            yield from _fields(part, parts, f"{key}{step}.")
        else:
            yield key, field, name in schema.get("required", ())


def _type_text(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(map(_type_text, field["anyOf"]))
    if "enum" in field or "const" in field:
        return " or ".join(
            f"`{json.dumps(one)}`" for one in field.get("enum", [field.get("const")])
        )
    if field["type"] == "array":
        of = field["items"]
        return "text, or list" if "$ref" in of else f"list of {_type_text(of)}"
    if field["type"] == "object":
        return "list of names, or table of numbers"
    name = {"boolean": "true or false", "string": "text", "integer": "integer", "number": "number"}
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {field[key]:,}" for key, sign in signs.items() if key in field]
    return ", ".join([name[field["type"]], *limits])


def _default_text(default: Any) -> str:
    if default is None:
        return "unset"
    if isinstance(default, list) and default and isinstance(default[0], dict):
        return f"`{json.dumps(default[0]['name'])}`"
    return f"`{json.dumps(default)}`"
