"""Compare two stores: attributes, missions, episodes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.errors import printable_text, printable_values
from demotools.look.info import aligned, flat_texts
from demotools.look.survey import episode_digests
from demotools.store.reading import Store, open_store

_SHOWN = 5
_SAID_ELSEWHERE = ("fingerprint", "metadata_hash", "vocabulary", "episodes", "steps", "missions")


@dataclass(frozen=True)
class Sides:
    """How many of something are in both stores, or in one only, and the first few of these."""

    both: int
    only_first: int
    only_second: int
    examples_first: list[str]
    examples_second: list[str]


@dataclass(frozen=True)
class Difference:
    """What two stores have in common and what not.

    stores       their names
    attributes   each attribute that differs, with its two values
    missions     texts
    episodes     by what the agent saw, did and was told; seeds and order do not count
    same_order   whether the episodes are the same in the same order
    """

    stores: tuple[str, str]
    attributes: dict[str, tuple[Any, Any]]
    missions: Sides
    episodes: Sides
    same_order: bool

    def as_json(self) -> dict[str, Any]:
        """The difference as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """The difference for a person."""
        one, other = map(printable_text, self.stores)
        rows: list[tuple[str, ...]] = [("", one, other)]
        rows += [
            (name, *map(_short, values))
            for name, values in _flat(printable_values(self.attributes))
        ]
        lines = ["attributes: all the same"] if len(rows) == 1 else ["attributes that differ"]
        lines += aligned(rows) if len(rows) > 1 else []
        lines += _side_lines("missions", self.missions, (one, other))
        lines += _side_lines("episodes", self.episodes, (one, other))
        if not self.episodes.only_first and not self.episodes.only_second:
            lines.append(f"  in {'the same' if self.same_order else 'another'} order")
        return "\n".join(lines)


def store_difference(first: Path, second: Path, *, quiet: bool = False) -> Difference:
    """Compare two stores; every byte of their views and actions is read once.

    StoreError  see `open_store`
    """
    one, other = open_store(first), open_store(second)
    digests = [episode_digests(store, quiet=quiet) for store in (one, other)]
    return Difference(
        stores=(one.name, other.name),
        attributes=_attributes(one, other),
        missions=_mission_sides(one, other),
        episodes=_episode_sides(one, other, digests[0], digests[1]),
        same_order=np.array_equal(digests[0], digests[1]),
    )


def _attributes(one: Store, other: Store) -> dict[str, tuple[Any, Any]]:
    first, second = (store.attributes.model_dump(mode="json") for store in (one, other))
    return {
        name: (first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and name not in _SAID_ELSEWHERE
    }


def _mission_sides(one: Store, other: Store) -> Sides:
    first, second = set(one.mission_text), set(other.mission_text)
    return Sides(
        both=len(first & second),
        only_first=len(first - second),
        only_second=len(second - first),
        examples_first=sorted(first - second)[:_SHOWN],
        examples_second=sorted(second - first)[:_SHOWN],
    )


def _episode_sides(
    one: Store, other: Store, first: NDArray[np.uint64], second: NDArray[np.uint64]
) -> Sides:
    both = common(first, second)
    return Sides(
        both=both,
        only_first=len(first) - both,
        only_second=len(second) - both,
        examples_first=_examples(one, ~np.isin(first, second)),
        examples_second=_examples(other, ~np.isin(second, first)),
    )


def common(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> int:
    """How many numbers are in both; each repetition counts.

    >>> common(np.array([7, 7, 7, 5]), np.array([7, 9, 7]))
    2
    """
    kinds_first, count_first = np.unique(first, return_counts=True)
    kinds_second, count_second = np.unique(second, return_counts=True)
    _kinds, in_first, in_second = np.intersect1d(
        kinds_first, kinds_second, assume_unique=True, return_indices=True
    )
    return int(np.minimum(count_first[in_first], count_second[in_second]).sum())


def _examples(store: Store, chosen: NDArray[np.bool_]) -> list[str]:
    rows = np.flatnonzero(chosen)[:_SHOWN].tolist()
    return [f"{row}: {store.mission_text[store.episode_mission[row]]}" for row in rows]


def _side_lines(name: str, sides: Sides, stores: tuple[str, str]) -> list[str]:
    lines = [f"{name}: {sides.both:,} in both"]
    for store, number, examples in (
        (stores[0], sides.only_first, sides.examples_first),
        (stores[1], sides.only_second, sides.examples_second),
    ):
        if number:
            lines.append(f"  {number:,} only in {store}")
            lines += [f"    {printable_text(example)}" for example in examples]
            if len(examples) < number:
                lines.append("    ...")
    return lines


def _flat(attributes: dict[str, tuple[Any, Any]]) -> list[tuple[str, tuple[str, str]]]:
    """Attributes as texts, tables among them key by key."""
    rows: list[tuple[str, tuple[str, str]]] = []
    for name, values in attributes.items():
        sides = [dict(text.split(": ", 1) for text in flat_texts(value, name)) for value in values]
        rows += [
            (key, (sides[0].get(key, "-"), sides[1].get(key, "-")))
            for key in dict.fromkeys([*sides[0], *sides[1]])
            if sides[0].get(key) != sides[1].get(key)
        ]
    return rows


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
