from __future__ import annotations

import errno
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numcodecs import blosc
from numpy.typing import NDArray

from demotools.babyai.cells import Encoding
from demotools.errors import DemotoolsError, ManifestError, PickleError, StoreError
from demotools.pickles.convert import ConvertOptions, convert_files
from demotools.pickles.encoding import guessed_level_and_split
from demotools.pickles.writer import write_pickle
from demotools.store.reading import Store, open_store
from tests.conftest import make_episodes
from tests.store.test_building import folder_bytes

QUIET = ConvertOptions(quiet=True, workers=1)
Rows = list[tuple[str, NDArray[np.uint8], list[int], list[int]]]


class _InertUnpickler(pickle.Unpickler):
    """An independent reading of trusted files: the action class is the integer itself."""

    def find_class(self, module: str, name: str) -> object:
        if name == "getattr":
            return lambda _owner, _name: int
        if name in ("MiniGridEnv", "MiniGridEnv.Actions"):
            return int
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def independent_rows(path: Path) -> Rows:
    with path.open("rb") as stream:
        demos = _InertUnpickler(stream).load()
    return [
        (mission, pickle.loads(blosc.decompress(frame)), directions, actions)
        for mission, frame, directions, actions in demos
    ]


def independent_cell(cell: NDArray[np.uint8], day: str) -> tuple[int, int, int]:
    """A cell that is in sight, in today's encoding, by the table of the facts."""
    kind, colour, state = cell.tolist()
    if day == "2018-11-10":
        kind += 1  # the second encoding begins with `unseen`
    if day != "2020-07-20":
        if kind in (4, 5):
            return (4, colour, 0 if state == 1 else {4: 1, 5: 2}[kind])
        kind = kind - 1 if kind > 5 else kind
    return (kind, colour, state)


def independent_sight(view: NDArray[np.uint8]) -> set[tuple[int, int]]:
    """The cells in sight of a view of 2018-11-10, spread one by one from the agent's cell."""

    def clear(i: int, j: int) -> bool:
        kind, _colour, state = view[i, j].tolist()
        return kind != 1 and not (kind in (3, 4) and state == 0)

    seen = {(3, 6)}
    for j in range(6, 0, -1):
        for i in range(6):
            if (i, j) in seen and clear(i, j):
                seen |= {(i + 1, j), (i + 1, j - 1), (i, j - 1)}
        for i in range(6, 0, -1):
            if (i, j) in seen and clear(i, j):
                seen |= {(i - 1, j), (i - 1, j - 1), (i, j - 1)}
    return seen


def convert_one(path: Path, folder: Path, options: ConvertOptions = QUIET) -> Store:
    return open_store(convert_files([path], folder, options).path)


def test_the_real_file_of_2018_converts(real_demos: Path, tmp_path: Path) -> None:
    path = real_demos / "BabyAI-GoToLocal-v0_agent.pkl"
    converted = convert_files([path], tmp_path, QUIET)
    store = open_store(converted.path)
    assert (store.episodes, store.steps, len(store.mission_text)) == (1000, 5511, 36)
    assert store.attributes.source["files"][0]["encoding"] == "2018-11-16"
    assert "2018-11-16 to 2019-01-08" in converted.text()
    rows = independent_rows(path)
    expected = np.concatenate([images for _mission, images, _d, _a in rows]).copy()
    assert not np.isin(expected[..., 0], (4, 5)).any()  # this level has no doors
    expected[..., 0] -= expected[..., 0] > 5
    np.testing.assert_array_equal(store.images(0, 5511), expected)
    missions = [store.mission_text[row] for row in store.episode_mission]
    assert missions == [row[0] for row in rows]
    for array, column in ((store.direction, 2), (store.action, 3)):
        steps = np.concatenate([row[column] for row in rows])
        np.testing.assert_array_equal(array.span(0, 5511), steps)


def test_the_named_object_stands_ahead_at_the_end_of_the_real_file(
    real_demos: Path, tmp_path: Path
) -> None:
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX

    store = convert_one(real_demos / "BabyAI-GoToLocal-v0_agent.pkl", tmp_path)
    seen = 0
    for episode in range(store.episodes):
        last = int(store.episode_offset[episode + 1]) - 1
        if store.action.span(last, last + 1)[0] == 2:
            words = store.mission_text[store.episode_mission[episode]].split()
            kind, colour, _state = store.images(last, last + 1)[0, 3, 4]
            assert (kind, colour) == (OBJECT_TO_IDX[words[-1]], COLOR_TO_IDX[words[-2]])
            seen += 1
    assert seen == 556


@pytest.mark.parametrize("level", ["GoToLocal", "Unlock"])
@pytest.mark.parametrize(
    ("day", "encoding"),
    [("2018-11-10", "2018-08-28"), ("2018-12-15", "2018-11-16"), ("2020-07-20", "2019-01-08")],
)
def test_dated_files_are_told_right_and_recoded(
    real_demos: Path, tmp_path: Path, day: str, encoding: str, level: str
) -> None:
    path = real_demos / day / f"BabyAI-{level}-v0.pkl"
    store = convert_one(path, tmp_path)
    assert store.attributes.source["files"][0]["encoding"] == encoding
    assert store.attributes.level == level
    views = np.concatenate([images for _mission, images, _d, _a in independent_rows(path)])
    recoded = store.images(0, store.steps)
    for view, found in zip(views, recoded, strict=True):
        seen = independent_sight(view) if day == "2018-11-10" else None
        for i, j in np.ndindex(7, 7):
            hidden = seen is not None and (i, j) not in seen
            cell = (0, 0, 0) if hidden else independent_cell(view[i, j], day)
            assert tuple(found[i, j].tolist()) == cell


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BabyAI-GoToLocal-v0.pkl", ("GoToLocal", "train")),
        ("BabyAI-GoToLocal-v0_valid.pkl", ("GoToLocal", "valid")),
        ("BabyAI-GoToLocal-v0_agent.pkl", ("GoToLocal", "train")),
        ("BabyAI-GoToLocal-v0_agent_valid.pkl", ("GoToLocal", "valid")),
        ("BabyAI-BossLevel-v0_shard12.pkl", ("BossLevel", "train")),
        ("GoTo.pkl", ("GoTo", "train")),
    ],
)
def test_level_and_split_come_from_the_file_name(name: str, expected: tuple[str, str]) -> None:
    assert guessed_level_and_split(name) == expected


def pickled(demos: object, protocol: int = 4) -> bytes:
    return pickle.dumps(demos, protocol)


def frame(images: NDArray[np.uint8]) -> bytes:
    packed: bytes = blosc.compress(pickle.dumps(images), b"blosclz", 9, blosc.SHUFFLE)
    return packed


VIEWS = np.tile(np.array([[2, 5, 0]], np.uint8), (3, 7, 7, 1))
GOOD = ("go to the red ball", frame(VIEWS), [0, 0, 1], [2, 1, 2])

DAMAGED: dict[str, tuple[bytes, str]] = {
    "names os.system": (b"\x80\x03cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "names os.system"),
    "names eval": (b"\x80\x03cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "names builtins.eval"),
    "names numpy.load": (
        b"\x80\x04\x8c\x05numpy\x8c\x04load\x93\x8c\x01x\x85R.",
        "names numpy.load",
    ),
    "nests getattr": (
        b"\x80\x03cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(cgym_minigrid.minigrid\n"
        b"MiniGridEnv\nX\x07\x00\x00\x00ActionstRX\x09\x00\x00\x00__class__tR.",
        "calls getattr(Actions, '__class__')",
    ),
    "a web page": (b"<!DOCTYPE html><html>quota exceeded</html>", "a web page"),
    "a gzip": (b"\x1f\x8b\x08\x00abc", "this gzip file is cut short"),
    "nothing": (b"", "the file is empty"),
    "an empty list": (pickled([]), "an empty list"),
    "a dictionary": (pickled({"room_size": 8}), "holds a dict"),
    "fewer images than actions": (
        pickled([("go", frame(VIEWS[:2]), [0, 0, 1], [2, 1, 2])]),
        "2 images for 3 actions",
    ),
    "no steps": (pickled([("go", frame(VIEWS[:0]), [], [])]), "no steps"),
    "an action of 7": (pickled([(*GOOD[:3], [2, 7, 2])]), "one of its actions is 7"),
    "a direction of 4": (pickled([(*GOOD[:2], [0, 0, 4], GOOD[3])]), "one of its directions is 4"),
    "a mission that is no text": (pickled([(17, *GOOD[1:])]), "its mission is an int, not text"),
    "a frame instead of a file": (frame(VIEWS), "a blosc frame"),
}


@pytest.mark.parametrize(("content", "what"), DAMAGED.values(), ids=DAMAGED.keys())
def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(content)
    options = ConvertOptions(quiet=True, workers=1, encoding=Encoding.TODAY)
    with pytest.raises(PickleError) as caught:
        convert_files([path], tmp_path / "data", options)
    assert what in caught.value.what
    assert caught.value.path == str(path)
    assert caught.value.fix
    left = list((tmp_path / "data").glob("*")) if (tmp_path / "data").exists() else []
    assert [file.name for file in left if file.suffix != ".lock"] == []


def test_a_truncated_file_is_refused_and_salvage_takes_what_is_whole(
    real_demos: Path, tmp_path: Path
) -> None:
    content = (real_demos / "BabyAI-GoToLocal-v0_agent.pkl").read_bytes()
    path = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PickleError, match="cut short: it ends at byte 298559") as caught:
        convert_one(path, tmp_path / "data")
    assert "--salvage" in caught.value.fix
    whole = convert_one(real_demos / "BabyAI-GoToLocal-v0_agent.pkl", tmp_path / "whole")
    part = convert_one(path, tmp_path / "data", ConvertOptions(quiet=True, salvage=True))
    assert 480 < part.episodes < 520
    np.testing.assert_array_equal(part.view.span(0, part.steps), whole.view.span(0, part.steps))
    assert part.attributes.source["files"][0]["broken_at"] == len(content) // 2


def test_an_unknown_level_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    path = tmp_path / "BabyAI-GoToLocl-v0.pkl"
    path.write_bytes(pickled([GOOD]))
    with pytest.raises(ManifestError, match="GoToLocal"):
        convert_one(path, tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"cos\nsystem\n."])
def test_a_level_that_nobody_named_is_not_said_to_be_unknown(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="cannot be inferred from the file's name") as refused:
        convert_one(path, tmp_path / "data")
    assert (refused.value.path, refused.value.fix[:11]) == (str(path), "add --level")
    with pytest.raises(ManifestError, match="there is no such level"):
        convert_one(path, tmp_path / "data", replace(QUIET, level="evil"))


def test_an_existing_store_is_kept_without_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(pickled([GOOD]))
    options = ConvertOptions(quiet=True, encoding=Encoding.TODAY)
    store = convert_one(path, tmp_path, options)
    with pytest.raises(StoreError, match="--overwrite"):
        convert_one(path, tmp_path, options)
    assert open_store(store.path).steps == 3
    again = ConvertOptions(quiet=True, encoding=Encoding.TODAY, overwrite=True)
    assert convert_one(path, tmp_path, again).steps == 3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemotoolsError, match="no such file"):
        convert_one(tmp_path / "BabyAI-GoToLocal-v0.pkl", tmp_path)


def test_a_file_that_does_not_tell_its_encoding_is_refused_with_the_evidence(
    tmp_path: Path,
) -> None:
    path = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(pickled([GOOD]))
    with pytest.raises(PickleError, match="1 episodes read as") as caught:
        convert_one(path, tmp_path)
    assert "--encoding" in caught.value.fix


def test_a_bad_episode_far_behind_ends_the_conversion_and_leaves_nothing(tmp_path: Path) -> None:
    path = make_demo_file(tmp_path)
    content = path.read_bytes()
    # the blosc header of the last frame announces another size
    at = content.rindex(b"\x02\x01\x01\x01") + 4
    path.write_bytes(content[:at] + b"\x07" + content[at + 1 :])
    for workers in (1, 2):
        options = ConvertOptions(quiet=True, encoding=Encoding.TODAY, workers=workers)
        with pytest.raises(PickleError, match="episode 3071 is malformed"):
            convert_files([path], tmp_path / "data", options)
        left = [file for file in (tmp_path / "data").iterdir() if file.suffix != ".lock"]
        assert left == []


def test_bad_episodes_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(pickled([GOOD, (17, *GOOD[1:]), GOOD, ("go", b"no frame", [0], [0]), GOOD]))
    options = ConvertOptions(quiet=True, encoding=Encoding.TODAY, on_error="skip")
    converted = convert_files([path], tmp_path, options)
    assert converted.episodes == 3
    (source,) = converted.source["files"]
    assert [number for number, _reason in source["skipped"]] == [1, 3]
    assert "left out 2 episodes" in converted.text()


def make_demo_file(folder: Path, name: str = "BabyAI-GoToLocal-v0.pkl", parts: int = 3) -> Path:
    """A file of so many parts, in today's encoding."""
    path = folder / name
    blocks = [make_episodes([64] * 1024, seed) for seed in range(parts)]
    write_pickle(path, blocks)
    return path


def convert_command(path: Path, folder: Path) -> list[str]:
    program = "from demotools import cli; cli.main()"
    options = ["--data-dir", str(folder), "--encoding", "2019-01-08", "--workers", "2", "-q"]
    return [sys.executable, "-c", program, "convert", str(path), *options]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    path = make_demo_file(tmp_path)
    stores = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        options = ConvertOptions(quiet=True, encoding=Encoding.TODAY, workers=workers)
        convert_files([path], folder, options)
        stores.append(folder_bytes(folder / "GoToLocal.zarr"))
    assert all(store == stores[0] for store in stores)
    store = open_store(tmp_path / "1" / "GoToLocal.zarr")
    expected = np.concatenate([make_episodes([64] * 1024, seed).view for seed in range(3)])
    np.testing.assert_array_equal(store.view.span(0, store.steps), expected)


def kill_and_rerun(path: Path, folder: Path, seconds: float) -> dict[str, bytes]:
    """The store of a conversion that was killed after so long, and run again."""
    killed = subprocess.Popen(convert_command(path, folder))
    try:
        killed.wait(seconds)
    except subprocess.TimeoutExpired:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    # where the store has its name already, the same command refuses, and clears what else there is
    refused = (folder / "GoToLocal.zarr").exists()
    again = subprocess.run(convert_command(path, folder), capture_output=True, text=True)
    assert again.returncode == refused, again.stderr
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".lock") == [
        "GoToLocal.zarr"
    ]
    return folder_bytes(folder / "GoToLocal.zarr")


def check_kills(folder: Path, kills: int, parts: int) -> None:
    path = make_demo_file(folder, parts=parts)
    started = time.perf_counter()
    subprocess.run(convert_command(path, folder / "whole"), check=True)
    seconds = time.perf_counter() - started
    whole = folder_bytes(folder / "whole" / "GoToLocal.zarr")
    dice = random.Random(0)
    for number in range(kills):
        moment = dice.uniform(0.2, 1) * seconds
        assert kill_and_rerun(path, folder / str(number), moment) == whole


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=2, parts=3)


@pytest.mark.slow
def test_thirty_killed_conversions_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=30, parts=6)


def test_a_rerun_decodes_only_the_parts_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_demo_file(tmp_path)
    options = ConvertOptions(quiet=True, encoding=Encoding.TODAY, workers=1)

    def disk_full(*_arguments: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", disk_full)  # when the store is whole, before it has its name
        with pytest.raises(DemotoolsError, match="no space left on device"):
            convert_files([path], tmp_path / "data", options)
    parts = sorted((tmp_path / "data" / ".GoToLocal.zarr.building" / "parts").iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    before = [parts[0].stat().st_mtime_ns, parts[2].stat().st_mtime_ns]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", disk_full)  # when the store is whole, before it has its name
        with pytest.raises(DemotoolsError, match="no space left on device"):
            convert_files([path], tmp_path / "data", options)
    assert parts[1].exists()
    assert [parts[0].stat().st_mtime_ns, parts[2].stat().st_mtime_ns] == before


def test_shards_make_one_store_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    paths = []
    for number in (10, 2, 1):
        path = tmp_path / f"BabyAI-GoToLocal-v0_shard{number}.pkl"
        write_pickle(path, [make_episodes([number, 3], seed=number)])
        paths.append(path)
    options = ConvertOptions(quiet=True, encoding=Encoding.TODAY)
    store = open_store(convert_files(paths, tmp_path / "data", options).path)
    assert np.diff(store.episode_offset).tolist() == [1, 3, 2, 3, 10, 3]
    names = [source["name"] for source in store.attributes.source["files"]]
    assert [name.split("_")[1] for name in names] == ["shard1.pkl", "shard2.pkl", "shard10.pkl"]


def test_files_of_different_levels_are_not_mixed(tmp_path: Path) -> None:
    names = ["BabyAI-GoToLocal-v0_shard1.pkl", "BabyAI-GoTo-v0_shard2.pkl"]
    for name in names:
        write_pickle(tmp_path / name, [make_episodes([2])])
    with pytest.raises(PickleError, match="disagree on the level: GoTo, GoToLocal"):
        convert_files([tmp_path / name for name in names], tmp_path, QUIET)


def test_rgb_views_are_stored_as_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 56, 56, 3), dtype=np.uint8)
    demos = [("go to a door", frame(images[:3]), [0] * 3, [2] * 3)]
    demos += [("go to a key", frame(images[3:]), [0] * 2, [1] * 2)]
    path = tmp_path / "BabyAI-GoToLocal-v0_pixels.pkl"
    path.write_bytes(pickled(demos))
    store = convert_one(path, tmp_path, ConvertOptions(quiet=True, level="GoToLocal"))
    assert not store.packed
    np.testing.assert_array_equal(store.images(0, 5), images)


def test_egocentric_views_can_be_kept_as_images(tmp_path: Path) -> None:
    path = tmp_path / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(pickled([GOOD]))
    store = convert_one(path, tmp_path, ConvertOptions(quiet=True, encoding="image"))
    np.testing.assert_array_equal(store.images(0, 3), VIEWS)


def test_a_full_disk_leaves_no_store(tmp_path: Path) -> None:
    path = make_demo_file(tmp_path)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    command = convert_command(path, tmp_path / "data")
    command[2] = ignore + limit + command[2]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "file too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data" / "GoToLocal.zarr").exists()


def test_a_file_that_is_not_there_is_said_before_its_name_is_asked_for_a_level(
    tmp_path: Path,
) -> None:
    for path in (tmp_path / "nope.pkl", tmp_path):
        with pytest.raises(PickleError, match=r"no such file|a folder"):
            convert_files([path], tmp_path, ConvertOptions())
