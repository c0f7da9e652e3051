"""Environments transformed as augmented episodes are, made of minigrid's own things.

The proof of a symmetry needs them: whatever minigrid works out for an episode (the mission's text,
the checks of the instructions, the first view, what is carried) it works out after the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from minigrid.core.world_object import Ball, Box, Key
from minigrid.envs.babyai.core.verifier import AfterInstr, BeforeInstr
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, COLOURS, TYPES
from demotools.recording.bot import Episode, Failure, can_play, record_episode
from demotools.recording.environment import Environment, make_environment, observed_cells

_COLOURED = ("door", "key", "ball", "box")
_CLASSES = dict(zip(TYPES, (Key, Ball, Box), strict=True))


def transformed_environment(
    level: str,
    permutation: NDArray[np.int64],
    types: NDArray[np.int64],
    *,
    mirrored: bool,
    rephrased: bool = False,
) -> Environment:
    """An environment whose episodes are those of the level, changed by these symmetries.

    permutation  int64 [6], the new colour of each
    types        int64 [3], the new type of each of TYPES
    """
    # minigrid's own views: what our fast ones owe to them is another proof
    environment = make_environment(level, stock=True)
    babyai: Any = environment.unwrapped
    generate = babyai.gen_mission

    def gen_mission() -> None:
        generate()
        recolour(babyai, permutation)
        if (types != np.arange(len(TYPES))).any():
            retype(babyai, types)
        if mirrored:
            mirror(babyai)
        if rephrased:
            babyai.instrs = rephrase(babyai.instrs)

    babyai.gen_mission = gen_mission
    return environment


def recolour(babyai: Any, permutation: NDArray[np.int64]) -> None:
    """Give doors, keys, balls, boxes, what these hold, and the instructions their new colours."""
    things = {id(thing): thing for cell in babyai.grid.grid for thing in _nested(cell)}
    described = {id(each): each for each in descriptions(babyai.instrs)}
    for thing in [*things.values(), *described.values()]:
        if thing.color is not None:
            thing.color = COLOURS[permutation[COLOURS.index(thing.color)]]


def retype(babyai: Any, types: NDArray[np.int64]) -> None:
    """Put a thing of its new type in the place of every key, ball and box; in the instructions too.

    AssertionError  a box holds something: what holds nothing cannot stand in for it
    """
    names = {old: TYPES[types[number]] for number, old in enumerate(TYPES)}
    for place, thing in enumerate(babyai.grid.grid):
        if thing is not None and thing.type in names:
            assert getattr(thing, "contains", None) is None
            new: Any = _CLASSES[names[thing.type]](thing.color)
            new.init_pos, new.cur_pos = thing.init_pos, thing.cur_pos
            babyai.grid.grid[place] = new
            if thing is getattr(babyai, "obj_a", None):
                babyai.obj_a = new  # what PutNext...Carrying hands over when the grid is done
    for each in {id(each): each for each in descriptions(babyai.instrs)}.values():
        each.type = names.get(each.type, each.type)


def mirror(babyai: Any) -> None:
    """Exchange left and right: in the grid, for the agent, and in what the instructions say."""
    grid, width = babyai.grid, babyai.grid.width
    cells = [[grid.get(column, row) for row in range(grid.height)] for column in range(width)]
    for column, things in enumerate(reversed(cells)):
        for row, thing in enumerate(things):
            grid.set(column, row, thing)
            if thing is not None and thing.type in _COLOURED:
                thing.cur_pos = thing.init_pos = (column, row)
    column, row = babyai.agent_pos
    babyai.agent_pos = (width - 1 - column, row)
    babyai.agent_dir = [2, 1, 0, 3][babyai.agent_dir]
    for each in {id(each): each for each in descriptions(babyai.instrs)}.values():
        each.loc = {"left": "right", "right": "left"}.get(each.loc, each.loc)


def rephrase(instruction: Any) -> Any:
    """The same instruction in other words: "a, then b" is "b after you a"."""
    for kind, other in ((BeforeInstr, AfterInstr), (AfterInstr, BeforeInstr)):
        if isinstance(instruction, kind):
            return other(instruction.instr_b, instruction.instr_a, strict=instruction.strict)
    return instruction


def descriptions(instruction: Any) -> Iterator[Any]:
    """The descriptions of things in an instruction, however deep, in the order of the text."""
    for name in ("desc", "desc_move", "desc_fixed"):
        if hasattr(instruction, name):
            yield getattr(instruction, name)
    for name in ("instr_a", "instr_b"):
        if hasattr(instruction, name):
            yield from descriptions(getattr(instruction, name))


def solved_episodes(level: str, first_seed: int = 0) -> Iterator[Episode]:
    """Solved episodes without end: the bot's, or lucky random ones where the bot solves none."""
    environment = make_environment(level)
    by_bot = can_play(environment) and any(
        isinstance(record_episode(environment, seed), Episode) for seed in range(10)
    )
    play = record_episode if by_bot else random_episode
    for seed in count(first_seed):
        episode = play(environment, seed)
        if isinstance(episode, Episode):
            yield episode


def random_episode(environment: Environment, seed: int) -> Episode | Failure:
    """An episode of random actions, if it is solved."""
    random = np.random.default_rng(seed)
    observation, _ = environment.reset(seed=seed)
    mission, seen, actions = str(observation["mission"]), [], []
    reward, over = 0.0, False
    while not over:
        seen.append((observation["image"], observation["direction"]))
        actions.append(int(random.integers(len(ACTIONS) - 1)))
        observation, last, terminated, truncated, _ = environment.step(actions[-1])
        reward, over = float(last), terminated or truncated
    if reward <= 0:
        return Failure(seed, "no luck")
    return Episode(
        mission=mission,
        seed=seed,
        cells=observed_cells(np.stack([image for image, _ in seen])),
        direction=np.array([direction for _, direction in seen], dtype=np.uint8),
        action=np.array(actions, dtype=np.uint8),
    )


def _nested(thing: Any) -> Iterator[Any]:
    """A coloured thing, and what it holds."""
    while thing is not None and thing.type in _COLOURED:
        yield thing
        thing = getattr(thing, "contains", None)


class FirstSteps(NamedTuple):
    """What some first steps have of each kind of thing.

    A kind is what a thing is and whether it is locked, what the instructions ask for first or later
    and whether by its colour, or the agent; an agent that looks to a side looks `<` or `>`. Finer
    kinds would be too rare to be seen on all sides.

    colours   kind and colour
    sides     kind and `<` left or `>` right
    types     kind without its type, and its type, of keys, balls and boxes
    orders    the ways in which two tasks are put in order
    """

    colours: set[tuple[str, str]]
    sides: set[tuple[str, str]]
    types: set[tuple[str, str]]
    orders: set[type]


def first_steps(environment: Environment, seeds: range) -> FirstSteps:
    """What the first steps of these seeds have."""
    found = FirstSteps(set(), set(), set(), set())
    babyai: Any = environment.unwrapped
    for seed in seeds:
        environment.reset(seed=seed)
        centre = (babyai.grid.width - 1) / 2
        if isinstance(babyai.instrs, BeforeInstr | AfterInstr):
            found.orders.add(type(babyai.instrs))
        for place, cell in enumerate(babyai.grid.grid):
            for thing in _nested(cell):
                kind = f"{thing.type} {getattr(thing, 'is_locked', '')}"
                found.colours.add((kind, thing.color))
                found.sides.add((kind, _side(place % babyai.grid.width - centre)))
                found.types.add(("thing", thing.type))
        for number, each in enumerate(descriptions(babyai.instrs)):
            order = "later" if number else "first"
            found.types.add((order, each.type))
            if not number:
                order += f" {each.type}"
            kind = f"{order} by colour: {each.color is not None}"
            if each.color is not None:
                found.colours.add((kind, each.color))
            found.sides.update((kind, _side(column - centre)) for column, _ in each.obj_poss)
            found.sides.add(("told", {"left": "<", "right": ">"}.get(each.loc, "|")))
        facing = (">", "down", "<", "up")[babyai.agent_dir]
        found.sides.add(("agent", f"{_side(babyai.agent_pos[0] - centre)} facing {facing}"))
    return found._replace(
        sides={(kind, side) for kind, side in found.sides if not side.startswith("|")},
        types={(kind, thing) for kind, thing in found.types if thing in TYPES},
    )


def _side(distance: float) -> str:
    """Of the room's centre; few things stand just there."""
    return "|" if not distance else "<" if distance < 0 else ">"
