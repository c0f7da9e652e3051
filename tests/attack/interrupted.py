"""Killed at any moment: what was there stays, and the same command ends where it would have."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.attack import world
from tests.attack.campaign import Arena, attack, digest, ended, kill, litter, started, typed

SAME = "killed at any moment and run again, it writes the same bytes as without the kill"


def killed_jobs(arena: Arena, command: Callable[[Path], tuple[object, ...]], made: str) -> None:
    """Kill the command of a folder at random moments; run it again; compare what it made."""
    undisturbed = arena.folder / "undisturbed"
    undisturbed.mkdir()
    start = time.monotonic()
    first = ended(started(*command(undisturbed)))
    took = time.monotonic() - start
    wanted = digest(undisturbed / made)
    arena.note("undisturbed", first.problem or ("" if wanted else "it made nothing"))
    number = 0
    while arena.time_left:
        folder = arena.folder / f"killed-{(number := number + 1)}"
        folder.mkdir()
        moment = arena.dice.uniform(0.25, 1.02) * took
        process = started(*command(folder))
        time.sleep(moment)
        kill(process)
        half = digest(folder / made)
        if half not in ("", wanted):
            arena.note(f"killed after {moment:.2f} s", "half a result under the final name")
            continue
        # where the result has its name, the command refuses, and clears what else was left
        again = ended(started(*command(folder)))
        problem = again.problem
        if digest(folder / made) != wanted:
            problem = problem or f"other bytes than undisturbed: {again.text[-200:]}"
        arena.note(f"killed after {moment:.2f} s", problem or ", ".join(litter(folder)))


@attack("kill generate", SAME)
def kill_generate(arena: Arena) -> None:
    killed_jobs(
        arena,
        lambda data: (
            *("demotools", "generate", "GoToLocal", "--episodes", 600, "--workers", 2),
            *("--data-dir", data),
        ),
        "GoToLocal.zarr",
    )


@attack("kill convert", SAME)
def kill_convert(arena: Arena) -> None:
    source = arena.folder / "source"
    world.store(source, 300)
    file = world.legacy_pickle(source)
    killed_jobs(
        arena,
        lambda data: ("demotools", "convert", file, "--data-dir", data),
        f"{world.LEVEL}.zarr",
    )


@attack("kill shrink", SAME)
def kill_shrink(arena: Arena) -> None:
    store = world.store(arena.folder / "source", 400)
    killed_jobs(
        arena,
        lambda data: (
            *("demotools", "shrink", store, "--episodes", 300, "--name", "twin"),
            *("--data-dir", data),
        ),
        "twin.zarr",
    )


@attack("kill archive", SAME)
def kill_archive(arena: Arena) -> None:
    store = world.store(arena.folder / "source", 400)
    killed_jobs(arena, lambda data: ("demotools", "archive", store, "-o", data / "a.zip"), "a.zip")


@attack("kill unarchive", SAME)
def kill_unarchive(arena: Arena) -> None:
    source = arena.folder / "source"
    world.store(source, 400)
    file = world.archive(source)
    killed_jobs(
        arena,
        lambda data: ("demotools", "unarchive", file, "--name", "back", "--data-dir", data),
        "back.zarr",
    )


@attack(
    "kill an overwrite",
    "a reader finds the old store or the new one, never neither and never a mixture",
)
def kill_overwrite(arena: Arena) -> None:
    data = arena.folder / "data"
    parent = world.store(data, 400)

    def twin(episodes: int) -> tuple[object, ...]:
        return (
            *("demotools", "shrink", parent, "--episodes", episodes, "--name", "twin"),
            *("--data-dir", data, "--overwrite"),
        )

    digests = {}
    took = 0.0
    for episodes in (100, 200):
        start = time.monotonic()
        ended(started(*twin(episodes)))
        took = time.monotonic() - start
        digests[episodes] = digest(data / "twin.zarr")
    while arena.time_left:
        moment = arena.dice.uniform(0.3, 1.02) * took
        process = started(*twin(arena.dice.choice([100, 200])))
        time.sleep(moment)
        kill(process)
        answer = typed("demotools", "verify", "twin", "--data-dir", data)
        problem = answer.problem or (answer.text[-200:] if answer.code else "")
        again = ended(started(*twin(100)))
        problem = problem or again.problem
        if digest(data / "twin.zarr") != digests[100]:
            problem = problem or "the overwrite that followed made other bytes"
        arena.note(f"killed after {moment:.2f} s", problem)


def weights(folder: Path) -> list[torch.Tensor]:
    """Of the last checkpoint of a run."""
    content = torch.load(folder / "last.pt", weights_only=True)
    return list(content["model"].values())


@attack("kill a run", "killed at any moment and resumed, it ends with the same weights")
def kill_run(arena: Arena) -> None:
    data = arena.folder / "data"
    world.store(data, 60)
    # as many steps as take about as long as its start: most kills then meet the loop
    longer = ("--set", "stages.0.max_demo_steps=4_000", "--set", "run.save_every_demo_steps=250")
    start = time.monotonic()
    first = ended(started(*world.tiny_run(data, arena.folder / "undisturbed"), *longer))
    took = time.monotonic() - start
    arena.note("undisturbed", first.problem)
    wanted = weights(arena.folder / "undisturbed")
    number = 0
    while arena.time_left:
        folder = arena.folder / f"killed-{(number := number + 1)}"
        command = (*world.tiny_run(data, folder), *longer)
        moment = arena.dice.uniform(0.4, 1.02) * took
        process = started(*command)
        time.sleep(moment)
        kill(process)
        flag = "--resume" if (folder / "last.pt").is_file() else "--overwrite"
        again = ended(started(*command, flag))
        problem = again.problem or (again.text[-200:] if again.code else "")
        if not problem and not all(map(torch.equal, weights(folder), wanted)):
            problem = f"other weights after {flag}"
        arena.note(f"killed after {moment:.2f} s", problem)
