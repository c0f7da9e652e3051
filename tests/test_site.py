"""The site of the docs builds, its links hold, and it loads nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import colours_of_page, needs_chromium

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[1]
LOADED = r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=[\"'](?:https?:)?//[^\"']*"


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of the project at `root`; a warning (a broken link, say) is a failure."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", str(root / "mkdocs.yml"), "--site-dir", str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_site_builds_with_all_its_links_and_loads_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = {page.name: page.read_text("utf-8") for page in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "tutorial.html", "commands.html", "look.html"} <= set(pages)
    assert "Learn from BabyAI demonstrations" in pages["index.html"]
    # code is coloured word by word
    assert "trainer run bc_small_cpu.toml" in re.sub("<[^>]*>", "", pages["tutorial.html"])
    assert [hit for page in pages.values() for hit in re.findall(LOADED, page)] == []
    for picture in re.findall(r'<img[^>]* src="([^"]*)"', pages["index.html"]):
        assert (tmp_path / "site" / picture).is_file()


@needs_chromium
@pytest.mark.parametrize("size", [(1100, 900), (500, 900)])
def test_chromium_opens_the_first_page_from_its_folder_without_a_complaint(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    build(ROOT, tmp_path / "site")
    colours = colours_of_page(tmp_path / "site" / "index.html", tmp_path, size)
    # the agent's picture: the bar of the action that it takes
    assert (59, 130, 246) in colours


@pytest.mark.parametrize(
    ("page", "link"),
    [("README.md", "docs/nowhere.md"), ("docs/look.md", "nowhere.md"), ("docs/look.md", "#none")],
)
def test_a_broken_link_fails_the_build(tmp_path: Path, page: str, link: str) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "benchmarks").mkdir()
    for name in ("mkdocs.yml", "README.md", "benchmarks/results.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / page).open("a", encoding="utf-8") as stream:
        stream.write(f"\nSee [this]({link}).\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert link.removeprefix("docs/").removeprefix("#") in built.stderr


def test_every_picture_is_shown_with_the_command_that_makes_it() -> None:
    written = (ROOT / "README.md", ROOT / "benchmarks" / "results.md", *ROOT.glob("docs/*.md"))
    pages = [file.read_text("utf-8") for file in written]
    pictures = [file for file in (ROOT / "docs" / "pictures").iterdir() if file.suffix != ".py"]
    assert {file.suffix for file in pictures} == {".gif", ".png", ".svg"}
    assert sum(file.stat().st_size for file in pictures) < 400_000
    for picture in pictures:
        shown = [page for page in pages if f"pictures/{picture.name})" in page]
        commands = "\n".join(
            block
            for page in shown
            for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL)
        )
        assert f"docs/pictures/{picture.name}" in commands


def test_a_terminal_is_drawn_with_its_colours_and_without_fonts_from_elsewhere(
    tmp_path: Path,
) -> None:
    pytest.importorskip("rich")
    drawing = tmp_path / "terminal.svg"
    script = ROOT / "docs" / "pictures" / "terminal.py"
    command = [sys.executable, str(script), str(drawing), "--title", "a & b", "--lines", "2"]
    text = "plain\n\x1b[31mcoloured\x1b[0m\nleft out\n"
    subprocess.run(command, input=text, text=True, check=True, timeout=60)
    drawn = drawing.read_text("utf-8")
    assert "plain" in drawn and "coloured" in drawn and "left out" not in drawn
    assert "a&#160;&amp;&#160;b" in drawn
    assert "url(http" not in drawn.replace('"', "")
    assert "#cc555a" in drawn  # red, in the theme of rich's drawings
