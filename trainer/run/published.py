"""A policy as files to share: weights, settings and vocabulary, each as plain data.

    model.safetensors   the weights by their names; the format can contain nothing else
    settings.toml       as in the folder of a run
    vocabulary.json     `words` in the order of their ids, `versions` of what wrote it, `format`,
                        and in `progress` how many steps it was trained for

`trainer push` sends them to the Hugging Face hub, where `hf:OWNER/NAME` names them; a folder that
holds them is read like the folder of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import tomli_w
import torch

from demotools.errors import CheckpointError, optional_package
from demotools.exchange.hub import downloaded_files, on_hub
from demotools.output import read_regular, write_output
from demotools.store.format import SUFFIX
from trainer.settings.models import SETTINGS_FILE, Settings

WEIGHTS_FILE = "model.safetensors"
WORDS_FILE = "vocabulary.json"
FORMAT = 1


def handed_on(settings: Settings) -> str:
    """The settings as TOML for others: stores and first weights by their names alone.

    Where they lie on this machine is of no use elsewhere, and nobody's business.
    """
    tree = settings.tree()
    begun = settings.run.init_from
    if begun is not None and not on_hub(begun):
        path = PurePath(begun)
        tree["run"]["init_from"] = "/".join(path.parts[-2:] if path.suffix else path.parts[-1:])
    for stage in tree["stages"]:
        stores = stage.get("off_policy", {}).get("store")
        if isinstance(stores, str):
            stage["off_policy"]["store"] = _plain(stores)
        for store in stores if isinstance(stores, list) else ():
            store["name"] = _plain(store["name"])
        rule = stage.get("early_stopping", {})
        if "hold_out" in rule:
            rule["hold_out"] = _plain(rule["hold_out"])
    return tomli_w.dumps(tree)


def _plain(store: str) -> str:
    return PurePath(store).name.removesuffix(SUFFIX) or store


def steps_alone(steps: Mapping[str, int] | None) -> dict[str, Any]:
    """What stands for the state of training where weights are handed on alone."""
    return {} if steps is None else {"progress": dict(steps)}


def write_policy(
    folder: Path,
    *,
    settings: str,
    words: Sequence[str],
    model: Mapping[str, Any],
    versions: Mapping[str, str],
    steps: Mapping[str, int] | None = None,
) -> list[Path]:
    """Write the three files, which are returned, into a folder that has none of them.

    CheckpointError  the network keeps something beside tensors
    DemotoolsError   the package safetensors is missing, or the disk cannot be written
    """
    safetensors = optional_package("safetensors.torch", "hf")
    odd = [name for name, values in model.items() if not isinstance(values, torch.Tensor)]
    if odd:
        raise CheckpointError(
            f"the network stores `{odd[0]}`, which is not a tensor, so it cannot be published",
            path=folder,
            fix="store it as a buffer (`register_buffer`), and train again",
        )
    tensors = {name: values.detach().cpu().clone() for name, values in model.items()}
    vocabulary = {"format": FORMAT, "words": list(words), "versions": dict(versions)}
    vocabulary |= steps_alone(steps)
    contents = {
        WEIGHTS_FILE: safetensors.save(tensors, metadata={"format": "pt"}),
        SETTINGS_FILE: settings.encode(),
        WORDS_FILE: (json.dumps(vocabulary, ensure_ascii=False, indent=1) + "\n").encode(),
    }
    for name, content in contents.items():
        write_output(folder / name, content, overwrite=False)
    return [folder / name for name in contents]


def downloaded_policy(place: str) -> Path:
    """The folder of the files of `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.

    FetchError  see `downloaded_files`
    """
    place = f"hf:{place.removeprefix('hf:').strip('/')}"  # a path has lost one slash of `hf://`
    return downloaded_files(place, [SETTINGS_FILE, WORDS_FILE, WEIGHTS_FILE], "model")


def policy_content(folder: Path) -> dict[str, Any]:
    """What the three files hold, in the form of a checkpoint's content without training state.

    Nothing of it is checked but what safetensors and JSON themselves are.

    CheckpointError  a file is missing or is not of its format
    """
    safetensors = optional_package("safetensors.torch", "hf")
    damaged: type[Exception] = optional_package("safetensors", "hf").SafetensorError
    texts = {
        name: read_regular(folder / name) for name in (SETTINGS_FILE, WORDS_FILE, WEIGHTS_FILE)
    }
    try:
        vocabulary = json.loads(texts[WORDS_FILE])
        if not isinstance(vocabulary, dict):
            raise ValueError("vocabulary.json does not hold an object")
        return {
            **{name: vocabulary.get(name) for name in ("format", "words", "versions")},
            "settings": texts[SETTINGS_FILE].decode(),
            "model": safetensors.load(texts[WEIGHTS_FILE]),
            "training": {key: vocabulary[key] for key in ("progress",) if key in vocabulary},
        }
    except (ValueError, RecursionError, damaged) as error:
        raise CheckpointError(
            f"this is not a published policy, or a damaged one: {error}",
            path=folder,
            fix="publish it again, or name another policy",
        ) from error
