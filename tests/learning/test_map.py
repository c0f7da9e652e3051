"""The map that `maze` keeps: exact against environments and a plain search."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, BALL, EMPTY
from demotools.recording.bot import BotError, Expert
from demotools.recording.environment import make_environment, observed_cells
from trainer.learning.networks import map as maps
from trainer.learning.networks.map import MapState, Seen, explored, routes, things

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


def test_the_things_of_a_few_steps_are_those_of_a_batch() -> None:
    played = (play("BossLevel", 78_000 + seed, 40, 0.1) for seed in range(6))
    episodes = [episode for episode in played if len(episode["cells"]) == 40][:3]
    cells, direction = (
        np.stack([episode[name] for episode in episodes], axis=1) for name in ("cells", "direction")
    )
    begins = np.repeat(np.arange(40)[:, None] == 0, 3, axis=1)
    state = MapState.unpacked(torch.zeros(3, MapState.size()))
    seen, _ = explored(cells, direction, ~begins, state)
    whole = things(seen, direction)
    through = 0.0
    for time in range(0, 40, 3):
        some = slice(time, time + 3)
        part = {name: getattr(seen, name)[some] for name in ("number", "faced", "place", "first")}
        few = things(seen._replace(**part), direction[some])
        same = (whole.step >= 3 * time) & (whole.step < 3 * (time + 3))
        np.testing.assert_array_equal(few.code, whole.code[same])
        np.testing.assert_array_equal(few.how, whole.how[:, same])
        through += few.how[len(maps._NEAR) + 9].sum()
    assert through > 0


def plain_routes(free: NDArray[np.bool_], x: int, y: int) -> NDArray[np.uint8]:
    """Distance and first moves of one map, [2, 24, 24]: cell after cell, up to a distance of 62."""
    result = np.zeros((2, 24, 24), np.uint8)
    moves = {(x, y): 0}
    for distance in range(1, 63):
        reached: dict[tuple[int, int], int] = {}
        for at, first in moves.items():
            for move, (dx, dy) in enumerate(maps._STEP.tolist()):
                to = at[0] + dx, at[1] + dy
                if min(to) < 0 or max(to) > 23 or to == (x, y) or result[0, to[1], to[0]]:
                    continue
                reached[to] = reached.get(to, 0) | (first or 1 << move)
        for to, first in reached.items():
            result[:, to[1], to[0]] = distance, first
        moves = {to: first for to, first in reached.items() if free[to[1], to[0]]}
    return result


def in_words(cells: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """As a search takes cells, of bool [N, 24, 24]."""
    rows = (cells.astype(np.uint32) << np.arange(24, dtype=np.uint32)).sum(2, dtype=np.uint32)
    return maps.by_map(rows.T)


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3, 64, 70]),
    st.integers(1, 24),
    st.sampled_from([0.4, 0.7, 0.95, 1.0]),
    st.booleans(),
)
def test_the_routes_on_all_maps_at_once_are_those_of_a_plain_search_on_each(
    seed: int, count: int, side: int, share: float, winding: bool
) -> None:
    random = np.random.default_rng(seed)
    free, unseen = np.zeros((2, count, 24, 24), bool)
    sides = random.integers(1, side + 1, (count, 2))
    for number, (height, width) in enumerate(sides.tolist()):
        free[number, :height, :width] = random.random((height, width)) < share
        if winding:  # longer than any distance that is told
            free[number, 1:height:4, : width - 1] = free[number, 3:height:4, 1:width] = False
    unseen[:] = random.random((count, 24, 24)) < 0.02
    x, y = random.integers(0, side, (2, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "_CHUNK", 1)
        ways = routes(in_words(free), in_words(unseen), x, y)
    number, row, column = (axis.reshape(-1) for axis in np.indices((count, 24, 24)))
    found = np.stack(ways.to(number, column, row)).reshape(2, count, 24, 24)
    for number in range(count):
        distance, first = plain_routes(free[number], x[number], y[number])
        np.testing.assert_array_equal(found[:, number], [distance, first])
        to = unseen[number] & (distance > 0)
        least = distance[to].min(initial=63)
        assert ways.distance[number] == least
        nearest = np.bitwise_or.reduce(first[to & (distance == least)])
        assert ways.first[number] == nearest
        assert ways.reach(in_words(unseen))[number] == to.any()


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
