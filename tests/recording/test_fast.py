"""The fast views and the fast bot against stock minigrid: every bit."""

import logging
from typing import Any

import gymnasium
import numpy as np
import pytest
from minigrid.core.world_object import Wall, WorldObj
from minigrid.envs.babyai.core.verifier import ObjDesc
from minigrid.utils.baby_ai_bot import BabyAIBot

from demotools.babyai.levels import level_names, read_manifest
from demotools.recording import environment as environment_module
from demotools.recording import environment as fastview
from demotools.recording.bot import Expert, record_episode
from demotools.recording.environment import (
    Environment,
    FastView,
    World,
    _find_again,
    cell_code,
    make_environment,
    with_fast_views,
)
from demotools.recording.fast_bot import FastBot

LEVELS = [level for level in level_names() if read_manifest(level).environment_id]
assert len(LEVELS) == 18
OTHERS = sorted(
    identifier
    for identifier in gymnasium.registry
    if identifier.startswith("BabyAI-")
    and identifier not in {read_manifest(level).environment_id for level in LEVELS}
)


def twins(identifier: str) -> tuple[Environment, Environment]:
    """The same environment with fast views and as it is, by id: other levels have no manifest."""
    make_environment("GoToLocal")  # which silences minigrid
    stock: Any = gymnasium.make(identifier, disable_env_checker=True).unwrapped
    level: Any = type(stock)
    fast: Any = with_fast_views(level)(**(stock.spec.kwargs or {}))
    assert not isinstance(stock, FastView)
    return fast, stock


def level_twins(level: str) -> tuple[Environment, Environment]:
    fast, stock = make_environment(level), make_environment(level, stock=True)
    assert isinstance(fast, FastView)
    assert not isinstance(stock, FastView)
    return fast, stock


def assert_same_observation(fast: dict[str, Any], stock: dict[str, Any]) -> None:
    assert fast.keys() == stock.keys()
    assert np.array_equal(fast["image"], stock["image"])
    assert fast["image"].dtype == stock["image"].dtype
    assert fast["direction"] == stock["direction"]
    assert fast["mission"] == stock["mission"]


def assert_same_random_steps(pair: tuple[Environment, Environment], steps: int) -> None:
    fast, stock = pair
    actions = np.random.default_rng(7).integers(0, 7, steps).tolist()
    over, seed = True, 0
    for action in actions:
        if over:
            seed += 1
            ours, theirs = fast.reset(seed=seed), stock.reset(seed=seed)
            assert_same_observation(ours[0], theirs[0])
        mine, other = fast.step(action), stock.step(action)
        assert_same_observation(mine[0], other[0])
        assert mine[1:] == other[1:]
        over = mine[2] or mine[3]


def assert_same_episodes(pair: tuple[Environment, Environment], seeds: range) -> None:
    fast, stock = pair
    for seed in seeds:
        mine, other = record_episode(fast, seed), record_episode(stock, seed)
        assert vars(mine).keys() == vars(other).keys()
        for name, value in vars(mine).items():
            assert np.array_equal(value, vars(other)[name]), (seed, name)


@pytest.mark.parametrize("level", LEVELS)
def test_random_steps_are_those_of_stock(level: str) -> None:
    assert_same_random_steps(level_twins(level), 800)


@pytest.mark.parametrize("level", LEVELS)
def test_episodes_of_the_bot_are_those_of_stock(level: str) -> None:
    assert_same_episodes(level_twins(level), range(100, 102))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_200_000_random_steps_are_those_of_stock(level: str) -> None:
    assert_same_random_steps(level_twins(level), 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_200_episodes_of_the_bot_are_those_of_stock(level: str) -> None:
    # benchmarks/bench_recording.py --identity does 2,000
    assert_same_episodes(level_twins(level), range(200))


@pytest.mark.slow
@pytest.mark.parametrize("identifier", OTHERS)
def test_levels_beyond_the_papers_are_those_of_stock(identifier: str) -> None:
    assert_same_random_steps(twins(identifier), 5_000)
    assert_same_episodes(twins(identifier), range(10))


def test_the_agent_at_every_place_and_direction_sees_what_stock_shows() -> None:
    pair: Any = level_twins("BossLevel")
    random = np.random.default_rng(0)
    for seed in range(3):
        for level in pair:
            level.reset(seed=seed)
        for _ in range(150):
            column, row = (int(number) for number in random.integers(1, 21, 2))
            if isinstance(pair[1].grid.get(column, row), Wall):
                continue
            for level in pair:
                level.agent_pos, level.agent_dir = (column, row), int(random.integers(0, 4))
            pair[1].agent_dir = pair[0].agent_dir
            assert_same_observation(pair[0].gen_obs(), pair[1].gen_obs())


def test_the_bot_advises_a_wandering_agent_as_stock_does() -> None:
    for level in ("GoToSeq", "UnblockPickup", "PutNextLocal"):
        fast, stock = level_twins(level)
        random = np.random.default_rng(3)
        fast.reset(seed=5)
        stock.reset(seed=5)
        ours, theirs = Expert(fast), Expert(stock)
        taken = None
        for _ in range(60):
            advice = ours.action(taken)
            assert advice == theirs.action(taken)
            taken = int(random.integers(0, 3)) if random.random() < 0.3 else advice
            mine, other = fast.step(taken), stock.step(taken)
            assert mine[1:] == other[1:]
            if mine[2] or mine[3]:
                break


def assert_same_answers(bot: Any, level: Any, random: np.random.Generator) -> None:
    places = {(int(column), int(row)) for column, row in random.integers(1, 12, (9, 2))}
    if random.integers(2):
        places = {(int(column), int(row)) for column, row in np.argwhere(~bot.vis_mask)}
    targets = sum(bot.cell(place) for place in places)
    for through in (False, True):
        path, end, blocked = BabyAIBot._shortest_path(  # type: ignore[no-untyped-call]
            bot, lambda position, _cell: position in places, try_with_blockers=through
        )
        route = bot.route(targets, through_blockers=through)
        found = route and (route.length, route.step, route.end, route.blocked)
        assert found == (None if end is None else (len(path), (path or [None])[0], end, blocked))
    place = min(places)
    stock: Any = BabyAIBot
    assert bot._find_drop_pos(place) == stock._find_drop_pos(bot, place)
    assert bot._find_drop_pos() == stock._find_drop_pos(bot)
    things = [thing for thing in level.grid.grid if thing is not None and thing.type != "wall"]
    description: Any = ObjDesc("ball")  # type: ignore[no-untyped-call]
    for _ in range(4):
        description.obj_set = [things[at] for at in random.integers(len(things), size=2)]
        description.obj_poss = [tuple(map(int, thing.cur_pos)) for thing in description.obj_set]
        results: list[Any] = []
        for find in (bot._find_obj_pos, stock._find_obj_pos.__get__(bot)):
            try:
                results.append(find(description, place[0] % 2 == 0))
            except AssertionError:
                results.append("not to be reached")
        assert results[0] == results[1]


def test_searches_answer_as_those_of_stock_wherever_the_agent_is_and_whatever_it_has_seen() -> None:
    level: Any = twins("BabyAI-GoToObjMazeS5-v0")[0]
    random = np.random.default_rng(1)
    for seed in range(15):
        level.reset(seed=seed)
        for _ in range(seed * 2):
            level.place_obj(WorldObj.decode(6, 0, 0))
        bot: Any = FastBot(level)
        for step in range(20):
            if step % 3:
                level.place_agent()
            for thing in level.grid.grid:
                if thing is not None and thing.type == "door" and step % 2:
                    thing.is_open = bool(random.integers(2))
            level.carrying = WorldObj.decode(6, 0, 0) if random.integers(2) else None
            level.world = None
            bot.vis_mask[:] = random.random(bot.vis_mask.shape) < 0.95
            bot._process_obs()
            assert_same_answers(bot, level, random)


def test_the_fast_bot_serves_fast_levels_only() -> None:
    fast, stock = level_twins("GoToLocal")
    fast.reset(seed=0)
    stock.reset(seed=0)
    assert type(Expert(fast)._bot) is FastBot
    assert type(Expert(stock)._bot) is BabyAIBot


def test_an_unproven_minigrid_falls_back_to_stock_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fastview, "PROVEN_VERSIONS", ("2.9.9",))
    environment_module._specification.cache_clear()
    with caplog.at_level(logging.WARNING):
        environment = make_environment("GoToLocal")
    environment_module._specification.cache_clear()
    assert not isinstance(environment, FastView)
    assert "minigrid's own views" in caplog.text
    assert "BabyAI-GoToLocal-v0" in caplog.text


def test_objects_that_were_moved_are_found_in_the_order_of_stock() -> None:
    level: Any = make_environment("BossLevel")
    random = np.random.default_rng(0)
    for seed in range(5):
        level.reset(seed=seed)
        description = ObjDesc("ball")  # type: ignore[no-untyped-call]
        description.find_matching_objs(level)  # type: ignore[no-untyped-call]
        assert len(description.obj_set) > 1
        for thing in random.permutation(description.obj_set)[:-1]:
            level.grid.set(*thing.cur_pos, None)
            level.place_obj(thing)
        lost = description.obj_set[0]
        level.grid.set(*lost.cur_pos, None)
        lost.cur_pos = np.array([-1, -1])  # as minigrid marks what is carried
        _find_again(description, level)
        found = list(description.obj_poss)
        description.find_matching_objs(level, use_location=False)  # type: ignore[no-untyped-call]
        assert found == description.obj_poss
        assert len(found) == len(description.obj_set) - 1


def test_a_world_that_is_updated_equals_one_that_is_made_anew() -> None:
    stock: Any = make_environment("Unlock", stock=True)
    stock.reset(seed=0)
    world, grid = World(stock.grid), stock.grid
    doors = [at for at, thing in enumerate(grid.grid) if thing and thing.type == "door"]
    assert doors
    for at in doors:
        grid.grid[at].is_open = not grid.grid[at].is_open
        world.update(world.layout.at(at % grid.width, at // grid.width), cell_code(grid.grid[at]))
    anew = World(grid)
    assert np.array_equal(world.cells, anew.cells)
    assert (world._rows, world._columns) == (anew._rows, anew._columns)
