"""The things that are attacked: a store, a pickle, an archive, a run; made by the commands."""

from __future__ import annotations

from pathlib import Path

from tests.attack.campaign import typed

LEVEL = "GoToObj"


def store(data: Path, episodes: int = 40, name: str = LEVEL) -> Path:
    """A store of the bot's first episodes."""
    _must(
        *("demotools", "generate", LEVEL, "--episodes", episodes, "--name", name),
        *("--workers", 1, "--data-dir", data, "-q"),
    )
    return data / f"{name}.zarr"


def legacy_pickle(data: Path, name: str = LEVEL) -> Path:
    """The store as babyai's own pickle."""
    file = data / f"BabyAI-{LEVEL}-v0.pkl"
    _must("demotools", "export", name, "--to", "pickle", "-o", file, "--data-dir", data, "-q")
    return file


def archive(data: Path, name: str = LEVEL) -> Path:
    """The store as one file."""
    _must("demotools", "archive", name, "--data-dir", data, "-q")
    return data / f"{name}.zarr.zip"


def trained(data: Path, folder: Path) -> Path:
    """A run of a few updates on the store, and its folder."""
    _must(*tiny_run(data, folder))
    return folder


def tiny_run(data: Path, folder: Path) -> tuple[object, ...]:
    """The command of a run of a few updates, the same bits every time."""
    return (
        *("trainer", "run", "bc_small_cpu.toml", "--tiny", "-o", folder, "--data-dir", data),
        *("--set", f"run.level={LEVEL}", "--set", f"stages.0.off_policy.store={LEVEL}"),
        *("--set", "run.deterministic=true", "--set", "evaluation=", "-m", 1, "-q"),
    )


def _must(*words: object) -> None:
    answer = typed(*words)
    if answer.code or answer.problem:
        raise RuntimeError(f"{' '.join(map(str, words))}: {answer.problem or answer.text}")
