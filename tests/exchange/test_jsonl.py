"""A store as lines of text: every line against the store, every view against its cells."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from demotools.babyai.cells import ACTIONS, COLOURS, EGOCENTRIC_CODES, OBJECTS, STATES
from demotools.cli import main
from demotools.errors import DemotoolsError, StoreError
from demotools.exchange.jsonl import described_view, export_jsonl
from demotools.store.reading import open_store
from tests.conftest import build_store, make_episodes

COLOUR = "red|green|blue|purple|yellow|grey"
SEEN = re.compile(rf"You see an? (?:(?:(open|closed|locked) )?({COLOUR}) )?(\w+) ([\w ]+)\.")


def view_of(**things: tuple[int, int, int]) -> bytes:
    """A packed view, empty but for what stands at `cCrR`: (object, colour, state)."""
    cells = np.full((7, 7), OBJECTS.index("empty") * 18, np.uint8)
    for place, (kind, colour, state) in things.items():
        cells[int(place[1]), int(place[3])] = kind * 18 + colour * 3 + state
    return cells.tobytes()


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (view_of(), "You see nothing."),
        (view_of(c3r4=(6, 0, 0)), "You see a red ball 2 steps forward."),
        (view_of(c2r6=(5, 2, 0)), "You see a blue key 1 step left."),
        (
            view_of(c6r5=(4, 1, 2), c3r6=(7, 5, 0)),
            "You carry a grey box. You see a locked green door 3 steps right and 1 step forward.",
        ),
        (view_of(c3r0=(4, 4, 0)), "You see an open yellow door 6 steps forward."),
        # only the nearest wall of a line is told, and none that stands aside of all
        (
            view_of(c3r3=(2, 5, 0), c3r2=(2, 5, 0), c0r6=(2, 5, 0), c6r6=(2, 5, 0), c1r1=(2, 5, 0)),
            "You see a wall 3 steps forward. You see a wall 3 steps left. "
            "You see a wall 3 steps right.",
        ),
    ],
)
def test_a_view_is_told_from_where_the_agent_stands(view: bytes, text: str) -> None:
    assert described_view(view) == text


@given(st.lists(st.integers(0, EGOCENTRIC_CODES - 1), min_size=49, max_size=49))
def test_every_object_in_sight_can_be_read_off_the_text(codes: list[int]) -> None:
    cells = np.array(codes, np.uint8).reshape(7, 7)
    told = set()
    for state, colour, kind, where in SEEN.findall(described_view(cells.tobytes())):
        column, row = 3, 6
        for number, way in re.findall(r"(\d) steps? (left|right|forward)", where):
            column += {"left": -1, "right": 1, "forward": 0}[way] * int(number)
            row -= int(number) if way == "forward" else 0
        told.add((kind, colour, state, column, row))
    seen = set()
    for column, row in np.ndindex(7, 7):
        code = int(cells[column, row])
        kind = OBJECTS[code // 18]
        if kind in ("unseen", "empty", "floor", "wall") or (column, row) == (3, 6):
            continue
        state = STATES[code % 3] if kind == "door" else ""
        seen.add((kind, COLOURS[code % 18 // 3], state, column, row))
    assert {each for each in told if each[0] != "wall"} == seen


def test_each_line_is_an_episode_with_its_mission_seed_and_actions(tmp_path: Path) -> None:
    episodes = make_episodes([3, 2, 4])
    episodes.seed[1] = -1
    store = build_store(tmp_path / "GoToLocal.zarr", episodes)
    done = export_jsonl(store, quiet=True)
    lines = [json.loads(line) for line in done.path.read_text("utf-8").splitlines()]
    assert (done.path.name, done.size_bytes) == ("GoToLocal.jsonl", done.path.stat().st_size)
    assert [line["mission"] for line in lines] == episodes.mission
    assert [line["seed"] for line in lines] == [0, None, 2]
    steps = [step for line in lines for step in line["steps"]]
    assert [step["action"] for step in steps] == [ACTIONS[each] for each in episodes.action]
    ways = ["right", "down", "left", "up"]
    assert [step["direction"] for step in steps] == [ways[each] for each in episodes.direction]
    assert [step["view"] for step in steps] == [described_view(v.tobytes()) for v in episodes.view]
    assert [len(line["steps"]) for line in lines] == [3, 2, 4]
    assert set(steps[0]) == {"direction", "view", "action"}


def test_steps_of_a_recording_with_noise_say_what_was_taken(tmp_path: Path) -> None:
    episodes = make_episodes([3])
    taken = np.array([6, 5, 4], np.uint8)
    store = build_store(tmp_path / "Noisy.zarr", replace(episodes, optional={"taken": taken}))
    (line,) = export_jsonl(store, quiet=True).path.read_text("utf-8").splitlines()
    assert [step["taken"] for step in json.loads(line)["steps"]] == ["done", "toggle", "drop"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_a_file_is_not_replaced_unasked_and_lines_can_be_printed(tmp_path: Path) -> None:
    store = build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 2]))
    # the format is told by --to, by --format alone, or by the file's name
    for way in (["--to", "jsonl"], ["--format", "jsonl"], ["-o", tmp_path / "mine.jsonl"]):
        done = run("export", store.path, *way, "--overwrite")
        assert done.exit_code == 0, done.output
    assert (tmp_path / "mine.jsonl").read_bytes() == (tmp_path / "GoToLocal.jsonl").read_bytes()
    again = run("export", store.path, "--to", "jsonl")
    assert (again.exit_code, "the file already exists" in again.stderr) == (1, True)
    printed = run("export", store.path, "--to", "jsonl", "-o", "-")
    assert printed.stdout == (tmp_path / "mine.jsonl").read_text("utf-8")
    with pytest.raises(DemotoolsError, match="the file already exists"):
        export_jsonl(open_store(store.path), quiet=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Missing option '--to'"),
        (["--to", "jsonl", "--format", "arrow"], "--to jsonl has no format arrow"),
        (["--to", "minari", "--format", "jsonl"], "--to minari has no format jsonl"),
        (["--to", "parquet", "-o", "-"], "only jsonl can be printed"),
        (["--to", "jsonl", "--id", "a-v0"], "--id needs --to minari"),
    ],
)
def test_formats_that_do_not_go_together_are_wrong_usage(
    options: list[str], said: str, tmp_path: Path
) -> None:
    store = build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 2]))
    done = run("export", store.path, *options)
    assert (done.exit_code, said in done.stderr) == (2, True)


def test_views_that_are_images_cannot_be_told(tmp_path: Path) -> None:
    images = np.full((3, 7, 7, 3), 200, np.uint8)
    store = build_store(tmp_path / "Images.zarr", replace(make_episodes([3]), view=images))
    with pytest.raises(StoreError, match="not minigrid's 7 x 7 cells"):
        export_jsonl(store, quiet=True)
    assert not (tmp_path / "Images.jsonl").exists()
