"""Export a store to other programs: as a legacy pickle for babyai, or as a Minari dataset.

A Minari episode has one more observation than actions. The last one comes from replaying the stored
actions, if the seed is known and everything agrees; otherwise the last stored observation is
repeated, and the dataset says for how many episodes, and for which.
"""

from __future__ import annotations

import shutil
import string
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from pydantic import BaseModel, ConfigDict, Field

from demotools.babyai.cells import ACTIONS
from demotools.babyai.levels import Split
from demotools.errors import (
    LevelError,
    ManifestError,
    SettingsError,
    StoreError,
    optional_package,
    os_refusals,
    printable_text,
)
from demotools.output import (
    check_output,
    counted,
    progress_bar,
    size_on_disk,
    size_text,
    variable_set,
    working_folder,
)
from demotools.pickles.writer import write_pickle
from demotools.recording.environment import (
    Environment,
    Observation,
    level_environment_id,
    make_environment,
)
from demotools.recording.replay import reason_against, replayed_episode
from demotools.store.reading import Episodes, Store
from demotools.store.reshape import MIXED

ATTRIBUTES_KEY = "demotools"
"""Under this key of the dataset's metadata an export keeps the store's attributes."""
REPLAYED, REPEATED = "replayed", "repeated"
_ROOT_VARIABLE = "MINARI_DATASETS_PATH"
_EPISODES_A_BATCH, _STEPS_A_BATCH = 500, 1 << 15
SUCCESS_REWARD = 1.0
"""What a success is worth where its reward is not known."""


class KeptAttributes(BaseModel):
    """What an export keeps of a store's attributes, for whoever imports it.

    optional   the optional step arrays that the store had
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    level: str
    split: Split
    source: dict[str, Any]
    parent: dict[str, Any] | None
    licence: str
    citation: str
    fingerprint: str | None = None
    optional: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, store: Store) -> KeptAttributes:
        """Those of a store."""
        about = store.attributes
        kept = {name: getattr(about, name) for name in cls.model_fields if name != "optional"}
        return cls.model_construct(**kept, optional=sorted(store.optional))

    def one_level(self, path: Path | str) -> str:
        """The level; SettingsError where the store was merged of several."""
        if self.level == MIXED:
            raise SettingsError(
                "it was exported from a store of several levels, and does not say which is which",
                path=path,
                fix="export each level separately (`demotools select STORE --level LEVEL`), or add "
                "--level, which leaves out episodes whose mission is not one of that level",
            )
        return self.level


@dataclass(frozen=True)
class Exported:
    """A finished export.

    path                the file, or the folder of Minari datasets (for Minari's own variable)
    size_bytes          of all that was written
    note                what the format cannot hold; the format of a Minari dataset
    dataset_id          None for a file
    last_observations   how many of them are `replayed`, how many `repeated`
    """

    path: Path
    episodes: int
    size_bytes: int
    note: str = ""
    dataset_id: str | None = None
    last_observations: dict[str, int] | None = None

    def text(self) -> str:
        """What was exported, for a person."""
        path = printable_text(self.path)
        what = f"{counted(self.episodes, 'episode')}, {size_text(self.size_bytes)}"
        if self.last_observations is None:
            return f"exported {path}: {what}{f'; {self.note}' if self.note else ''}"
        counts = ", ".join(f"{number:,} {how}" for how, number in self.last_observations.items())
        return (
            f"exported {self.dataset_id}: {what} {self.note}\n"
            f"  last observations: {counts}\n"
            f"  load it with {_ROOT_VARIABLE}={path}"
        )


def what_it_lacks(store: Store, *kept: str) -> str:
    """What a format without seeds, and with these optional arrays, leaves out of a store."""
    lost = ["seeds", *(f"`{name}`" for name in store.optional if name not in kept)]
    return f"this format has no {' and no '.join(lost)}"


def export_pickle(
    store: Store, path: Path | None = None, *, overwrite: bool = False, quiet: bool = False
) -> Exported:
    """Write a store as a legacy pickle that babyai's own loader reads; seeds have no place in it.

    path   None means beside the store, under the name that babyai gives such a file, which
           `demotools convert` understands, too

    DemotoolsError  the file exists and `overwrite` is False, or it cannot be written
    """
    if path is None:
        about = store.attributes
        tag = "_valid" if about.split == "valid" else ""
        path = store.path.with_name(f"{about.environment_id or about.level}_agent{tag}.pkl")
    check_output(path, overwrite=overwrite)
    with progress_bar(store.episodes, path.name, "episodes", quiet=quiet) as bar:

        def blocks() -> Iterator[Episodes]:
            for batch in store_batches(store):
                yield store.take(np.arange(batch.start, batch.stop))
                bar.update(len(batch))

        write_pickle(path, blocks())
    return Exported(path, store.episodes, path.stat().st_size, what_it_lacks(store))


def store_batches(store: Store) -> Iterator[range]:
    """All episodes, in batches of few enough episodes and steps."""
    offset, first = store.episode_offset, 0
    while first < store.episodes:
        fits = int(np.searchsorted(offset, offset[first] + _STEPS_A_BATCH, "right")) - 1
        stop = min(max(fits, first + 1), first + _EPISODES_A_BATCH)
        yield range(first, stop)
        first = stop


def minari_module(data_format: str | None = None) -> Any:
    """The package `minari`, with its storage of a format, which it does not install by itself.

    DemotoolsError  one of them is not installed
    """
    if data_format is not None:
        optional_package("h5py" if data_format == "hdf5" else "pyarrow.dataset", "minari")
    return optional_package("minari", "minari")


def datasets_root(folder: Path) -> AbstractContextManager[None]:
    """Minari's folder of datasets, for a while; its API takes no other way to name it."""
    return variable_set(_ROOT_VARIABLE, str(folder))


def export_minari(
    store: Store,
    *,
    root: Path | None = None,
    dataset_id: str | None = None,
    data_format: str = "hdf5",
    overwrite: bool = False,
    quiet: bool = False,
) -> Exported:
    """Write a store as a Minari dataset (views as they are, missions as text).

    root         folder of datasets; None means Minari's own: its variable, else the user's home
    dataset_id   None means `babyai/NAME-v0`
    data_format  hdf5, arrow or parquet

    SettingsError   the id is not one that Minari takes
    StoreError      there is such a dataset already and `overwrite` is False
    DemotoolsError  minari is not installed, the disk is full
    """
    minari = minari_module(data_format)
    dataset_id = dataset_id or f"babyai/{store.name}-v0"
    _refuse_malformed(dataset_id)
    root = (root or minari.storage.get_dataset_path()).absolute()
    final = root / dataset_id
    if final.exists() and not overwrite:
        raise StoreError(
            "this dataset already exists",
            path=final,
            fix="add --overwrite to replace it, or choose another --id",
        )
    # an id has no dots: no two share this name
    hidden = root / f".export.{dataset_id.replace('/', '.')}"
    with os_refusals(root):
        root.mkdir(parents=True, exist_ok=True)
        with working_folder(hidden) as folder:
            old = root / f"{hidden.name}.old"
            if old.exists() and not final.exists():
                old.rename(final)  # an export was killed between its two renames
            with datasets_root(folder):
                counts = _write_dataset(minari, store, (dataset_id, data_format), quiet)
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            (folder / dataset_id).rename(final)
            shutil.rmtree(old, ignore_errors=True)
        namespace, _, _ = dataset_id.rpartition("/")
        with datasets_root(root):
            if namespace and namespace not in minari.namespace.list_local_namespaces():
                minari.namespace.create_namespace(namespace)
    return Exported(
        *(root, store.episodes, size_on_disk(final)),
        f"as {data_format}"
        + ("; its actions are those of `taken`" if "taken" in store.optional else ""),
        *(dataset_id, counts),
    )


def _refuse_malformed(dataset_id: str) -> None:
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:  # a TypeError where only the version lacks
        raise SettingsError(
            f"{dataset_id!r} is not a valid id of a Minari dataset",
            path="--id",
            fix="use an --id without spaces, such as babyai/GoToLocal-v0",
        ) from error


def _write_dataset(
    minari: Any, store: Store, named: tuple[str, str], quiet: bool
) -> dict[str, int]:
    """Write an id's dataset in a format; how many last observations come from where."""
    playable = len(store.levels) == 1 and not reason_against(store)
    environment = make_environment(store.level) if playable else None
    counts: Counter[str] = Counter()
    dataset = None
    with progress_bar(store.episodes, named[0], "episodes", quiet=quiet) as bar:
        for batch in store_batches(store):
            written = [_buffer(store, episode, environment) for episode in batch]
            buffers = [buffer for buffer, _how in written]
            if dataset is None:
                dataset = _create_dataset(minari, store, named, buffers)
                # after every episode it would add up the sizes of all files that are there
                dataset.storage.get_size = float
            else:
                dataset.update_dataset_from_buffer(buffers)
            how = [{"last_observation": how} for _buffer, how in written]
            dataset.storage.update_episode_metadata(how, batch)
            counts.update(how for _buffer, how in written)
            bar.update(len(batch))
    assert dataset is not None  # no store is without episodes
    del dataset.storage.get_size
    about = {
        ATTRIBUTES_KEY: KeptAttributes.of(store).model_dump(),
        "last_observations": dict(counts),
        "dataset_size": dataset.storage.get_size(),
    }
    dataset.storage.update_metadata(about)
    return dict(sorted(counts.items()))


def _create_dataset(minari: Any, store: Store, named: tuple[str, str], buffers: list[Any]) -> Any:
    dataset_id, data_format = named
    about = store.attributes
    recorded = about.source.get("minigrid")
    with warnings.catch_warnings():
        # reminders to name an author and the like: that is for who publishes the dataset
        warnings.simplefilter("ignore", UserWarning)
        return minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=_environment_id(about.level),
            algorithm_name=about.source.get("bot"),
            description=f"{about.level}, {about.split} split. Demonstrations: {about.citation}. "
            f"Licence: {about.licence}.",
            requirements=[f"minigrid=={recorded}"] if recorded else None,
            observation_space=_observation_space(store),
            action_space=spaces.Discrete(len(ACTIONS)),
            data_format=data_format,
            jpeg_encoding=False,
        )


def _environment_id(level: str) -> str | None:
    try:
        make_environment(level)  # registers minigrid's environments
    except (LevelError, ManifestError):
        return None
    return level_environment_id(level)


def _observation_space(store: Store) -> spaces.Dict:
    texts = store.mission_text
    characters = set(string.printable).union(*texts)
    return spaces.Dict(
        {
            "image": spaces.Box(0, 255, store.images(0, 1).shape[1:], np.uint8),
            "direction": spaces.Discrete(4),
            "mission": spaces.Text(
                max_length=max(map(len, texts)),
                min_length=0,
                charset="".join(sorted(characters)),
            ),
        }
    )


def _buffer(store: Store, episode: int, environment: Environment | None) -> tuple[Any, str]:
    """One episode as Minari's buffer, and where its last observation comes from."""
    from minari.data_collector import EpisodeBuffer

    one = store[episode]
    start, stop = store.bounds(episode)
    images, directions, seed = one.images, one.directions, one.seed
    last: Observation = {"image": images[-1], "direction": directions[-1]}
    reward, how = SUCCESS_REWARD, REPEATED
    if environment is not None and seed >= 0:
        replay = replayed_episode(environment, store, episode)
        if replay.observation is not None:
            last, reward, how = replay.observation, replay.reward, REPLAYED
    length = stop - start
    rewards = [0.0] * (length - 1) + [reward]
    if "reward" in store.optional:
        rewards = store.optional["reward"].span(start, stop).tolist()
    terminated = [*[False] * (length - 1), rewards[-1] > 0]
    if "terminated" in store.optional:
        terminated = (store.optional["terminated"].span(start, stop) > 0).tolist()
    buffer = EpisodeBuffer(
        seed=seed if seed >= 0 else None,
        observations={
            "image": np.concatenate([images, last["image"][None]]),
            "direction": np.append(directions, last["direction"]).astype(np.int64),
            "mission": [one.mission] * (length + 1),
        },
        # what led from one observation to the next
        actions=one.taken.astype(np.int64),
        rewards=rewards,
        terminations=terminated,
        truncations=[False] * (length - 1) + [not terminated[-1]],
        infos={},
    )
    return buffer, how
