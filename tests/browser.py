"""A page in headless Chromium, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def colours_of_page(page: Path, folder: Path, size: tuple[int, int]) -> set[tuple[int, int, int]]:
    """The colours of the page as Chromium draws it, which must have nothing to complain about.

    folder   for the browser's own files and the picture
    size     width and height of the window
    """
    assert CHROMIUM is not None
    picture = folder / "picture.png"
    shown = subprocess.run(
        [
            CHROMIUM,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
            *(f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    with Image.open(picture) as drawn:
        assert drawn.size == size
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    return {(red, green, blue) for red, green, blue in np.unique(pixels, axis=0).tolist()}
