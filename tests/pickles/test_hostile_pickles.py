from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demotools.babyai.cells import Encoding
from demotools.errors import PickleError
from demotools.pickles.convert import ConvertOptions, convert_files
from tests.hostile import HOSTILE

TODAY = ConvertOptions(quiet=True, workers=1, encoding=Encoding.TODAY)


def test_the_corpus_is_large_enough() -> None:
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize(("content", "what"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickles_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(content)
    modules = set(sys.modules)
    with pytest.raises(PickleError) as caught:
        convert_files([path], tmp_path / "data", TODAY)
    assert what in caught.value.what
    assert caught.value.path == str(path)
    assert set(sys.modules) == modules
    assert sorted(os.listdir(tmp_path)) == [path.name]  # noqa: PTH208


def fuzz(folder: Path, first: int, count: int) -> subprocess.Popen[str]:
    """A process that reads `count` mutated files; see tests/fuzz.py."""
    own = folder / str(first)
    own.mkdir()
    command = [sys.executable, "-m", "tests.fuzz", str(own), str(first), str(count)]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: int) -> None:
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors[-2000:]
    refused, passed = (int(word) for word in output.split() if word.isdigit())
    assert refused > 0
    assert passed > 0


def test_mutated_files_are_refused_or_give_well_formed_episodes(tmp_path: Path) -> None:
    finish(fuzz(tmp_path, 0, 1500), 120)


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files(tmp_path: Path) -> None:
    chunk = 10_000
    for first in range(0, 100_000, 2 * chunk):
        running = [fuzz(tmp_path, start, chunk) for start in (first, first + chunk)]
        for process in running:
            finish(process, 1800)
