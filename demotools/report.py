"""One HTML file about one or several stores: figures, pictures, findings. It needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from demotools.errors import printable_text
from demotools.findings import Finding, store_findings
from demotools.grid import (
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
from demotools.page import rendered_page
from demotools.render import animation, panel, view_picture
from demotools.store import Store, open_store
from demotools.survey import Survey, store_survey

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
