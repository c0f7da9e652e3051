"""Many levels stepped as one batch: their grids are one array, and so are their agents.

Most steps do little: the agent turns, moves to a free cell, or tries something that has no effect.
A few numpy calls do that for all levels, and compute all views. If a step could do more (something
can be picked up, dropped or toggled, or the mission may be done), minigrid's own code steps that
level, with the agent put in its place. Which steps those are follows from minigrid's
`MiniGridEnv.step` and its verifier; in doubt, minigrid's code is used.
tests/recording/test_batch.py compares every bit with stock minigrid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeGuard

import numpy as np
from minigrid.envs.babyai.core import verifier
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from numpy.typing import NDArray

from demotools.babyai.cells import (
    ACTIONS,
    AGENT_COLUMN,
    AGENT_ROW,
    BALL,
    BOX,
    DOOR,
    EMPTY,
    KEY,
    OPEN,
    SIGHT_ENDS,
    UNPACKING_TABLE,
    VIEW_SIZE,
    WALL,
)
from demotools.recording.environment import (
    FastView,
    World,
    cell_code,
    changes_what_reset_made,
    layout,
    sight_of_a_row,
)

_LEFT, _RIGHT, _FORWARD, _PICKUP, _DROP, _TOGGLE, _DONE = range(len(ACTIONS))
_UNKNOWN = len(ACTIONS)
_CLEAR = ~SIGHT_ENDS
_NOTHING = cell_code(None)


def can_be_batched(environment: object) -> TypeGuard[FastView]:
    """Whether it is a level of ours that does what minigrid's do, and nothing else."""
    return (
        isinstance(environment, FastView)
        and type(environment).__mro__[1] is FastView
        and type(environment).step is RoomGridLevel.step
        and not changes_what_reset_made(type(environment))
        and vars(environment).keys().isdisjoint(("step", "reset", "gen_obs"))
        and environment.render_mode is None
        and environment.agent_view_size == VIEW_SIZE
        and not environment.see_through_walls
        and not verifier.use_done_actions
    )


class Batch:
    """`levels` that step together, each of which `can_be_batched`; from now on only here.

    What an episode shows before its first `reset` means nothing.

    direction   int64 [n], 0 right, 1 down, 2 left, 3 up
    """

    def __init__(self, levels: Sequence[FastView]) -> None:
        self._levels: list[Any] = list(levels)
        for level in self._levels:
            level.shows = False
        count = len(levels)
        # of the largest: smaller grids have more wall around them
        self._layout = layout(
            max(level.width for level in levels), max(level.height for level in levels)
        )
        size = self._layout.width * self._layout.height
        self._view = np.stack([view.reshape(-1) for view in self._layout.view])
        self._onward = np.array([view[AGENT_COLUMN, 0] // AGENT_ROW for view in self._layout.view])
        self._cells = np.full(count * size, cell_code(None), dtype=np.uint8)
        # where the mission may be done when the agent looks at it
        self._aims = np.zeros(count * size, dtype=np.bool_)
        self._first = np.arange(count) * size  # of its cells in those of all
        self._at = self._first.copy()
        self._count, self._limit = np.zeros((2, count), dtype=np.int64)
        self._carried = np.full(count, _NOTHING, dtype=np.uint8)
        self._watched, self._moved = np.zeros((2, count), dtype=np.bool_)
        self.direction = np.zeros(count, dtype=np.int64)

    def reset(self, number: int, seed: int) -> str:
        """Begin an episode in one level; returns its mission."""
        level = self._levels[number]
        level.reset(seed=seed)
        shape = (self._layout.height, self._layout.width)
        world = World(level.grid)
        cells = self._of(self._cells, number)
        if world.layout is self._layout:
            cells[:] = world.cells
        else:
            cells[:] = cell_code(level.grid.bare.grid[0])
            smaller = world.cells.reshape(world.layout.height, world.layout.width)
            cells.reshape(shape)[: len(smaller), : smaller.shape[1]] = smaller
        self._at[number] = self._place(number, level.agent_pos)
        self.direction[number] = level.agent_dir
        self._carried[number] = cell_code(level.carrying)
        self._count[number], self._limit[number] = level.step_count, level.max_steps
        self._watched[number], self._moved[number] = not _is_known(level.instrs), False
        self._aim(number)
        return str(level.mission)

    def _of(self, values: NDArray[Any], number: int) -> NDArray[Any]:
        size = self._layout.width * self._layout.height
        return values[number * size : (number + 1) * size]

    def _place(self, number: int, position: Any) -> int:
        return int(self._first[number]) + self._layout.at(int(position[0]), int(position[1]))

    def _aim(self, number: int) -> None:
        """Mark the places that the mission's `go to` looks for."""
        aims = self._of(self._aims, number)
        aims[:] = False
        for column, row in _aims(self._levels[number].instrs):
            aims[self._layout.at(int(column), int(row))] = True

    def step(
        self, rows: NDArray[np.int64], actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Step the levels of these rows.

        rows      int64 [m], each at most once
        actions   int64 [m]
        returns   reward float32 [m], terminated and truncated bool [m]

        ValueError   an action is none of 0 to 6
        """
        tables = _tables()
        # negative ones are large without their sign
        action = np.minimum(actions.view(np.uint64), _UNKNOWN).view(np.int64)
        at, direction = self._at[rows], self.direction[rows]
        ahead = at + self._onward[direction]
        code = self._cells[ahead]
        happens = action << 8 | code
        turned = (direction + tables.turn[action]) & 3
        walked = np.where(tables.walks[happens], ahead, at)
        by_itself = (
            tables.has_effect[(self._carried[rows] != _NOTHING) * tables.half + happens]
            | self._aims[walked + self._onward[turned]]
            | self._watched[rows]
            | (self._moved[rows] & (action == _DROP))
        )
        self._count[rows] += 1
        reward = np.zeros(len(rows), dtype=np.float32)
        terminated = np.zeros(len(rows), dtype=np.bool_)
        truncated = self._count[rows] >= self._limit[rows]
        itself = np.flatnonzero(by_itself)
        for index, number, chosen, front in zip(
            itself.tolist(),
            rows[itself].tolist(),
            actions[itself].tolist(),
            ahead[itself].tolist(),
            strict=True,
        ):
            reward[index], terminated[index] = self._step_itself(number, chosen, front)
        self._at[rows], self.direction[rows] = walked, turned
        return reward, terminated, truncated

    def _step_itself(self, number: int, action: int, ahead: int) -> tuple[float, bool]:
        """One level's step by minigrid's code: reward, and whether the episode terminated.

        Agents turn and walk as `step` has found already.
        """
        level = self._levels[number]
        first = int(self._first[number])
        level.agent_pos = self._layout.place[int(self._at[number]) - first]
        level.agent_dir = int(self.direction[number])
        level.step_count = int(self._count[number]) - 1
        _, reward, terminated, _, _ = level.step(action)
        if action in (_PICKUP, _DROP, _TOGGLE):
            column, row = self._layout.place[ahead - first]
            self._cells[ahead] = cell_code(level.grid.get(column, row))
            self._carried[number] = cell_code(level.carrying)
            # minigrid looks for the mission's objects again at a drop only
            self._moved[number] = action != _DROP
            if action == _DROP:
                self._aim(number)
        return reward, terminated

    def views(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """What these levels show: packed cells uint8 [m, 7, 7], 0 out of sight."""
        tables = _tables()
        places = self._view[self.direction[rows]] + self._at[rows][:, None]
        cells: NDArray[np.uint8] = self._cells[places.reshape(-1, VIEW_SIZE, VIEW_SIZE)]
        # seven bits for each row of each view
        clear = np.packbits(_CLEAR[cells], axis=1, bitorder="little")[:, 0].T.astype(np.int64) << 7
        seen = np.full(len(rows), 1 << AGENT_COLUMN)
        for row in range(AGENT_ROW, -1, -1):
            clear[row] |= seen
            seen = tables.seen_ahead[clear[row]]
        cells *= tables.columns[tables.seen[clear]].transpose(1, 2, 0)
        # the agent sees what it carries at its own place
        cells[:, AGENT_COLUMN, AGENT_ROW] = self._carried[rows]
        return cells


class _Tables:
    """What follows from an action and the packed cell ahead, `action << 8 | cell`.

    turn         int64 [8], by action
    walks        bool [8 * 256], the agent goes on to that cell
    has_effect   bool [2 * 8 * 256], more than that may come of it: for agents that carry nothing,
                 then for those that do
    seen, seen_ahead, columns   of `sight_of_a_row`; uint8 [128, 7] of seven bits
    """

    half = (_UNKNOWN + 1) << 8

    def __init__(self) -> None:
        kind, state = UNPACKING_TABLE[:, 0], UNPACKING_TABLE[:, 2]
        self.turn = np.zeros(_UNKNOWN + 1, dtype=np.int64)
        self.turn[[_LEFT, _RIGHT]] = -1, 1
        free = (kind == EMPTY) | ((kind == DOOR) & (state == OPEN))
        walks = np.zeros((_UNKNOWN + 1, 256), dtype=np.bool_)
        walks[_FORWARD] = free
        effect = np.zeros((2, _UNKNOWN + 1, 256), dtype=np.bool_)
        things = np.isin(kind, (KEY, BALL, BOX))
        # no level of BabyAI's has other cells than these
        effect[:, _FORWARD] = ~(free | things | np.isin(kind, (WALL, DOOR)))
        effect[0, _PICKUP] = things
        effect[1, _DROP] = True
        effect[:, _TOGGLE] = np.isin(kind, (DOOR, BOX))
        effect[:, _UNKNOWN] = True
        self.walks, self.has_effect = walks.reshape(-1), effect.reshape(-1)
        self.seen, self.seen_ahead = np.array(sight_of_a_row()).T.copy()
        bits = np.arange(1 << VIEW_SIZE, dtype=np.uint8)[:, None]
        self.columns = np.unpackbits(bits, axis=1, bitorder="little")[:, :VIEW_SIZE]


_tables = cache(_Tables)


def _is_known(instruction: Any) -> bool:
    """Whether nothing comes of a step but what `Batch.step` looks for.

    Not so of strict instructions: trying may be enough to fail.
    """
    if getattr(instruction, "strict", False):
        return False
    if type(instruction) in (verifier.BeforeInstr, verifier.AfterInstr, verifier.AndInstr):
        return _is_known(instruction.instr_a) and _is_known(instruction.instr_b)
    # `open` looks at toggles of doors, `pick up` at what was picked up, `put` at drops
    known = (verifier.GoToInstr, verifier.OpenInstr, verifier.PickupInstr, verifier.PutNextInstr)
    return type(instruction) in known


def _aims(instruction: Any) -> list[Any]:
    """The places of the objects that a known instruction has the agent go to."""
    if isinstance(instruction, verifier.SeqInstr):
        return _aims(instruction.instr_a) + _aims(instruction.instr_b)
    return instruction.desc.obj_poss if isinstance(instruction, verifier.GoToInstr) else []
