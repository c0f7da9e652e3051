"""What a look at one or several stores finds: things that make figures look better than they are.

Nothing here says that a store is damaged; that is `demotools verify`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from demotools.digest import mission_pieces
from demotools.environment import EVALUATION_SEED
from demotools.errors import ManifestError
from demotools.grid import ACTIONS
from demotools.manifest import read_manifest
from demotools.survey import Survey

_SHOWN = 5
# An action this frequent is right so often that it can be learnt instead of the task.
_FREQUENT = 0.8
_RARE = 0.01


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
        parts.append(f"{evaluation:,} seeds are of those that evaluation keeps to itself")
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
        text = f"not asked (--instruction-len); the longest mission has {longest} words"
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
    text = f"{ACTIONS[most]} is {share[most]:.1%} of the steps: always saying so is right as often"
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
