"""Levels that are laid out sooner against stock minigrid's: every draw, every object."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minigrid.core.world_object import Ball
from minigrid.envs.babyai.core.verifier import ObjDesc

from demotools.recording.environment import make_environment
from demotools.recording.generation import Draws, SparseGrid
from tests.recording.test_fast import LEVELS, level_twins, twins

ALL = sorted(name for name in gymnasium.registry if name.startswith("BabyAI-"))


def state(generator: np.random.Generator) -> tuple[str, int, int]:
    shown: Any = generator.bit_generator.state
    half = shown.get("has_uint32", 0)
    return str(shown["state"]), half, half and shown["uinteger"]


@given(st.integers(0, 2**63), st.integers(0, 200), st.booleans())
def test_draws_are_those_of_numpy_and_leave_its_generator_where_it_would_be(
    seed: int, length: int, begun: bool
) -> None:
    ours, numpys, choice = (np.random.default_rng(seed) for _ in range(3))
    if begun:  # half a word is left
        assert ours.integers(7) == numpys.integers(7)
    draws = Draws(ours)
    for number in range(length):
        # small ones, and those of which many words are refused
        count = [0, 1, 6, 20, 3 << 30, int(choice.integers(1, 1 << 32))][choice.integers(6)]
        if count == 0:
            assert draws.fraction() == numpys.uniform(0, 1)
        else:
            assert draws.below(count) == numpys.integers(0, count)
        if number % 40 == 39:
            draws.give_back()
            assert state(ours) == state(numpys)
    draws.give_back()
    assert state(ours) == state(numpys)


def everything(level: Any) -> dict[str, Any]:
    """All that an episode of a level begins with, walls and doors included."""
    found: list[Any] = []
    instructions = [level.instrs]
    while instructions:
        one = instructions.pop()
        for name in ("desc", "desc_move", "desc_fixed"):
            if (description := getattr(one, name, None)) is not None:
                found.append(
                    [
                        (thing.type, thing.color, thing.cur_pos and tuple(thing.cur_pos))
                        for thing in description.obj_set
                    ]
                )
                found.append(list(description.obj_poss))
        instructions += [
            getattr(one, name) for name in ("instr_a", "instr_b") if hasattr(one, name)
        ]
    return {
        "grid": level.grid.encode().tolist(),
        "agent": (tuple(level.agent_pos), level.agent_dir, level.carrying and level.carrying.type),
        "mission": level.mission,
        "limit": level.max_steps,
        "rooms": [
            (room.locked, [thing.type for thing in room.objs], [bool(door) for door in room.doors])
            for row in level.room_grid
            for room in row
        ],
        "described": found,
        "generator": state(level.np_random),
    }


def assert_same_layouts(pair: Any, seeds: range) -> None:
    fast, stock = pair
    for seed in seeds:
        # without a seed the generator goes on
        for asked in (seed, None):
            fast.reset(seed=asked)
            if stock.spec is not None and (stock.spec.id, seed, asked) in FOR_EVER:
                break
            stock.reset(seed=asked)
            assert everything(fast) == everything(stock), seed


FOR_EVER = {("BabyAI-SynthS5R2-v0", 3, None), ("BabyAI-SynthS5R2-v0", 461, None)}
"""Layouts that stock minigrid would never come to the end of."""


@pytest.mark.parametrize("level", LEVELS)
def test_layouts_are_those_of_stock(level: str) -> None:
    assert_same_layouts(level_twins(level), range(4))


@pytest.mark.slow
@pytest.mark.parametrize("identifier", ALL)
def test_500_layouts_of_every_level_are_those_of_stock(identifier: str) -> None:
    assert_same_layouts(twins(identifier), range(500))


@pytest.mark.parametrize("seed", [1741, 2678])
def test_a_layout_that_stock_would_look_for_for_ever_is_made_anew(seed: int) -> None:
    """The room drawn for the agent has no place from which it would not face a thing."""
    fast: Any
    again: Any
    fast, again = (twins("BabyAI-SynthS5R2-v0")[0] for _ in range(2))
    fast.reset(seed=seed)
    assert fast.grid.get(*fast.front_pos) is None or fast.grid.get(*fast.front_pos).type == "wall"
    again.reset(seed=seed)
    assert everything(fast) == everything(again)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(0, 9), st.booleans())
def test_the_agent_is_placed_where_there_is_a_place(seed: int, left: int, turns: bool) -> None:
    """A room full of things, but for a cell or none."""
    level: Any = twins("BabyAI-SynthS5R2-v0")[0]
    level.reset(seed=1)
    room, kept = level.room_grid[0][0], level.agent_dir
    ball = Ball("red")  # type: ignore[no-untyped-call]
    inner = [(room.top[0] + 1 + at % 3, room.top[1] + 1 + at // 3) for at in range(9)]
    for at, pos in enumerate(inner):
        level.grid.set(*pos, None if at == left else ball)
    level.np_random = np.random.default_rng(seed)
    clear = [
        turn
        for turn, (right, down) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1)))
        if left < 9
        and (turns or turn == kept)
        and getattr(level.grid.get(inner[left][0] + right, inner[left][1] + down), "type", "wall")
        == "wall"
    ]
    if clear:
        level.place_agent(0, 0, rand_dir=turns)
        assert (tuple(level.agent_pos), level.agent_dir in clear) == (inner[left], True)
    else:
        with pytest.raises(RecursionError):
            level.place_agent(0, 0, rand_dir=turns)


kinds = st.sampled_from([None, "box", "ball", "key", "door"])
colours = st.sampled_from([None, "red", "green", "blue", "purple", "yellow", "grey"])
sides = st.sampled_from([None, "left", "right", "front", "behind"])


@settings(max_examples=30)
@given(st.integers(0, 50), kinds, colours, sides, st.integers(0, 3))
def test_what_is_described_is_what_stock_finds(
    seed: int, kind: str | None, colour: str | None, side: str | None, direction: int
) -> None:
    fast, stock = PAIR
    result = []
    for level in (fast, stock):
        level.reset(seed=seed)
        level.agent_dir = direction
        description: Any = ObjDesc(kind, colour, side)  # type: ignore[no-untyped-call]
        things, places = description.find_matching_objs(level)
        result.append(([(thing.type, thing.color) for thing in things], places))
    assert result[0] == result[1]


PAIR: Any = level_twins("BossLevel")


def test_a_thing_that_cannot_be_reached_is_refused_as_by_stock() -> None:
    for level in level_twins("GoToLocal"):
        environment: Any = level
        environment.reset(seed=0)
        assert environment.check_objs_reachable(raise_exc=False)
        # in the corner, behind two others
        for place in ((1, 1), (2, 1), (1, 2)):
            environment.grid.set(*place, Ball())  # type: ignore[no-untyped-call]
        environment.agent_pos = (5, 5)
        assert not environment.check_objs_reachable(raise_exc=False)


def test_a_generator_of_ones_own_is_drawn_from() -> None:
    fast, stock = level_twins("GoToLocal")
    for own in (np.random.PCG64(3), np.random.MT19937(3)):
        shown = []
        for level in (fast, stock):
            level.reset(seed=0)
            level.np_random = np.random.Generator(type(own)(3))
            level.reset()
            shown.append(everything(level))
            assert level.np_random_seed == -1
        assert shown[0] == shown[1]


def test_an_episode_leaves_the_bare_walls_as_they_were() -> None:
    level: Any = make_environment("BossLevel")
    level.reset(seed=1)
    assert isinstance(level.grid, SparseGrid)
    bare = level.grid.bare
    assert {thing.type for thing in bare.grid if thing is not None} == {"wall"}
    assert level.grid.changed
    assert all(level.grid.grid[at] is thing for at, thing in level.grid.changed.items())
