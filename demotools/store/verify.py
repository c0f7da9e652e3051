"""Check a store: every byte against its checksum, the arrays against the format and each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import EGOCENTRIC_CODES, OBJECTS, PACKING
from demotools.babyai.levels import SEEDS, read_manifest
from demotools.babyai.vocabulary import alike, mission_tokens, mission_words
from demotools.errors import ManifestError, StoreError, printable_text
from demotools.output import progress_bar
from demotools.store.format import (
    StoreAttributes,
    checked_chunks,
    expected_entries,
    present_folder,
    read_attributes,
)
from demotools.store.reading import StepArray, Store, episode_mask, open_store

_STEPS_A_BLOCK = 1 << 20
# What file managers put into every folder that they show; it changes nothing that is read.
_DESKTOP = (".DS_Store", "Thumbs.db", "desktop.ini")
_LEVEL_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Check:
    """One check: what was checked, what is wrong (empty where all is well), or why not checked."""

    name: str
    problems: tuple[str, ...] = ()
    note: str = ""
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """The check as JSON values."""
        return {**asdict(self), "passed": self.passed}

    def text(self) -> str:
        """The check as a line, its problems below."""
        note = f" ({printable_text(self.note)})" if self.note else ""
        word = "skip" if self.skipped else "ok  " if self.passed else "FAIL"
        lines = [f"{word}  {self.name}{note}"]
        return "\n".join(lines + [f"      {printable_text(problem)}" for problem in self.problems])


def verify_store(
    path: Path, *, replay: Callable[[Store], Check] | None = None, quiet: bool = False
) -> list[Check]:
    """All checks of one store, in order; the first that finds damage to the files ends them.

    replay      a further check, made if all else is well (`recording.replay.replay_check`)

    StoreError  the folder is not a finished store, or what it says of itself is wrong
    """
    path = present_folder(path)
    read_attributes(path)
    damaged = _damaged_files(path, quiet)
    checks = [Check("chunk checksums", tuple(damaged)), _files(path)]
    if damaged:
        return checks
    store = open_store(path)
    checks += [check(store) for check in _CHECKS]
    if replay and all(check.passed for check in checks):
        checks.append(replay(store))
    return checks


def raise_if_damaged(path: Path, checks: list[Check]) -> None:
    """StoreError if any check failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        raise StoreError(
            f"{len(failed)} of {len(checks)} checks failed: {failed[0].problems[0]}",
            path=path,
            fix="rerun the command that made it, with --overwrite",
        )


def _damaged_files(path: Path, quiet: bool) -> list[str]:
    damaged = []
    with progress_bar(None, f"verify {path.stem}", "B", quiet=quiet) as bar:
        for size_bytes, problem in checked_chunks(path):
            bar.update(size_bytes)
            if problem:
                damaged.append(problem)
    return damaged


def _files(path: Path) -> Check:
    """Every entry of the folder is one that the format names; nothing is hidden from this."""
    folders, files = expected_entries(path)
    problems, tolerated = [], []
    for folder in ("", *sorted(folders)):
        if not (path / folder).is_dir():
            problems.append(f"the folder {folder!r} is missing")
            continue
        with os.scandir(path / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{folder}/{entry.name}" if folder else entry.name
                kind = _kind(entry)
                if (name in files and kind == "file") or (name in folders and kind == "folder"):
                    continue
                if entry.name in _DESKTOP and kind == "file":
                    tolerated.append(name)
                else:
                    problems.append(f"the {kind} {name!r} does not belong in a store")
    note = f"plus {', '.join(tolerated)}, which desktop systems create" if tolerated else ""
    return Check("exactly the files of the format", tuple(problems[:5]), note)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "file" if entry.is_file() else "folder" if entry.is_dir() else "pipe or device"


def _attributes(store: Store) -> Check:
    about = store.attributes
    expected = {"packing": PACKING, "objects": list(OBJECTS)}
    problems = [
        f"{name} is not {wanted!r}"
        for name, wanted in expected.items()
        if (about.model_extra or {}).get(name) != wanted
    ]
    if not _LEVEL_NAME.fullmatch(about.level):
        problems.append(f"the level {about.level!r} is not a name")
    return Check("cell encoding and level name", tuple(problems))


def _masks(store: Store) -> Check:
    problems = []
    for start, mask in _blocks(store.mask):
        expected = episode_mask(store.episode_offset, start, start + len(mask))
        wrong = np.not_equal(mask, expected)
        problems += [f"the mask of step {start + row} is wrong" for row in _rows(wrong)]
    return Check("masks match the episode offsets", tuple(problems[:5]))


def _ranges(store: Store) -> Check:
    arrays = {"action": store.action, "direction": store.direction, **store.optional}
    arrays.pop("reward", None)
    limits = {name: store.value_limit(name) for name in arrays}
    if store.packed:
        arrays["view"], limits["view"] = store.view, EGOCENTRIC_CODES
    problems = []
    for name, limit in limits.items():
        for start, values in _blocks(arrays[name]):
            wrong = (values >= limit).reshape(len(values), -1).any(axis=1)
            problems += [
                f"the {name} of step {start + row} is not in 0..{limit - 1}" for row in _rows(wrong)
            ]
    if rewards := store.optional.get("reward"):
        for start, some in _blocks(rewards):
            wrong = ~((some >= 0) & (some <= 1))
            problems += [f"the reward of step {start + row} is not in 0..1" for row in _rows(wrong)]
    if terminated := store.optional.get("terminated"):
        for start, some in _blocks(terminated):
            ended = np.flatnonzero(some) + start
            early = ended[~np.isin(ended + 1, store.episode_offset)][:5].tolist()
            problems += [f"step {step} is terminated, but not its episode's last" for step in early]
        last = store.episode_offset[1:] - 1
        solved = rewards.take(last) > 0 if rewards else np.zeros(len(last), np.bool_)
        wrong = solved & (terminated.take(last) == 0)
        problems += [f"episode {row} is solved, but not terminated" for row in _rows(wrong)]
    optional = f"also {' and '.join(store.optional)}" if store.optional else ""
    return Check("actions, directions and cell codes in range", tuple(problems[:5]), optional)


def _missions(store: Store) -> Check:
    words = store.attributes.vocabulary
    problems = []
    if pair := alike(store.mission_tokens):
        problems.append(f"missions {pair[0]} and {pair[1]} have the same tokens")
    known = set(words)
    unknown = {w for text in store.mission_text for w in mission_words(text)} - known
    problems += [f"the word {word!r} is not in the vocabulary" for word in sorted(unknown)[:5]]
    if not unknown:
        expected = mission_tokens(store.mission_text, words)
        same = np.array_equal(expected, store.mission_tokens)
        problems += [] if same else ["the tokens do not match the mission texts"]
    return Check("missions, words and tokens", tuple(problems))


def missions_out_of_grammar(store: Store, *, quiet: bool = True) -> list[int] | None:
    """The rows of the missions that their level does not have; None where it has no manifest."""
    missions = store.attributes.missions
    manifests, occurs = [], []
    for number, level in enumerate(store.levels):
        with suppress(ManifestError):
            manifests.append(read_manifest(level))
            occurs.append(np.zeros(missions, np.bool_))
            occurs[-1][store.episode_mission[store.episode_level == number]] = True
    if not manifests:
        return None
    found = []
    texts = (text for chunk in store.text_chunks() for text in chunk)
    name = f"missions of {store.name}"
    bar = progress_bar(missions, name, "missions", quiet=quiet, items=enumerate(texts))
    for row, text in bar:
        if not all(
            manifest.matches_mission(text)
            for manifest, rows in zip(manifests, occurs, strict=True)
            if rows[row]
        ):
            found.append(row)
    return found


def _grammar(store: Store) -> Check:
    name, level = "missions against the level's grammar", " or ".join(store.levels)
    rows = missions_out_of_grammar(store)
    if rows is None:
        return Check(name, note="the level has no manifest", skipped=True)
    return Check(name, tuple(f"not a mission of {level}: {t!r}" for t in store.texts(rows[:5])))


def seed_faults(store: Store) -> tuple[int, int, list[int]]:
    """Episodes without a known seed, seeds that occur again, episodes with another split's seed."""
    seeds = store.episode_seed
    known = seeds != -1
    outside = known.copy()
    for split in seed_splits(store.attributes):
        allowed = SEEDS["valid" if split == "valid" else "train"]
        outside &= (seeds < allowed.start) | (seeds >= allowed.stop)
    repeated = sum(len(some) - len(np.unique(some)) for some in store.level_seeds().values())
    return int((~known).sum()), repeated, np.flatnonzero(outside).tolist()


def seed_splits(attributes: StoreAttributes) -> set[str]:
    """The splits that the seeds of a store may be of: its own, or those of what it was made of."""
    about: Any = attributes.parent
    while isinstance(about, dict):
        if isinstance(kept := about.get("seed_splits"), list):
            return set(map(str, kept))
        about = about.get("parent")
    merged = [one.get("seed_splits") for one in attributes.merged_from]
    return {str(split) for kept in merged for split in kept or ()} or {attributes.split}


def _seeds(store: Store) -> Check:
    unknown, repeated, outside = seed_faults(store)
    problems = [
        f"seed {store.episode_seed[row]} of episode {row} does not belong to the "
        f"{store.attributes.split} split"
        for row in outside[:5]
    ]
    if repeated:
        problems.append(f"{repeated} seeds occur more than once")
    note = f"{unknown:,} episodes have no known seed" if unknown else ""
    return Check("environment seeds", tuple(problems), note)


_CHECKS: tuple[Callable[[Store], Check], ...] = (
    _attributes,
    _masks,
    _ranges,
    _missions,
    _grammar,
    _seeds,
)


def _rows(wrong: NDArray[np.bool_] | np.bool_) -> list[int]:
    """The first five rows that are wrong."""
    return [int(row) for row in np.flatnonzero(wrong)[:5]]


def _blocks(array: StepArray) -> Iterator[tuple[int, NDArray[Any]]]:
    steps = array.shape[0]
    for start in range(0, steps, _STEPS_A_BLOCK):
        yield start, array.span(start, min(start + _STEPS_A_BLOCK, steps))
