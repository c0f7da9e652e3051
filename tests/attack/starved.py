"""Without room, without permission: a message, nothing half-written, what was there still there."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.attack import world
from tests.attack.campaign import Arena, attack, digest, ended, litter, started

ROOM = "out of space in any phase: a three-part error, and existing files stay intact"
AS_ANYBODY = (
    *("setpriv", "--bounding-set=-dac_override,-dac_read_search"),
    "--inh-caps=-dac_override,-dac_read_search",
)
"""Starts a program as a user to whom permissions apply, root too."""


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[bool]:
    """A file system of its own with so much room, where this user may mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def limited(size_bytes: int) -> Callable[[], None]:
    """Before a program starts: no file of it may be larger."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))

    return limit


def jobs(arena: Arena) -> dict[str, tuple[Callable[[Path], tuple[object, ...]], str]]:
    """What may meet a full disk: its command by the folder, and what it makes there."""
    source = arena.folder / "source"
    store = world.store(source, 150)
    pickle, zipped = world.legacy_pickle(source), world.archive(source)
    level = world.LEVEL
    return {
        "generate": (
            lambda to: (
                *("demotools", "generate", level, "--episodes", 150, "--workers", 2),
                *("--data-dir", to, "--overwrite"),
            ),
            f"{level}.zarr",
        ),
        "convert": (
            lambda to: ("demotools", "convert", pickle, "--data-dir", to, "--overwrite"),
            f"{level}.zarr",
        ),
        "shrink": (
            lambda to: (
                *("demotools", "shrink", store, "--episodes", 140, "--name", "twin"),
                *("--data-dir", to, "--overwrite"),
            ),
            "twin.zarr",
        ),
        "archive": (
            lambda to: ("demotools", "archive", store, "-o", to / "a.zip", "--overwrite"),
            "a.zip",
        ),
        "unarchive": (
            lambda to: (
                *("demotools", "unarchive", zipped, "--name", "back"),
                *("--data-dir", to, "--overwrite"),
            ),
            "back.zarr",
        ),
        "export": (
            lambda to: (
                *("demotools", "export", store, "--to", "pickle", "-o", to / "x.pkl"),
                "--overwrite",
            ),
            "x.pkl",
        ),
        "report": (
            lambda to: ("demotools", "report", store, "-o", to / "r.html", "--overwrite"),
            "r.html",
        ),
        "run": (lambda to: (*world.tiny_run(source, to / "run"), "--overwrite"), "run/last.pt"),
    }


@attack("full disk", ROOM)
def full_disk(arena: Arena) -> None:
    known = jobs(arena)
    disk = arena.folder / "disk"
    needed = {}
    for name, (command, made) in known.items():
        with small_disk(disk, 1 << 30) as there:
            if not there:
                return
            answer = ended(started(*command(disk)))
            arena.note(f"{name} with room", answer.problem)
            used = sum(file.stat().st_blocks * 512 for file in disk.rglob("*"))
            needed[name] = used, digest(disk / made)
    while arena.time_left:
        for name, (command, made) in known.items():
            used, wanted = needed[name]
            room = int(used * arena.dice.uniform(0.02, 2.2)) // 4096 * 4096 + 4096
            with small_disk(disk, room):
                answer = ended(started(*command(disk)))
                problem = answer.problem
                left = digest(disk / made)
                if answer.code and left and name != "run":
                    problem = problem or "something under the final name"
                if not answer.code and not left:
                    problem = problem or "it says that all is well, and there is nothing"
                grown = ["mount", "-o", f"remount,size={1 << 30}", str(disk)]
                subprocess.run(grown, check=True)
                again = ended(started(*command(disk)))
                problem = problem or again.problem or (again.text[-200:] if again.code else "")
                if wanted != digest(disk / made) and name not in ("run", "report"):
                    problem = problem or "other bytes once there was room"
                hidden = [each for each in litter(disk) if not each.endswith(".building")]
                arena.note(f"{name} with {room:,} bytes", problem or ", ".join(hidden))


@attack("quota", ROOM)
def quota(arena: Arena) -> None:
    known = jobs(arena)
    largest = {}
    for name, (command, _made) in known.items():
        folder = arena.folder / f"{name}-old"
        folder.mkdir()
        answer = ended(started(*command(folder)))
        arena.note(f"{name} without a limit", answer.problem)
        largest[name] = max(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    while arena.time_left:
        for name, (command, made) in known.items():
            folder = arena.folder / f"{name}-old"
            before = digest(folder / made)
            limit = int(largest[name] * arena.dice.uniform(0.01, 1.2)) + 1
            answer = ended(started(*command(folder), preparation=limited(limit)))
            problem = answer.problem
            if answer.code and digest(folder / made) != before:
                problem = problem or "what was there is not there any more"
            arena.note(f"{name} with files of {limit:,} bytes", problem)


@attack(
    "permissions",
    "the error names the file or folder that lacks permission, and nothing else changes",
)
def permissions(arena: Arena) -> None:
    before = () if os.geteuid() else AS_ANYBODY
    if before and shutil.which(before[0]) is None:
        return
    known = jobs(arena)
    other = arena.folder / "other"
    for name, (command, _made) in known.items():
        for mode in (0o000, 0o444, 0o555):
            folder = arena.folder / f"{name}-{mode:o}"
            folder.mkdir()
            folder.chmod(mode)
            answer = ended(started(*command(folder), before=before))
            folder.chmod(0o755)
            problem = answer.problem or (
                "" if answer.code in (1, 2) else f"exit code {answer.code}"
            )
            if any(folder.iterdir()):
                problem = problem or "something was written"
            arena.note(f"{name} into a folder of mode {mode:o}", problem)
    source = arena.folder / "source"
    for file in sorted(
        path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")
    ):
        mode = file.stat().st_mode
        file.chmod(0)
        for words in (
            ("demotools", "verify", world.LEVEL, "--data-dir", source),
            ("demotools", "unarchive", source / f"{world.LEVEL}.zarr.zip", "--data-dir", other),
            ("demotools", "convert", source / f"BabyAI-{world.LEVEL}-v0.pkl", "--data-dir", other),
        ):
            if file == words[2] or (words[1] == "verify" and f"{world.LEVEL}.zarr" in file.parts):
                answer = ended(started(*words, before=before))
                # click itself looks at arguments that name a file, and exits with 2
                expected = 1 if words[1] == "verify" else 2
                problem = answer.problem or (
                    "" if answer.code == expected else f"exit {answer.code}"
                )
                arena.note(f"{words[1]} with {file.name} unreadable", problem)
        file.chmod(mode)
