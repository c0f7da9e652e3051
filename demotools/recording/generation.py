"""Level layouts by minigrid's own rules and random draws, several times as fast.

The layout takes half the time of an episode of a small level, most of it for drawing single numbers
from numpy's generator and for scanning grids that are nearly all wall. Here the generator's words
are fetched many at a time and turned into the same numbers, and a grid starts as a copy of its bare
walls and keeps track of where it differs from them, so that searches for objects look only there.
The levels' own code still chooses rooms, doors, objects and missions.
tests/recording/test_fast.py compares every bit with stock minigrid, with the generator's state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from itertools import count
from typing import Any, TypeVar

import numpy as np
from gymnasium import Env
from minigrid.core.constants import COLOR_NAMES, DIR_TO_VEC
from minigrid.core.grid import Grid
from minigrid.core.roomgrid import Room, RoomGrid
from minigrid.core.world_object import WorldObj
from minigrid.envs.babyai.core.roomgrid_level import RejectSampling, RoomGridLevel
from minigrid.envs.babyai.core.verifier import ObjDesc
from minigrid.minigrid_env import MiniGridEnv

T = TypeVar("T")

_WORDS_AT_ONCE = 64
_HALF = 1 << 32
_MANY_TRIES = 1_000


class Draws:
    """The numbers that `integers` and `uniform` of a numpy Generator over PCG64 give, one by one.

    Its words are fetched in advance; until `give_back` the generator is further on than it seems.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        state: Any = generator.bit_generator.state
        # halves of words that are not used so far, the next one last; a word is used from its lower
        # half on, and where there is an odd number the next one is left of a word
        self._halves: list[int] = [state["uinteger"]] if state["has_uint32"] else []

    def below(self, count: int) -> int:
        """An integer from [0, count), as `integers(0, count)` gives it; count up to 2**32 - 1.

        source   numpy's `buffered_bounded_lemire_uint32`: Lemire, Fast Random Integer Generation
                 in an Interval (2019)
        """
        if count == 1:
            return 0
        product = self._half() * count
        if product % _HALF < count:
            least = (_HALF - count) % count
            while product % _HALF < least:
                product = self._half() * count
        return product >> 32

    def _half(self) -> int:
        if not self._halves:
            self._fetch()
        return self._halves.pop()

    def fraction(self) -> float:
        """A double from [0, 1), as `random()` gives it: a whole word, half a one waits."""
        if len(self._halves) < 3:
            self._fetch()
        waiting = [self._halves.pop()] if len(self._halves) % 2 else []
        word = self._halves.pop() | self._halves.pop() << 32
        self._halves += waiting
        return (word >> 11) * 2.0**-53

    def _fetch(self) -> None:
        words: Any = self.generator.bit_generator.random_raw(_WORDS_AT_ONCE)
        halves: list[int] = words.astype("<u8").view("<u4").tolist()
        self._halves = halves[::-1] + self._halves

    def give_back(self) -> None:
        """Set the generator to where it would be, had it given these numbers itself."""
        bits: Any = self.generator.bit_generator
        words, odd = divmod(len(self._halves), 2)
        self._halves = self._halves[-1:] * odd
        bits.advance(-words)
        bits.state = {**bits.state, "has_uint32": odd, "uinteger": sum(self._halves)}


class BareWalls:
    """The walls of rooms side by side, before there is a door.

    grid     of every cell, row by row: a wall or None, as a Grid of minigrid has it
    clear    a bit for each cell without a wall
    """

    def __init__(self, columns: int, rows: int, room_size: int) -> None:
        inner = room_size - 1
        grid = Grid(columns * inner + 1, rows * inner + 1)
        for row in range(rows):
            for column in range(columns):
                grid.wall_rect(column * inner, row * inner, room_size, room_size)
        self.width, self.height = grid.width, grid.height
        self.grid: list[WorldObj | None] = grid.grid
        self.clear = sum(1 << at for at, thing in enumerate(self.grid) if thing is None)


bare_walls = cache(BareWalls)


class SparseGrid(Grid):
    """A grid that knows where it differs from its bare walls.

    changed   by row * width + column: what is there instead
    """

    def __init__(self, bare: BareWalls) -> None:
        self.bare = bare
        self.width, self.height = bare.width, bare.height
        self.grid = bare.grid.copy()
        self.changed: dict[int, WorldObj | None] = {}
        self._ordered: list[tuple[int, int, WorldObj]] | None = None

    def set(self, i: int, j: int, v: WorldObj | None) -> None:
        """As minigrid's."""
        super().set(i, j, v)
        self.changed[int(j) * self.width + int(i)] = v
        self._ordered = None

    def things(self) -> list[tuple[int, int, WorldObj]]:
        """Column, row and object wherever there is one, walls left out, in the order of columns."""
        if self._ordered is None:
            placed = (
                (*divmod(at, self.width)[::-1], thing)
                for at, thing in self.changed.items()
                if thing is not None
            )
            self._ordered = sorted(placed, key=lambda one: one[:2])
        return self._ordered


class FastLayout(RoomGridLevel):
    """Put before a level of BabyAI's among the bases; the methods are minigrid's."""

    def check_objs_reachable(self, raise_exc: bool = True) -> bool:
        """As minigrid's, all cells at once: a bit each."""
        grid = self.grid
        assert isinstance(grid, SparseGrid)
        clear, width = grid.bare.clear, grid.width
        for at, thing in grid.changed.items():
            if thing is None or thing.type == "door":
                clear |= 1 << at
            else:
                clear &= ~(1 << at)
        reached, before = 1 << (int(self.agent_pos[1]) * width + int(self.agent_pos[0])), 0
        while reached != before:
            before = reached
            onward = reached & clear
            reached |= onward << 1 | onward >> 1 | onward << width | onward >> width
        for column, row, thing in grid.things():
            if not reached >> (row * width + column) & 1 and thing.type != "wall":
                if not raise_exc:
                    return False
                raise RejectSampling(f"unreachable object at {(column, row)}")
        return True


class FastRoomGrid(RoomGrid):
    """Put after a level of BabyAI's among the bases, it is between the level and RoomGrid.

    Methods are minigrid's, with the same draws in the same order.
    """

    _draws: Draws | None = None
    agent_pos: Any

    @property
    def np_random(self) -> np.random.Generator:
        """As gymnasium's."""
        if self._draws is not None:
            self._draws.give_back()
            self._draws = None
        return Env.np_random.fget(self)  # type: ignore[attr-defined,no-any-return]

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self._draws = None
        Env.np_random.fset(self, value)  # type: ignore[attr-defined]

    def _rand_int(self, low: int, high: int) -> Any:
        # some levels compare what they have drawn by `is`, which is never so of numpy's integers
        return np.int64(self._drawn(low, high))

    def _drawn(self, low: int, high: int) -> int:
        draws = self._draws
        if draws is None or draws.generator is not self._np_random:
            generator = self.np_random if draws is None else self._np_random
            assert generator is not None
            if type(generator.bit_generator) is not np.random.PCG64:
                return int(generator.integers(low, high))
            draws = self._draws = Draws(generator)
        if not 0 < high - low < _HALF:
            return int(self.np_random.integers(low, high))
        return low + draws.below(high - low)

    def _rand_float(self, low: float, high: float) -> float:
        if self._draws is None or self._draws.generator is not self._np_random:
            return super()._rand_float(low, high)
        return low + (high - low) * self._draws.fraction()

    def _rand_bool(self) -> bool:
        return self._drawn(0, 2) == 0

    def _rand_elem(self, iterable: Iterable[T]) -> T:
        values = list(iterable)
        return values[self._drawn(0, len(values))]

    def _gen_grid(self, width: int, height: int) -> None:  # noqa: ARG002
        size, inner = self.room_size, self.room_size - 1
        self.grid = SparseGrid(bare_walls(self.num_cols, self.num_rows, size))
        self.room_grid = [
            [Room((i * inner, j * inner), (size, size)) for i in range(self.num_cols)]
            for j in range(self.num_rows)
        ]
        for j, row in enumerate(self.room_grid):
            for i, room in enumerate(row):
                left, top = room.top
                # right, down, left, up
                if i < self.num_cols - 1:
                    room.neighbors[0] = row[i + 1]
                    room.door_pos[0] = (left + inner, self._drawn(top + 1, top + inner))
                if j < self.num_rows - 1:
                    room.neighbors[1] = self.room_grid[j + 1][i]
                    room.door_pos[1] = (self._drawn(left + 1, left + inner), top + inner)
                if i > 0:
                    room.neighbors[2] = row[i - 1]
                    room.door_pos[2] = row[i - 1].door_pos[0]
                if j > 0:
                    room.neighbors[3] = self.room_grid[j - 1][i]
                    room.door_pos[3] = self.room_grid[j - 1][i].door_pos[1]
        middle = (self.num_cols // 2 * inner + size // 2, self.num_rows // 2 * inner + size // 2)
        self.agent_pos, self.agent_dir = np.array(middle), 0

    def place_obj(
        self,
        obj: WorldObj | None,
        top: Any = None,
        size: Any = None,
        reject_fn: Any = None,
        max_tries: float = math.inf,
    ) -> tuple[int, int]:
        """As minigrid's."""
        grid = self.grid
        left, upper = (0, 0) if top is None else (max(top[0], 0), max(top[1], 0))
        width, height = (grid.width, grid.height) if size is None else size
        right, lower = min(left + width, grid.width), min(upper + height, grid.height)
        agent = tuple(self.agent_pos)
        tries = 0
        while True:
            if tries > max_tries:
                raise RecursionError("rejection sampling failed in place_obj")
            tries += 1
            pos = (self._drawn(left, right), self._drawn(upper, lower))
            if grid.grid[pos[1] * grid.width + pos[0]] is not None or pos == agent:
                continue
            if reject_fn and reject_fn(self, pos):
                continue
            break
        grid.set(pos[0], pos[1], obj)
        if obj is not None:
            obj.init_pos = pos
            obj.cur_pos = pos
        return pos

    def place_agent(self, i: int | None = None, j: int | None = None, rand_dir: bool = True) -> Any:  # type: ignore[override]
        """As minigrid's, which looks for ever where whoever stands in the room faces a thing.

        RecursionError   that is so; minigrid lays the level out anew then
        """
        i = self._drawn(0, self.num_cols) if i is None else i
        j = self._drawn(0, self.num_rows) if j is None else j
        room = self.room_grid[j][i]
        for tries in count(1):
            MiniGridEnv.place_agent(self, room.top, room.size, rand_dir, 1000)  # type: ignore[no-untyped-call]
            if self._is_clear(self.front_pos):
                break
            if tries == _MANY_TRIES and not self._has_place(room, rand_dir):
                raise RecursionError("whoever stands in this room faces a thing")
        return self.agent_pos

    def _is_clear(self, pos: Iterable[Any]) -> bool:
        thing = self.grid.get(*(int(one) for one in pos))
        return thing is None or thing.type == "wall"

    def _has_place(self, room: Room, any_direction: bool) -> bool:
        (left, upper), (width, height) = room.top, room.size
        ahead = DIR_TO_VEC if any_direction else DIR_TO_VEC[self.agent_dir : self.agent_dir + 1]
        return any(
            self.grid.get(column, row) is None
            and any(self._is_clear((column + right, row + down)) for right, down in ahead)
            for column in range(left + 1, left + width - 1)
            for row in range(upper + 1, upper + height - 1)
        )

    def connect_all(self, door_colors: Any = COLOR_NAMES, max_itrs: int = 5000) -> list[Any]:
        """As minigrid's, which finds out after every draw which rooms can be reached."""
        start = self.room_from_pos(*self.agent_pos)
        reach = _reached_rooms(start)
        added: list[Any] = []
        for number in range(max_itrs + 2):
            if number > max_itrs:
                raise RecursionError("connect_all failed")
            if len(reach) == self.num_rows * self.num_cols:
                break
            i, j = self._drawn(0, self.num_cols), self._drawn(0, self.num_rows)
            wall = self._drawn(0, 4)
            room = self.get_room(i, j)
            neighbor = room.neighbors[wall]
            if not room.door_pos[wall] or room.doors[wall]:
                continue
            assert neighbor is not None
            if room.locked or neighbor.locked:
                continue
            door, _ = self.add_door(i, j, wall, self._rand_elem(door_colors), False)
            added.append(door)
            if (room in reach) != (neighbor in reach):
                reach = _reached_rooms(start)
        return added


def _reached_rooms(start: Room) -> set[Room]:
    reach: set[Room] = set()
    stack: list[Any] = [start]
    while stack:
        room = stack.pop()
        if room not in reach:
            reach.add(room)
            stack.extend(room.neighbors[side] for side in range(4) if room.doors[side])
    return reach


_stock_find: Any = ObjDesc.find_matching_objs


def _find_matching_objs(description: Any, env: Any, use_location: bool = True) -> Any:
    """Minigrid's `ObjDesc.find_matching_objs`; in levels of ours it looks at things, not at cells.

    returns   the objects, and where they are
    """
    level = env.unwrapped
    grid = getattr(level, "grid", None)
    kind, colour, side = description.type, description.color, description.loc
    # a description of walls is left to minigrid
    if not (
        use_location and isinstance(grid, SparseGrid) and (kind or colour not in (None, "grey"))
    ):
        return _stock_find(description, env, use_location)
    room = level.room_from_pos(*level.agent_pos)
    description.obj_set, description.obj_poss = [], []
    for column, row, thing in grid.things():
        if (kind is None or thing.type == kind) and (colour is None or thing.color == colour):
            if side is not None and not (
                room.pos_inside(column, row) and _is_on_side(level, column, row, side)
            ):
                continue
            description.obj_set.append(thing)
            description.obj_poss.append((column, row))
    return description.obj_set, description.obj_poss


def _is_on_side(level: Any, column: int, row: int, side: str) -> bool:
    """Whether a place is to that side of the agent."""
    ahead, down = map(int, DIR_TO_VEC[level.agent_dir])
    across = column - int(level.agent_pos[0])
    along = row - int(level.agent_pos[1])
    if side in ("front", "behind"):
        distance = across * ahead + along * down
        return distance > 0 if side == "front" else distance < 0
    distance = along * ahead - across * down
    return distance > 0 if side == "right" else distance < 0


def use_fast_descriptions() -> None:
    """Have minigrid's descriptions look for objects as above, in the levels of this module only.

    In all of the process: levels make their descriptions by minigrid's name, so a subclass would
    have to take its place in every module of theirs; and to put minigrid's own back after every
    reset would be wrong where threads reset levels at once. Other levels go on to minigrid's own.
    """
    vars_of: Any = ObjDesc
    vars_of.find_matching_objs = _find_matching_objs
