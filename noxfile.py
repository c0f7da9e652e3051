"""Other Pythons and other versions: `demotools` without torch, on the newest and the oldest."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"


def _newer_python() -> str | None:
    """The newest interpreter above 3.11 that starts, on the path or among pyenv's."""
    candidates: list[str] = []
    for version in ("3.14", "3.13", "3.12"):
        candidates.append(f"python{version}")
        if shutil.which("pyenv"):
            root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True)
            folder = Path(root.stdout.strip()) / "versions"
            candidates += map(str, sorted(folder.glob(f"{version}*/bin/python"), reverse=True))
    for candidate in candidates:
        found = shutil.which(candidate)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


@nox.session(name="newer-python", python=_newer_python() or False)
def newer_python(session: nox.Session) -> None:
    """The tests of demotools with the newest zarr, which needs Python 3.12."""
    if session.python is None:
        session.skip("no Python newer than 3.11 is installed")
    session.install("-c", "constraints.txt", "-e", ".", "pytest", "hypothesis", "trustme")
    # tests of the trainer are left out by tests/conftest.py where torch is absent
    session.run("pytest", *(session.posargs or ["tests", "demotools"]))


@nox.session(name="lower-bounds", python="3.11")
def lower_bounds(session: nox.Session) -> None:
    """The tests of demotools with the lowest version of everything that pyproject.toml allows.

    Without the extra `train`, whose oldest builds are gigabytes: the constraints name theirs.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    lowest = [re.sub(r">=([^,]+).*", r"==\1", name) for name in project["dependencies"]]
    session.install("--only-binary", ":all:", *lowest, "pytest", "hypothesis", "trustme")
    session.install("--no-deps", "-e", ".")
    # fast views, batches of environments and our level generator are made for the minigrid of the
    # constraints; others are stepped by its own code
    made_for_one = ("test_fast.py", "test_batch.py", "test_generation.py")
    # only today's click breaks the lines of the help as the page of commands has them; gymnasium's
    # checker is to look at fast views
    left_out = (
        "tests/commands/test_commands.py::test_the_page_of_commands_shows_the_real_help",
        "tests/recording/test_registration.py::test_gymnasiums_checker_finds_nothing",
    )
    session.run(
        "pytest",
        *(f"--ignore=tests/recording/{file}" for file in made_for_one),
        *(f"--deselect={test}" for test in left_out),
        *(session.posargs or ["tests", "demotools"]),
    )
