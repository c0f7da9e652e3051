"""What `auto` in the settings stands for on this machine, with the reason to be said aloud."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from demotools.errors import CheckpointError, SettingsError
from demotools.store import Store, open_store, store_path
from demotools.vocabulary import WORDS
from trainer.checkpoint import Checkpoint
from trainer.config import Device, Settings, StageSettings, toml_of
from trainer.overrides import setting_leaves

# What changes nothing that the weights are made of.
_HARMLESS = ("run.name", "run.save_every_", "run.keep", "run.wandb", "evaluation.")


_NETWORKS = {
    "cpu": ("small", "the 0.6 M-parameter one that is made for CPUs"),
    "cuda": ("big", "the tutorial's 20 M-parameter one, because there is a GPU"),
}


def resolved(settings: Settings, folder: Path) -> tuple[Settings, list[str]]:
    """The settings without any `auto`, and one line for each choice that was made.

    folder   of the demo stores
    """
    device, reasons = _device(settings.run.device)
    model = settings.model
    if model.type == "auto":
        kind, what = _NETWORKS[device]
        model = model.model_copy(update={"type": kind})
        reasons.append(f"network: {kind}, {what} (device: {device})")
    stages, said = [], set()
    for stage in settings.stages:
        stage, reason = _with_store(stage, settings.run.level, folder, device)
        stages.append(stage)
        if reason and reason not in said:
            reasons.append(reason)
            said.add(reason)
    run = settings.run.model_copy(update={"device": device})
    update = {"run": run, "model": model, "stages": tuple(stages)}
    return settings.model_copy(update=update), reasons


def open_stores(settings: Settings, folder: Path) -> dict[str, Store]:
    """The stores of all stages, by name; StoreError where one is missing or damaged."""
    names = [stage.off_policy.store for stage in settings.stages if stage.off_policy]
    for stage in settings.stages:
        if stage.early_stopping and stage.early_stopping.hold_out:
            names.append(stage.early_stopping.hold_out)
    return {name: open_store(store_path(name, folder)) for name in dict.fromkeys(names)}


def other_levels(settings: Settings, stores: Mapping[str, Store]) -> list[str]:
    """One line for each store whose demonstrations are of another level than the run's.

    That is a choice; missions with words that the run has not learned are refused where they are
    played.
    """
    level = settings.run.level
    return [
        f"another level: the store {name} shows {store.attributes.level}, but success is measured "
        f"on {level}; run.level={store.attributes.level} measures it on the same"
        for name, store in stores.items()
        if level not in (store.attributes.level, store.attributes.environment_id)
    ]


def check_resumed(checkpoint: Checkpoint, settings: Settings, *, forced: bool) -> None:
    """Refuse to resume with settings that changed; where that is harmless, only if not forced.

    CheckpointError  names the keys
    """
    before = setting_leaves(tomllib.loads(checkpoint.settings))
    now = setting_leaves(tomllib.loads(toml_of(settings)))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    grave = [key for key in changed if not key.startswith(_HARMLESS)]
    if grave or (changed and not forced):
        keys = ", ".join(f"`{key}`" for key in grave or changed)
        raise CheckpointError(
            f"the run was begun with other settings: {keys}",
            path=checkpoint.path,
            fix="resume with the settings.toml that lies beside it, or begin anew with --overwrite"
            if grave
            else "they change nothing that was learned: add --force-settings, or set them back",
        )


def shared_words(stores: Sequence[Store]) -> tuple[str, ...]:
    """The vocabulary of all stores: the longest, which the others must be beginnings of.

    SettingsError  two stores give different words the same id
    """
    longest = max((store.attributes.vocabulary for store in stores), key=len, default=WORDS)
    for store in stores:
        words = store.attributes.vocabulary
        if words != longest[: len(words)]:
            raise SettingsError(
                "the stores of this run have different vocabularies",
                path=store.path,
                fix="train on stores of one origin, or in separate runs",
            )
    return longest


def _device(wanted: Device) -> tuple[Device, list[str]]:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "this torch finds no GPU", path="run.device", fix='set it to "cpu" or "auto"'
        )
    if wanted != "auto":
        return wanted, []
    found: Device = "cuda" if torch.cuda.is_available() else "cpu"
    why = "torch finds a GPU" if found == "cuda" else "torch finds no GPU"
    return found, [f"device: {found}, because {why}"]


def _with_store(
    stage: StageSettings, level: str, folder: Path, device: Device
) -> tuple[StageSettings, str]:
    if stage.off_policy is None or stage.off_policy.store != "auto":
        return stage, ""
    small = f"{level}-small"
    name, why = level, f"the full one, because there is no {small}"
    if device == "cuda":
        why = "the full one, because there is a GPU"
    elif store_path(small, folder).exists():
        name, why = small, f"because there is no GPU; --set stages.0.off_policy.store={level} "
        why += "takes the full one"
    off_policy = stage.off_policy.model_copy(update={"store": name})
    return stage.model_copy(update={"off_policy": off_policy}), f"store: {name}, {why}"
