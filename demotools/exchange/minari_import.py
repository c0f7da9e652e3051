"""Make a demo store from a Minari dataset, ours or any other with minigrid's observations.

Only successes (reward > 0 at the last step) are kept; from an export of a store with rewards, all
episodes are kept, with their rewards. The observation after the last action, which a store does not
have, is left out. Episodes with a malformed column, with a mission that is not one of the level, or
with a seed of the other split, of evaluation or of an earlier episode are left out and counted.

A dataset may come from anybody: its metadata are checked before Minari sees them (it would make any
environment, with any function that they name), and whatever Minari, h5py or a codec raise on the
rest becomes a StoreError.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from demotools.babyai.cells import ACTIONS, fits_cells, packed_cells, shows_agent, unpacked_cells
from demotools.babyai.levels import (
    EVALUATION_SEED,
    SEEDS,
    Manifest,
    Split,
    guessed_manifest,
    level_from_environment_id,
    manifest_of_data,
)
from demotools.babyai.vocabulary import mission_words
from demotools.errors import (
    DemotoolsError,
    FetchError,
    SettingsError,
    StoreError,
    first_problem,
    printable_text,
)
from demotools.exchange.export import KeptAttributes, minari_module
from demotools.output import counted, open_regular, progress_bar, read_regular
from demotools.store.building import StoreBuilder, read_lengths, read_notes, read_part, write_part
from demotools.store.format import OPTIONAL, OUTCOMES, is_ours
from demotools.store.reading import Episodes

_EPISODES_A_PART = 2000
_MINARI_ID = r"-v\d+$"
_SPELLING = "check the spelling; the id of a Minari dataset ends in its version, as in -v0"
_METADATA, _HDF5 = "metadata.json", "main_data.hdf5"
_FORMATS = ("hdf5", "arrow", "parquet")
_METADATA_BYTES = 1 << 26
# What one episode may ask for: an HDF5 file of a few kB can announce any size.
_EPISODE_BYTES = 1 << 30
_BROKEN = "download or export it again, or name another dataset"

_Count = Annotated[int, Field(ge=0)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Metadata(_Checked):
    """What is used of a dataset's metadata.json; without its spaces Minari would make them."""

    dataset_id: str
    minari_version: str
    data_format: str
    total_episodes: _Count
    total_steps: _Count
    observation_space: str
    action_space: str
    env_spec: str | None = None
    algorithm_name: str | None = None
    author: list[str] | None = None
    code_permalink: str | None = None
    requirements: list[str] | None = None
    ours: KeptAttributes | None = Field(None, alias="demotools")  # exchange.ATTRIBUTES_KEY


@dataclass(frozen=True)
class Imported:
    """A finished import.

    left_out   the episodes that were left out, by reason
    lost       optional step arrays that the store had which was exported
    """

    path: Path
    episodes: int
    left_out: dict[str, int]
    lost: tuple[str, ...] = ()

    def text(self) -> str:
        """What was imported, for a person."""
        lines = [f"imported {printable_text(self.path)}: {counted(self.episodes, 'episode')}"]
        lines += [f"  left out {number:,}: {reason}" for reason, number in self.left_out.items()]
        if "taken" in self.lost:
            lines.append(
                "  its actions are those that were taken, with noise: the dataset does not have "
                "the expert's actions, which behaviour cloning needs"
            )
        others = ", ".join(f"`{name}`" for name in self.lost if name != "taken")
        if others:
            lines.append(f"  the exported store had {others}, which the dataset lacks")
        return "\n".join(lines)


@dataclass(frozen=True)
class Dataset:
    """An open Minari dataset, and what a store says about it.

    minari      Minari's own object
    folder      where its data lie
    metadata    of the dataset; its `ours` is None for a dataset that no store was exported to
    """

    minari: Any
    folder: Path
    metadata: _Metadata
    level: str
    split: Split

    @property
    def outcomes(self) -> list[str]:
        """Which of `OUTCOMES` the store had that it was made of; with rewards, failures too."""
        ours = self.metadata.ours
        return [name for name in OUTCOMES if ours is not None and name in ours.optional]

    def job(self) -> dict[str, Any]:
        """All that the store depends on, JSON values."""
        files = sorted(self.folder.rglob("*"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return {"command": "import", "level": self.level, "split": self.split, "files": stats}

    def source(self) -> dict[str, Any]:
        """Where the episodes come from."""
        about = self.metadata
        through = {"dataset": about.dataset_id, "minari": about.minari_version}
        if about.ours:
            return {**about.ours.source, "imported": through}
        known = about.model_dump(
            include={"algorithm_name", "author", "code_permalink", "requirements"}
        )
        return {"kind": "minari", **through, **{key: known[key] for key in known if known[key]}}


def opened_dataset(name: str, *, level: str | None = None, split: Split | None = None) -> Dataset:
    """A Minari dataset on this machine, by its id or the path of its folder.

    level, split    override what the dataset says of itself; one made elsewhere says train

    FetchError      there is no such dataset here
    SettingsError   its level is not known
    StoreError      it is damaged, of another version of Minari, or its observations or actions are
                    not those of minigrid
    """
    _refuse_other_things(Path(name))
    minari = minari_module()
    folder = _dataset_folder(minari, name)
    metadata = _read_metadata(folder / _METADATA)
    if metadata.data_format not in _FORMATS:
        what = f"the dataset's format is {metadata.data_format!r}, not {', '.join(_FORMATS)}"
        raise _broken(what, folder)
    minari_module(metadata.data_format)
    if metadata.minari_version not in minari.supported_dataset_versions:
        raise _broken(
            f"the dataset is of Minari {metadata.minari_version}, which the installed Minari "
            f"{minari.__version__} cannot read",
            folder,
            "install a version of Minari that can, or get the dataset in another version",
        )
    _check_files(folder, metadata)
    with _reading(folder):
        dataset = minari.MinariDataset(folder)
        spec = dataset.env_spec
    ours = metadata.ours
    said = (ours and ours.one_level(name)) or (spec and level_from_environment_id(spec.id))
    if not (level or said):
        raise SettingsError("the dataset does not say its level", path=name, fix="add --level")
    with _reading(folder):
        _refuse_other_spaces(dataset, name)
    if level is None:
        level = guessed_manifest(str(said), name, f"the dataset's environment {said}").level
    else:
        level = manifest_of_data(level).level
    return Dataset(dataset, folder, metadata, level, split or (ours.split if ours else "train"))


def _refuse_other_things(path: Path) -> None:
    """FetchError where this is nothing, or something else of the user's: what reads it is told."""
    if path.suffix and not path.exists() and not re.search(_MINARI_ID, path.name):
        raise FetchError("there is no such file or folder", path=path, fix=_SPELLING)
    if path.is_file():
        raise FetchError(
            "this is a file, but a Minari dataset is a folder",
            path=path,
            fix="name a dataset, its folder or a parquet file; use `demotools convert` for pickles,"
            " `demotools unarchive` for archives",
        )
    if is_ours(path):
        raise FetchError(
            "this is already a demo store, so there is nothing to import",
            path=path,
            fix="use it directly, as the STORE of other commands",
        )


def _dataset_folder(minari: Any, name: str) -> Path:
    """Where the data of a dataset lie, given its id or its folder."""
    place: Path | None = Path(name)
    if place is not None and not place.is_dir():
        with _reading(name):  # it makes the folder of all datasets
            root = Path(minari.storage.get_dataset_path())
        place = next(filter(Path.is_dir, [root / name]), None)
    if place is None:
        depths = ("*", "*/*", "*/*/*")
        known = [place for depth in depths for place in root.glob(f"{depth}/data/{_METADATA}")]
        ids = [place.parents[1].relative_to(root).as_posix() for place in known]
        near = difflib.get_close_matches(name, ids, cutoff=0.4)
        also = f"; similar names: {', '.join(near)}" if near else ""
        what = "there is no Minari dataset of this name on this machine"
        fix = f"name its folder, or download it: minari download {name}"
        if not re.search(_MINARI_ID, name):
            what, fix = f"there is no such folder, and {what.removeprefix('there is ')}", _SPELLING
        raise FetchError(what, path=name, fix=f"{fix}{also}")
    folder = place / "data" if (place / "data").is_dir() else place
    if os.path.lexists(folder / _METADATA):
        return folder
    inside = [child.name for child in folder.iterdir()]
    parts = any(entry == _HDF5 or entry.isdecimal() for entry in inside)
    if folder == place and not parts and not re.search(_MINARI_ID, place.name):
        what = f"there is no Minari dataset in this folder: it has no {_METADATA}"
        raise FetchError(what, path=folder, fix=_BROKEN)
    there = f"it has only {', '.join(sorted(inside)[:3])}" if inside else "it is empty"
    raise _broken(
        f"the Minari dataset is incomplete: it has no {_METADATA}, {there}; "
        "was its download interrupted?",
        folder,
        "download it again: minari download ID",
    )


def _read_metadata(file: Path) -> _Metadata:
    if file.is_file() and file.stat().st_size > _METADATA_BYTES:
        raise _broken("the dataset's metadata are far too large", file)
    try:
        return _Metadata.model_validate_json(read_regular(file, _METADATA_BYTES))
    except ValidationError as error:
        place, what = first_problem(error, "json")
        raise _broken(f"the dataset's metadata are invalid at {place}: {what}", file) from error


def _broken(what: str, path: Path | str, fix: str = _BROKEN) -> StoreError:
    return StoreError(what, path=path, fix=fix)


def _check_files(folder: Path, metadata: _Metadata) -> None:
    """StoreError where a file is no regular one, or there are not as many episodes as announced."""
    for file in folder.rglob("*"):
        if not file.is_dir():
            open_regular(file).close()
    if metadata.data_format == "hdf5":
        file = folder / _HDF5
        if not file.exists():
            raise _broken("the dataset's HDF5 file is missing", file)
        import h5py

        with _reading(file, "the dataset's HDF5 file is broken"), h5py.File(file, "r") as content:
            found = len(content)
    else:
        episodes = [child for child in folder.iterdir() if child.is_dir()]
        episodes = [child for child in episodes if child.name.isdecimal()]
        found = len(episodes)
        for episode in sorted(episodes, key=lambda child: int(child.name)):
            files = {child.suffix for child in episode.iterdir() if child.name != _METADATA}
            described = (episode / _METADATA).exists()
            if not described or f".{metadata.data_format}" not in files:
                missing = f"{metadata.data_format} file" if described else _METADATA
                what = f"episode {episode.name} of the dataset has no {missing}"
                raise _broken(f"{what}; was its download interrupted?", episode)
    if found != metadata.total_episodes:
        said = metadata.total_episodes
        raise _broken(
            f"the dataset's metadata announce {said:,} episodes, but it has {found:,}", folder
        )


@contextmanager
def _reading(path: Path | str, what: str = "Minari cannot read this dataset") -> Iterator[None]:
    """Around calls of Minari and h5py only: all that they raise on damaged data, as a message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their texts are of the dataset, too
            yield
    except DemotoolsError:
        raise
    except ImportError as error:
        raise DemotoolsError(
            f"this dataset needs a package that is not installed: {error}",
            path=path,
            fix=f"pip install {error.name or 'what it names'}",
        ) from error
    except Exception as error:  # their parsers let through whatever a damaged file provokes
        said = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise _broken(f"{what}: {printable_text(reason, 300)}", path) from error


def _refuse_other_spaces(dataset: Any, name: str) -> None:
    space, actions = dataset.observation_space, dataset.action_space
    seen = space if isinstance(space, spaces.Dict) else {}
    view = seen.get("image")
    if not (
        {"image", "direction", "mission"} <= set(seen)
        and isinstance(seen["mission"], spaces.Text)
        # images [height, width, channels] of bytes
        and isinstance(view, spaces.Box)
        and view.dtype == np.uint8
        and len(view.shape) == 3
        and 0 not in view.shape
    ):
        raise _broken(
            "its observations are not an image, a direction and a text mission: "
            + printable_text(space, 300),
            name,
            "export it from the unwrapped environment, or name another dataset",
        )
    if not isinstance(actions, spaces.Discrete) or actions.n != len(ACTIONS) or actions.start:
        what = f"its actions are not minigrid's seven: {printable_text(actions, 300)}"
        raise _broken(what, name, "name another dataset")


def import_minari(
    dataset: Dataset, path: Path, *, overwrite: bool = False, quiet: bool = False
) -> Imported:
    """Make a store of a Minari dataset, resuming where an earlier call was ended.

    StoreError  the store exists, the dataset is damaged, shows whole rooms, or no episode can be
                kept
    """
    manifest = manifest_of_data(dataset.level)
    about, ours = dataset.metadata, dataset.metadata.ours
    total = about.total_episodes
    with StoreBuilder(path, dataset.job(), overwrite=overwrite) as builder:
        done = set(builder.finished_parts())
        seeds: set[int] = set()
        with progress_bar(total, path.stem, "episodes", quiet=quiet) as bar:
            for part, first in enumerate(range(0, total, _EPISODES_A_PART)):
                rows = range(first, min(first + _EPISODES_A_PART, total))
                if part in done:
                    seeds.update(read_part(builder.parts, part).seed.tolist())
                else:
                    _write_part(dataset, manifest, rows, seeds, builder.parts, part)
                bar.update(len(rows))
        notes = {part: read_notes(builder.parts, part) for part in builder.finished_parts()}
        episodes = sum(len(read_lengths(builder.parts, part)) for part in notes)
        counts = sum((Counter(note["left_out"]) for note in notes.values()), Counter[str]())
        left_out = dict(sorted(counts.items()))
        if not episodes:
            what = f"no episode can be kept: {', '.join(left_out) or 'it is empty'}"
            fix = "name another dataset, or another --level or --split"
            raise _broken(what, about.dataset_id, fix)
        _unpack_mixed_parts(builder.parts, notes)
        builder.finish(
            **manifest.store_attributes(
                split=dataset.split,
                licence=ours.licence if ours else f"see Minari dataset {about.dataset_id}",
                citation=ours.citation if ours else f"Minari dataset {about.dataset_id}",
            ),
            source={**dataset.source(), **({"left_out": left_out} if left_out else {})},
            parent=ours.parent if ours else None,
        )
    had = [name for name in OPTIONAL if ours and name in ours.optional]
    return Imported(path, episodes, left_out, tuple(name for name in had if name not in OUTCOMES))


class _UnfitError(Exception):
    """Why an episode is left out."""


def _write_part(
    dataset: Dataset, manifest: Manifest, rows: range, seeds: set[int], folder: Path, part: int
) -> None:
    """Read some episodes of the dataset, write those that are kept as one part.

    seeds   those of earlier episodes; the new ones are added
    """
    shape = dataset.minari.observation_space["image"].shape
    kept: list[Episodes] = []
    left_out: Counter[str] = Counter()
    for content, about in _read_episodes(dataset, rows):
        try:
            episode = _checked_episode(content, about, dataset, manifest)
            seed = int(episode.seed[0])
            if seed in seeds and seed >= 0:
                raise _UnfitError("an earlier episode has the same seed")
        except _UnfitError as reason:
            left_out[str(reason)] += 1
        else:
            kept.append(episode)
            seeds.add(seed)
    none = Episodes.none(shape)
    kinds = {name: np.zeros(0, OUTCOMES[name]) for name in dataset.outcomes}
    none = replace(none, optional=kinds)
    episodes = Episodes.concatenated([none, *kept])
    packed = fits_cells(episodes.view)
    if packed:
        episodes = replace(episodes, view=packed_cells(episodes.view))
        if shows_agent(episodes.view).any():
            raise _broken(
                "its views show the whole room, including the agent, not what the agent sees",
                dataset.folder,
                "record it without FullyObsWrapper, or name another dataset",
            )
    write_part(folder, part, episodes, {"left_out": dict(left_out), "packed": packed})


def _read_episodes(dataset: Dataset, rows: range) -> Iterator[tuple[Any, Any]]:
    """Each episode of these rows as Minari gives it, and its metadata."""
    numbers = dataset.minari.episode_indices[rows.start : rows.stop]
    if dataset.metadata.data_format == "hdf5":
        _check_hdf5_episodes(dataset.folder / _HDF5, numbers)
    storage = dataset.minari.storage
    with _reading(dataset.folder):
        episodes, metadata = storage.get_episodes(numbers), storage.get_episode_metadata(numbers)
    yield from zip(
        _read_each(episodes, dataset.folder), _read_each(metadata, dataset.folder), strict=True
    )


def _read_each(items: Iterable[Any], folder: Path) -> Iterator[Any]:
    iterator, end = iter(items), object()
    while True:
        with _reading(folder):
            item = next(iterator, end)
        if item is end:
            return
        yield item


def _check_hdf5_episodes(file: Path, numbers: Iterable[int]) -> None:
    """StoreError for what Minari does not look at: sizes, and seeds that it makes numbers of."""
    import h5py

    with _reading(file, "the dataset's HDF5 file is broken"), h5py.File(file, "r") as content:
        for number in numbers:
            episode, sizes = content[f"episode_{number}"], Counter[str]()
            episode.visititems(
                lambda name, item, sizes=sizes: sizes.update({name: getattr(item, "nbytes", 0)})
            )
            wrong = ""
            if sizes.total() > _EPISODE_BYTES:
                wrong = f"needs {sizes.total():,} bytes of memory"
            elif np.asarray(episode.attrs.get("seed", -1)).dtype.kind not in "iu":
                wrong = "has a seed that is not a whole number"
            if wrong:
                raise _broken(f"episode {number} of the dataset {wrong}", file)


def _checked_episode(content: Any, about: Any, dataset: Dataset, manifest: Manifest) -> Episodes:
    """The steps of one episode, views as images; _UnfitError where a store cannot hold them."""
    shape, outcomes = dataset.minari.observation_space["image"].shape, dataset.outcomes
    seen, rewards = content["observations"], np.asarray(content["rewards"])
    steps = len(rewards) if rewards.ndim == 1 else 0
    if not steps:
        raise _UnfitError("it has no steps")
    if rewards.dtype.kind not in "biuf":
        raise _UnfitError("its rewards are not numbers")
    if "reward" in outcomes and not bool(np.all((rewards >= 0) & (rewards <= 1))):
        raise _UnfitError("its rewards are not in 0..1")
    if "reward" not in outcomes and not 0 < float(rewards[-1]) < np.inf:
        raise _UnfitError("it is not solved: its last reward is not above 0")
    missions = seen.get("mission")
    seed = _seed(about.get("seed"), dataset.split)
    mission = _mission(missions, manifest)
    # one observation for each step, and one after the last
    rows = len(missions) if len(missions) in (steps, steps + 1) else -1
    columns = {
        "image": (seen.get("image"), (rows, *shape), 256),
        "direction": (seen.get("direction"), (rows,), 4),
        "action": (content["actions"], (steps,), len(ACTIONS)),
    }
    view, direction, action = (
        _whole_numbers(name, *column)[:steps] for name, column in columns.items()
    )
    given = {"reward": rewards}
    if "terminated" in outcomes:
        given["terminated"] = ended = np.asarray(content["terminations"])
        if ended.shape != (steps,) or ended.dtype != np.bool_ or ended[:-1].any():
            raise _UnfitError(
                "it is terminated before its last step, or its terminations are malformed"
            )
    optional = {name: given[name].astype(OUTCOMES[name]) for name in outcomes}
    return Episodes.one(mission, seed, view, direction, action, optional)


def _whole_numbers(name: str, values: Any, shape: tuple[int, ...], limit: int) -> NDArray[np.uint8]:
    array = np.asarray(values)
    if array.shape[:1] != shape[:1]:
        raise _UnfitError("its observations and actions differ in number")
    if array.dtype.kind not in "iu" or array.shape != shape:
        raise _UnfitError(f"its {name}s are not integers of the shape of their space")
    if not 0 <= int(array.min()) <= int(array.max()) < limit:
        raise _UnfitError(f"its {name}s are not in 0..{limit - 1}")
    return array.astype(np.uint8)


def _mission(missions: Any, manifest: Manifest) -> str:
    if not isinstance(missions, list) or not all(isinstance(text, str) for text in missions):
        raise _UnfitError("its mission is not a string")
    if len(set(missions)) != 1:
        raise _UnfitError("its mission changes between steps")
    mission: str = missions[0]
    if not mission.isprintable() or not mission_words(mission):
        raise _UnfitError("its mission has no words or contains unprintable characters")
    if not manifest.matches_mission(mission):
        raise _UnfitError(f"{manifest.level} has no such mission")
    return mission


def _seed(value: Any, split: Split) -> int:
    """The seed of an episode, -1 where it has none."""
    if value is None or value == -1:
        return -1
    if not isinstance(value, int | np.integer):
        raise _UnfitError("its seed is not an integer")
    if value >= EVALUATION_SEED:
        raise _UnfitError("its seed is reserved for evaluation")
    if value not in SEEDS[split]:
        raise _UnfitError(
            "its seed belongs to the other split" if value >= 0 else "its seed is negative"
        )
    return int(value)


def _unpack_mixed_parts(parts: Path, notes: Mapping[int, dict[str, Any]]) -> None:
    """Views pack part by part; where those of one part do not, none may be packed."""
    packed = [part for part, note in notes.items() if note["packed"]]
    for part in packed if len(packed) < len(notes) else ():
        content = read_part(parts, part)
        images = replace(content, view=unpacked_cells(content.view))
        write_part(parts, part, images, {**notes[part], "packed": False})
