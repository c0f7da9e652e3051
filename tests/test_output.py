"""A file for people appears whole or not at all, and never over another unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from demotools.errors import DemotoolsError
from demotools.output import check_output, write_output


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_output(file, b"one", overwrite=False)
    with pytest.raises(DemotoolsError, match="exists already"):
        write_output(file, b"two", overwrite=False)
    assert file.read_bytes() == b"one"
    write_output(file, b"two", overwrite=True)
    assert file.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full on this system")
    file = tmp_path / "a"
    file.write_bytes(b"before")
    temporary = tmp_path / f".a.{os.getpid()}.tmp"
    temporary.symlink_to(full)
    with pytest.raises(DemotoolsError, match="no space left") as error:
        write_output(file, b"after", overwrite=True)
    assert error.value.path == str(file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_folder_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(DemotoolsError, match="no such folder"):
        check_output(tmp_path / "no" / "a", overwrite=True)


def test_a_read_only_folder_is_said_before_the_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write into read-only folders")
    with pytest.raises(DemotoolsError, match="cannot be written to"):
        check_output(tmp_path / "a", overwrite=True)
