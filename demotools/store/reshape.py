"""New stores from episodes of existing ones: select, merge, split and shrink are four plans.

A `Plan` lists the episodes of a new store, source by source; `make_store` copies them bit for bit,
block by block, and records their origin. All plans but that of `shrink` are made here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.babyai.levels import seeds_of
from demotools.errors import SettingsError, StoreError, printable_text
from demotools.output import counted, progress_bar
from demotools.store.building import StoreBuilder, write_part
from demotools.store.duplicates import joined_groups, repeats, store_hashes
from demotools.store.episodes import EpisodeDataset
from demotools.store.format import MERGED, OPTIONAL, OUTCOMES
from demotools.store.reading import Episodes, Store, open_store, remapped
from demotools.store.verify import seed_splits

Rows = NDArray[np.int64]

MIXED = "mixed"
"""What the level of a store is called whose episodes are of several levels."""
_EPISODES_A_PART = 4096
_MAPPED_BYTES = 1 << 25


@dataclass(frozen=True)
class Plan:
    """A store that is to be made.

    path       its folder
    episodes   each store that they are of, and their numbers there, int64 [E'] each
    split      train or valid
    parent     how they were chosen; None where several stores are merged
    """

    path: Path
    episodes: Sequence[tuple[Store, Rows]]
    split: str
    parent: Mapping[str, Any] | None

    @property
    def size(self) -> int:
        """Episodes of the store."""
        return sum(len(rows) for _store, rows in self.episodes)


@dataclass(frozen=True)
class Made:
    """A store that was made out of others.

    path             its folder
    episodes         in it
    parents          the names of those that it was made of
    left_out         episodes of theirs that are not in it
    duplicates       episodes of theirs that repeat one before them step by step; None: not counted
    repeated_seeds   episodes of theirs with the seed, and level, of one before them; the same
    no_rewards       the name of one without rewards, for which those of others are left out
    no_terminations  the same of the array `terminated`
    """

    path: Path
    episodes: int
    parents: tuple[str, ...]
    left_out: int
    duplicates: int | None = None
    repeated_seeds: int | None = None
    no_rewards: str | None = None
    no_terminations: str | None = None

    def text(self) -> str:
        """What was made, for a person."""
        names = ", ".join(map(printable_text, self.parents[:3]))
        more = f" and {len(self.parents) - 3} others" if len(self.parents) > 3 else ""
        lines = [
            f"made {printable_text(self.path)}: {counted(self.episodes, 'episode')} of "
            f"{names}{more}, {self.left_out:,} left out"
        ]
        if self.duplicates is not None:
            lines.append(
                f"  {counted(self.duplicates, 'duplicate')} of earlier episodes, step by step"
            )
        if self.repeated_seeds is not None:
            again = counted(self.repeated_seeds, "episode")
            lines.append(f"  {again} with the same seed as an earlier one of their level")
        if self.no_rewards is not None:
            lines.append(f"  no rewards: {printable_text(self.no_rewards)} has none")
        if self.no_terminations is not None:
            lines.append(f"  no terminations: {printable_text(self.no_terminations)} has none")
        return "\n".join(lines)


def make_store(plan: Plan, *, overwrite: bool = False, quiet: bool = False) -> None:
    """Make the store of a plan, going on where an earlier call was ended.

    StoreError  it exists already, no episode is left, the stores do not go together, or one of them
                was replaced meanwhile
    """
    stores = [store for store, _rows in plan.episodes]
    for store in stores:
        if plan.path.resolve() == store.path.resolve():
            raise StoreError(
                "the new store would replace one of its own sources",
                path=plan.path,
                fix="give another --name",
            )
    if not plan.size:
        raise StoreError(
            "the new store would have no episodes",
            path=stores[0].path,
            fix="choose more episodes; `demotools info` shows what the store has",
        )
    about = _about(plan)
    names = _optional_arrays(plan.episodes)
    with StoreBuilder(plan.path, _job(plan), overwrite=overwrite) as builder:
        finished = builder.finished_parts()
        bar = progress_bar(plan.size, f"copy to {plan.path.stem}", "episodes", quiet=quiet)
        with bar:
            for number, (size, episodes) in enumerate(_blocks(plan, finished)):
                if episodes is not None:
                    write_part(builder.parts, number, _with_arrays(episodes, names), {})
                bar.update(size)
        for store in stores:
            store.check_unchanged()
        builder.finish(**about)


def _blocks(plan: Plan, finished: Sequence[int]) -> Iterator[tuple[int, Episodes | None]]:
    """The episodes a block at a time, and how many; None for those whose part is there already."""
    part, done = count(), set(finished)
    for store, rows in plan.episodes:
        # not the store's own list, which would stay for as long as the store does
        texts = [text for chunk in store.text_chunks() for text in chunk]
        step_bytes = int(np.prod(store.view.shape[1:])) + 4
        fresh, mapped = store, _MAPPED_BYTES
        for start in range(0, len(rows), _EPISODES_A_PART):
            block = rows[start : start + _EPISODES_A_PART]
            if next(part) in done:
                yield len(block), None
                continue
            if mapped >= _MAPPED_BYTES:
                fresh, mapped = remapped(store), 0
            yield len(block), fresh.take(block, texts)
            steps = store.episode_offset[block.max() + 1] - store.episode_offset[block.min()]
            mapped += int(steps) * step_bytes


def _job(plan: Plan) -> dict[str, Any]:
    """What determines the store's content."""
    digest = hashlib.sha256()
    for store, rows in plan.episodes:
        digest.update(f"{store.attributes.fingerprint} {len(rows)}\n".encode() + rows.tobytes())
    return {"episodes": digest.hexdigest(), "part": _EPISODES_A_PART}


def _about(plan: Plan) -> dict[str, Any]:
    """What the builder gets of a store beside its episodes."""
    stores = [store for store, _rows in plan.episodes]
    levels: dict[str, int] = {}
    numbers = []
    for store, rows in plan.episodes:
        here = store.episode_level[rows]
        table = np.zeros(256, np.uint8)
        for number in np.unique(here).tolist():
            table[number] = levels.setdefault(store.levels[number], len(levels))
        numbers.append(table[here])
    one = len(levels) == 1
    first = stores[0].attributes
    if plan.parent is None:
        source = {"kind": MERGED, "stores": [_entry(store) for store in stores]}
    else:
        source = first.source
    known = [one for store in stores for one in [_entry(store), *store.attributes.merged_from]]
    ids = {entry["level"]: entry["environment_id"] for entry in known}
    return {
        "level": next(iter(levels)) if one else MIXED,
        "split": plan.split,
        "environment_id": ids.get(next(iter(levels))) if one else None,
        "licence": "; ".join(dict.fromkeys(store.attributes.licence for store in stores)),
        "citation": "; ".join(dict.fromkeys(store.attributes.citation for store in stores)),
        "source": source,
        "parent": plan.parent,
        "subgoals": _subgoals(stores),
        "levels": () if one else tuple(levels),
        "episode_level": None if one else np.concatenate(numbers),
    }


def _entry(store: Store) -> dict[str, Any]:
    """What a merged store keeps of one of its parents."""
    about = store.attributes
    kept = ("level", "environment_id", "split", "licence", "citation", "source", "parent")
    return {
        "name": _name_of(store),
        "fingerprint": about.fingerprint,
        "episodes": store.episodes,
        **{name: getattr(about, name) for name in kept},
        "seed_splits": sorted(seed_splits(about)),
    }


def parent_of(store: Store, **choice: Any) -> dict[str, Any]:
    """What a store keeps of the only one that it is made of, and of that one's parent.

    choice   how its episodes were chosen, JSON values
    """
    before = store.attributes.parent
    return {
        "name": _name_of(store),
        "fingerprint": store.attributes.fingerprint,
        "episodes": store.episodes,
        **choice,
        **({"parent": before} if before else {}),
    }


def _name_of(store: Store) -> str:
    """Its name as an attribute; the name of a folder may be no text."""
    return os.fsencode(store.name).decode("utf-8", "replace")


def _subgoals(stores: Sequence[Store]) -> tuple[str, ...]:
    tables = {store.attributes.subgoals: store for store in stores if "subgoal" in store.optional}
    if len(tables) > 1:
        raise StoreError(
            f"its subgoals are numbered unlike those of {next(iter(tables.values())).name}",
            path=list(tables.values())[1].path,
            fix="rerecord one of them with the same version of demotools, or leave it out",
        )
    return next(iter(tables), ())


def _optional_arrays(chosen: Sequence[tuple[Store, Rows]]) -> list[str]:
    """The optional step arrays of what is made of these episodes of stores.

    A store without rewards holds solved episodes only, and so may those that lose theirs beside it.
    """
    first = chosen[0][0]
    for store, _rows in chosen:
        if store.view.shape[1:] != first.view.shape[1:]:
            raise StoreError(
                f"its views differ in shape from those of {first.name}",
                path=store.path,
                fix="leave it out, or combine it only with stores of the same shape",
            )
    without = _without("reward", [store for store, _rows in chosen])
    for store, rows in chosen if without else ():
        if not (EpisodeDataset(store, rows).ends == "success").all():
            raise StoreError(
                f"it has unsolved episodes, but {without[0].name} has no rewards, so the new store "
                "could not tell solved and unsolved episodes apart",
                path=store.path,
                fix="keep only its solved episodes: `demotools select STORE --solved`",
            )
    return [
        name
        for name in OPTIONAL
        # what is not filled in is left out where a store lacks it
        if (all if name in OUTCOMES else any)(name in store.optional for store, _rows in chosen)
    ]


def _without(name: str, stores: Sequence[Store]) -> list[Store]:
    """The stores without this optional array, where others have it."""
    without = [store for store in stores if name not in store.optional]
    return without if len(without) < len(stores) else []


def _with_arrays(episodes: Episodes, names: Sequence[str]) -> Episodes:
    """With these optional arrays: without noise the bot's action was taken; no subgoal is known."""
    otherwise = {"taken": episodes.action, "subgoal": np.zeros_like(episodes.action)}
    given = episodes.optional
    optional = {name: given[name] if name in given else otherwise[name] for name in names}
    return replace(episodes, optional=optional)


def sampled(count: int, wanted: int, seed: int) -> Rows:
    """A random choice of `wanted` out of `count`, in ascending order.

    returns  int64 [wanted]; for one seed, a smaller choice is a part of a larger one

    The raw output of a bit generator is the one random stream that numpy promises never to change.
    """
    rank = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    return np.sort(rank[:wanted]).astype(np.int64)


@dataclass(frozen=True)
class Conditions:
    """Which episodes of a store are wanted; what is None does not matter.

    mission            a regular expression to be found in the mission
    min_len, max_len   steps, both inclusive
    actions            names of actions, each of which the expert takes
    seeds              environment seeds: a list such as `0-999,5000`, or a file of such lists
    level              of a merged store
    ended              kinds of end, one of which is theirs: see `EpisodeDataset.ends`
    first, sample      so many of those that fit: the first, or a random choice
    seed               of that choice
    """

    mission: str | None = None
    min_len: int | None = None
    max_len: int | None = None
    actions: tuple[str, ...] | None = None
    seeds: str | None = None
    level: str | None = None
    ended: tuple[str, ...] | None = None
    first: int | None = None
    sample: int | None = None
    seed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Those that matter."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value is not None
        }


def selected_episodes(store: Store, wanted: Conditions) -> Rows:
    """The numbers of the episodes that fit, in ascending order.

    SettingsError  the expression, the seeds or the level cannot be
    StoreError     none fits, or fewer than are to be sampled
    """
    rows = _fitting(store, wanted)
    if not len(rows):
        raise _nothing_fits(store, wanted)
    if wanted.sample is not None:
        if wanted.sample > len(rows):
            raise StoreError(
                f"only {len(rows):,} episodes match, but --sample asks for {wanted.sample:,}",
                path=store.path,
                fix=f"use at most --sample {len(rows)}",
            )
        rows = rows[sampled(len(rows), wanted.sample, wanted.seed or 0)]
    return rows[: wanted.first]


def _nothing_fits(store: Store, wanted: Conditions) -> StoreError:
    """Says which condition no episode meets, or that none meets all of them."""
    for name, value in wanted.as_json().items():
        if name in ("first", "sample", "seed") or len(_fitting(store, Conditions(**{name: value}))):
            continue
        if name == "mission":
            some = ", ".join(map(repr, next(store.text_chunks())[:3]))
            missions = f"{store.attributes.missions:,} missions, such as {some}"
            what, fix = f"no mission matches {value!r}", f"the store has {missions}"
        else:
            shown = ",".join(value) if isinstance(value, list) else value
            what = f"no episode matches --{name.replace('_', '-')} {shown}"
            length, seed = store.lengths, store.seeds
            fix = (
                f"its episodes have {length.min()} to {length.max()} steps and seeds from "
                f"{seed.min()} to {seed.max()}: see `demotools info` and `demotools report`"
            )
        return StoreError(what, path=store.path, fix=fix)
    return StoreError(
        "each condition matches some episodes, but no episode matches all of them",
        path=store.path,
        fix="drop or relax a condition",
    )


def _fitting(store: Store, wanted: Conditions) -> Rows:
    # a store of its own, which is gone with all the missions that it unpacks
    found = remapped(store).filter(
        mission=wanted.mission,
        min_length=wanted.min_len or 1,
        max_length=wanted.max_len,
        seeds=None if wanted.seeds is None else seeds_of(wanted.seeds),
    )
    rows = found.numbers
    del found
    if wanted.level is not None:
        if wanted.level not in store.levels:
            raise SettingsError(
                f"the store has no episodes of level {wanted.level}",
                path=f"--level {wanted.level}",
                fix=f"name one of {', '.join(store.levels)}",
            )
        rows = rows[store.episode_level[rows] == store.levels.index(wanted.level)]
    if wanted.ended is not None:
        rows = rows[np.isin(EpisodeDataset(store, rows).ends, wanted.ended)]
    for action in wanted.actions or ():
        rows = rows[_with_action(store, ACTIONS.index(action))[rows]]
    return rows


def _with_action(store: Store, action: int) -> NDArray[np.bool_]:
    """Which episodes have this action: bool [E]."""
    offset, found = store.episode_offset, np.zeros(store.episodes, np.bool_)
    for start in range(0, store.episodes, 1 << 16):
        bounds = offset[start : start + (1 << 16) + 1]
        steps = store.action.span(int(bounds[0]), int(bounds[-1])) == action
        found[start : start + len(bounds) - 1] = np.logical_or.reduceat(
            steps, bounds[:-1] - bounds[0]
        )
    return found


def select_store(
    path: Path, new: Path, wanted: Conditions, *, overwrite: bool = False, quiet: bool = False
) -> Made:
    """Make a store of those episodes of another that fit.

    StoreError, SettingsError  see `selected_episodes` and `make_store`
    """
    store = open_store(path)
    rows = selected_episodes(store, wanted)
    parent = parent_of(store, select=wanted.as_json())
    plan = Plan(new, [(store, rows)], store.attributes.split, parent)
    make_store(plan, overwrite=overwrite, quiet=quiet)
    return Made(new, len(rows), (store.name,), store.episodes - len(rows))


def merge_stores(
    paths: Sequence[Path],
    new: Path,
    *,
    split: str | None = None,
    dedupe: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Made:
    """Make one store of the episodes of several, one store after another.

    split       of the new store; None: that of the stores
    dedupe      leave out what repeats an episode before it, step by step

    StoreError  see `make_store`; or they are of different splits and `split` is None; it is one
                store alone, where nothing is to be left out
    """
    stores = [open_store(path) for path in paths]
    if len(stores) == 1 and not dedupe:
        raise StoreError(
            "this is one store alone, and nothing to merge it with",
            path=stores[0].path,
            fix="name the others too; --dedupe leaves out what repeats in it, `demotools select` "
            "takes some of its episodes",
        )
    splits = sorted({store.attributes.split for store in stores})
    if split is None and len(splits) > 1:
        raise StoreError(
            f"it belongs to the {stores[-1].attributes.split} split, but another store does not",
            path=stores[-1].path,
            fix="set the split of the merged store: --split train or --split valid",
        )
    again = repeats(np.concatenate([store_hashes(store, quiet=quiet) for store in stores]))
    ends = np.cumsum([store.episodes for store in stores])
    episodes = [
        (store, np.flatnonzero(~part) if dedupe else np.arange(store.episodes))
        for store, part in zip(stores, np.split(again, ends[:-1]), strict=True)
    ]
    plan = Plan(new, episodes, split or splits[0], None)
    make_store(plan, overwrite=overwrite, quiet=quiet)
    names = tuple(store.name for store in stores)
    left_out, duplicates = len(again) - plan.size, int(again.sum())
    bare = [next((store.name for store in _without(name, stores)), None) for name in OUTCOMES]
    return Made(new, plan.size, names, left_out, duplicates, _seed_repeats(stores), *bare)


def _seed_repeats(stores: Sequence[Store]) -> int:
    """Episodes with a known seed of their level that one before them has."""
    found: dict[str, list[Rows]] = {}
    for store in stores:
        for level, seeds in store.level_seeds().items():
            found.setdefault(level, []).append(seeds)
    whole = [np.concatenate(seeds) for seeds in found.values()]
    return sum(len(seeds) - len(np.unique(seeds)) for seeds in whole)


def split_store(
    path: Path,
    train: Path,
    valid: Path,
    *,
    share: float,
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Made]:
    """Make a training and a validation store of all episodes of one.

    Episodes that repeat each other step by step, and those of one seed, go to the same side.

    share       of the episodes that go to the validation store, at most; from 1 on, their number

    StoreError  see `make_store`; or one side has no episode
    """
    store = open_store(path)
    wanted = int(share) if share >= 1 else round(share * store.episodes)
    held = _held_out(store, wanted, seed, quiet=quiet)
    if not held.any() or held.all():
        raise StoreError(
            f"its {store.episodes:,} episodes cannot be split this way: one side would be empty",
            path=path,
            fix="change --valid; duplicates always stay on the same side, and `demotools report` "
            "counts them",
        )
    made = []
    for new, split, side in ((train, "train", ~held), (valid, "valid", held)):
        parent = parent_of(
            store,
            split=split,
            valid=share,
            seed=seed,
            seed_splits=sorted(seed_splits(store.attributes)),
        )
        plan = Plan(new, [(store, np.flatnonzero(side))], split, parent)
        make_store(plan, overwrite=overwrite, quiet=quiet)
        made.append(Made(new, plan.size, (store.name,), store.episodes - plan.size))
    return made


def _held_out(store: Store, wanted: int, seed: int, *, quiet: bool) -> NDArray[np.bool_]:
    """Which episodes go to the validation store: whole groups, `wanted` of them or a few less."""
    known = store.episode_seed != -1
    seeds = np.unique(store.episode_seed, return_inverse=True)[1].reshape(-1)
    # a seed means something else on another level, and one that is not known nothing
    place = np.where(known, seeds * 256 + store.episode_level, -1 - np.arange(store.episodes))
    group = joined_groups([store_hashes(store, quiet=quiet), place])
    numbers, member, size = np.unique(group, return_inverse=True, return_counts=True)
    left, chosen = wanted, np.zeros(len(numbers), np.bool_)
    rank = np.argsort(np.random.PCG64(seed).random_raw(len(numbers)), kind="stable")
    for number, episodes in zip(rank.tolist(), size[rank].tolist(), strict=True):
        if episodes <= left:
            chosen[number] = True
            left -= episodes
        if not left:
            break
    held: NDArray[np.bool_] = chosen[member.reshape(-1)]
    return held
