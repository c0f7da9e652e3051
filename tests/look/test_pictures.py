"""Pictures are compared pixel by pixel with those that minigrid itself draws of the same grid."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Key, Wall
from numpy.typing import NDArray
from PIL import Image

from demotools.babyai.cells import AGENT_COLUMN, AGENT_ROW, CELL_CODES, COLOURS, packed_cells
from demotools.look.pictures import animation, panel, sheet, still, view_picture, wrapped
from demotools.recording.environment import make_environment

TILE = 16


def minigrid_picture(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Minigrid's rendering of a decoded view, seen cells highlighted, the agent looking up."""
    grid, seen = Grid.decode(image)
    picture: NDArray[np.uint8] = grid.render(
        TILE, (AGENT_COLUMN, AGENT_ROW), agent_dir=3, highlight_mask=seen
    )
    return picture


def test_every_cell_code_is_drawn_as_minigrid_draws_it() -> None:
    codes = np.arange(CELL_CODES, dtype=np.uint8)
    for part in np.array_split(np.resize(codes, 5 * 49), 5):
        image = np.stack([part // 18, part % 18 // 3, part % 3], axis=-1).reshape(7, 7, 3)
        assert np.array_equal(view_picture(packed_cells(image), TILE), minigrid_picture(image))


def test_doors_in_three_states_keys_balls_and_boxes_are_minigrids_own_objects() -> None:
    grid = Grid(7, 7)
    things: list[Any] = [
        make(colour)
        for colour in COLOURS
        for make in (
            *(lambda c: Door(c, is_open=True), lambda c: Door(c), lambda c: Door(c, False, True)),
            *(Key, Ball, Box, Wall),
        )
    ]
    for number, thing in enumerate(things):
        grid.set(number // 7, number % 7, thing)
    seen = np.ones((7, 7), dtype=bool)
    seen[6, 3:] = False
    image = np.asarray(grid.encode(seen))
    drawn: NDArray[np.uint8] = grid.render(TILE, (3, 6), agent_dir=3, highlight_mask=seen)
    assert np.array_equal(view_picture(packed_cells(image), TILE), drawn)


@pytest.mark.parametrize("level", ["BossLevel", "Unlock", "GoToLocal"])
def test_views_of_a_level_are_drawn_as_its_own_picture_of_the_agents_view(level: str) -> None:
    environment: Any = make_environment(level)
    random = np.random.default_rng(1)
    for seed in range(3):
        observation, _ = environment.reset(seed=seed)
        for _step in range(15):
            cells = packed_cells(observation["image"])
            assert np.array_equal(view_picture(cells, TILE), environment.get_pov_render(TILE))
            observation, *_ = environment.step(int(random.integers(0, 6)))


def test_an_image_of_another_size_is_drawn_with_the_agent_in_the_middle_of_the_lowest_row() -> None:
    grid = Grid(9, 9)
    grid.set(2, 3, Door("red", is_locked=True))
    image = np.asarray(grid.encode())
    everything = np.ones((9, 9), dtype=bool)
    drawn = grid.render(TILE, (4, 8), agent_dir=3, highlight_mask=everything)
    assert np.array_equal(view_picture(image, TILE), drawn)


def test_pixels_are_enlarged_and_other_numbers_of_channels_become_grey_or_three() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    picture = view_picture(pixels, TILE)
    assert picture.shape == (112, 112, 3)
    assert np.array_equal(picture[::2, 1::2], pixels)
    assert view_picture(pixels[..., :1], TILE)[3, 5].tolist() == [int(pixels[1, 2, 0])] * 3


def colourful(number: int) -> NDArray[np.uint8]:
    codes = np.random.default_rng(number).integers(0, CELL_CODES, (7, 7), dtype=np.uint8)
    return panel([view_picture(codes, 32), view_picture(codes, 13)], ["a caption", str(number)])


def test_an_animation_holds_the_same_pixels_as_its_pictures() -> None:
    pictures = [colourful(number) for number in range(6)]
    with Image.open(io.BytesIO(animation(pictures))) as gif:
        assert getattr(gif, "n_frames") == 6  # noqa: B009  (known to GIF files only)
        for number, picture in enumerate(pictures):
            gif.seek(number)
            assert np.array_equal(np.asarray(gif.convert("RGB")), picture)
            assert gif.info["duration"] == (1500 if number == 5 else 300)


def test_an_animation_of_more_than_256_colours_is_near_its_pictures() -> None:
    ramp = np.arange(64, dtype=np.uint8) * 4
    picture = np.stack([*np.meshgrid(ramp, ramp), np.full((64, 64), 9, np.uint8)], axis=-1)
    with Image.open(io.BytesIO(animation([picture, picture[::-1]]))) as gif:
        difference = np.asarray(gif.convert("RGB")).astype(int) - picture
    # 4,096 colours on 256: a cell of the palette is some 16 values wide
    assert np.abs(difference).mean() < 16


def test_a_still_holds_the_same_pixels() -> None:
    picture = colourful(1)
    with Image.open(io.BytesIO(still(picture))) as png:
        assert np.array_equal(np.asarray(png), picture)


def test_a_sheet_holds_every_panel_in_rows_near_a_square() -> None:
    panels = [np.full((20, 30, 3), number, np.uint8) for number in range(1, 8)]
    whole = sheet(panels, gap=2)
    assert whole.shape == (3 * 22 + 2, 3 * 32 + 2, 3) or whole.shape == (4 * 22 + 2, 2 * 32 + 2, 3)
    assert all((whole == number).all(axis=2).sum() == 600 for number in range(1, 8))


def test_a_long_text_is_wrapped_between_words_and_loses_none() -> None:
    text = "pick up the grey box behind you, then go to a door and open the purple door"
    lines = wrapped(text, 200)
    assert " ".join(lines) == text
    assert len(lines) > 1
