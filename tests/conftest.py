"""What every test may use: small worlds on one line, the real files, a command line to type at."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from demotools.babyai.cells import EGOCENTRIC_CODES
from demotools.store.building import StoreBuilder, write_part
from demotools.store.format import aside_folder
from demotools.store.reading import Episodes, Store, open_store
from tests.upload_server import Hub, serving

# On a Python without torch (see noxfile.py) the tests of the trainer are left out, and so are the
# modules that they import.
collect_ignore = [
    file.relative_to(Path(__file__).parent).as_posix()
    for file in Path(__file__).parent.rglob("*.py")
    if importlib.util.find_spec("torch") is None
    and re.search(
        r"^(from|import) (torch|trainer)|^    from trainer", file.read_text("utf-8"), re.M
    )
]
# what it takes away is to be missing in the processes that a test starts, not here
collect_ignore.append("elsewhere")

# A deadline is a timed assertion, which fails where other processes take the processor; and of it
# hypothesis makes the limit of a second for its first ten draws (HealthCheck.too_slow).
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell starts background jobs with Ctrl-C ignored, nohup with hangups ignored, and children
# inherit that: the tests that send these must see what a user sees.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

REAL_DEMOS = Path(__file__).parents[2] / "shared" / "data" / "real_demos"
MISSIONS = ("go to the red ball", "go to a green key", "go to the grey box")


@contextmanager
def without_root() -> Iterator[None]:
    """As nobody, where the tests run as root, for whom every folder can be written."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def make_episodes(lengths: Sequence[int], seed: int = 0) -> Episodes:
    """Episodes of the given lengths with random cells, directions and actions."""
    random = np.random.default_rng(seed)
    steps = int(np.sum(lengths))
    return Episodes(
        length=np.array(lengths, dtype=np.int64),
        mission=[MISSIONS[number % len(MISSIONS)] for number in range(len(lengths))],
        seed=np.arange(len(lengths), dtype=np.int64),
        view=random.integers(0, EGOCENTRIC_CODES, (steps, 7, 7), dtype=np.uint8),
        direction=random.integers(0, 4, steps, dtype=np.uint8),
        action=random.integers(0, 7, steps, dtype=np.uint8),
    )


def build_store(
    path: Path,
    *parts: Episodes,
    level: str = "GoToLocal",
    split: str = "train",
    subgoals: Sequence[str] = (),
) -> Store:
    """A finished store at `path` holding the given parts."""
    with StoreBuilder(path, {"test": path.name}, overwrite=True) as builder:
        for number, episodes in enumerate(parts):
            write_part(builder.parts, number, episodes, {})
        builder.finish(
            level=level,
            split=split,
            environment_id=f"BabyAI-{level}-v0",
            licence="none",
            citation="none",
            source={"kind": "test"},
            subgoals=subgoals,
        )
    return open_store(path)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """`make_store(lengths=[3, 2, 4])` gives an open store of random episodes."""

    def make(lengths: Sequence[int], seed: int = 0, name: str = "GoToLocal") -> Store:
        return build_store(tmp_path / f"{name}.zarr", make_episodes(lengths, seed))

    return make


def set_aside(store: Store) -> Path:
    """The path of a store whose overwrite was killed between its renames: it lies aside."""
    store.path.rename(aside_folder(store.path))
    return store.path


@pytest.fixture
def real_demos() -> Path:
    """The folder of real demo files; the test is skipped where it is absent."""
    if not REAL_DEMOS.is_dir():
        pytest.skip(f"the real demo files are not beside this checkout ({REAL_DEMOS.name})")
    return REAL_DEMOS


@pytest.fixture(scope="session")
def bot_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of the bot's first 60 episodes on GoToLocal, only to be read."""
    from demotools.recording.record import generate, planned_recording

    folder = tmp_path_factory.mktemp("data")
    recording = planned_recording("GoToLocal", 60, split="train", first_seed=None)
    generate(recording, folder / "GoToLocal.zarr", workers=1, overwrite=False, quiet=True)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A stand-in for the Hugging Face hub to which files are sent."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Batches this small are faster on one thread, the more so beside other processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)
