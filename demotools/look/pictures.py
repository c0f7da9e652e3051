"""Pictures of views and rooms in minigrid's own tiles; panels with captions; animations.

Packed cells become minigrid's objects, which `Grid.render_tile` draws, each kind of cell once. As
in minigrid's own picture of the agent's view, visible cells are highlighted, other cells are black,
and the agent faces up from the middle of the bottom row.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demotools.babyai.cells import UNPACKING_TABLE, UNSEEN, fits_cells, packed_cells

Picture = NDArray[np.uint8]
"""uint8 [height, width, 3], RGB."""

BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)
_TROUGH, _PLAIN, _MARKED = (39, 39, 42), (82, 82, 91), (59, 130, 246)
_UP = 3
_TEXT_SIZE, _GAP = 14, 8
_STEP_MILLISECONDS, _LAST_MILLISECONDS = 300, 1500


@lru_cache(maxsize=4096)
def tile_picture(code: int, size: int, *, agent: bool = False) -> Picture:
    """Minigrid's tile of a packed cell of a view, highlighted where the cell is seen.

    code      0..197, see `packed_cells`
    size      pixels of a side
    agent     draw the agent, looking up, over the cell (which holds what it carries)
    returns   uint8 [size, size, 3]
    """
    # half a second, and only pictures need it
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import WorldObj

    kind, colour, state = (int(channel) for channel in UNPACKING_TABLE[code])
    cell = WorldObj.decode(kind, colour, state)
    tile = Grid.render_tile(
        cell, agent_dir=_UP if agent else None, highlight=kind != UNSEEN, tile_size=size
    )
    return np.asarray(tile).astype(np.uint8)


def encoded_cells(view: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The packed cells of a stored view of any size; None where it is pixels.

    view      uint8 [7, 7] or [H, W, C]
    """
    if view.ndim == 2:
        return view
    return packed_cells(view) if fits_cells(view, view.shape[:2]) else None


def view_picture(view: NDArray[np.uint8], tile: int) -> Picture:
    """The picture of one stored view.

    view      uint8 [7, 7] packed cells, or [H, W, C]: an image of encoded cells of another size,
              or pixels, which are enlarged to about the same size
    tile      pixels of a cell's side
    returns   uint8 [height, width, 3]
    """
    cells = encoded_cells(view)
    if cells is not None:
        return _tiled(cells, tile)
    channels = view if view.shape[2] >= 3 else np.repeat(view[..., :1], 3, axis=2)
    factor = max(1, 7 * tile // view.shape[0])
    return channels[..., :3].repeat(factor, axis=0).repeat(factor, axis=1)


def _tiled(cells: NDArray[np.uint8], tile: int) -> Picture:
    columns, rows = cells.shape
    agent = (columns // 2, rows - 1)
    tiles = (
        [
            tile_picture(int(cells[column, row]), tile, agent=(column, row) == agent)
            for column in range(columns)
        ]
        for row in range(rows)
    )
    return np.vstack([np.hstack(row) for row in tiles])


def panel(
    pictures: Sequence[Picture], lines: Sequence[str], *, text_size: int = _TEXT_SIZE
) -> Picture:
    """Pictures side by side, with lines of text beneath.

    returns   uint8 [height, width, 3]
    """
    height = max(len(picture) for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + _GAP * (len(pictures) - 1)
    line_height = text_size + 5
    below = len(lines) * line_height + (4 if lines else 0)
    result = Image.new("RGB", (width, height + below), BACKGROUND)
    left = 0
    for picture in pictures:
        result.paste(Image.fromarray(picture), (left, (height - len(picture)) // 2))
        left += picture.shape[1] + _GAP
    tops = range(height + 3, height + below, line_height)
    _write(result, [((4, top), line) for top, line in zip(tops, lines, strict=False)], text_size)
    return np.asarray(result)


def _write(image: Image.Image, texts: Iterable[tuple[tuple[int, int], str]], size: int) -> None:
    """Write texts into the picture, each with its left upper corner."""
    mask = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(mask)
    for corner, text in texts:
        draw.text(corner, text, fill=255, font=_font(size))
    # 16 shades of text leave room for all tile colours in an animation's palette of 256
    mask = mask.point([shade // 17 * 17 for shade in range(256)])
    image.paste(TEXT, (0, 0), mask)


def bar_picture(bars: Sequence[tuple[str, float]], height: int, *, marked: int) -> Picture:
    """Shares as bars below each other: the name, the bar, its percentage.

    bars      names and shares, 0 to 1
    height    pixels, at least 18 a bar
    marked    number of the bar that stands out
    returns   uint8 [height, width, 3]
    """
    length, thick, font = 110, _TEXT_SIZE - 2, _font(_TEXT_SIZE)
    names = round(max(font.getlength(name) for name, _share in bars))
    left = names + 2 * _GAP
    pitch = height // len(bars)
    width = left + length + round(font.getlength("100.0%")) + 2 * _GAP
    result = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(result)
    texts = []
    for number, (name, share) in enumerate(bars):
        middle = number * pitch + pitch // 2
        top, text_top = middle - thick // 2, middle - _TEXT_SIZE // 2 - 2
        draw.rectangle((left, top, left + length, top + thick), fill=_TROUGH)
        if end := round(length * share):
            colour = _MARKED if number == marked else _PLAIN
            draw.rectangle((left, top, left + end, top + thick), fill=colour)
        texts.append(((_GAP, text_top), name))
        texts.append(((left + length + _GAP, text_top), f"{share:.1%}"))
    _write(result, texts, _TEXT_SIZE)
    return np.asarray(result)


def equally_large(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures, each on a ground as wide and as high as the largest, at its left upper corner.

    >>> small, large = np.zeros((1, 2, 3), np.uint8), np.zeros((3, 1, 3), np.uint8)
    >>> [picture.shape for picture in equally_large([small, large])]
    [(3, 2, 3), (3, 2, 3)]
    """
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0).tolist()
    results = []
    for picture in pictures:
        ground = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
        ground[: picture.shape[0], : picture.shape[1]] = picture
        results.append(ground)
    return results


def wrapped(text: str, width: int) -> list[str]:
    """The text cut between words into lines of at most `width` pixels.

    >>> wrapped("go to the red ball", 80)
    ['go to the', 'red ball']
    """
    font = _font(_TEXT_SIZE)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width - 8:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def sheet(panels: Sequence[Picture], *, gap: int = 8) -> Picture:
    """Panels in rows, the whole as near to a square as their number allows.

    returns   uint8 [height, width, 3]
    """
    height = max(len(picture) for picture in panels) + gap
    width = max(picture.shape[1] for picture in panels) + gap
    columns = min(len(panels), max(1, round((len(panels) * height / width) ** 0.5)))
    rows = -(-len(panels) // columns)
    result = np.empty((rows * height + gap, columns * width + gap, 3), dtype=np.uint8)
    result[:] = BACKGROUND
    for number, picture in enumerate(panels):
        top, left = gap + number // columns * height, gap + number % columns * width
        result[top : top + len(picture), left : left + picture.shape[1]] = picture
    return result


def animation(pictures: Sequence[Picture]) -> bytes:
    """The pictures, all of one size, as the bytes of a GIF that repeats.

    Pixels are exact as long as all pictures together have no more than 256 colours, which tiles
    and captions never do; others get the nearest of 256.
    """
    numbers = [_colour_numbers(picture) for picture in pictures]
    colours = np.unique(np.concatenate([np.unique(number) for number in numbers]))
    palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8)
    if len(colours) <= 256:
        images = []
        for number in numbers:
            image = Image.fromarray(np.searchsorted(colours, number).astype(np.uint8))
            image.putpalette(palette.tobytes())
            images.append(image)
    else:
        fewer = Image.fromarray(palette[None]).quantize(256)
        images = [
            Image.fromarray(picture).quantize(palette=fewer, dither=Image.Dither.NONE)
            for picture in pictures
        ]
    stream = io.BytesIO()
    durations = [_STEP_MILLISECONDS] * (len(images) - 1) + [_LAST_MILLISECONDS]
    images[0].save(
        stream, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0
    )
    return stream.getvalue()


def _colour_numbers(picture: Picture) -> NDArray[np.int32]:
    wide = picture.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def still(picture: Picture) -> bytes:
    """The picture as the bytes of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return stream.getvalue()
