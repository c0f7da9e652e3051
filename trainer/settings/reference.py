"""Describes every setting: as a page for people (docs/settings.md), as a JSON Schema for editors.

Types, ranges and defaults come from `trainer.settings.models`; units and meanings are here.
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
    "run.level": ("", "level to train and evaluate on, or a list of names and tables: BabyAI levels, or whatever `on_policy.environment` accepts"),
    "run.level.N.name": ("", "name of the level"),
    "run.level.N.proportion": ("", "share of the environments, relative to the other levels"),
    "run.seed": ("", "seed of the initial weights, the order of episodes from the store, the environments and the actions"),
    "run.device": ("", "`auto`: a CUDA GPU if torch finds one, else the CPU; `mps` must be named"),
    "run.precision": (
        "",
        "precision of the network's computation; weights stay float32; `auto`: bfloat16 on a CPU "
        "where a test at the start finds its matrix products at least 1.5 times as fast",
    ),
    "run.compile": ("", "compile the parts of the network that gain from it"),
    "run.deterministic": ("", "use only torch's deterministic algorithms"),
    "run.init_from": ("", "checkpoint, or run folder, whose weights to start from; unset: random weights"),
    "run.ema": ("", "decay of an exponential moving average of the weights; the checkpoint then acts and is evaluated with the average; unset: with the weights themselves"),
    "run.save_every_env_steps": ("env steps", "interval between checkpoints; cannot be combined with `save_every_demo_steps`"),
    "run.save_every_demo_steps": ("demo steps", "interval between checkpoints; cannot be combined with `save_every_env_steps`"),
    "run.keep": ("checkpoints", "number of most recent checkpoints to keep"),
    "run.wandb": ("", "Weights & Biases project that also receives the log"),
    "run.mlflow": ("", "MLflow experiment that also receives the log"),
    "run.trackio": ("", "trackio project that also receives the log"),
    "model.type": ("", "the network: `auto` (`big` on a CUDA GPU, else `small`), one of ours, or `package.module:Name`; its arguments are further keys of this table"),
    "model.words": ("", "mission words in addition to those of BabyAI and of the stores; unset: the environment's"),
    "optimizer.type": ("", "`adam`, `adamw`, `sgd`, `torch.optim:Name` or `package.module:Name`; its arguments are further keys of this table"),
    "optimizer.lr": ("", "learning rate; the schedule never exceeds it"),
    "optimizer.max_grad_norm": ("", "clip gradients to this norm; unset: no clipping"),
    "optimizer.schedule.type": ("", "learning-rate schedule: `constant`, `linear`, `cosine`, `torch.optim.lr_scheduler:Name` or `package.module:Name`"),
    "on_policy.environments": ("environments", "number of environments stepped in parallel, in at most `-m` processes"),
    "on_policy.rollout_len": ("steps", "length of a rollout in each environment"),
    "on_policy.gamma": ("", "discount factor per step"),
    "on_policy.gae_lambda": ("", "lambda of generalised advantage estimation: 0 for one-step advantages, 1 for full returns"),
    "on_policy.normalise_advantages": ("", "normalise the advantages of a rollout to mean 0 and standard deviation 1"),
    "on_policy.environment": ("", "`package.module:make`, a function that is called with `run.level` and returns a Gymnasium environment"),
    "losses.NAME.type": ("", "`expert_cross_entropy`, `subgoal_cross_entropy`, `ppo`, `a2c` or `package.module:Name`; its arguments are further keys of this table"),
    "stages.N.max_env_steps": ("env steps", "budget of the stage; set exactly one of the two budgets"),
    "stages.N.max_demo_steps": ("demo steps", "budget of the stage; set exactly one of the two budgets"),
    "stages.N.losses": ("", "losses on environment rollouts: names from `[losses]`, or weights by name"),
    "stages.N.rollout_len": ("steps", "overrides `on_policy.rollout_len` in this stage"),
    "stages.N.repeats": ("", "number of passes over each rollout"),
    "stages.N.minibatches": ("minibatches", "number of minibatches per rollout, each with whole environments"),
    "stages.N.teacher_forcing.from": ("probability", "probability that the expert acts, at the start of the stage"),
    "stages.N.teacher_forcing.to": ("probability", "probability that the expert acts, after `steps`"),
    "stages.N.teacher_forcing.steps": ("env steps", "steps of the stage over which the probability changes linearly"),
    "stages.N.early_stopping.success": ("share", "success rate in training episodes at which the stage stops; set this or `patience`"),
    "stages.N.early_stopping.episodes": ("episodes", "number of most recent episodes that `success` is measured on"),
    "stages.N.early_stopping.patience": ("cycles", "the stage stops after this many cycles without a lower loss on `hold_out`"),
    "stages.N.early_stopping.hold_out": ("", "store on which `patience` measures the loss"),
    "stages.N.early_stopping.hold_out_steps": ("demo steps", "number of steps of `hold_out` to use, always the same ones; unset: all"),
    "stages.N.off_policy.store": ("", "name or path of a store, or a list of names and tables; `auto`: the level's store, or its small copy (`demotools shrink`) if there is no GPU"),
    "stages.N.off_policy.store.N.name": ("", "name or path of the store"),
    "stages.N.off_policy.store.N.proportion": ("", "share of the rollouts, relative to the other stores"),
    "stages.N.off_policy.store.N.mission": ("", "use only episodes whose mission contains this regular expression"),
    "stages.N.off_policy.store.N.min_length": ("steps", "minimum length of an episode"),
    "stages.N.off_policy.store.N.max_length": ("steps", "maximum length of an episode"),
    "stages.N.off_policy.store.N.min_seed": ("", "lowest environment seed of an episode"),
    "stages.N.off_policy.store.N.max_seed": ("", "highest environment seed of an episode"),
    "stages.N.off_policy.iterator.type": ("", "`package.module:Name` of an iterator that yields the batches instead of the trainer's own; its arguments are further keys of this table"),
    "stages.N.off_policy.rollouts": ("rollouts", "number of parallel rollouts in a batch"),
    "stages.N.off_policy.rollout_len": ("steps", "length of each rollout in a batch"),
    "stages.N.off_policy.updates": ("updates", "number of updates per cycle, each on a new batch"),
    "stages.N.off_policy.losses": ("", "losses on batches from the store: names from `[losses]`, or weights by name"),
    "stages.N.off_policy.augment": ("", "symmetries of the level to apply to episodes at random"),
    "stages.N.off_policy.shuffle": ("", "`windowed` reads stores larger than memory from front to back"),
    "evaluation.episodes": ("episodes", "number of unseen episodes to play in each evaluation"),
    "evaluation.every": ("steps", "interval between evaluations during training, in the steps of the stage's budget; unset: only after the last stage"),
    "evaluation.sample": ("", "`true`: sample actions from the policy; `false`: take the most probable ones; `loops`: sample from the third time that the same view comes up in an episode; `both`: two measurements, `true` and `false`; unset: both if a stage learns from its own rollouts, else the most probable"),
    "evaluation.gifs": ("episodes", "number of episodes per evaluation and level to show as GIFs on TensorBoard and keep in `gifs/`; unset: none"),
}  # fmt: skip
"""Unit and meaning of every setting; N numbers stages and stores, NAME names a loss."""

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
        "description": "overrides that `--tiny` applies, each by its full key in quotes",
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
