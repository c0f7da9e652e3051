"""The writer: whole or not at all, the same bytes whoever wrote the parts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from demotools.errors import DemotoolsError, StoreError, exit_with_message
from demotools.store.building import (
    StoreBuilder,
    chunk_length,
    is_unfinished,
    read_notes,
    read_part,
    write_part,
)
from demotools.store.reading import list_stores, open_store
from demotools.store.remove import planned_removals, remove_store
from tests.conftest import build_store, make_episodes

ABOUT: dict[str, Any] = {
    "level": "GoToLocal",
    "split": "train",
    "environment_id": None,
    "licence": "",
    "citation": "",
    "source": {"kind": "test"},
}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@given(st.integers(1, 200_000_000))
def test_chunks_are_few_equal_and_hold_all_steps(steps: int) -> None:
    length = chunk_length(steps)
    chunks = -(-steps // length)
    assert chunks <= 16
    assert length * chunks - steps <= 4096 * chunks
    assert chunks == 1 or length % 4096 == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=4))
def test_parts_written_in_any_order_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("stores")
    parts = [make_episodes(part, seed=number) for number, part in enumerate(lengths)]
    build_store(folder / "one/A.zarr", *parts)
    with StoreBuilder(folder / "two/A.zarr", {}) as builder:
        for number in reversed(range(len(parts))):
            write_part(builder.parts, number, parts[number], {"n": number})
        assert read_notes(builder.parts, 0) == {"n": 0}
        assert np.array_equal(read_part(builder.parts, 0).view, parts[0].view)
        builder.finish(
            **{
                **ABOUT,
                "environment_id": "BabyAI-GoToLocal-v0",
                "licence": "none",
                "citation": "none",
            }
        )
    assert folder_bytes(folder / "one/A.zarr") == folder_bytes(folder / "two/A.zarr")
    assert not (folder / "two/.A.zarr.building").exists()


def test_an_existing_store_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    build_store(path, make_episodes([3]))
    before = folder_bytes(path)
    with pytest.raises(StoreError, match="already exists"), StoreBuilder(path, {}):
        pytest.fail("the builder must not open")
    assert folder_bytes(path) == before


def test_overwrite_keeps_the_old_store_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    build_store(path, make_episodes([3]))
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        StoreBuilder(path, {"new": 1}, overwrite=True) as builder,
    ):
        write_part(builder.parts, 0, make_episodes([4]), {})
        raise RuntimeError("on purpose")
    assert open_store(path).steps == 3
    with StoreBuilder(path, {"new": 1}, overwrite=True) as builder:
        assert builder.finished_parts() == [0]
        builder.finish(**ABOUT)
    assert open_store(path).steps == 4
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == [
        "A.zarr"
    ]


def test_an_overwrite_killed_between_its_renames_gives_the_old_store_back(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    build_store(path, make_episodes([3]))
    path.rename(tmp_path / ".A.zarr.old")
    with pytest.raises(StoreError, match="already exists"), StoreBuilder(path, {}):
        pytest.fail("the builder must not open")
    assert open_store(path).steps == 3


def test_parts_of_another_job_are_thrown_away_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "A.zarr"
    with StoreBuilder(path, {"seed": 1}) as builder:
        write_part(builder.parts, 0, make_episodes([4]), {})
    with StoreBuilder(path, {"seed": 2, "files": ["a" * 100]}) as builder:
        assert builder.finished_parts() == []
    assert "files differs; seed was 1, is 2\n" in capsys.readouterr().err


def test_costly_parts_of_another_job_are_thrown_away_only_by_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    with StoreBuilder(path, {"seed": 1}, costly=True) as builder:
        write_part(builder.parts, 0, make_episodes([4]), {})
    for costly in (True, False):  # a store of another kind takes no recording's place either
        with pytest.raises(StoreError) as error:
            StoreBuilder(path, {"noise": 0.5}, costly=costly).__enter__()
        assert error.value.what.endswith("noise was absent, is 0.5; seed was 1, is absent")
        assert error.value.path == str(builder.folder)
        assert "its 1 finished part," in error.value.fix
    with StoreBuilder(path, {"seed": 1}, costly=True) as builder:
        assert builder.finished_parts() == [0]
    (builder.folder / "job.json").write_bytes(b"\x1b[2J")
    for content in (b"\x1b[2J", b"{}\n", b'{"seed": '):  # nothing says how it was begun
        (builder.folder / "job.json").write_bytes(content)
        with pytest.raises(StoreError, match="which ones is not known") as error:
            StoreBuilder(path, {}, costly=True).__enter__()
        assert "--overwrite" in error.value.fix and "as before" not in error.value.fix
    (builder.folder / "job.json").write_text(json.dumps(dict.fromkeys(map(str, range(9999)))))
    with pytest.raises(StoreError) as error, StoreBuilder(path, {"seed": 1}, costly=True):
        pytest.fail("the builder must not open")
    assert len(error.value.what) < 500
    with StoreBuilder(path, {}, costly=True, overwrite=True) as builder:
        assert builder.finished_parts() == []


def test_a_second_builder_of_the_same_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    with (
        StoreBuilder(path, {}),
        pytest.raises(StoreError, match="another process"),
        StoreBuilder(path, {}),
    ):
        pytest.fail("the second builder must not open")


def test_a_store_without_episodes_is_refused(tmp_path: Path) -> None:
    with (
        StoreBuilder(tmp_path / "A.zarr", {}) as builder,
        pytest.raises(StoreError, match="no episode"),
    ):
        builder.finish(**ABOUT)
    assert not (tmp_path / "A.zarr").exists()


@pytest.mark.parametrize(
    "missions",
    [
        ["go to a box", "Go to a box!"],
        ["go to a box", "..."],
        [" ".join(f"w{number}" for number in range(n, n + 40_000)) for n in (0, 40_000)],
        ["go to a box", "go " * (1 << 16)],
    ],
    ids=["the same words", "no words", "too many words", "a mission too long"],
)
def test_parts_that_can_never_become_a_store_are_not_kept(
    missions: list[str], tmp_path: Path
) -> None:
    with (
        pytest.raises(StoreError, match="words") as caught,
        StoreBuilder(tmp_path / "A.zarr", {}) as builder,
    ):
        write_part(builder.parts, 0, replace(make_episodes([3, 2]), mission=missions), {})
        builder.finish(**ABOUT)
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []
    assert caught.value.path == str(tmp_path / "A.zarr")


def test_parts_are_kept_where_what_was_written_does_not_read_back(tmp_path: Path) -> None:
    with (
        pytest.raises(DemotoolsError, match="attributes are invalid at level") as caught,
        StoreBuilder(tmp_path / "A.zarr", {}) as builder,
    ):
        write_part(builder.parts, 0, make_episodes([3, 2]), {})
        builder.finish(**{**ABOUT, "level": 5})
    assert builder.finished_parts() == [0]
    assert "Finished work is kept" in caught.value.fix


@pytest.mark.parametrize("parts", [0, 1])
def test_ctrl_c_says_whether_the_same_command_goes_on(
    parts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = StoreBuilder(tmp_path / "A.zarr", {})
    with pytest.raises(SystemExit) as left, exit_with_message(), builder:
        for number in range(parts):
            write_part(builder.parts, number, make_episodes([3]), {})
        raise KeyboardInterrupt
    assert left.value.code == 130
    kept = "; finished work is kept: run the same command again to resume" if parts else ""
    assert capsys.readouterr().err == f"\ninterrupted{kept}\n"
    assert not (tmp_path / "A.zarr").exists()


WRITE = """
import sys
from pathlib import Path
from typing import Any
from demotools.errors import exit_with_message
from tests.conftest import build_store, make_episodes
with exit_with_message():
    build_store(Path(sys.argv[1]), *(make_episodes([5] * 2000, n) for n in range(4)))
"""


def test_a_full_disk_is_said_in_three_parts_and_leaves_the_old_store(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    build_store(path, make_episodes([3]))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "file too large" in done.stderr
    kept = tmp_path / ".A.zarr.building"
    assert f"Finished work is kept in {kept}: run the same command again to resume" in done.stderr
    assert len(list(kept.glob("parts/*.npy"))) == 4
    assert "Traceback" not in done.stderr
    assert open_store(path).steps == 3


def test_a_writer_killed_at_any_moment_leaves_no_half_store(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    random = np.random.default_rng(0)
    whole = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITE, str(path)])
        time.sleep(float(random.uniform(0.3, 1.5)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            whole += 1
            assert open_store(path).steps == 40_000
    subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True)
    assert open_store(path).steps == 40_000


def test_a_read_only_folder_is_said_in_three_parts(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(DemotoolsError, match="permission"), StoreBuilder(tmp_path / "a/A.zarr", {}):
        pytest.fail("the builder must not open")


def test_a_full_disk_before_the_first_part_leaves_nothing(tmp_path: Path) -> None:
    full = DemotoolsError("no space left on device", path="part", fix="free some space")
    with pytest.raises(DemotoolsError) as refused, StoreBuilder(tmp_path / "A.zarr", {}):
        raise full
    assert refused.value.fix == "free some space"
    assert [file.name for file in tmp_path.iterdir()] == [".A.zarr.lock"]


def test_overwriting_a_link_to_a_store_replaces_the_store_and_the_link_stays(
    tmp_path: Path,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = build_store(tmp_path / "elsewhere/Gen.zarr", make_episodes([3])).path
    path = tmp_path / "A.zarr"
    path.symlink_to(target, target_is_directory=True)
    for steps in (4, 5):
        assert build_store(path, make_episodes([steps])).steps == steps
        assert path.is_symlink()
        assert open_store(target).steps == steps
        assert sorted(file.name for file in tmp_path.iterdir()) == ["A.zarr", "elsewhere"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_an_earlier_overwrite_left_aside_is_cleared(tmp_path: Path, kind: str) -> None:
    path, aside = tmp_path / "A.zarr", tmp_path / ".A.zarr.old"
    build_store(path, make_episodes([3]))
    if kind == "link":
        aside.symlink_to(tmp_path, target_is_directory=True)
    else:
        aside.write_bytes(b"x")
    assert build_store(path, make_episodes([4])).steps == 4
    assert not os.path.lexists(aside)


@pytest.mark.parametrize("kind", ["dangling", "loop", "file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_that_is_no_folder_is_refused_before_the_work(
    tmp_path: Path, kind: str, overwrite: bool
) -> None:
    path = tmp_path / "A.zarr"
    if kind == "file":
        path.write_bytes(b"precious")
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    with (
        pytest.raises(StoreError, match="not a folder"),
        StoreBuilder(path, {}, overwrite=overwrite),
    ):
        pytest.fail("the builder must not open")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".A.zarr.lock", "A.zarr"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs the folder /proc of Linux")
def test_a_folder_that_takes_no_files_is_not_mistaken_for_another_process() -> None:
    with (
        pytest.raises(DemotoolsError, match=r"no such file|permission denied") as refused,
        StoreBuilder(Path("/proc/A.zarr"), {}),
    ):
        pytest.fail("the builder must not open")
    assert "another process" not in str(refused.value)


JOB = {"test": "A.zarr"}
PARTS = tuple(make_episodes([3, 2], seed=number) for number in range(3))


def begun(path: Path) -> Path:
    """The building folder of a job that was ended after its parts."""
    with StoreBuilder(path, JOB) as builder:
        for number, episodes in enumerate(PARTS):
            write_part(builder.parts, number, episodes, {"n": number})
        (builder.folder / "missions.json").write_text("left by a joining that was killed")
    return path.with_name(f".{path.name}.building")


def finished(path: Path) -> dict[str, bytes]:
    """The store after the same job has been run again."""
    with StoreBuilder(path, JOB) as builder:
        for number, episodes in enumerate(PARTS):
            if number not in builder.finished_parts():
                write_part(builder.parts, number, episodes, {"n": number})
        builder.finish(**ABOUT)
    return folder_bytes(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return finished(tmp_path_factory.mktemp("whole") / "A.zarr")


@pytest.mark.parametrize("name", ["parts/part-000001.npy", "job.json", "missions.json"])
def test_one_byte_changed_in_what_was_left_changes_nothing(
    name: str, tmp_path: Path, undisturbed: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    kept = begun(tmp_path / "A.zarr")
    size = (kept / name).stat().st_size
    for position in range(0, size, max(size // 25, 1)):
        again = tmp_path / f"again-{position}"
        shutil.copytree(kept, again / kept.name)
        content = bytearray((kept / name).read_bytes())
        content[position] ^= 1
        (again / kept.name / name).write_bytes(content)
        assert finished(again / "A.zarr") == undisturbed
        said = capfd.readouterr().err
        assert ("part 1 of an earlier run was damaged" in said) == ("part-" in name)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def lengthened(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def of_another_number(file: Path) -> None:
    shutil.copy(file.with_name("part-000000.npy"), file)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "damage",
    [cut, lengthened, of_another_number, emptied, a_pipe, a_folder],
    ids=lambda f: f.__name__,
)
def test_a_part_that_is_not_as_it_was_written_is_made_again(
    damage: Callable[[Path], None],
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(begun(tmp_path / "A.zarr") / "parts/part-000001.npy")
    assert finished(tmp_path / "A.zarr") == undisturbed
    assert "part 1 of an earlier run was damaged and will be redone" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["parts/part-x.npy", "parts/part-1.npy", "parts/foo", "foo", "A.zarr"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_what_does_not_belong_among_the_parts_is_cleared(
    name: str, kind: str, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    stray = begun(tmp_path / "A.zarr") / name
    if kind == "file":
        stray.write_bytes(b"x")
    elif kind == "folder":
        stray.mkdir()
    else:
        os.mkfifo(stray)
    assert finished(tmp_path / "A.zarr") == undisturbed


@pytest.mark.parametrize("name", ["", "parts", "job.json"])
@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_a_building_folder_of_another_kind_is_begun_anew(
    name: str, kind: str, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    place = begun(tmp_path / "A.zarr") / name
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    before = folder_bytes(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
    if kind == "file":
        place.write_bytes(b"x")
    elif kind == "link":
        place.symlink_to(elsewhere)
    else:
        os.mkfifo(place)
    assert finished(tmp_path / "A.zarr") == undisturbed
    assert before == (folder_bytes(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes())


CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir")


def killed_before_call(
    last: int, act: Callable[[], object], names: Sequence[str] = CHANGES
) -> bool:
    """Whether a process that does this was ended before its call `last` that changes a folder."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        return status == 9
    done = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if done == last:
                os._exit(9)
            done += 1
            return call(*arguments, **options)

        return stand_in

    try:
        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        act()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("old", [0, 3])
def test_a_kill_at_any_rename_loses_neither_the_store_nor_the_parts(
    old: int, tmp_path: Path
) -> None:
    seen = []
    for last in range(20):
        path = tmp_path / str(last) / "A.zarr"
        if old:
            build_store(path, make_episodes([old]))
        opened = partial(StoreBuilder, path, {"seed": 1}, overwrite=True, costly=True)
        with opened() as builder:
            write_part(builder.parts, 0, make_episodes([4]), {})

        def finish(builder: StoreBuilder) -> None:
            with builder:
                builder.finish(**ABOUT)

        killed = killed_before_call(last, partial(finish, opened()), ("rename",))
        try:
            seen.append(open_store(path).steps)
        except StoreError as error:
            assert error.what == "there is no such demo store"
            seen.append(0)
        assert list_stores(path.parent) == ["A"][: seen[-1]]
        assert is_unfinished(path) == (seen[-1] != 4)
        if seen[-1] == 4:  # the next command clears what else was left
            with pytest.raises(StoreError, match="already exists"), StoreBuilder(path, {}):
                pass
        else:
            with opened() as builder:
                assert builder.finished_parts() == [0]
                builder.finish(**ABOUT)
            assert open_store(path).steps == 4
        names = {file.name for file in path.parent.iterdir()}
        assert names - {".A.zarr.lock"} == {"A.zarr"}
        if not killed:
            break
    assert len(seen) > 2
    assert set(seen) == {old, 4}


@pytest.mark.slow
@pytest.mark.parametrize("act", ["overwrite", "remove"])
def test_a_kill_between_any_two_calls_leaves_the_old_store_or_the_new_one(
    act: str, tmp_path: Path
) -> None:
    seen = []
    for last in range(400):
        path = tmp_path / str(last) / "A.zarr"
        build_store(path, make_episodes([3]))
        (removal,) = planned_removals([path])
        work = (
            partial(remove_store, removal)
            if act == "remove"
            else partial(build_store, path, make_episodes([4]))
        )
        killed = killed_before_call(last, work)
        try:
            seen.append(open_store(path).steps)
        except StoreError as error:
            assert error.what == "there is no such demo store", last
            seen.append(0)
        if not killed:
            break
        if seen[-1]:
            # what was set aside never comes back once the store is gone
            remove_store(planned_removals([path])[0])
            assert not path.exists()
            with pytest.raises(StoreError, match="no such demo store"):
                open_store(path)
        assert build_store(path, make_episodes([5])).steps == 5
        names = {file.name for file in path.parent.iterdir()}
        assert names - {".A.zarr.lock"} == {"A.zarr"}
        shutil.rmtree(path.parent)
    else:
        pytest.fail("the calls never end")
    assert len(seen) > 10
    new = 4 if act == "overwrite" else 0
    assert sorted(seen, key=lambda steps: steps == new) == seen
    assert set(seen) == {3, new}


@pytest.mark.slow
def test_a_writer_killed_once_its_store_has_its_name_leaves_nothing_behind(tmp_path: Path) -> None:
    named = 0
    for last in range(400):
        path = tmp_path / str(last) / "A.zarr"
        path.parent.mkdir()
        if not killed_before_call(last, partial(build_store, path, make_episodes([4]))):
            break
        if path.exists():
            named += 1
            with pytest.raises(StoreError, match="already exists"), StoreBuilder(path, {}):
                pass
        else:
            build_store(path, make_episodes([4]))
        assert {file.name for file in path.parent.iterdir()} == {"A.zarr", ".A.zarr.lock"}
    else:
        pytest.fail("the calls never end")
    assert named > 3


def test_a_store_that_cannot_be_emptied_stays_visible(tmp_path: Path) -> None:
    if os.geteuid() == 0 and not Path("/usr/bin/chattr").exists():
        pytest.skip("root removes everything")
    path = tmp_path / "A.zarr"
    build_store(path, make_episodes([3]))
    (removal,) = planned_removals([path])
    with kept_from_removal(path / "mask/c"), pytest.raises(StoreError) as refused:
        remove_store(removal)
    assert "part of this store could not be removed" in refused.value.what
    assert refused.value.path == str(path)
    assert path.is_dir()
    remove_store(planned_removals([path])[0])
    assert [file.name for file in tmp_path.iterdir()] == [".A.zarr.lock"]


@contextmanager
def kept_from_removal(folder: Path) -> Iterator[None]:
    """Nothing can be removed from this folder meanwhile."""
    if os.geteuid():
        folder.chmod(0o500)
        yield
        found = next(file for file in folder.parents[2].rglob(folder.name) if file.is_dir())
        found.chmod(0o700)
        return
    if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        pytest.skip("this file system protects nothing from root")
    yield
    for found in folder.parents[2].rglob("*"):
        subprocess.run(["chattr", "-i", found], capture_output=True, check=False)


def test_overwriting_spares_what_is_not_a_demo_store(tmp_path: Path) -> None:
    path = tmp_path / "A.zarr"
    path.mkdir()
    (path / "precious").write_bytes(b"x")
    with pytest.raises(StoreError, match="not a demo store") as refused:
        build_store(path, make_episodes([3]))
    assert "move it away" in refused.value.fix
    assert folder_bytes(path) == {"precious": b"x"}
