"""One HTML file about one or several stores: figures, pictures and findings.

The findings are about each store and each pair of stores: what they share and where they differ.
They point out what would make results look better than they are; damage is reported by `verify`.
Texts are escaped, and the page's content policy lets a browser load nothing but the pictures inside
the file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import (
    ACTIONS,
    BALL,
    BOX,
    CLOSED,
    COLOURS,
    DOOR,
    KEY,
    LOCKED,
    OBJECTS,
    OPEN,
    STATES,
)
from demotools.look.info import flat_texts
from demotools.look.pictures import animation, panel, view_picture
from demotools.look.statistics import StoreStatistics, store_statistics
from demotools.output import progress_bar, size_text
from demotools.store.reading import Store, open_store
from demotools.store.verify import missions_out_of_grammar, seed_faults

_TILE = 14
_PICTURES = 8
_STEPS_AT_MOST = 100
_ROWS_AT_MOST = 25
_BINS_AT_MOST = 40


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its count, its part of the longest (0 to 1), its part of the whole."""

    label: str
    count: int
    part: float
    share: float


@dataclass(frozen=True)
class Finding:
    """One finding.

    name      what was checked
    stores    the stores that it is about
    alarm     whether one should look into it
    text      what was found, for a person
    figures   the same for a machine
    details   the first few cases
    """

    name: str
    stores: tuple[str, ...]
    alarm: bool
    text: str
    figures: dict[str, Any]
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found in the stores, and the page that shows it."""

    stores: list[StoreStatistics]
    findings: list[Finding]
    html: str

    def as_json(self) -> dict[str, Any]:
        """The figures and findings as JSON values."""
        return {
            "stores": [one.as_json() for one in self.stores],
            "findings": [asdict(one) for one in self.findings],
        }


def store_report(
    paths: Sequence[Path], *, instruction_len: int | None = None, quiet: bool = False
) -> Report:
    """The report of some stores.

    instruction_len   tokens that a network reads of a mission; None: nothing is cut

    StoreError  see `open_store`
    """
    stores = [store_statistics(open_store(path), quiet=quiet) for path in paths]
    findings = store_findings(stores, instruction_len, quiet=quiet)
    html = rendered_page(
        "report.html",
        title=", ".join(one.name for one in stores),
        stores=[_page(one, quiet=quiet) for one in stores],
        findings=sorted(findings, key=lambda finding: not finding.alarm),
        alarms=sum(finding.alarm for finding in findings),
    )
    return Report(stores, findings, html)


def _page(one: StoreStatistics, *, quiet: bool) -> dict[str, Any]:
    """What the template shows of one store."""
    store = one.store
    frequent = np.argsort(-one.mission_episodes, kind="stable")[:_ROWS_AT_MOST]
    counts = one.mission_episodes[frequent].tolist()
    missions = zip(one.store.texts(frequent), counts, strict=True)
    words = zip(store.attributes.vocabulary, one.word_episodes.tolist(), strict=True)
    return {
        "info": one.info,
        "provenance": _provenance(one.info),
        "lengths": length_bars(store.lengths),
        "actions": bars(zip(ACTIONS, one.action_steps.tolist(), strict=True), keep_order=True),
        "missions": bars(missions, total=store.episodes),
        "words": bars(words, total=store.episodes),
        "objects": None if one.cell_counts is None else object_table(one.cell_counts),
        "colours": COLOURS,
        "gallery": gallery(one, quiet=quiet),
    }


def _provenance(info: dict[str, Any]) -> list[tuple[str, str]]:
    texts = flat_texts(info["source"])
    texts += [f"parent’s {text}" for text in flat_texts(info["parent"] or {})]
    texts += [f"{key}: {info[key]}" for key in ("licence", "citation")]
    parts = [text.partition(": ") for text in texts]
    # those of the stores that were merged stand together in the store's own
    repeated = (" licence", " citation")
    rows = [
        (name, value)
        for name, _colon, value in parts
        if value != "None" and not name.endswith(repeated)
    ]
    return [*rows, ("made by", info["created_by"]), ("fingerprint", info["fingerprint"])]


def bars(
    counts: Iterable[tuple[str, int]], *, keep_order: bool = False, total: int | None = None
) -> list[Bar]:
    """The largest counts as bars, at most 25, largest first; zeros only where the order is kept.

    total   what shares are of; None: the sum

    >>> [(bar.label, bar.part) for bar in bars([("a", 1), ("b", 0), ("c", 4)])]
    [('c', 1.0), ('a', 0.25)]
    """
    rows = list(counts)
    whole = total or sum(count for _label, count in rows) or 1
    if not keep_order:
        rows = sorted((row for row in rows if row[1]), key=lambda row: -row[1])[:_ROWS_AT_MOST]
    longest = max((count for _label, count in rows), default=0) or 1
    return [Bar(label, count, count / longest, count / whole) for label, count in rows]


def length_bars(length: NDArray[np.int64]) -> list[Bar]:
    """Episode lengths in at most 40 bins of equal width.

    >>> [(bar.label, bar.count) for bar in length_bars(np.array([1, 3, 3]))]
    [('1', 1), ('2', 0), ('3', 2)]
    >>> [(bar.label, bar.count) for bar in length_bars(np.array([1, 3, 60]))][::29]
    [('1–2', 1), ('59–60', 1)]
    """
    low, high = int(length.min()), int(length.max())
    width = -(-(high - low + 1) // _BINS_AT_MOST)
    counts = np.bincount((length - low) // width)
    starts = [low + number * width for number in range(len(counts))]
    ends = [min(start + width - 1, high) for start in starts]
    labels = [
        str(start) if start == end else f"{start}–{end}"
        for start, end in zip(starts, ends, strict=True)
    ]
    return bars(zip(labels, counts.tolist(), strict=True), keep_order=True)


def object_table(cell_counts: NDArray[np.int64]) -> list[tuple[str, list[Bar]]]:
    """Kinds of coloured objects with a bar for each colour; shares are of all object cells.

    cell_counts   int64 [11, 6, 3]
    """
    kinds = [(OBJECTS[kind], cell_counts[kind].sum(axis=1)) for kind in (KEY, BALL, BOX)]
    kinds += [(f"{STATES[s]} door", cell_counts[DOOR, :, s]) for s in (OPEN, CLOSED, LOCKED)]
    counts = [count for _name, row in kinds for count in row.tolist()]
    all_bars = bars(((str(n), count) for n, count in enumerate(counts)), keep_order=True)
    width = len(COLOURS)
    return [
        (name, all_bars[row * width : (row + 1) * width]) for row, (name, _c) in enumerate(kinds)
    ]


def gallery_episodes(length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Eight episodes at equal distances in the order of their lengths, the shortest first.

    >>> gallery_episodes(np.array([5, 1, 3])).tolist()
    [1, 2, 0]
    """
    order = np.argsort(length, kind="stable")
    places = np.linspace(0, len(length) - 1, min(_PICTURES, len(length)))
    return order[places.round().astype(np.int64)]


def gallery(one: StoreStatistics, *, quiet: bool) -> list[dict[str, Any]]:
    """Eight episodes as small animations: the first hundred steps of each."""
    store, length = one.store, one.store.lengths
    chosen = gallery_episodes(length)
    missions = one.store.texts(store.episode_mission[chosen])
    bar = progress_bar(
        len(chosen), f"draw {store.name}", "episodes", quiet=quiet, items=chosen.tolist()
    )
    return [
        {
            "episode": episode,
            "mission": mission,
            "steps": int(length[episode]),
            "shown": min(int(length[episode]), _STEPS_AT_MOST),
            "picture": _data_uri(store, episode),
        }
        for episode, mission in zip(bar, missions, strict=True)
    ]


def _data_uri(store: Store, episode: int) -> str:
    start, stop = store.bounds(episode)
    stop = min(stop, start + _STEPS_AT_MOST)
    views, actions = store.view.span(start, stop), store.action.span(start, stop)
    pictures = [
        panel([view_picture(view, _TILE)], [f"{step}  {ACTIONS[action]}"], text_size=11)
        for step, (view, action) in enumerate(zip(views, actions, strict=True))
    ]
    return "data:image/gif;base64," + base64.b64encode(animation(pictures)).decode()


_SHOWN = 5
# An action this frequent is right so often that it can be learnt instead of the task.
_FREQUENT = 0.8
_RARE = 0.01
_ATTRIBUTES_SAID_ELSEWHERE = (
    *("fingerprint", "metadata_hash", "vocabulary", "episodes", "steps", "missions"),
)


def store_findings(
    stores: list[StoreStatistics], instruction_len: int | None, *, quiet: bool = True
) -> list[Finding]:
    """All findings: of each store, then of each pair of stores.

    instruction_len   tokens that a network reads of a mission; None: nothing is cut
    """
    found = []
    for one in stores:
        found += [
            _repeated_episodes(one),
            _seeds(one),
            _grammar(one, quiet=quiet),
            _cut_missions(one, instruction_len),
            _unbalanced_actions(one),
        ]
    for first, second in combinations(stores, 2):
        found += [
            _shared_episodes(first, second),
            _shared_missions(first, second),
            _attributes(first, second),
            _shared_seeds(first, second),
        ]
    return found


def _repeated_episodes(one: StoreStatistics) -> Finding:
    order = np.argsort(one.episode_hash, kind="stable")
    ranked = one.episode_hash[order]
    again = np.flatnonzero(ranked[1:] == ranked[:-1])
    first, second = order[again], order[again + 1]
    seed, level = one.store.episode_seed, one.store.episode_level
    same = (seed[first] == seed[second]) & (level[first] == level[second])
    same_seed = int((same & (seed[first] >= 0)).sum())
    text = "no episode occurs twice"
    if len(again):
        text = f"{_share(len(again), len(order))} are step-by-step repeats of another"
        text += f", {same_seed:,} of them with the same seed" if same_seed else ""
    pairs = list(zip(first[:_SHOWN].tolist(), second[:_SHOWN].tolist(), strict=True))
    return Finding(
        name="duplicates within the store",
        stores=(one.name,),
        alarm=same_seed > 0 or len(again) > 0.01 * len(order),
        text=text,
        figures={"repeated": len(again), "same_seed": same_seed},
        details=tuple(f"episodes {a} and {b}: {_mission(one, b)}" for a, b in pairs),
    )


def _shared_episodes(first: StoreStatistics, second: StoreStatistics) -> Finding:
    hashes, others = first.episode_hash, second.episode_hash
    order = np.argsort(hashes, kind="stable")
    place = np.minimum(np.searchsorted(hashes, others, sorter=order), len(order) - 1)
    rows = np.flatnonzero(hashes[order[place]] == others)
    both = common(hashes, others)
    same_order = np.array_equal(hashes, others)
    text = "no episode is in both"
    if len(rows):
        text = f"{_share(len(rows), len(others))} of {second.name} are also in {first.name}"
    if both == len(hashes) == len(others):
        text += f", and no others, in {'the same' if same_order else 'another'} order"
    details = [
        f"episode {order[place[row]]} of {first.name} is episode {row} of {second.name}: "
        f"{_mission(second, row)}"
        for row in rows[:_SHOWN].tolist()
    ]
    for one, missing in ((first, ~np.isin(hashes, others)), (second, ~np.isin(others, hashes))):
        details += [
            f"episode {row} is only in {one.name}: {_mission(one, row)}"
            for row in np.flatnonzero(missing)[:_SHOWN].tolist()
        ]
    related = _is_subset(first.store, second.store)
    if related and len(rows):
        text += ": one was made from the other"
    return Finding(
        name="duplicates between stores",
        stores=(first.name, second.name),
        alarm=len(rows) > 0 and not related,
        text=text,
        figures={
            "shared": len(rows),
            "share": len(rows) / len(others),
            **_sides(both, len(hashes), len(others)),
            "same_order": same_order,
        },
        details=tuple(details),
    )


def _is_subset(first: Store, second: Store) -> bool:
    """Whether one was made from the other, for the same use: then they are meant to overlap."""
    if first.attributes.split != second.attributes.split:
        return False
    for child, other in ((first, second), (second, first)):
        parent = child.attributes.parent
        while parent:
            if parent.get("fingerprint") == other.attributes.fingerprint:
                return True
            parent = parent.get("parent")
    return False


def common(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> int:
    """How many numbers are in both; each repetition counts.

    >>> common(np.array([7, 7, 7, 5]), np.array([7, 9, 7]))
    2
    """
    numbers, counts = np.unique(first, return_counts=True)
    others, other_counts = np.unique(second, return_counts=True)
    _both, here, there = np.intersect1d(numbers, others, assume_unique=True, return_indices=True)
    return int(np.minimum(counts[here], other_counts[there]).sum())


def _sides(both: int, first: int, second: int) -> dict[str, int]:
    return {"both": both, "only_first": first - both, "only_second": second - both}


def _shared_missions(first: StoreStatistics, second: StoreStatistics) -> Finding:
    hashes, others = first.mission_hash, second.mission_hash
    figures = _sides(common(hashes, others), len(hashes), len(others))
    details = [
        f"only in {one.name}: {text}"
        for one, missing in ((first, ~np.isin(hashes, others)), (second, ~np.isin(others, hashes)))
        for text in one.store.texts(np.flatnonzero(missing)[:_SHOWN])
    ]
    text = (
        f"{figures['both']:,} in both, {figures['only_first']:,} only in {first.name}, "
        f"{figures['only_second']:,} only in {second.name}"
    )
    names = (first.name, second.name)
    return Finding("missions of two stores", names, False, text, figures, tuple(details))


def _attributes(first: StoreStatistics, second: StoreStatistics) -> Finding:
    """What the stores say of themselves, tables key by key: those that differ."""
    one, other = (each.store.attributes.model_dump(mode="json") for each in (first, second))
    names = [
        name
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name) and name not in _ATTRIBUTES_SAID_ELSEWHERE
    ]
    sides = [
        dict(text.split(": ", 1) for name in names for text in flat_texts(each.get(name), name))
        for each in (one, other)
    ]
    details = [
        f"{key}: {sides[0].get(key, '-')} | {sides[1].get(key, '-')}"
        for key in dict.fromkeys([*sides[0], *sides[1]])
        if sides[0].get(key) != sides[1].get(key)
    ]
    return Finding(
        name="attributes of two stores",
        stores=(first.name, second.name),
        alarm=False,
        text=f"they differ in {', '.join(names)}" if names else "all the same",
        figures={name: [one.get(name), other.get(name)] for name in names},
        details=tuple(details),
    )


def _seeds(one: StoreStatistics) -> Finding:
    seed, split = one.store.episode_seed, one.store.attributes.split
    unknown, repeated, outside = seed_faults(one.store)
    known = seed[seed != -1]
    parts = []
    if unknown:
        parts.append(f"{_share(unknown, len(seed))} have no known seed")
    if len(known):
        parts.append(f"known seeds from {known.min()} to {known.max()}")
    if repeated:
        parts.append(f"{repeated:,} seeds are repeated")
    if len(outside):
        parts.append(f"{len(outside):,} seeds do not belong to the {split} split")
    return Finding(
        name="seeds",
        stores=(one.name,),
        alarm=repeated > 0 or len(outside) > 0,
        text="; ".join(parts),
        figures={"unknown": unknown, "repeated": repeated, "outside_split": len(outside)},
    )


def _shared_seeds(first: StoreStatistics, second: StoreStatistics) -> Finding:
    known, others = (one.store.level_seeds() for one in (first, second))
    common_levels = known.keys() & others.keys()
    pairs = [(known[level], others[level]) for level in sorted(common_levels)]
    shared = np.concatenate([np.intersect1d(*pair) for pair in pairs] or [np.zeros(0, np.int64)])
    text = f"{len(shared):,} seeds are in both" if len(shared) else "no seed is in both"
    if not pairs:
        text = "not compared: the same seed means different episodes on different levels"
    elif not all(any(map(len, seeds.values())) for seeds in (known, others)):
        text = "not compared: the seeds of one store are unknown"
    return Finding(
        name="seed overlap",
        stores=(first.name, second.name),
        alarm=len(shared) > 0 and not _is_subset(first.store, second.store),
        text=text,
        figures={"shared": len(shared)},
        details=tuple(f"seed {seed}" for seed in shared[:_SHOWN]),
    )


def _grammar(one: StoreStatistics, *, quiet: bool) -> Finding:
    name, level = "missions against the level's grammar", " or ".join(one.store.levels)
    rows = missions_out_of_grammar(one.store, quiet=quiet)
    if rows is None:
        text = f"not checked: the level {level} has no manifest"
        return Finding(name, (one.name,), False, text, {"checked": False})
    episodes, missions = int(one.mission_episodes[rows].sum()), one.info["missions"]
    text = f"all {missions:,} missions follow the grammar of {level}"
    if rows:
        text = (
            f"{len(rows):,} of {missions:,} missions are not missions of {level}; they occur in "
            f"{_share(episodes, one.store.episodes)}"
        )
    return Finding(
        name=name,
        stores=(one.name,),
        alarm=bool(rows),
        text=text,
        figures={"checked": True, "missions": len(rows), "episodes": episodes},
        details=tuple(map(repr, one.store.texts(rows[:_SHOWN]))),
    )


def _cut_missions(one: StoreStatistics, instruction_len: int | None) -> Finding:
    name, longest = "missions cut by the instruction length", int(one.mission_length.max())
    if instruction_len is None:
        text = f"not checked without --instruction-len; the longest mission has {longest} words"
        return Finding(name, (one.name,), False, text, {"longest": longest})
    cut = one.mission_length > instruction_len
    episodes = int(one.mission_episodes[cut].sum())
    text = f"no mission has more than {instruction_len} words; the longest has {longest}"
    if episodes:
        text = (
            f"{_share(episodes, one.store.episodes)} have missions of more than "
            f"{instruction_len} words; the longest has {longest}"
        )
    rows = np.flatnonzero(cut)[:_SHOWN]
    return Finding(
        name=name,
        stores=(one.name,),
        alarm=episodes > 0,
        text=text,
        figures={"longest": longest, "episodes": episodes},
        details=tuple(map(repr, one.store.texts(rows))),
    )


def _unbalanced_actions(one: StoreStatistics) -> Finding:
    share: NDArray[np.float64] = one.action_steps / one.action_steps.sum()
    most = int(share.argmax())
    rare = [ACTIONS[n] for n in np.flatnonzero((share > 0) & (share < _RARE))]
    never = [ACTIONS[n] for n in np.flatnonzero(share == 0)]
    text = f"{ACTIONS[most]} is {share[most]:.1%} of the steps, so always taking it is as accurate"
    text += f"; under {_RARE:.0%}: {', '.join(rare)}" if rare else ""
    text += f"; never: {', '.join(never)}" if never else ""
    return Finding(
        name="balance of actions",
        stores=(one.name,),
        alarm=bool(share[most] > _FREQUENT),
        text=text,
        figures={"shares": dict(zip(ACTIONS, share.tolist(), strict=True))},
    )


def _mission(one: StoreStatistics, episode: int) -> str:
    return one.store.texts([one.store.episode_mission[episode]])[0]


def _share(part: int, whole: int) -> str:
    """So many of so many episodes.

    >>> _share(5, 1000)
    '5 of 1,000 episodes (0.5%)'
    """
    percent = 100 * part / whole
    return f"{part:,} of {whole:,} episodes ({percent:.3g}%)"


def rendered_page(template: str, package: str = "demotools", **values: object) -> str:
    """The text of a template that lies in `package`; what goes into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name, ".") for name in dict.fromkeys((package, "demotools"))]
        ),
        autoescape=jinja2.select_autoescape(("html",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters
    filters["size"] = size_text
    return environment.get_template(template).render(**values)
