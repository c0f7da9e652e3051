"""Make a demo store from a Minari dataset, ours or anybody's with minigrid's observations.

Kept are the successes: reward > 0 at the last step. The observation after the last action, which
a store does not have, is left out. Episodes whose seed belongs to the other split, or to
evaluation, are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from tqdm import tqdm

from demotools.environment import EVALUATION_SEED, SEEDS
from demotools.errors import FetchError, SettingsError, StoreError, printable_text
from demotools.exchange import ATTRIBUTES_KEY, minari_module
from demotools.grid import ACTIONS, fits_cells, packed_cells, unpacked_cells
from demotools.manifest import Split, level_from_environment_id, read_manifest
from demotools.store import Episodes
from demotools.writer import StoreBuilder, read_lengths, read_notes, read_part, write_part

_EPISODES_A_PART = 2000
_PACKED_AXES = 3  # [S, 7, 7]; images have four


@dataclass(frozen=True)
class Imported:
    """A finished import, and the episodes that were left out, by reason."""

    path: Path
    episodes: int
    left_out: dict[str, int]

    def text(self) -> str:
        """What was imported, for a person."""
        lines = [f"imported {printable_text(self.path)}: {self.episodes:,} episodes"]
        lines += [f"  left out {number:,}: {reason}" for reason, number in self.left_out.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Dataset:
    """An open Minari dataset, and what a store says about it."""

    minari: Any
    level: str
    split: Split
    ours: Mapping[str, Any]
    """The attributes of the store that it was exported from; empty for a foreign dataset."""

    @property
    def store_name(self) -> str:
        """What the store is called where nobody says otherwise."""
        return self.level if self.split == "train" else f"{self.level}-{self.split}"

    def job(self) -> dict[str, Any]:
        """All that the store depends on, JSON values."""
        files = sorted(Path(self.minari.spec.data_path).rglob("*"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return {"command": "import", "level": self.level, "split": self.split, "files": stats}

    def source(self) -> dict[str, Any]:
        """Where the episodes come from."""
        spec, metadata = self.minari.spec, self.minari.storage.metadata
        through = {"dataset": spec.dataset_id, "minari": spec.minari_version}
        if self.ours:
            return {**self.ours["source"], "imported": through}
        about = ("algorithm_name", "author", "code_permalink", "requirements")
        told = {key: metadata[key] for key in about if metadata.get(key)}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in told.items()}
        return {"kind": "minari", **through, **plain}


def opened_dataset(name: str, *, level: str | None = None, split: Split | None = None) -> Dataset:
    """A Minari dataset on this machine, by its id or the path of its folder.

    level, split    override what the dataset says of itself; a foreign one says train

    FetchError      there is no such dataset here
    SettingsError   its level is not known
    StoreError      its observations or actions are not those of minigrid
    """
    minari = minari_module()
    folder = Path(name) / "data" if (Path(name) / "data").is_dir() else Path(name)
    try:
        local = folder.is_dir()
        dataset = minari.MinariDataset(folder) if local else minari.load_dataset(name)
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise FetchError(
            "there is no Minari dataset of this name on this machine",
            path=name,
            fix=f"name its folder, or download it: minari download {name}",
        ) from error
    ours = dataset.storage.metadata.get(ATTRIBUTES_KEY, {})
    spec = dataset.env_spec
    level = level or ours.get("level") or (spec and level_from_environment_id(spec.id))
    if level is None:
        raise SettingsError("the dataset does not say its level", path=name, fix="add --level")
    _refuse_other_spaces(dataset, name)
    return Dataset(dataset, read_manifest(level).level, split or ours.get("split", "train"), ours)


def _refuse_other_spaces(dataset: Any, name: str) -> None:
    space = dataset.observation_space
    known = isinstance(space, spaces.Dict) and {"image", "direction", "mission"} <= set(space)
    if not known or not isinstance(space["mission"], spaces.Text) or space["image"].dtype != "u1":
        raise StoreError(
            f"its observations are not an image, a direction and a mission as text: {space}",
            path=name,
            fix="export it from the unwrapped environment, or name another dataset",
        )
    actions = dataset.action_space
    if not isinstance(actions, spaces.Discrete) or actions.n != len(ACTIONS) or actions.start:
        raise StoreError(
            f"its actions are not minigrid's seven: {actions}",
            path=name,
            fix="name another dataset",
        )


def import_minari(
    dataset: Dataset, path: Path, *, overwrite: bool = False, quiet: bool = False
) -> Imported:
    """Make a store of a Minari dataset, going on where an earlier call was ended.

    StoreError  the store exists, or no episode can be kept
    """
    manifest = read_manifest(dataset.level)
    total = dataset.minari.total_episodes
    with StoreBuilder(path, dataset.job(), overwrite=overwrite) as builder:
        done = set(builder.finished_parts())
        bar = tqdm(total=total, desc=path.stem, unit=" episodes", disable=quiet or None)
        with bar:
            for part, first in enumerate(range(0, total, _EPISODES_A_PART)):
                rows = range(first, min(first + _EPISODES_A_PART, total))
                if part not in done:
                    _write_part(dataset, rows, builder.parts, part)
                bar.update(len(rows))
        left_out, episodes = _summary(builder)
        if not episodes:
            builder.discard()
            reasons = ", ".join(left_out) or "it is empty"
            raise StoreError(
                f"no episode can be kept: {reasons}",
                path=dataset.minari.id,
                fix="name another dataset, or another --split",
            )
        _unpack_mixed_parts(builder)
        builder.finish(
            level=dataset.level,
            split=dataset.split,
            environment_id=manifest.environment_id,
            licence=dataset.ours.get("licence", f"see Minari dataset {dataset.minari.id}"),
            citation=dataset.ours.get("citation", f"Minari dataset {dataset.minari.id}"),
            source={**dataset.source(), **({"left_out": left_out} if left_out else {})},
            parent=dataset.ours.get("parent"),
        )
    return Imported(path, episodes, left_out)


def _write_part(dataset: Dataset, rows: range, folder: Path, part: int) -> None:
    """Read some episodes of the dataset, write those that are kept as one part."""
    numbers = dataset.minari.episode_indices[rows.start : rows.stop]
    metadata = dataset.minari.storage.get_episode_metadata(numbers)
    kept, seeds = [], []
    left_out: Counter[str] = Counter()
    for episode, about in zip(dataset.minari.iterate_episodes(numbers), metadata, strict=True):
        seed = _seed(about.get("seed"))
        if reason := _reason_against(episode, seed, dataset.split):
            left_out[reason] += 1
        else:
            kept.append(episode)
            seeds.append(seed)
    episodes = _columns(kept, seeds, dataset.minari.observation_space["image"].shape)
    packed = episodes.view.ndim == _PACKED_AXES
    write_part(folder, part, episodes, {"left_out": dict(left_out), "packed": packed})


def _seed(value: Any) -> int:
    return int(value) if isinstance(value, int | np.integer) and value >= 0 else -1


def _reason_against(episode: Any, seed: int, split: Split) -> str:
    if not len(episode.actions):
        return "no step"
    if not float(episode.rewards[-1]) > 0:
        return "not a success: no reward at its end"
    if len(episode.observations["image"]) not in (len(episode.actions), len(episode.actions) + 1):
        return "observations and actions of different lengths"
    if not np.isin(episode.actions, range(len(ACTIONS))).all():
        return f"an action outside 0..{len(ACTIONS) - 1}"
    if seed >= EVALUATION_SEED:
        return "its seed belongs to evaluation"
    if seed >= 0 and seed not in SEEDS[split]:
        return "its seed belongs to the other split"
    return ""


def _columns(kept: list[Any], seeds: list[int], shape: tuple[int, ...]) -> Episodes:
    def joined(arrays: list[Any], *rest: int) -> NDArray[np.uint8]:
        return np.concatenate([np.zeros((0, *rest), np.uint8), *arrays]).astype(np.uint8)

    length = [len(episode.actions) for episode in kept]
    steps = list(zip(kept, length, strict=True))
    images = joined([episode.observations["image"][:size] for episode, size in steps], *shape)
    return Episodes(
        length=np.array(length, dtype=np.int64),
        mission=[str(episode.observations["mission"][0]) for episode in kept],
        seed=np.array(seeds, dtype=np.int64),
        view=packed_cells(images) if fits_cells(images) else images,
        direction=joined([episode.observations["direction"][:size] for episode, size in steps]),
        action=joined([episode.actions for episode in kept]),
    )


def _summary(builder: StoreBuilder) -> tuple[dict[str, int], int]:
    """What was left out of all parts, by reason, and how many episodes are in them."""
    left_out: Counter[str] = Counter()
    for part in builder.finished_parts():
        left_out.update(read_notes(builder.parts, part)["left_out"])
    episodes = sum(len(read_lengths(builder.parts, part)) for part in builder.finished_parts())
    return dict(sorted(left_out.items())), episodes


def _unpack_mixed_parts(builder: StoreBuilder) -> None:
    """Views pack part by part; where those of one part do not, none may be packed."""
    notes = {part: read_notes(builder.parts, part) for part in builder.finished_parts()}
    packed = [part for part, note in notes.items() if note["packed"]]
    if len(packed) == len(notes):
        return
    for part in packed:
        content = read_part(builder.parts, part)
        images = replace(content, view=unpacked_cells(content.view))
        write_part(builder.parts, part, images, {**notes[part], "packed": False})
