"""The map that `maze` keeps: exact against environments and a plain search."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, BALL, EMPTY
from demotools.recording.bot import BotError, Expert
from demotools.recording.environment import make_environment, observed_cells
from trainer.learning.networks import map as maps
from trainer.learning.networks.map import MapState, Seen, explored, things

FREE, THINGS, BLOCKERS = (
    (maps._bits() & bit) != 0 for bit in (maps._FREE_BIT, maps._THING_BIT, maps._BLOCKER_BIT)
)
LEVELS = ("BossLevel", "GoToObjMaze", "UnblockPickup", "PutNextLocal")


def play(level: str, seed: int, steps: int, noise: float) -> dict[str, NDArray[Any]]:
    """An episode of the bot with random actions in between: views, directions, true places."""
    environment: Any = make_environment(level)
    observation, _ = environment.reset(seed=seed)
    expert = Expert(environment)
    random = np.random.default_rng(seed)
    views, directions, places, seen = [], [], [], []
    known = np.zeros((environment.width, environment.height), np.uint8)
    for _ in range(steps):
        views.append(observed_cells(observation["image"]).reshape(-1))
        directions.append(observation["direction"])
        places.append(tuple(environment.agent_pos))
        look(environment, views[-1], known)
        seen.append(known.copy())
        try:
            action = expert.action()
        except BotError:
            action = ACTIONS.index("forward")
        if random.random() < noise:
            action = int(random.integers(6))
        observation, _, terminated, truncated, _ = environment.step(action)
        if terminated or truncated:
            break
    return {
        "cells": np.array(views, np.uint8),
        "direction": np.array(directions, np.uint8),
        "place": np.array(places),
        "known": np.array(seen),
    }


def look(environment: Any, view: NDArray[np.uint8], known: NDArray[np.uint8]) -> None:
    """Writes what a view shows into a grid of all that was ever seen."""
    x, y = environment.agent_pos
    ahead, right = environment.dir_vec, environment.right_vec
    for column in range(7):
        for row in range(7):
            code = view[column * 7 + row]
            if code < 18 or (column, row) == (3, 6):
                continue
            where = np.array([x, y]) + ahead * (6 - row) + right * (column - 3)
            known[tuple(where)] = code
    if known[x, y] == 0:
        known[x, y] = EMPTY * 18


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_map_is_what_was_seen_where_it_is(level: str, noise: float) -> None:
    for seed in range(12):
        episode = play(level, 77_000 + seed, 150, noise)
        steps = len(episode["cells"])
        seen, _ = explored(
            episode["cells"][:, None],
            episode["direction"][:, None],
            np.arange(steps)[:, None] > 0,
            MapState.unpacked(torch.zeros(1, MapState.size())),
        )
        start = episode["place"][0]
        assert (seen.place[:, 0] - 16 == episode["place"] - start).all()
        for step in range(steps):
            known = episode["known"][step]
            here = np.zeros((32, 32), np.uint8)
            for x, y in np.argwhere(known):
                here[(y - start[1] + 16) % 32, (x - start[0] + 16) % 32] = known[x, y]
            assert (seen.cells[seen.number[step, 0]].reshape(32, 32) == here).all()
            low = np.argwhere(known).min(0) - start + 16
            assert (seen.low[seen.number[step, 0]] == low).all()


def plain_search(
    grid: NDArray[np.uint8], x: int, y: int, passable: NDArray[np.bool_]
) -> dict[tuple[int, int], int]:
    """Distances of all cells reached over passable ones."""
    distance = {(x, y): 0}
    queue = deque([(x, y)])
    while queue:
        at = queue.popleft()
        if at != (x, y) and not passable[grid[at[1], at[0]]]:
            continue
        for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            to = ((at[0] + dx) % 32, (at[1] + dy) % 32)
            if to not in distance:
                distance[to] = distance[at] + 1
                queue.append(to)
    return distance


def test_distances_and_first_moves_are_those_of_a_plain_search() -> None:
    checked = unseen = blocked = 0
    for seed in range(8):
        episode = play("BossLevel", 78_000 + seed, 120, 0.1)
        steps = len(episode["cells"])
        direction = episode["direction"][:, None]
        seen, _ = explored(
            episode["cells"][:, None],
            direction,
            np.arange(steps)[:, None] > 0,
            MapState.unpacked(torch.zeros(1, MapState.size())),
        )
        found = things(seen, direction)
        for step in range(0, steps, 5):
            grid = seen.cells[seen.number[step, 0]].reshape(32, 32)
            x, y = (int(value) & 31 for value in seen.place[step, 0])
            free = plain_search(grid, x, y, FREE)
            through = plain_search(grid, x, y, FREE | BLOCKERS)
            mine = found.step == step
            rows = found.how[:, mine].T
            codes = found.code[mine]
            at = np.flatnonzero(THINGS[grid.reshape(-1)])
            assert (codes[1:] == grid.reshape(-1)[at]).all()
            targets = [[(int(p) % 32, int(p) // 32)] for p in at]
            empty = [(p, d) for p, d in free.items() if grid[p[1], p[0]] == 0]
            if not empty:
                empty = [(p, d) for p, d in through.items() if grid[p[1], p[0]] == 0]
            least = min((d for _, d in empty), default=63)
            targets.insert(0, [p for p, d in empty if d == least])
            for row, target in zip(rows, targets, strict=True):
                best = min((free.get(p, 63) for p in target), default=63)
                is_blocked = best == 63
                passable = FREE | BLOCKERS if is_blocked else FREE
                if is_blocked:
                    best = min((through.get(p, 63) for p in target), default=63)
                blocked += is_blocked and best < 63
                assert row[maps._RANGE[best]] == 1
                assert row[: len(maps._NEAR) + 1].sum() == 1
                if best in (0, 63):
                    continue
                for move in range(4):
                    dx, dy = maps._STEP[(int(direction[step, 0]) + move) % 4]
                    beside = ((x + int(dx)) % 32, (y + int(dy)) % 32)
                    if best == 1:
                        leads = beside in target
                    elif passable[grid[beside[1], beside[0]]]:
                        rest = plain_search(grid, *beside, passable)
                        leads = any(rest.get(p) == best - 1 for p in target)
                    else:
                        leads = False
                    assert row[len(maps._NEAR) + 1 + move] == leads
                    checked += 1
                unseen += 1
    assert checked > 500
    assert unseen > 100
    assert blocked > 0


def test_a_thing_beyond_the_box_of_a_search_is_at_its_border() -> None:
    cells = np.zeros((1, maps.SIDE, maps.SIDE), np.uint8)
    cells[0, 16, 16], cells[0, 14, 13] = EMPTY * 18, BALL * 18
    seen = Seen(
        cells.reshape(1, -1),
        low=np.full((1, 2), 16, np.int16),  # what memory of another place says
        number=np.zeros((1, 1), np.int64),
        faced=np.zeros((1, 1, maps.SIDE**2), np.uint8),
        place=np.full((1, 1, 2), 16, np.int16),
        first=np.zeros((1, 1), np.uint8),
    )
    assert things(seen, np.zeros((1, 1), np.uint8)).code.tolist() == [0, BALL * 18]
