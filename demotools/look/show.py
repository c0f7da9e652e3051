"""Shows one episode: as pictures, an animation, or text to step through.

What the agent saw comes from the store. The room next to it comes from a replay of the episode's
seed, and is shown only if every step of that replay agrees with the store; otherwise the caption
says why there is no room.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.errors import LevelError, ManifestError, StoreError
from demotools.look.pictures import (
    Picture,
    animation,
    encoded_cells,
    panel,
    sheet,
    still,
    view_picture,
    wrapped,
)
from demotools.look.terminal import Scene, page_lines, room_scene, step_through, view_scene
from demotools.output import counted, progress_bar
from demotools.recording.environment import Environment, make_environment
from demotools.recording.replay import reason_against, replayed_episode
from demotools.store.episodes import Episode, EpisodeDataset
from demotools.store.reading import Store

_GIF_TILE, _PNG_TILE = 32, 14


@dataclass(frozen=True)
class Shown:
    """One episode of T steps, ready to be looked at.

    view          uint8 [T, 7, 7] packed cells, or [T, H, W, C]
    direction     uint8 [T]
    action        uint8 [T]
    environment   plays the episode again from its seed; None where that does not agree
    note          why there is no room; empty where there is one
    taken         uint8 [T], the actions played, where they may differ from `action`, the expert's
    subgoal       the bot's subgoal at each step, a text; empty where none are known
    end           how it ended, see `EpisodeDataset.ends`; empty where the store has no rewards
    """

    store: str
    episode: int
    mission: str
    seed: int
    view: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    action: NDArray[np.uint8]
    environment: Environment | None
    note: str
    taken: NDArray[np.uint8] | None = None
    subgoal: Sequence[str] = ()
    end: str = ""

    @property
    def played(self) -> NDArray[np.uint8]:
        """The actions that lead from one step to the next: uint8 [T]."""
        return self.action if self.taken is None else self.taken

    @property
    def title(self) -> str:
        """Which episode of which store this is."""
        seed = "unknown" if self.seed < 0 else str(self.seed)
        steps = counted(len(self.action), "step")
        ended = f", ended by {self.end}" if self.end else ""
        return f"{self.store}, episode {self.episode}, {steps}, seed {seed}{ended}"

    def step_text(self, step: int) -> str:
        """The number of a step, its action, what was done instead, and what for."""
        return f"step {step} (last {len(self.action) - 1})   {self.action_text(step)}"

    def action_text(self, step: int) -> str:
        """The action of a step, what was done instead, and what for."""
        advice, taken = self.action[step], self.played[step]
        words = [
            ACTIONS[advice] if advice == taken else f"{ACTIONS[advice]}, took {ACTIONS[taken]}"
        ]
        return "   ".join([*words, *self.subgoal[step : step + 1]])

    def as_json(self) -> dict[str, Any]:
        """The episode without its views, as JSON values."""
        return {
            "store": self.store,
            "episode": self.episode,
            "mission": self.mission,
            "seed": None if self.seed < 0 else self.seed,
            "steps": len(self.action),
            **({"end": self.end} if self.end else {}),
            "actions": [ACTIONS[action] for action in self.action],
            **({} if self.taken is None else {"taken": [ACTIONS[it] for it in self.taken]}),
            **({"subgoals": list(self.subgoal)} if self.subgoal else {}),
            "directions": self.direction.tolist(),
            "replay_agrees": self.environment is not None,
            "note": self.note,
        }


def chosen_episode(
    store: Store,
    *,
    episode: int | None = None,
    mission: str | None = None,
    ended: Sequence[str] | None = None,
    longest: bool = False,
    random: bool = False,
) -> int:
    """The number of the episode that a user asks for; the first one where nothing is asked.

    mission   only among the episodes whose mission contains this text
    ended     only among those that ended so, see `EpisodeDataset.ends`
    longest   the longest of them; random: any of them

    StoreError  there is no such episode
    """
    if episode is not None:
        if not 0 <= episode < store.episodes:
            raise StoreError(
                f"there is no episode {episode}",
                path=store.path,
                fix=f"choose an episode with 0 <= episode < {store.episodes}",
            )
        return episode
    candidates = np.arange(store.episodes) if mission is None else _with_mission(store, mission)
    if ended is not None:
        ends = EpisodeDataset(store, candidates).ends
        candidates = candidates[np.isin(ends, ended)]
        if not len(candidates):
            raise StoreError(
                f"none of these episodes ended in {' or '.join(ended)}",
                path=store.path,
                fix=f"choose from {', '.join(sorted(set(ends.tolist())))}",
            )
    if longest:
        return int(candidates[store.lengths[candidates].argmax()])
    return int(np.random.default_rng().choice(candidates) if random else candidates[0])


def _with_mission(store: Store, text: str) -> NDArray[np.int64]:
    folded = text.lower()
    rows = [row for row, mission in enumerate(store.mission_text) if folded in mission.lower()]
    found = np.flatnonzero(np.isin(store.episode_mission, rows))
    if not len(found):
        some = ", ".join(repr(mission) for mission in store.mission_text[:3])
        raise StoreError(
            f"no mission contains {text!r}",
            path=store.path,
            fix=f"use part of one of its {len(store.mission_text):,} missions, such as {some}",
        )
    return found


def shown_episode(store: Store, episode: int) -> Shown:
    """One episode and, where a replay of its seed agrees at every step, its environment.

    episode   0 <= episode < E
    """
    selected = store.take(np.array([episode]))
    environment, note = _replaying(store, episode)
    return Shown(
        store=store.name,
        episode=episode,
        mission=selected.mission[0],
        seed=int(selected.seed[0]),
        view=selected.view,
        direction=selected.direction,
        action=selected.action,
        environment=environment,
        note=note,
        taken=selected.optional.get("taken"),
        subgoal=[store.attributes.subgoals[code] for code in selected.optional.get("subgoal", [])],
        end=Episode(store, episode).end if "reward" in store.optional else "",
    )


def _replaying(store: Store, episode: int) -> tuple[Environment | None, str]:
    if reason := reason_against(store):
        return None, f"no room: {reason}"
    if store.episode_seed[episode] < 0:
        return None, "no room: the seed of this episode is unknown"
    try:
        environment = make_environment(store.levels[store.episode_level[episode]])
    except (LevelError, ManifestError) as error:
        return None, f"no room: {error.what}"
    if difference := replayed_episode(environment, store, episode).difference:
        return None, f"no room: replaying the seed differs from the store at {difference}"
    return environment, ""


def _played(shown: Shown) -> Iterator[Any]:
    """The environment before each action, None for each where there is none."""
    if shown.environment is None:
        yield from (None for _action in shown.action)
        return
    shown.environment.reset(seed=shown.seed)
    for action in shown.played.tolist():
        yield shown.environment
        shown.environment.step(action)


def scenes(shown: Shown) -> list[tuple[Scene, Scene | None]]:
    """The view and the room of every step, for the terminal.

    StoreError  the views are pixels
    """
    found = []
    for view, environment in zip(shown.view, _played(shown), strict=True):
        cells = encoded_cells(view)
        if cells is None:
            raise StoreError(
                "the views of this store are pixel images, which text cannot show",
                path=shown.store,
                fix="add --gif FILE or --png FILE",
            )
        room = None if environment is None else room_scene(environment)
        found.append((view_scene(cells), room))
    return found


def step_pictures(shown: Shown, tile: int, *, quiet: bool = True) -> Iterator[list[Picture]]:
    """The pictures of every step: the view and, where there is one, the room.

    tile   pixels of a cell's side in the view; rooms are drawn about as large as the view
    """
    bar = progress_bar(len(shown.action), "draw", "pictures", quiet=quiet, items=_played(shown))
    for view, environment in zip(shown.view, bar, strict=True):
        pictures = [view_picture(view, tile)]
        if environment is not None:
            side = max(environment.width, environment.height)
            room_tile = min(max(10 * tile // side, tile // 2), 7 * tile // 8)
            pictures.append(environment.get_full_render(highlight=True, tile_size=room_tile))
        yield pictures


def episode_gif(shown: Shown, *, quiet: bool = True) -> bytes:
    """An animation of the episode: a step a picture, with mission, number and action."""
    panels = []
    for step, pictures in enumerate(step_pictures(shown, _GIF_TILE, quiet=quiet)):
        width = sum(picture.shape[1] for picture in pictures)
        texts = [shown.mission, shown.step_text(step), shown.note]
        lines = [line for text in texts for line in wrapped(text, width)]
        panels.append(panel(pictures, lines))
    return animation(panels)


def episode_png(shown: Shown, *, quiet: bool = True) -> bytes:
    """All steps of the episode on one sheet."""
    panels = [
        panel(pictures, [f"{step}  {shown.action_text(step)}"], text_size=11)
        for step, pictures in enumerate(step_pictures(shown, _PNG_TILE, quiet=quiet))
    ]
    whole = sheet(panels)
    texts = [shown.mission, shown.title, shown.note]
    return still(panel([whole], [line for text in texts for line in wrapped(text, whole.shape[1])]))


def step_page(
    shown: Shown,
    scene: tuple[Scene, Scene | None],
    step: int,
    *,
    size: tuple[int, int | None],
    coloured: bool,
) -> list[str]:
    """The lines of one step: what the agent saw and did."""
    heading = [shown.mission, shown.title, shown.step_text(step)]
    heading += [shown.note] if shown.note else []
    return page_lines(heading, *scene, size=size, coloured=coloured)


def show_in_terminal(shown: Shown, *, coloured: bool) -> None:
    """Step through the episode with the arrow keys."""
    pages = scenes(shown)

    def page(step: int) -> list[str]:
        columns, lines = shutil.get_terminal_size()
        # one line is for the keys
        size = (columns, lines - 1)
        return step_page(shown, pages[step], step, size=size, coloured=coloured)

    step_through(len(pages), page)


def episode_text(shown: Shown, *, coloured: bool) -> Iterator[str]:
    """Every step of the episode, one after another."""
    size = (shutil.get_terminal_size().columns, None)
    for step, scene in enumerate(scenes(shown)):
        yield "\n".join([*step_page(shown, scene, step, size=size, coloured=coloured), ""])
