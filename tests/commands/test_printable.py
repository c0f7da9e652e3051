"""Texts of others cannot steer the terminal, forge a line or end a command in a traceback."""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from demotools.cli import main
from demotools.errors import DemotoolsError, exit_with_message, printable_text, printable_values
from demotools.store.building import StoreBuilder, write_part
from tests.conftest import make_episodes

STRANGE = "a\x1b[2J\x1b]0;title\x07b\rc\nok    forged\x9b31md\u202ee\u2028f\u2066g\x7fh"
BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def strange_characters(text: str) -> list[str]:
    """What must not reach a terminal; line ends are looked for by `forged`."""
    bad = {"Cc", "Cs", "Zl", "Zp"}
    return [
        one for one in text if (unicodedata.category(one) in bad and one != "\n") or one in BIDI
    ]


@pytest.fixture
def strange_store(tmp_path: Path) -> Path:
    """A store with escape sequences and line ends wherever it holds a text, its name included."""
    path = tmp_path / f"{STRANGE}.zarr"
    episodes = make_episodes([3, 2, 4])
    episodes.mission[:] = [f"{mission} {STRANGE}" for mission in episodes.mission]
    with StoreBuilder(path, {}) as builder:
        write_part(builder.parts, 0, episodes, {})
        builder.finish(
            level=STRANGE,
            split="train",
            environment_id=STRANGE,
            licence=STRANGE,
            citation=STRANGE,
            source={"kind": STRANGE, STRANGE: [STRANGE, {STRANGE: STRANGE}]},
            parent={"name": STRANGE, STRANGE: STRANGE},
        )
    return path


@given(st.text(st.characters()))
def test_a_printable_text_holds_nothing_strange_and_a_plain_one_is_as_it_was(text: str) -> None:
    shown = printable_text(text)
    assert not strange_characters(shown)
    assert "\n" not in shown
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_a_text_without_end_is_cut() -> None:
    assert printable_text("x" * 10_000_000) == "x" * 4093 + "..."


def test_values_are_cleaned_at_every_depth() -> None:
    cleaned = printable_values({"a\n": [{"b": "\x1b"}, ("\r",), 1, None]})
    assert cleaned == {"a\\n": [{"b": "\\x1b"}, ["\\r"], 1, None]}


def test_all_three_parts_of_a_message_are_cleaned() -> None:
    told = str(DemotoolsError(STRANGE, path=STRANGE, fix=STRANGE))
    assert not strange_characters(told)
    assert told.count("\n") == 2


READING = [
    ["info"],
    ["info", "--json"],
    ["card"],
    ["report", "other"],
    ["report", "--json", "other"],
    ["show", "--ansi"],
    ["show", "--json"],
    ["show", "--mission", "no such mission"],
    ["show", "--gif", "a.gif"],
    ["report"],
    ["report", "--json"],
    ["verify"],
    ["verify", "--replay"],
    ["list"],
    ["list", "--json"],
    ["shrink", "--episodes", "100"],
    ["remove"],
    ["archive"],
    ["export", "--to", "pickle"],
    ["generate"],
]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_nothing_of_a_strange_store_steers_the_terminal(
    strange_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    with StoreBuilder(tmp_path / "other.zarr", {}) as builder:
        write_part(builder.parts, 0, make_episodes([3]), {})
        builder.finish(
            level="GoTo", split="train", environment_id=None, licence="x", citation="y", source={}
        )
    command, *rest = words
    arguments = [command, *(["--data-dir", str(tmp_path)]), *rest]
    if command == "generate":
        arguments += [STRANGE, "--episodes", "1"]
    elif command != "list":
        arguments.append(str(strange_store))
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    output = result.stdout + result.stderr
    assert output
    assert not strange_characters(output)
    # a line end in a text of the store begins no line
    assert not re.search(r"^ *ok    forged", output, re.M)


def test_a_file_name_that_is_no_utf8_can_be_told(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    for words in (["list"], ["info", "GoTo"], ["generate", "GoToLocal", "--episodes", "2"]):
        done = subprocess.run(
            [sys.executable, "-m", "demotools", *words, "--data-dir", folder],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            capture_output=True,
            check=False,
        )
        said = (done.stdout + done.stderr).decode()
        assert "Traceback" not in said
        assert r"caf\udce9" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [["list"], ["list", "--json"]])
def test_a_full_disk_behind_standard_output_is_named(words: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "demotools", *words, "--data-dir", tmp_path],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "error: no space left on device\n  where: standard output\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "out of memory: Unable to allocate 9 TiB"),
        (MemoryError(), "out of memory\n"),
        (RecursionError("maximum depth"), "nested too deeply"),
        (OSError(errno.EIO, "Input/output error"), "input/output error"),
    ],
)
def test_what_names_no_file_is_said_with_the_command(
    error: BaseException,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/demotools", "info", "GoTo"])
    with pytest.raises(SystemExit), exit_with_message():
        raise error
    told = capsys.readouterr().err
    assert said in told
    assert "  where: demotools info GoTo\n  next:  " in told


def test_a_recursion_in_the_users_own_code_keeps_its_traceback() -> None:
    error = RecursionError("maximum depth")
    error.add_note("named by loss.type")
    with pytest.raises(RecursionError), exit_with_message():
        raise error


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize(
    "words", [["verify"], ["report", "--json"], ["archive"], ["export", "--to", "pickle"]]
)
def test_a_progress_bar_shows_no_escape_sequence_of_a_name(
    strange_store: Path, words: list[str]
) -> None:
    import fcntl
    import pty
    import termios

    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 400, 0, 0))
    stores = [str(strange_store)]
    with subprocess.Popen(
        [sys.executable, "-m", "demotools", *words, *stores], stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        said = bytearray()
        try:
            while some := os.read(own, 1 << 16):
                said += some
        except OSError as error:  # what Linux says at the end
            assert error.errno == errno.EIO
        process.wait()
    os.close(own)
    assert b"\\x1b[2J" in said
    assert not {"\x1b", "\x07", "\x7f"} & set(said.decode())
