"""A level played by keyboard, in a real terminal and in a window without a display."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from demotools.cli import main
from demotools.look.play import HELP, TerminalPlayer, WindowPlayer
from demotools.recording.bot import Episode, record_episode
from demotools.recording.environment import make_environment
from demotools.recording.human import QUIT, SKIP
from demotools.store.reading import open_store
from tests.terminal import in_terminal

SEED = 900_000_000
KEYS = (b"\x1b[D", b"\x1b[C", b"\x1b[A", b"p", b"d", b" ", b"\r")


def read_until(terminal: int, text: str, key: bytes = b"", seen: str = "") -> str:
    """Read until a text appears, and return what was read beyond it.

    The key is pressed again if nothing happens: one that comes before the program listens is lost.

    seen    what earlier calls read beyond their own texts
    """
    deadline = time.monotonic() + 120
    while text not in seen:
        assert time.monotonic() < deadline, seen
        os.write(terminal, key)
        while text not in seen and select.select([terminal], [], [], 15)[0]:
            seen += os.read(terminal, 65536).decode()
    return seen.partition(text)[2]


@pytest.mark.slow
def test_in_a_real_terminal_the_keys_of_the_bots_actions_make_its_episode(tmp_path: Path) -> None:
    expected = record_episode(make_environment("GoToObj"), SEED)
    assert isinstance(expected, Episode)
    name = "GoToObj-human.zarr"
    arguments = ["play", "GoToObj", "--room", "--data-dir", str(tmp_path)]
    with in_terminal("demotools", *arguments) as (program, terminal):
        read_until(terminal, HELP)
        time.sleep(0.2)
        actions = expected.action.tolist()
        for step, action in enumerate(actions):
            last = step == len(actions) - 1
            shown = f"solved; 1 episode in {name}" if last else f"step {step + 1} of at most"
            beyond = read_until(terminal, shown, KEYS[action])
        read_until(terminal, HELP, seen=beyond)
        time.sleep(0.2)
        os.write(terminal, b"q")
        assert program.wait(timeout=120) == 0
    store = open_store(tmp_path / name)
    assert store[0].actions.tolist() == expected.action.tolist()
    assert store[0].cells.tolist() == expected.cells.tolist()
    assert store[0].mission == expected.mission


def test_keys_mean_what_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    environment = make_environment("GoToObj")
    observation, _ = environment.reset(seed=0)
    typed = iter(["?\x1b[A\x1bOC", "\xe0K", "pd \t\r", "n", "q"])
    player = TerminalPlayer(room=False, key=lambda: next(typed))
    actions = [player.action(environment, observation, "a note") for _ in range(10)]
    assert actions == [2, 1, 0, 3, 4, 5, 3, 6, SKIP, QUIT]
    shown = capsys.readouterr().out
    assert observation["mission"] in shown and "a note" in shown


def test_without_a_terminal_it_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["play", "GoToObj", "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "playing needs a terminal" in result.output and "--window" in result.output


def test_a_window_gives_the_keys_that_are_pressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame = pytest.importorskip("pygame")
    environment = make_environment("GoToObj")
    observation, _ = environment.reset(seed=0)
    player = WindowPlayer(room=True)
    pygame.display.init()
    pressed = [pygame.K_x, pygame.K_UP, pygame.K_LEFT, pygame.K_SPACE, pygame.K_n]
    for key in pressed:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
    found = [player.action(environment, observation, "") for _ in pressed[1:]]
    assert found == [2, 0, 5, SKIP]
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert player.action(environment, observation, "") == QUIT
    environment.close()
