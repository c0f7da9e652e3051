"""Single episodes and subsets of them: what `store[i]`, `store[:100]` and `store.filter()` return.

Nothing is copied until you access it: an episode is a number, and its arrays are views of the
store's memory maps. A store and its subsets are map-style datasets for PyTorch, and `pad_episodes`
collates episodes of different lengths into a batch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import unpacked_cells
from demotools.errors import SettingsError, StoreError
from demotools.output import counted

Rows = NDArray[np.int64]
ARRAYS = ("images", "directions", "actions", "masks")
"""The step arrays that an episode is made of, besides `cells`."""
_SINGULAR = {"image": "images", "direction": "directions", "action": "actions", "mask": "masks"}
_KEYS = ("mission", "seed", *ARRAYS)


class _Array(Protocol):
    def span(self, start: int, stop: int) -> NDArray[np.uint8]: ...
    def take(self, index: Rows) -> NDArray[np.uint8]: ...


class _Store(Protocol):
    """What is needed of a `demotools.store.reading.Store`, which is all of its episodes."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def packed(self) -> bool: ...
    @property
    def episode_offset(self) -> Rows: ...
    @property
    def episode_mission(self) -> NDArray[np.int32]: ...
    @property
    def episode_seed(self) -> Rows: ...
    @property
    def mission_text(self) -> list[str]: ...
    @property
    def mission_tokens(self) -> NDArray[np.uint8] | NDArray[np.uint16]: ...
    @property
    def optional(self) -> Mapping[str, Any]: ...
    def step_array(self, name: str) -> _Array: ...
    def check_values(self, **columns: NDArray[np.uint8]) -> None: ...


ENDS = ("success", "failure", "truncation", "unknown")
"""How an episode can have ended, see `EpisodeDataset.ends`."""


class Episode:
    """One episode of T steps. `episode["actions"]` and `episode["action"]` are `episode.actions`.

    store    the store of the episode
    number   its number in that store
    """

    __slots__ = ("number", "store")

    def __init__(self, store: _Store, number: int) -> None:
        self.store = store
        self.number = number

    def __len__(self) -> int:
        """T, the number of steps."""
        offset = self.store.episode_offset
        return int(offset[self.number + 1] - offset[self.number])

    @property
    def mission(self) -> str:
        """The mission's text. The first text read from a store unpacks all of its missions."""
        text: str = self.store.mission_text[self.store.episode_mission[self.number]]
        return text

    @property
    def mission_tokens(self) -> NDArray[np.int64]:
        """The word ids of the mission, 0 = padding: int64 [L]."""
        return np.array(
            self.store.mission_tokens[self.store.episode_mission[self.number]], np.int64
        )

    @property
    def seed(self) -> int:
        """The environment seed; -1 if unknown."""
        return int(self.store.episode_seed[self.number])

    @property
    def images(self) -> NDArray[np.uint8]:
        """Egocentric views uint8 [T, 7, 7, 3], unpacked on access; stored images [T, H, W, C]."""
        view = self._steps("view")
        return unpacked_cells(view) if self.store.packed else view

    @property
    def cells(self) -> NDArray[np.uint8]:
        """Packed views uint8 [T, 7, 7]; StoreError if the store has images."""
        if not self.store.packed:
            raise _without_cells(self.store)
        return self._steps("view")

    @property
    def directions(self) -> NDArray[np.uint8]:
        """The agent's directions: uint8 [T], 0 right, 1 down, 2 left, 3 up."""
        return self._steps("direction")

    @property
    def actions(self) -> NDArray[np.uint8]:
        """The expert's actions: uint8 [T], 0..6."""
        return self._steps("action")

    @property
    def taken(self) -> NDArray[np.uint8]:
        """Actions taken: some random in a recording with noise, else the expert's: uint8 [T]."""
        return self._steps("taken")

    @property
    def end(self) -> str:
        """How the episode ended, see `EpisodeDataset.ends`."""
        return str(EpisodeDataset(self.store, [self.number]).ends[0])

    @property
    def masks(self) -> NDArray[np.uint8]:
        """Memory masks uint8 [T]: 0 on the first step, else 1."""
        return self._steps("mask")

    def _steps(self, name: str) -> NDArray[np.uint8]:
        start, stop = self.store.episode_offset[self.number : self.number + 2].tolist()
        steps = self.store.step_array(name).span(start, stop)
        self.store.check_values(**{name: steps})
        return steps

    def keys(self) -> tuple[str, ...]:
        """The keys of `dict(episode)`."""
        return _KEYS

    def __getitem__(self, key: str) -> Any:
        name = _SINGULAR.get(key, key)
        if name not in (*_KEYS, "cells", "mission_tokens", "taken", "end"):
            raise KeyError(key)
        return getattr(self, name)

    def __repr__(self) -> str:
        return f"<episode {self.number} of {self.store.name}: {counted(len(self), 'step')}>"


class EpisodeDataset(Sequence[Episode]):
    """A subset of a store's episodes, in any order: `dataset[i]`, `len`, iteration; a map-style
    dataset.

    store      an open store
    episodes   their numbers in the store; None: all
    """

    def __init__(self, store: _Store, episodes: Iterable[int] | Rows | None = None) -> None:
        self._store = store
        count = len(store.episode_mission)
        self._numbers: Rows = np.arange(count) if episodes is None else _numbers(episodes, count)

    @property
    def store(self) -> _Store:
        """The store of the episodes."""
        return self._store

    @property
    def numbers(self) -> Rows:
        """Their numbers in the store: int64 [E]."""
        return self._numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Episode: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[Any]) -> EpisodeDataset: ...
    def __getitem__(
        self, index: int | np.integer[Any] | slice | Sequence[int] | NDArray[Any]
    ) -> Episode | EpisodeDataset:
        if isinstance(index, slice):
            return EpisodeDataset(self.store, self.numbers[index])
        if isinstance(index, int | np.integer):
            return Episode(self.store, int(self.numbers[index]))
        return self.select(index)

    def __iter__(self) -> Iterator[Episode]:
        return (Episode(self.store, number) for number in self.numbers.tolist())

    def __getitems__(self, index: Sequence[int]) -> EpisodeDataset:
        """For PyTorch's DataLoader: the episodes of a batch at once."""
        _teach_collate()
        return self.select(index)

    def select(self, episodes: Iterable[int] | NDArray[Any]) -> EpisodeDataset:
        """The episodes at these positions, in this order; or those where a bool [E] is true."""
        return EpisodeDataset(self.store, self.numbers[_numbers(episodes, len(self))])

    def filter(
        self,
        test: Callable[[Episode], bool] | None = None,
        *,
        mission: str | Callable[[str], bool] | None = None,
        min_length: int = 1,
        max_length: int | None = None,
        seeds: Iterable[int] | None = None,
    ) -> EpisodeDataset:
        """The episodes that match all arguments, in their order.

        test                    a function, called with each episode that matches the rest
        mission                 a regular expression to search for in the mission, or a function
        min_length, max_length  in steps, both inclusive
        seeds                   environment seeds

        SettingsError           the expression cannot be parsed
        """
        length = self.lengths
        fits = length >= min_length
        if max_length is not None:
            fits &= length <= max_length
        if seeds is not None:
            wanted = seeds if isinstance(seeds, range) else list(seeds)
            fits &= np.isin(self.seeds, np.array(wanted, dtype=np.int64))
        if mission is not None:
            found = _mission_test(mission, self.store.path)
            # each text once, whatever the number of episodes
            rows, place = np.unique(
                self.store.episode_mission[self.numbers[fits]], return_inverse=True
            )
            texts = self.store.mission_text
            fits[fits] = np.array([bool(found(texts[row])) for row in rows], dtype=np.bool_)[place]
        chosen = EpisodeDataset(self.store, self.numbers[fits])
        if test is None:
            return chosen
        return chosen.select(np.array([bool(test(one)) for one in chosen], dtype=np.bool_))

    def by_seed(self, seed: int) -> Episode:
        """The first episode with this seed; KeyError if there is none."""
        found = np.flatnonzero(self.seeds == seed)
        if not len(found):
            raise KeyError(seed)
        return self[int(found[0])]

    @cached_property
    def lengths(self) -> Rows:
        """The number of steps of each episode: int64 [E]."""
        offset = self.store.episode_offset
        return offset[self.numbers + 1] - offset[self.numbers]

    @property
    def seeds(self) -> Rows:
        """The environment seed of each episode, -1 if unknown: int64 [E]."""
        return self.store.episode_seed[self.numbers]

    @property
    def missions(self) -> list[str]:
        """The mission text of each episode."""
        texts = self.store.mission_text
        return [texts[row] for row in self.store.episode_mission[self.numbers].tolist()]

    @property
    def ends(self) -> NDArray[np.str_]:
        """How each episode ended, texts [E].

        "success"      with a reward, mission done; in a store without rewards, all episodes
        "failure"      without a reward, by the level's rules: it was terminated
        "truncation"   at the step limit, or because the bot gave up: it was truncated
        "unknown"      without a reward, in a store that has no `terminated`
        """
        last = self.store.episode_offset[self.numbers + 1] - 1
        ends = np.full(len(last), "success", "<U10")
        if "reward" in self.store.optional:
            unsolved = self.store.optional["reward"].take(last) <= 0
            ends[unsolved] = "unknown"
            if "terminated" in self.store.optional:
                terminated = self.store.optional["terminated"].take(last)[unsolved] > 0
                ends[unsolved] = np.where(terminated, "failure", "truncation")
        return ends

    @property
    def steps(self) -> int:
        """The total number of steps of these episodes."""
        return int(self.lengths.sum())

    @property
    def level(self) -> str:
        """The store's."""
        return self.store.level

    @property
    def name(self) -> str:
        """The store's."""
        return self.store.name

    def to_numpy(self, arrays: Sequence[str] = ARRAYS) -> dict[str, NDArray[Any]]:
        """Copies of all steps of these episodes, one after another: S steps, E episodes.

        arrays    which step arrays, of images, cells, directions, actions, masks
        returns   images uint8 [S, 7, 7, 3], directions, actions, masks uint8 [S]; missions [E],
                  seeds int64 [E]; episode_ends int64 [E], the step after the last of each
        """
        steps: dict[str, NDArray[Any]] = dict(_taken(self.store, self.numbers, arrays))
        return steps | {
            "missions": np.array(self.missions),
            "seeds": self.seeds.copy(),
            "episode_ends": np.cumsum(self.lengths),
        }

    @staticmethod
    def collate(episodes: Sequence[Episode]) -> dict[str, Any]:
        """For DataLoader's `collate_fn`: see `pad_episodes`."""
        return pad_episodes(episodes)

    def __repr__(self) -> str:
        return f"<{counted(len(self), 'episode')} of {self.name}>"


def pad_episodes(
    episodes: Sequence[Episode], arrays: Sequence[str] = ("images", "directions", "actions")
) -> dict[str, Any]:
    """A batch of B episodes, padded with 0 to the longest, T; for DataLoader's `collate_fn`.

    arrays    which step arrays to include, of images, cells, directions, actions, masks
    returns   these [B, T, ...], directions and actions as int64; mission, B texts; mission_tokens
              int64 [B, L]; seed int64 [B]; lengths int64 [B]; valid bool [B, T], true for a step
              of the episode, false for padding. Tensors if torch is loaded, else numpy arrays.
    """
    length = np.array([len(one) for one in episodes])
    count, longest = len(length), int(length.max(initial=0))
    stores = {id(one.store): one.store for one in episodes}
    tokens = max((one.mission_tokens.shape[1] for one in stores.values()), default=0)
    valid = np.arange(longest) < length[:, None]
    batch: dict[str, NDArray[Any]] = {
        "mission_tokens": np.zeros((count, tokens), dtype=np.int64),
        "seed": np.array([one.seed for one in episodes], dtype=np.int64),
        "lengths": length,
        "valid": valid,
    }
    # one gather for all episodes of a store
    for store in stores.values():
        rows = np.array([row for row, one in enumerate(episodes) if one.store is store])
        numbers = np.array([episodes[row].number for row in rows])
        place = np.zeros_like(valid)
        place[rows] = valid[rows]
        for name, steps in _taken(store, numbers, arrays).items():
            kind = np.int64 if name in ("directions", "actions") else np.uint8
            if name not in batch:
                batch[name] = np.zeros((*valid.shape, *steps.shape[1:]), dtype=kind)
            batch[name][place] = steps
        text = store.mission_tokens[store.episode_mission[numbers]]
        batch["mission_tokens"][rows, : text.shape[1]] = text
    return {"mission": [one.mission for one in episodes], **_tensors(batch)}


def _taken(store: _Store, numbers: Rows, arrays: Sequence[str]) -> Mapping[str, NDArray[np.uint8]]:
    """The steps of these episodes, one after another; the arrays by the names of an episode."""
    start = store.episode_offset[numbers]
    index = spans(start, store.episode_offset[numbers + 1] - start)
    found = {}
    for array in arrays:
        if array == "cells" and not store.packed:
            raise _without_cells(store)
        name = {"images": "view", "cells": "view"}.get(array, array.removesuffix("s"))
        steps = store.step_array(name).take(index)
        store.check_values(**{name: steps})
        found[array] = unpacked_cells(steps) if array == "images" and store.packed else steps
    return found


def spans(start: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """The integers of several half-open ranges, one after another.

    start, length   int64 [N]
    returns         int64 [sum of length]

    >>> spans(np.array([7, 0]), np.array([2, 3]))
    array([7, 8, 0, 1, 2])
    """
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(length.sum())


def _teach_collate() -> None:
    """Let PyTorch's own collate function make batches of episodes: `DataLoader(store, 4)`."""
    collate = sys.modules.get("torch.utils.data._utils.collate")
    known = getattr(collate, "default_collate_fn_map", None)
    if known is not None and Episode not in known:
        known[Episode] = lambda episodes, *, collate_fn_map=None: pad_episodes(episodes)  # noqa: ARG005


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    # whoever has a DataLoader has loaded torch, which is never imported here
    torch = sys.modules.get("torch")
    return {
        name: values if torch is None else torch.from_numpy(values)
        for name, values in arrays.items()
    }


def _numbers(given: Iterable[int] | NDArray[Any], count: int) -> Rows:
    """Places 0 <= place < count; IndexError where one is not."""
    array = np.asarray(given if isinstance(given, np.ndarray | range) else list(given))
    is_bool = array.dtype == np.bool_
    if is_bool and array.shape == (count,):
        return np.flatnonzero(array)
    numbers = array.astype(np.int64)
    if is_bool or array.ndim != 1 or not (numbers == array).all():
        raise IndexError("select episodes by a list of whole numbers, or by one bool per episode")
    if len(numbers) and not -count <= numbers.min() <= numbers.max() < count:
        raise IndexError(f"an episode number is out of range: there are {count:,} episodes")
    return np.where(numbers < 0, numbers + count, numbers)


def _mission_test(mission: str | Callable[[str], bool], path: Path) -> Callable[[str], object]:
    if callable(mission):
        return mission
    try:
        return re.compile(mission).search
    except re.error as error:
        raise SettingsError(
            f"the filter {mission!r} is not a regular expression: {error}",
            path=path,
            fix="correct the expression",
        ) from error


def _without_cells(store: _Store) -> StoreError:
    return StoreError(
        "the store holds images, not packed cells",
        path=store.path,
        fix="use `images`; `demotools info` shows which of the two a store has",
    )
