from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from demotools.babyai.cells import (
    CELL_CODES,
    OBJECTS,
    Encoding,
    fits_cells,
    packed_cells,
    recoded_cells,
    recoding_table,
    shows_agent,
    unpacked_cells,
    visible,
)
from demotools.babyai.levels import level_names, read_manifest
from demotools.recording.environment import make_environment


def test_every_cell_round_trips() -> None:
    cells = np.stack(np.meshgrid(range(11), range(6), range(3), indexing="ij"), -1)
    images = cells.reshape(-1, 3).astype(np.uint8)
    codes = packed_cells(images)
    assert sorted(codes.tolist()) == list(range(CELL_CODES))
    np.testing.assert_array_equal(unpacked_cells(codes), images)


def test_the_objects_are_those_of_minigrid() -> None:
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

    from demotools.babyai.cells import COLOURS, STATES

    assert [OBJECT_TO_IDX[name] for name in OBJECTS] == list(range(11))
    assert [COLOR_TO_IDX[name] for name in COLOURS] == list(range(6))
    assert [STATE_TO_IDX[name] for name in STATES] == list(range(3))


@pytest.mark.parametrize(
    ("encoding", "old", "new"),
    [
        (Encoding.FIRST, (3, 2, 0), (4, 2, 1)),
        (Encoding.FIRST, (3, 2, 1), (4, 2, 0)),
        (Encoding.FIRST, (4, 2, 0), (4, 2, 2)),
        (Encoding.FIRST, (4, 2, 1), (4, 2, 0)),
        (Encoding.FIRST, (7, 1, 0), (7, 1, 0)),
        (Encoding.SECOND, (4, 2, 0), (4, 2, 1)),
        (Encoding.SECOND, (5, 2, 0), (4, 2, 2)),
        (Encoding.SECOND, (5, 2, 1), (4, 2, 0)),
        (Encoding.SECOND, (8, 1, 0), (7, 1, 0)),
        (Encoding.SECOND, (10, 0, 0), (9, 0, 0)),
        (Encoding.TODAY, (4, 2, 2), (4, 2, 2)),
    ],
)
def test_cells_are_recoded(
    encoding: Encoding, old: tuple[int, int, int], new: tuple[int, int, int]
) -> None:
    code = recoding_table(encoding)[old]
    assert tuple(unpacked_cells(code).tolist()) == new


@pytest.mark.parametrize("encoding", list(Encoding))
def test_cells_outside_the_table_are_marked(encoding: Encoding) -> None:
    images = np.zeros((1, 7, 7, 3), np.uint8)
    images[0, 3, 6] = (11, 0, 0)
    images[0, 3, 5] = (0, 6, 0)
    images[0, 3, 4] = (0, 0, 3)
    images[0, 3, 3] = (255, 255, 255)
    cells = recoded_cells(images, encoding)
    assert (cells == 255).sum() == 4
    assert not fits_cells(images)


def slow_sight(opaque: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same rule, cell by cell."""
    seen = np.zeros((7, 7), np.bool_)
    seen[3, 6] = True
    for j in range(6, 0, -1):
        for order, step in ((range(6), 1), (range(6, 0, -1), -1)):
            for i in order:
                if seen[i, j] and not opaque[i, j]:
                    seen[i + step, j] = seen[i + step, j - 1] = seen[i, j - 1] = True
    return seen


@given(hnp.arrays(np.bool_, (3, 7, 7), elements=st.booleans()))
def test_sight_spreads_cell_by_cell(opaque: NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(visible(opaque), np.stack([slow_sight(view) for view in opaque]))


@given(hnp.arrays(np.uint8, (2, 7, 7, 3), elements=st.integers(0, 12)))
def test_recoding_many_views_equals_recoding_each(images: NDArray[np.uint8]) -> None:
    for encoding in Encoding:
        together = recoded_cells(images, encoding)
        each = [recoded_cells(images[step : step + 1], encoding)[0] for step in range(2)]
        np.testing.assert_array_equal(together, np.stack(each))
        table = recoding_table(encoding)
        for cell, code in zip(images.reshape(-1, 3), together.reshape(-1), strict=True):
            inside = (cell < table.shape).all()
            expected = table[tuple(cell)] if inside else 255
            hidden = encoding is Encoding.FIRST and expected != 255 and code == 0
            assert hidden or code == expected


@pytest.mark.parametrize("level", level_names())
def test_the_views_of_every_level_round_trip(level: str) -> None:
    if read_manifest(level).environment_id is None:
        pytest.skip(f"{level} has no environment any more")
    environment = make_environment(level)
    dice = np.random.default_rng(0)
    views = [environment.reset(seed=0)[0]["image"]]
    while len(views) < 1000:
        observation, _, terminated, truncated, _ = environment.step(int(dice.integers(7)))
        if terminated or truncated:
            observation, _ = environment.reset(seed=len(views))
        views.append(observation["image"])
    images = np.stack(views)
    assert fits_cells(images)
    np.testing.assert_array_equal(unpacked_cells(packed_cells(images)), images)


def test_only_views_of_the_whole_room_show_the_agent() -> None:
    from minigrid.wrappers import FullyObsWrapper

    egocentric = make_environment("GoToObj")
    observation, _ = egocentric.reset(seed=3)
    whole_room: Any = FullyObsWrapper
    whole = whole_room(egocentric.unwrapped).observation(dict(observation))["image"]
    assert not shows_agent(packed_cells(observation["image"]))
    assert shows_agent(packed_cells(whole))
