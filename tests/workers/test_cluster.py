"""A cluster records the same store bit for bit, whoever dies; unfit workers are refused by name."""

from __future__ import annotations

import json
import os
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from demotools.babyai.cells import Encoding
from demotools.cli import main
from demotools.errors import DemotoolsError, PickleError
from demotools.pickles.convert import ConvertOptions, convert_files
from demotools.pickles.writer import write_pickle
from demotools.recording.record import Recording, generate, planned_recording
from demotools.store.reading import Store, open_store
from demotools.workers.processes import opened_workers

distributed = pytest.importorskip("distributed")

# Dask's own, on its way out of event loops and sockets
pytestmark = pytest.mark.filterwarnings("ignore")

RECORDING = planned_recording("GoToLocal", 120)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("serial") / "GoToLocal.zarr"
    generate(RECORDING, path, workers=1, quiet=True)
    return open_store(path)


@pytest.fixture(scope="module")
def threads() -> Iterator[str]:
    """The address of a cluster of two threads of this process, by TCP."""
    cluster: Any = distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        dashboard_address=None,
    )
    with cluster:
        yield cluster.scheduler_address


def recorded_on(address: str, path: Path, recording: Recording = RECORDING) -> Store:
    generate(recording, path, dask=address, quiet=True)
    return open_store(path)


def same_bits(one: Store, other: Store) -> bool:
    names = {file.relative_to(one.path) for file in one.path.rglob("*") if file.is_file()}
    assert names == {
        file.relative_to(other.path) for file in other.path.rglob("*") if file.is_file()
    }
    return all((one.path / name).read_bytes() == (other.path / name).read_bytes() for name in names)


def test_a_cluster_records_the_same_store(threads: str, serial: Store, tmp_path: Path) -> None:
    assert same_bits(serial, recorded_on(threads, tmp_path / "GoToLocal.zarr"))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["GoToLocal.zarr"]


def test_a_level_that_the_bot_cannot_solve_is_refused_on_a_cluster_too(
    threads: str, tmp_path: Path
) -> None:
    recording = planned_recording("KeyInBox", 60)
    with pytest.raises(DemotoolsError, match=r"the bot cannot solve this level: 0\.0% of 208"):
        recorded_on(threads, tmp_path / "KeyInBox.zarr", recording)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_error_of_a_worker_arrives_in_its_three_parts(threads: str, tmp_path: Path) -> None:
    last = 999_999_999 - 15  # the first part is the last of the split
    recording = planned_recording("UnlockToUnlock", 14, first_seed=last)
    with pytest.raises(DemotoolsError, match="the train seeds are used up") as caught:
        recorded_on(threads, tmp_path / "Unlock.zarr", recording)
    assert caught.value.fix == "start with a lower --seed"


def test_without_a_scheduler_the_message_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demotools.workers.cluster._CONNECT_SECONDS", 0.5)
    address = "tcp://127.0.0.1:9"  # the discard service: nobody listens there
    arguments = ["--episodes", "10", "--data-dir", str(tmp_path), "--dask", address]
    result = CliRunner().invoke(main, ["generate", "GoToLocal", *arguments])
    assert result.exit_code == 1
    assert f"scheduler of the installed version answers\n  where: {address}" in result.stderr
    assert "dask scheduler --port 8786" in result.stderr
    assert "dask worker tcp://HOST:8786" in result.stderr


@pytest.mark.parametrize("address", ["nonsense", "udp://1.2.3.4:5", "tcp://h:x", "tcp://h"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(DemotoolsError, match="not the address of a Dask scheduler") as caught:
        recorded_on(address, tmp_path / "GoToLocal.zarr")
    assert caught.value.path == address


def test_a_scheduler_without_workers_is_told_from_none(tmp_path: Path) -> None:
    cluster: Any = distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp://", dashboard_address=None
    )
    with cluster, pytest.raises(DemotoolsError, match="has no workers"):
        recorded_on(cluster.scheduler_address, tmp_path / "GoToLocal.zarr")


def test_a_number_of_processes_is_wrong_usage_with_a_cluster() -> None:
    options = ["--dask", "tcp://h:1", "--workers", "2"]
    for command in (["generate", "GoTo", "--episodes", "1"], ["convert", "x.pkl"]):
        assert CliRunner().invoke(main, [*command, *options]).exit_code == 2


# --- convert


def test_a_cluster_converts_sharded_pickles_to_the_same_store(
    threads: str, serial: Store, tmp_path: Path
) -> None:
    files = [f"BabyAI-GoToLocal-v0_agent_shard{number}.pkl" for number in range(2)]
    for number, file in enumerate(files):
        write_pickle(tmp_path / file, [serial.take(np.arange(number * 60, number * 60 + 60))])
    for name, how in (("alone", []), ("cluster", ["--dask", threads])):
        # in another folder than the workers, which must find the files all the same
        code = "from demotools.cli import main; main()"
        options = ("--data-dir", ".", "--name", name, "--encoding", "2019-01-08", "--quiet")
        command = [sys.executable, "-c", code, "convert", *files, *options, *how]
        subprocess.run(command, cwd=tmp_path, check=True)
    alone, cluster = (open_store(tmp_path / f"{name}.zarr") for name in ("alone", "cluster"))
    assert same_bits(alone, cluster)
    assert alone.steps == serial.steps


def test_a_damaged_pickle_is_refused_on_a_cluster_as_it_is_alone(
    threads: str, serial: Store, tmp_path: Path
) -> None:
    file = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    episodes = serial.take(np.arange(60))
    last = replace(episodes, action=np.where(np.arange(len(episodes.action)) > 200, 9, 0))
    write_pickle(file, [last], enum_actions=False)
    options = ConvertOptions(encoding=Encoding.TODAY, dask=threads, quiet=True)
    with pytest.raises(PickleError, match="is malformed") as caught:
        convert_files([file], tmp_path, options)
    assert caught.value.path == str(file)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


# --- what a worker must see


def read_text(_folder: Path, file: Path) -> str:
    return file.read_text()


def test_a_worker_that_does_not_see_a_file_says_which(threads: str, tmp_path: Path) -> None:
    with (
        opened_workers(1, tmp_path / "parts", dask=threads) as workers,
        pytest.raises(DemotoolsError, match="worker of the cluster, cannot access this") as caught,
    ):
        workers.submit(read_text, tmp_path / "elsewhere.pkl").result()
    assert caught.value.path == str(tmp_path / "elsewhere.pkl")
    assert "on a path that all machines share" in caught.value.fix


def test_a_worker_that_does_not_see_the_folder_says_so(threads: str, tmp_path: Path) -> None:
    with opened_workers(1, tmp_path / "parts", dask=threads) as workers:
        (shared,) = tmp_path.iterdir()
        shared.rename(tmp_path / "elsewhere")
        with pytest.raises(DemotoolsError, match="cannot access this") as caught:
            workers.submit(read_text, tmp_path).result()
    assert caught.value.path == str(shared)
    assert "--data-dir" in caught.value.fix


def write_after(folder: Path, signal_file: Path) -> None:
    wait_until(signal_file.exists)
    (folder / "part").write_text("late")


def test_a_worker_that_comes_back_when_all_is_over_spoils_nothing(
    threads: str, tmp_path: Path
) -> None:
    parts, go = tmp_path / "parts", tmp_path / "go"
    parts.mkdir()
    with opened_workers(1, parts, dask=threads) as workers:
        workers.submit(write_after, go)
    go.touch()
    wait_until(lambda: distributed_is_idle(threads))
    assert sorted(tmp_path.rglob("*")) == [go, parts]


def distributed_is_idle(scheduler: str) -> bool:
    with distributed.Client(scheduler, set_as_default=False) as client:
        return not any(client.processing().values())


# --- processes


@contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def running_scheduler(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    with process("-m", "dask", "scheduler", *options, "--scheduler-file", str(file)):
        wait_until(lambda: file.is_file() and bool(file.read_bytes()))
        yield json.loads(file.read_bytes())["address"]


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    with running_scheduler(tmp_path) as address:
        yield address


def worker(scheduler: str, name: str, *python: str, **environment: str) -> Any:
    options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name)
    return process(*(python or ("-m", "dask")), "worker", scheduler, *options, **environment)


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)


def wait_for_workers(scheduler: str, number: int) -> None:
    with distributed.Client(scheduler, set_as_default=False) as client:
        client.wait_for_workers(number, timeout=60)


def workers(scheduler: str) -> int:
    with distributed.Client(scheduler, set_as_default=False) as client:
        return len(client.scheduler_info()["workers"])


@pytest.mark.slow
def test_two_of_four_workers_killed_during_the_job_leave_no_trace(
    scheduler: str, tmp_path: Path
) -> None:
    recording = planned_recording("GoToObjMaze", 500)
    generate(recording, tmp_path / "serial.zarr", workers=1, quiet=True)
    path = tmp_path / "data" / "serial.zarr"
    with (
        worker(scheduler, "a") as first,
        worker(scheduler, "b") as second,
        worker(scheduler, "c"),
        worker(scheduler, "d"),
    ):
        wait_for_workers(scheduler, 4)
        command = ("-m", "demotools.cli", "generate", "GoToObjMaze", "--episodes", "500")
        options = ("--dask", scheduler, "--data-dir", str(path.parent), "--name", "serial")
        code = "from demotools.cli import main; main()"
        with process("-c", code, *command[2:], *options) as job:
            parts = path.with_name(f".{path.name}.building") / "parts"
            wait_until(lambda: len(list(parts.glob("*.npy"))) >= 3)
            first.send_signal(signal.SIGKILL)
            wait_until(lambda: len(list(parts.glob("*.npy"))) >= 8)
            second.send_signal(signal.SIGKILL)
            assert not path.exists()  # both died during the job
            assert job.wait(timeout=120) == 0
    assert same_bits(open_store(tmp_path / "serial.zarr"), open_store(path))


@pytest.mark.slow
def test_a_scheduler_that_goes_away_leaves_the_parts_that_are_finished(tmp_path: Path) -> None:
    code = "from demotools.cli import main; main()"
    command = ("generate", "GoToObjMaze", "--episodes", "500", "--data-dir", str(tmp_path))
    parts = tmp_path / ".GoToObjMaze.zarr.building" / "parts"
    with running_scheduler(tmp_path) as address, worker(address, "a"):
        wait_for_workers(address, 1)
        started = subprocess.Popen(
            [sys.executable, "-c", code, *command, "--dask", address], stderr=subprocess.PIPE
        )
        wait_until(lambda: len(list(parts.glob("*.npy"))) >= 2)
    stderr = started.communicate(timeout=60)[1].decode()
    assert started.returncode == 1
    assert stderr.startswith(f"error: the Dask scheduler was lost\n  where: {address}\n  next:  ")
    assert len(list(parts.glob("*.npy"))) >= 2
    assert [path.name for path in parts.parent.iterdir() if path.is_dir()] == ["parts"]


@pytest.mark.slow
def test_a_worker_with_other_versions_or_without_demotools_is_refused_by_name(
    scheduler: str, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "minigrid-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: minigrid\nVersion: 9.9.9\n")
    # without `site` the path files are not read, by which this checkout is installed
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(site.getsitepackages()[0]).iterdir():
        if "demotools" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    path = str(packages)
    bare = f"import sys; sys.path.insert(0, {path!r}); from dask.__main__ import main; main()"
    for name, python, environment, reason in (
        ("older", (), {"PYTHONPATH": str(other.parent)}, r"minigrid 9\.9\.9 instead of"),
        ("bare", ("-S", "-P", "-c", bare), {"PYTHONPATH": ""}, "demotools None instead of"),
    ):
        with worker(scheduler, name, *python, **environment):
            wait_for_workers(scheduler, 1)
            with pytest.raises(DemotoolsError, match=reason) as caught:
                recorded_on(scheduler, tmp_path / "GoToLocal.zarr")
            assert caught.value.path.startswith("tcp://")
        wait_until(lambda: workers(scheduler) == 0)
