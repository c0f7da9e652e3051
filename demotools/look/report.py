"""One HTML file about one or several stores: figures, pictures, and what is striking in them.

What a look at one or several stores finds: things that make figures look better than they are.

Nothing here says that a store is damaged; that is `demotools verify`.

HTML pages for people to look at: one file each, which loads nothing.

Texts are escaped, and the pages' content policy lets a browser load nothing but the pictures
inside the file.
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
from tqdm import tqdm

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
from demotools.babyai.levels import EVALUATION_SEED, read_manifest
from demotools.errors import ManifestError, printable_text
from demotools.look.pictures import animation, panel, view_picture
from demotools.look.survey import Survey, mission_pieces, store_survey
from demotools.output import size_text
from demotools.store.reading import Store, open_store

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

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """What was found in the stores, and the page that shows it."""

    surveys: list[Survey]
    findings: list[Finding]
    html: str

    def as_json(self) -> dict[str, Any]:
        """The figures and findings as JSON values."""
        return {
            "stores": [survey.as_json() for survey in self.surveys],
            "findings": [finding.as_json() for finding in self.findings],
        }


def store_report(
    paths: Sequence[Path], *, instruction_len: int | None = None, quiet: bool = False
) -> Report:
    """The report of some stores.

    instruction_len   tokens that a network reads of a mission; None: nothing is cut

    StoreError  see `open_store`
    """
    surveys = [store_survey(open_store(path), quiet=quiet) for path in paths]
    findings = store_findings(surveys, instruction_len, quiet=quiet)
    html = rendered_page(
        "report.html",
        title=", ".join(survey.name for survey in surveys),
        stores=[_page(survey, quiet=quiet) for survey in surveys],
        findings=sorted(findings, key=lambda finding: not finding.alarm),
        alarms=sum(finding.alarm for finding in findings),
    )
    return Report(surveys, findings, html)


def _page(survey: Survey, *, quiet: bool) -> dict[str, Any]:
    """What the template shows of one store."""
    store = survey.store
    frequent = np.argsort(-survey.mission_episodes, kind="stable")[:_ROWS_AT_MOST]
    counts = survey.mission_episodes[frequent].tolist()
    missions = zip(survey.missions(frequent), counts, strict=True)
    words = zip(store.attributes.vocabulary, survey.word_episodes.tolist(), strict=True)
    return {
        "info": survey.info,
        "provenance": _provenance(survey.info),
        "lengths": length_bars(survey.length),
        "actions": bars(zip(ACTIONS, survey.action_steps.tolist(), strict=True), keep_order=True),
        "missions": bars(missions, total=store.episodes),
        "words": bars(words, total=store.episodes),
        "objects": None if survey.cell_counts is None else object_table(survey.cell_counts),
        "colours": COLOURS,
        "gallery": gallery(survey, quiet=quiet),
    }


def _provenance(info: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, str(value)) for key, value in info["source"].items()]
    rows += [(f"parent’s {key}", str(value)) for key, value in (info["parent"] or {}).items()]
    rows += [(key, str(info[key])) for key in ("licence", "citation")]
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


def gallery(survey: Survey, *, quiet: bool) -> list[dict[str, Any]]:
    """Eight episodes as small animations: the first hundred steps of each."""
    store, length = survey.store, survey.length
    chosen = gallery_episodes(length)
    missions = survey.missions(store.episode_mission[chosen])
    bar = tqdm(
        chosen.tolist(),
        printable_text(f"draw {store.name}"),
        unit=" episodes",
        disable=quiet or None,
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
    start, stop = (int(step) for step in store.episode_offset[episode : episode + 2])
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


def store_findings(
    surveys: list[Survey], instruction_len: int | None, *, quiet: bool = True
) -> list[Finding]:
    """All findings: of each store, then of each pair of stores.

    instruction_len   tokens that a network reads of a mission; None: nothing is cut
    """
    found = []
    for survey in surveys:
        found += [
            _duplicates_within(survey),
            _seeds_within(survey),
            _foreign_missions(survey, quiet=quiet),
            _cut_missions(survey, instruction_len),
            _unbalanced_actions(survey),
        ]
    for one, other in combinations(surveys, 2):
        found += [_duplicates_between(one, other), _seeds_between(one, other)]
    return found


def _duplicates_within(survey: Survey) -> Finding:
    order = np.argsort(survey.digest, kind="stable")
    ranked = survey.digest[order]
    again = np.flatnonzero(ranked[1:] == ranked[:-1])
    first, second = order[again], order[again + 1]
    seed = survey.store.episode_seed
    same_seed = int(((seed[first] == seed[second]) & (seed[first] >= 0)).sum())
    text = "no episode occurs twice"
    if len(again):
        text = f"{_share(len(again), len(order))} repeat another episode step by step"
        text += f", {same_seed:,} of them with the same seed" if same_seed else ""
    return Finding(
        name="duplicates within the store",
        stores=(survey.name,),
        alarm=same_seed > 0 or len(again) > 0.01 * len(order),
        text=text,
        figures={"repeated": len(again), "same_seed": same_seed},
        details=tuple(
            f"episodes {a} and {b}: {_mission(survey, b)}"
            for a, b in list(zip(first.tolist(), second.tolist(), strict=True))[:_SHOWN]
        ),
    )


def _duplicates_between(one: Survey, other: Survey) -> Finding:
    order = np.argsort(one.digest, kind="stable")
    ranked = one.digest[order]
    place = np.minimum(np.searchsorted(ranked, other.digest), len(ranked) - 1)
    rows = np.flatnonzero(ranked[place] == other.digest)
    twins = order[place[rows]]
    text = "no episode is in both"
    if len(rows):
        text = f"{_share(len(rows), len(other.digest))} of {other.name} are also in {one.name}"
    return Finding(
        name="duplicates between stores",
        stores=(one.name, other.name),
        alarm=len(rows) > 0,
        text=text,
        figures={"shared": len(rows), "share": len(rows) / len(other.digest)},
        details=tuple(
            f"episode {a} of {one.name} is episode {b} of {other.name}: {_mission(other, b)}"
            for a, b in list(zip(twins.tolist(), rows.tolist(), strict=True))[:_SHOWN]
        ),
    )


def _seeds_within(survey: Survey) -> Finding:
    seed = survey.store.episode_seed
    known = seed[seed >= 0]
    repeated = len(known) - len(np.unique(known))
    evaluation = int((known >= EVALUATION_SEED).sum())
    parts = []
    if len(known) < len(seed):
        parts.append(f"{_share(len(seed) - len(known), len(seed))} have no known seed")
    if len(known):
        parts.append(f"known seeds from {known.min()} to {known.max()}")
    if repeated:
        parts.append(f"{repeated:,} seeds occur again")
    if evaluation:
        parts.append(f"{evaluation:,} seeds are reserved for evaluation")
    return Finding(
        name="seeds",
        stores=(survey.name,),
        alarm=repeated > 0 or evaluation > 0,
        text="; ".join(parts),
        figures={
            "unknown": len(seed) - len(known),
            "repeated": repeated,
            "of_evaluation": evaluation,
        },
    )


def _seeds_between(one: Survey, other: Survey) -> Finding:
    levels = {survey.store.attributes.level for survey in (one, other)}
    first, second = (s.store.episode_seed[s.store.episode_seed >= 0] for s in (one, other))
    shared = np.intersect1d(first, second)
    if len(levels) > 1:
        text = "not compared: a seed means something else on another level"
        shared = shared[:0]
    elif not len(first) or not len(second):
        text = "not compared: the seeds of one of them are not known"
    else:
        text = f"{len(shared):,} seeds are in both" if len(shared) else "no seed is in both"
    return Finding(
        name="seed overlap",
        stores=(one.name, other.name),
        alarm=len(shared) > 0,
        text=text,
        figures={"shared": len(shared)},
        details=tuple(f"seed {seed}" for seed in shared[:_SHOWN]),
    )


def _foreign_missions(survey: Survey, *, quiet: bool) -> Finding:
    name, level = "missions against the level's grammar", survey.store.attributes.level
    try:
        manifest = read_manifest(level)
    except ManifestError:
        text = f"not checked: the level {level} has no manifest"
        return Finding(name, (survey.name,), False, text, {"checked": False})
    foreign: list[int] = []
    with tqdm(desc=name, total=survey.info["missions"], disable=quiet or None) as bar:
        for start, texts in mission_pieces(survey.store):
            for row, text in enumerate(texts, start):
                if not manifest.matches_mission(text):
                    foreign.append(row)
            bar.update(len(texts))
    episodes, missions = int(survey.mission_episodes[foreign].sum()), survey.info["missions"]
    text = f"all {missions:,} missions are of the grammar of {level}"
    if foreign:
        text = (
            f"{len(foreign):,} of {missions:,} missions are none of {level}, those of "
            f"{_share(episodes, survey.store.episodes)}"
        )
    return Finding(
        name=name,
        stores=(survey.name,),
        alarm=bool(foreign),
        text=text,
        figures={"checked": True, "missions": len(foreign), "episodes": episodes},
        details=tuple(map(repr, survey.missions(foreign[:_SHOWN]))),
    )


def _cut_missions(survey: Survey, instruction_len: int | None) -> Finding:
    name, longest = "missions cut by the instruction length", int(survey.mission_length.max())
    if instruction_len is None:
        text = f"not checked without --instruction-len; the longest mission has {longest} words"
        return Finding(name, (survey.name,), False, text, {"longest": longest})
    cut = survey.mission_length > instruction_len
    episodes = int(survey.mission_episodes[cut].sum())
    text = f"no mission has more than {instruction_len} words, the longest has {longest}"
    if episodes:
        text = (
            f"{_share(episodes, survey.store.episodes)} have missions of more than "
            f"{instruction_len} words, the longest has {longest}"
        )
    rows = np.flatnonzero(cut)[:_SHOWN]
    return Finding(
        name=name,
        stores=(survey.name,),
        alarm=episodes > 0,
        text=text,
        figures={"longest": longest, "episodes": episodes},
        details=tuple(map(repr, survey.missions(rows))),
    )


def _unbalanced_actions(survey: Survey) -> Finding:
    share: NDArray[np.float64] = survey.action_steps / survey.action_steps.sum()
    most = int(share.argmax())
    rare = [ACTIONS[n] for n in np.flatnonzero((share > 0) & (share < _RARE))]
    never = [ACTIONS[n] for n in np.flatnonzero(share == 0)]
    text = f"{ACTIONS[most]} is {share[most]:.1%} of the steps: always taking it is right as often"
    text += f"; under {_RARE:.0%}: {', '.join(rare)}" if rare else ""
    text += f"; never: {', '.join(never)}" if never else ""
    return Finding(
        name="balance of actions",
        stores=(survey.name,),
        alarm=bool(share[most] > _FREQUENT),
        text=text,
        figures={"shares": dict(zip(ACTIONS, share.tolist(), strict=True))},
    )


def _mission(survey: Survey, episode: int) -> str:
    return survey.missions([survey.store.episode_mission[episode]])[0]


def _share(part: int, whole: int) -> str:
    """So many of so many episodes.

    >>> _share(5, 1000)
    '5 of 1,000 episodes (0.5%)'
    """
    percent = 100 * part / whole
    return f"{part:,} of {whole:,} episodes ({percent:.3g}%)"


def rendered_page(template: str, package: str = "demotools", **values: object) -> str:
    """The HTML of a template that lies in `package` and extends `page.html`."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name, ".") for name in dict.fromkeys((package, "demotools"))]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters
    filters["size"] = size_text
    return environment.get_template(template).render(**values)
