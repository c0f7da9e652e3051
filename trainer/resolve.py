"""What `auto` in the settings stands for on this machine, with the reason to be said aloud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from demotools.errors import SettingsError
from demotools.store import Store, open_store, store_path
from demotools.vocabulary import WORDS
from trainer.config import Device, Settings, StageSettings


def resolved(settings: Settings, folder: Path) -> tuple[Settings, list[str]]:
    """The settings without any `auto`, and one line for each choice that was made.

    folder   of the demo stores
    """
    device, reasons = _device(settings.run.device)
    model = settings.model
    if model.type == "auto":
        model = model.model_copy(update={"type": "small"})
        reasons.append(
            f"network: small, the 0.6 M-parameter one that is made for CPUs (device: {device})"
        )
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
    names = dict.fromkeys(stage.off_policy.store for stage in settings.stages if stage.off_policy)
    return {name: open_store(store_path(name, folder)) for name in names}


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
