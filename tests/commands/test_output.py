"""A file for people appears whole or not at all, and never over another unasked."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from demotools import output
from demotools.cli import main
from demotools.errors import DemotoolsError, StoreError
from demotools.output import (
    acquired_lock,
    check_output,
    open_regular,
    progress_bar,
    write_output,
    written_whole,
)


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_output(file, b"one", overwrite=False)
    with pytest.raises(DemotoolsError, match="already exists"):
        write_output(file, b"two", overwrite=False)
    assert file.read_bytes() == b"one"
    write_output(file, b"two", overwrite=True)
    assert file.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "a"
    file.write_bytes(b"before")
    _soft, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DemotoolsError, match="file too large") as error:
            write_output(file, bytes(2000), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.path == str(file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_two_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with written_whole(file) as first:
        first.write(b"one, ")
        with written_whole(file) as second:
            second.write(b"two")
        assert file.read_bytes() == b"two"
        first.write(b"whole")
    assert file.read_bytes() == b"one, whole"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_that_of_a_living_one_stays(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a"
    killed = tmp_path / ".a.0123456789ab.tmp"
    killed.write_bytes(b"half")
    with written_whole(file) as stream:
        stream.write(b"one")
        (living,) = tmp_path.glob(".a.*.tmp")
        write_output(file, b"two", overwrite=True)
        assert living.exists()
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"before")
    with pytest.raises(RuntimeError), written_whole(file) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    file, link = tmp_path / "a", tmp_path / "link"
    file.write_bytes(b"before")
    link.symlink_to(file)
    write_output(link, b"after", overwrite=True)
    assert link.is_symlink()
    assert file.read_bytes() == b"after"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_written_and_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(DemotoolsError, match="regular file"):
        write_output(path, b"content", overwrite=True)
    with pytest.raises(DemotoolsError, match="regular file"), written_whole(path):
        pass
    with pytest.raises(DemotoolsError, match="regular file"):
        open_regular(path)
    assert not path.is_file()


def test_a_missing_folder_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(DemotoolsError, match="no such folder"):
        check_output(tmp_path / "no" / "a", overwrite=True)


def test_a_read_only_folder_is_said_before_the_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write into read-only folders")
    with pytest.raises(DemotoolsError, match="not writable"):
        check_output(tmp_path / "a", overwrite=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_a_file_stands_for_one(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def flock(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    lock = acquired_lock(tmp_path / "A.zarr")
    mark = tmp_path / ".A.zarr.making"
    assert (
        f"this file system does not support locks; using {mark} instead" in capsys.readouterr().err
    )
    with pytest.raises(StoreError, match="another process") as refused:
        acquired_lock(tmp_path / "A.zarr")
    assert f"if no such process exists, remove {mark}" in refused.value.fix
    lock.release()
    acquired_lock(tmp_path / "A.zarr").release()


def test_where_there_is_no_terminal_a_line_now_and_then_says_how_far_the_work_has_come(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output, "_LINE_SECONDS", 0.05)
    caplog.set_level("INFO", "demotools")
    for quiet in (False, True):
        with progress_bar(4_000_000, "stage 1 of 2", "demo steps", quiet=quiet, done=50_000) as bar:
            for number in range(1, 3):
                time.sleep(0.06)
                bar.set_postfix({"loss": f"{1 / number:.3f}"}, refresh=False)
                bar.update(50_000)
    first, second = caplog.messages
    assert first.startswith("stage 1 of 2: 100k of 4.00M demo steps (2%), loss=1.000, ")
    assert second.startswith("stage 1 of 2: 150k of 4.00M demo steps (4%), loss=0.500, ")
    assert second.endswith(" left") and "demo steps/s, " in second
    caplog.clear()
    with progress_bar(None, "a file", "B", quiet=False) as bar:
        time.sleep(0.06)
        bar.update(2000)
    assert caplog.messages[0].startswith("a file: 2.00kB, ")
    assert {logging.INFO} == {record.levelno for record in caplog.records}
    assert capsys.readouterr().err == ""


READERS = (
    *("info", "verify", "show", "report", "archive", "card", "remove", "export --to jsonl"),
    *("split", "select --first 3", "shrink -n 3", "merge other"),
)


@pytest.mark.parametrize("command", [*READERS, "convert", "import", "unarchive"])
def test_a_file_that_is_not_there_is_said_to_be_missing_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *more = command.split()
    for name in ("gone.pkl", "gone.parquet", "gone/one.zip"):
        result = CliRunner().invoke(main, [verb, name, *more, "--data-dir", "data"])
        assert result.exit_code == 1
        assert re.match(rf"error: (there is )?no such .*\n  where: {name}\n", result.output)


@pytest.mark.parametrize("command", READERS)
def test_a_file_where_a_store_should_be_is_said_to_be_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").write_bytes(b"")
    verb, *more = command.split()
    result = CliRunner().invoke(main, [verb, "a.pkl", *more, "--data-dir", "data"])
    assert result.exit_code == 1
    said = "not removed" if verb == "remove" else "error: this is a file"
    assert said in result.output and "where: a.pkl\n" in result.output
