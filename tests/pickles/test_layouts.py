"""Layouts that other programs write, and files that are something else."""

from __future__ import annotations

import enum
import gzip
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import blosc

from demotools.babyai.cells import Encoding
from demotools.errors import DemotoolsError, PickleError, UnsafePickleError
from demotools.pickles.convert import Converted, ConvertOptions, convert_files
from demotools.pickles.encoding import guessed_level_and_split
from demotools.pickles.writer import write_pickle
from demotools.store.reading import Episodes, Store, open_store
from demotools.store.verify import verify_store
from tests.conftest import make_episodes
from tests.pickles.test_pickles import assert_same, demos_of, read

FAULTS = Path(__file__).parents[3] / "shared" / "data" / "public_faults"
TODAY = ConvertOptions(quiet=True, workers=1, encoding=Encoding.TODAY, level="GoToLocal")
PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


def frame(images: np.ndarray[Any, Any]) -> bytes:
    packed: bytes = blosc.compress(pickle.dumps(images), b"blosclz", 9, blosc.SHUFFLE)
    return packed


def images_of(episodes: Episodes, number: int, more: int = 0) -> np.ndarray[Any, Any]:
    """The images of an episode, the last one repeated `more` times."""
    demo = demos_of(episodes)[number]
    images = pickle.loads(blosc.decompress(demo[1]))
    return np.concatenate([images, *[images[-1:]] * more])


def converted(folder: Path, content: object, protocol: int = 4, **options: Any) -> Converted:
    path = folder / "BabyAI-GoToLocal-v0.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return convert_files([path], folder / "data", ConvertOptions(**{**TODAY.__dict__, **options}))


def assert_holds(result: Converted, episodes: Episodes, seeds: list[int] | None = None) -> Store:
    store = open_store(result.path)
    assert np.diff(store.episode_offset).tolist() == episodes.length.tolist()
    np.testing.assert_array_equal(store.view.span(0, store.steps), episodes.view)
    np.testing.assert_array_equal(store.action.span(0, store.steps), episodes.action)
    np.testing.assert_array_equal(store.direction.span(0, store.steps), episodes.direction)
    assert [store.mission_text[row] for row in store.episode_mission] == episodes.mission
    assert store.episode_seed.tolist() == (seeds or [-1] * len(episodes.length))
    assert all(check.passed for check in verify_store(result.path, quiet=True))
    return store


def assert_read(folder: Path, content: object, protocol: int, episodes: Episodes) -> None:
    path = folder / "demos.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    assert_same(read(path), [episodes])


def steps_of(episodes: Episodes) -> list[list[Any]]:
    """The episodes as lists of (observation, action, reward, done)."""
    listed = []
    for mission, packed, directions, actions in demos_of(episodes):
        images = pickle.loads(blosc.decompress(packed))
        rows = zip(images, directions, actions, strict=True)
        listed.append(
            [
                ({"image": image, "direction": direction, "mission": mission}, action, 0.5, False)
                for image, direction, action in rows
            ]
        )
    return listed


@PROTOCOLS
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[1], [2], [1, 3], [3, 1], [3, 1, 2], [1, 1, 1], [2, 3]],
    ids=lambda lengths: f"{len(lengths)} of {lengths[0]}",
)
def test_a_list_of_steps_is_told_from_a_list_of_episodes_by_what_it_holds(
    tmp_path: Path, protocol: int, with_offset: bool, lengths: list[int]
) -> None:
    episodes = make_episodes(lengths)
    listed: list[Any] = steps_of(episodes)
    demos = [(each, number) for number, each in enumerate(listed)] if with_offset else listed
    assert_read(tmp_path, demos, protocol, episodes)


@pytest.mark.parametrize("protocol", [2, 4])
def test_steps_and_episodes_are_told_apart_at_the_end_of_a_batch(
    tmp_path: Path, protocol: int
) -> None:
    # the pickler writes 1,000 values at once, and a single one that is left in another way
    episodes = make_episodes([1] * 1001)
    assert_read(tmp_path, steps_of(episodes), protocol, episodes)


def test_an_episode_of_one_step_that_is_wrong_is_skipped_alone(tmp_path: Path) -> None:
    demos = steps_of(make_episodes([3, 1, 2]))
    demos[1][0] = (*demos[1][0][:1], 9, 0.5, False)
    result = converted(tmp_path, demos, on_error="skip")
    assert result.source["files"][0]["skipped"] == [
        [1, "one of its actions is 9, outside 0 <= number < 7"]
    ]
    assert np.diff(open_store(result.path).episode_offset).tolist() == [3, 2]


def test_a_list_of_steps_without_episodes_says_so(tmp_path: Path) -> None:
    with pytest.raises(PickleError, match="it is a step, not an episode"):
        converted(tmp_path, steps_of(make_episodes([3]))[0])


def today_enum(reduced: Callable[[Any, int], Any]) -> type[enum.IntEnum]:
    """minigrid's enum of today, pickled in one of the ways of Python 3.11 to 3.13."""

    class Actions(enum.IntEnum):
        left, right, forward, pickup, drop, toggle, done = range(7)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return reduced(self, protocol)

    Actions.__module__, Actions.__qualname__ = "minigrid.core.actions", "Actions"
    return Actions


@PROTOCOLS
@pytest.mark.parametrize(
    "reduced",
    [
        lambda action, _protocol: (type(action), (action.value,)),
        lambda action, _protocol: (getattr, (type(action), action.name)),
    ],
    ids=["by value", "by name"],
)
def test_actions_of_the_enum_of_today_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: int,
    reduced: Callable[[Any, int], Any],
) -> None:
    actions = today_enum(reduced)
    module: Any = types.ModuleType("minigrid.core.actions")
    module.Actions = actions
    monkeypatch.setitem(sys.modules, "minigrid.core.actions", module)
    episodes = make_episodes([3, 1, 40])
    assert_read(tmp_path, demos_of(episodes, actions), protocol, episodes)


def test_an_enum_member_named_as_a_global_is_read(tmp_path: Path) -> None:
    content = pickle.dumps([(*demos_of(make_episodes([1]))[0][:3], ["@"])], 3)
    named = b"cminigrid.core.actions\nActions.pickup\n"
    content = content.replace(b"X\x01\x00\x00\x00@", named)
    assert open_store(converted(tmp_path, content).path).action.span(0, 1).tolist() == [3]


@PROTOCOLS
@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", "i4", "i8", ">i8", "u8", "f4", ">f8"])
def test_arrays_of_numbers_stand_for_lists(tmp_path: Path, protocol: int, dtype: str) -> None:
    episodes = make_episodes([3, 1, 4])
    demos = [
        (mission, packed, np.array(directions, dtype), np.array(actions, dtype).reshape(-1, 1))
        for mission, packed, directions, actions in demos_of(episodes)
    ]
    assert_read(tmp_path, demos, protocol, episodes)


@PROTOCOLS
@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8", "i8", ">u2"])
@pytest.mark.parametrize("as_frame", [True, False])
def test_images_of_whole_numbers_are_read_in_any_type(
    tmp_path: Path, protocol: int, dtype: str, as_frame: bool
) -> None:
    episodes = make_episodes([3, 1])
    demos = []
    for number, (mission, _frame, directions, actions) in enumerate(demos_of(episodes)):
        images = images_of(episodes, number).astype(dtype)
        demos.append((mission, frame(images) if as_frame else images, directions, actions))
    assert_read(tmp_path, demos, protocol, episodes)


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, np.nan, np.inf])
def test_images_that_are_no_bytes_are_not_supported_and_nobody_is_accused(
    tmp_path: Path, value: float
) -> None:
    images = np.full((1, 7, 7, 3), value, np.float32)
    with pytest.raises(PickleError, match="not supported") as caught:
        converted(tmp_path, [("go", frame(images), [0], [2])])
    assert not isinstance(caught.value, UnsafePickleError)


@pytest.mark.parametrize(
    "value",
    [
        *(OrderedDict(a=1), {1, 2}, frozenset([1]), Path("x"), 1j, bytearray(b"x"), range(3)),
        *(np.array(["a"]), np.array([1j]), np.datetime64("2020-01-01"), np.array([None])),
        *({b"a": 1}, {None: 1}, {(0, 1): 1}, {True: 1}, {0.5: 1}, 10**30, -(10**30)),
    ],
    ids=lambda value: type(value).__name__,
)
@PROTOCOLS
def test_harmless_values_that_are_not_read_are_not_called_dangerous(
    tmp_path: Path, value: object, protocol: int
) -> None:
    demo = demos_of(make_episodes([1]))[0]
    try:
        converted(tmp_path, [(*demo, value)], protocol)
    except PickleError as error:
        assert not isinstance(error, UnsafePickleError), error
        assert "not supported" in error.what
        assert "do not load" not in error.fix


@pytest.mark.parametrize(
    "name",
    [
        *("os system", "posix system", "subprocess Popen", "builtins eval", "builtins exec"),
        *("builtins getattr.x", "importlib import_module", "numpy os.system", "numpy load"),
        *("numpy.testing runstring", "shutil rmtree", "pathlib os.system", "datetime sys.modules"),
        *("pickle loads", "torch load", "torch.hub load", "dill loads", "webbrowser open"),
        *("functools partial", "operator attrgetter", "types FunctionType", "sys exit"),
        *("somebody.package os.system", "minigrid.core.actions Actions.__class__.mro"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_names_that_run_code_stay_accused(tmp_path: Path, name: str, protocol: int) -> None:
    module, function = name.split()
    if protocol == 2:
        content = b"\x80\x02(c" + f"{module}\n{function}\n".encode() + b"t."
    else:
        texts = (b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, function))
        content = b"\x80\x04(" + b"".join(texts) + b"\x93t."
    with pytest.raises(UnsafePickleError, match="nothing was run"):
        converted(tmp_path, content)


@pytest.mark.parametrize(
    "name",
    [
        *("gymnasium.spaces.dict Dict", "somebody.demos Episode"),
        *("pathlib PosixPath", "pathlib._local PosixPath"),  # until 3.12, and since 3.13
    ],
)
def test_unknown_names_are_not_supported_and_not_run(tmp_path: Path, name: str) -> None:
    content = b"\x80\x02(c" + name.replace(" ", "\n").encode() + b"\nt."
    with pytest.raises(
        PickleError, match=r"not supported: the pickle names .*nothing was run"
    ) as e:
        converted(tmp_path, content)
    assert not isinstance(e.value, UnsafePickleError)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("extra", "seeded"),
    [
        (lambda seed: (seed,), True),
        (lambda seed: (np.int64(seed),), True),
        (lambda _seed: ([0.0, 0.9],), False),
        (lambda _seed: (1,), False),
        (lambda seed: (["go to it"], seed), True),
        (lambda seed: (["go", "to", "the", "ball"], np.array([0.9]), seed), True),
        (lambda seed: (("a", "b", "c", "d"), 0.9, None, {"seed": seed}), False),
        (lambda seed: (seed, seed), False),
    ],
)
def test_fields_behind_the_first_four_are_left_out_and_said_and_seeds_are_kept(
    tmp_path: Path, protocol: int, extra: Callable[[int], tuple[Any, ...]], seeded: bool
) -> None:
    episodes = make_episodes([3, 1, 2])
    demos = [(*demo, *extra(40 + number)) for number, demo in enumerate(demos_of(episodes))]
    result = converted(tmp_path, demos, protocol)
    assert_holds(result, episodes, [40, 41, 42] if seeded else None)
    left_out = result.source["files"][0]["left_out"]
    assert len(left_out) == len(extra(1)) - seeded
    assert set(left_out.values()) <= {3}
    assert all(what in result.text() for what in left_out)


def test_seeds_of_another_split_are_refused(tmp_path: Path) -> None:
    demos = [(*demos_of(make_episodes([1]))[0], 1_000_000_000)]
    with pytest.raises(PickleError, match="does not belong to the train split") as caught:
        converted(tmp_path, demos)
    assert "--split" in caught.value.fix
    store = open_store(converted(tmp_path, demos, split="valid").path)
    assert store.episode_seed.tolist() == [1_000_000_000]
    with pytest.raises(PickleError, match="does not belong to the valid split"):
        converted(tmp_path, [(*demos[0][:4], 2_000_000_000)], split="valid", overwrite=True)


def tuples(demos: list[Any], images: list[Any]) -> list[Any]:
    return [(m, x, r, a) for (m, _f, r, a), x in zip(demos, images, strict=True)]


LAYOUTS: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "tuples of a frame": lambda d, i: tuples(d, [frame(x) for x in i]),
    "tuples of an array": tuples,
    "tuples of arrays": lambda d, i: tuples(d, [list(x) for x in i]),
    "dictionaries": lambda d, i: [
        {"mission": m, "images": frame(x), "directions": r, "actions": a}
        for (m, _f, r, a), x in zip(d, i, strict=True)
    ],
    "a dictionary of lists": lambda d, i: {
        "images": [frame(x) for x in i],
        "instructions": [demo[0] for demo in d],
        "actions": [demo[3] for demo in d],
        "directions": [demo[2] for demo in d],
    },
    "a dictionary of arrays": lambda d, i: {
        "missions": [demo[0] for demo in d],
        "images": i,
        "directions": [np.array(demo[2]) for demo in d],
        "actions": [np.array(demo[3]) for demo in d],
    },
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_is_read_with_an_observation_more_too(
    tmp_path: Path, protocol: int, more: int, layout: Callable[[list[Any], list[Any]], Any]
) -> None:
    episodes = make_episodes([3, 1, 2])
    images = [images_of(episodes, number, more) for number in range(3)]
    result = converted(tmp_path, layout(demos_of(episodes), images), protocol)
    assert_holds(result, episodes)
    left_out = result.source["files"][0]["left_out"]
    assert left_out == ({"the observation after the last action": 3} if more else {})
    assert ("after the last action" in result.text()) == bool(more)


def test_an_observation_more_goes_with_a_direction_more(tmp_path: Path) -> None:
    episodes = make_episodes([3, 2])
    demos = [
        (mission, images_of(episodes, number, 1), [*directions, 0], actions)
        for number, (mission, _f, directions, actions) in enumerate(demos_of(episodes))
    ]
    assert_holds(converted(tmp_path, demos), episodes)
    demos[1] = (demos[1][0], images_of(episodes, 1), *demos[1][2:])
    with pytest.raises(PickleError, match="2 images for 2 actions, others have one more"):
        converted(tmp_path, demos, overwrite=True)
    alone = [(mission, images[:-1], *rest) for mission, images, *rest in demos[:1]]
    with pytest.raises(PickleError, match="4 directions for 3 actions"):
        converted(tmp_path, alone, overwrite=True)


def test_a_last_step_without_action_is_the_observation_more(tmp_path: Path) -> None:
    episodes = make_episodes([3, 1])
    demos = [[*steps, (*steps[-1][:1], None, 0.0, True)] for steps in steps_of(episodes)]
    result = converted(tmp_path, demos)
    assert_holds(result, episodes)
    assert result.source["files"][0]["left_out"]["the last observation, which has no action"] == 2


def test_a_dictionary_keeps_seeds_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    episodes = make_episodes([3, 1, 2])
    columns = LAYOUTS["a dictionary of lists"](
        demos_of(episodes), [images_of(episodes, number) for number in range(3)]
    )
    result = converted(tmp_path, {**columns, "seeds": np.array([5, 6, 7]), "rewards": [0.1] * 3})
    assert_holds(result, episodes, [5, 6, 7])
    assert result.source["files"][0]["left_out"] == {"the field 'rewards'": 3}
    del columns["directions"]
    result = converted(tmp_path, columns, overwrite=True)
    assert open_store(result.path).direction.span(0, 6).tolist() == [0] * 6
    assert "no directions (0 is stored)" in result.text()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"images": []}, "differ in length"),
        ({"instructions": 7}, "the keys"),
        ({"actions": None}, "the keys"),
    ],
)
def test_a_dictionary_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    episodes = make_episodes([3, 1])
    columns = LAYOUTS["a dictionary of lists"](demos_of(episodes), [images_of(episodes, 0)] * 2)
    with pytest.raises(PickleError, match=f"not supported: .*{what}"):
        converted(tmp_path, {**columns, **change})


@pytest.mark.parametrize("shape", [(3, 7, 7), (3, 56, 56), (1, 40, 40), (4, 20, 30)])
@pytest.mark.parametrize("as_frame", [True, False])
def test_views_with_their_channels_first_are_refused(
    tmp_path: Path, shape: tuple[int, ...], as_frame: bool
) -> None:
    images = np.zeros((2, *shape), dtype=np.uint8)
    demo = ("go", frame(images) if as_frame else images, [0, 0], [2, 2])
    with pytest.raises(PickleError, match="channels before height and width are not supported"):
        converted(tmp_path, [demo])


@pytest.mark.parametrize("size", [176, 600])
def test_large_views_are_stored_as_images(tmp_path: Path, size: int) -> None:
    images = np.full((3, size, size, 3), 7, np.uint8)
    result = converted(
        tmp_path, [("go to a door", frame(images), [0] * 3, [2] * 3)], encoding="auto"
    )
    np.testing.assert_array_equal(open_store(result.path).images(0, 3), images)


def test_what_a_file_as_a_whole_asks_for_is_limited_and_said(tmp_path: Path) -> None:
    big = blosc.compress(pickle.dumps(np.zeros((1, 6000, 6000, 3), np.uint8)), b"zstd", 9, 1)
    demos = [(f"go to door {number}", bytes(big), [0], [2]) for number in range(12)]
    with pytest.raises(PickleError, match=r"limit for a file of .* 1 GiB at least") as caught:
        converted(tmp_path, demos, encoding="auto")
    assert "damaged" not in str(caught.value)


def whole_room(episodes: Episodes) -> Episodes:
    view = episodes.view.copy()
    view[:, 2, 3] = 10 * 18 + 1
    return Episodes(**{**episodes.__dict__, "view": view})


@pytest.mark.parametrize("encoding", ["auto", Encoding.TODAY])
def test_views_of_the_whole_room_are_refused_as_egocentric(tmp_path: Path, encoding: str) -> None:
    room = make_episodes([3, 1])
    room.view[:] = 18  # an empty floor
    with pytest.raises(PickleError, match="whole room") as caught:
        converted(tmp_path, demos_of(whole_room(room)), encoding=encoding)
    assert "--encoding image" in str(caught.value)
    result = converted(tmp_path, demos_of(whole_room(room)), encoding="image")
    assert not open_store(result.path).packed


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros(3))
    return stream.getvalue()


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"\x80\x02.")
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("demos.pkl"))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 12\n" % (b"0" * 64)
OTHERS: dict[str, tuple[bytes, str, str]] = {
    "lfs": (LFS, "Git LFS pointer", "git lfs pull"),
    "torch": (zipped("archive/data.pkl", "archive/version"), "torch.save", "pickle.dump"),
    "old torch": (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "torch.save", "pickle.dump"),
    "npz": (npz(), "NumPy archive", "pickle.dump"),
    "npy": (npy(), "NumPy array", "pickle.dump"),
    "json": (json.dumps([{"mission": "go"}]).encode(), "JSON", "pickle.dump"),
    "indented json": (json.dumps({"a": 1}, indent=1).encode(), "JSON", "pickle.dump"),
    "jsonl": (b'{"mission": "go"}\n{"mission": "go"}\n', "JSON", "pickle.dump"),
    "empty": (b"", "empty", "again"),
    "html": (b"\n <!DOCTYPE html><html>", "web page", "download"),
    "zip": (zipped("demos.pkl"), "zip file", "unzip"),
    "tar": (tar(), "tar archive", "tar -xf"),
    "tar.gz": (gzip.compress(tar()), "tar archive", "tar -xf"),
    "zip.gz": (gzip.compress(zipped("x")), "zip file", "unzip"),
    "bz2": (b"BZh91AY&SY", "bzip2", "bunzip2"),
    "xz": (b"\xfd7zXZ\x00", "xz file", "unxz"),
    "parquet": (b"PAR1\x15\x04", "Parquet", "pickle.dump"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0", "HDF5", "import"),
    "text": (b"go to the red ball\n", "text file", "make_agent_demos"),
    "one byte": (b"\x80", "cut short", "again"),
    "noise": (b"\xde\xad\xbe\xef", "not a pickle", "make_agent_demos"),
}


@pytest.mark.parametrize(("content", "what", "fix"), OTHERS.values(), ids=OTHERS.keys())
def test_other_files_are_refused_as_what_they_are(
    tmp_path: Path, content: bytes, what: str, fix: str
) -> None:
    with pytest.raises(PickleError) as caught:
        converted(tmp_path, content)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.path == str(tmp_path / "BabyAI-GoToLocal-v0.pkl")
    assert [file for file in (tmp_path / "data").glob("*") if file.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("file", "what", "fix"),
    [
        ("other.txt", "without demo files", "name a demo file"),
        ("demos.pkl", "with 1 demo files", "not the folder"),
        ("zarr.json", "a Zarr folder", "demotools info"),
        ("data/metadata.json", "a Minari dataset", "demotools import"),
    ],
)
def test_folders_are_refused_as_what_they_are(
    tmp_path: Path, file: str, what: str, fix: str
) -> None:
    (tmp_path / "x" / file).parent.mkdir(parents=True)
    (tmp_path / "x" / file).write_bytes(b"x")
    with pytest.raises(PickleError) as caught:
        convert_files([tmp_path / "x"], tmp_path / "data", TODAY)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "BabyAI-GoToLocal-v0.pkl")
    with pytest.raises(DemotoolsError, match="a pipe"):
        convert_files([tmp_path / "BabyAI-GoToLocal-v0.pkl"], tmp_path / "data", TODAY)


@pytest.mark.parametrize("name", ["BabyAI-GoToLocal-v0.pkl.gz", "BabyAI-GoToLocal-v0.pkl"])
@pytest.mark.parametrize("members", [1, 3])
def test_a_file_packed_with_gzip_is_read_as_such(tmp_path: Path, name: str, members: int) -> None:
    episodes = make_episodes([3, 1, 2] * 40)
    path = tmp_path / name
    write_pickle(path, [episodes])
    plain = path.read_bytes()
    cuts = np.linspace(0, len(plain), members + 1).astype(int)
    packed = b"".join(gzip.compress(plain[a:b]) for a, b in pairwise(cuts))
    path.write_bytes(packed + bytes(512))
    result = convert_files([path], tmp_path / "data", ConvertOptions(encoding=Encoding.TODAY))
    assert_holds(result, episodes)
    (source,) = result.source["files"]
    assert source["name"] == name
    assert source["size_bytes"] == len(packed) + 512
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(
        file.name for file in (tmp_path / "data").iterdir() if file.suffix != ".lock"
    ) == ["GoToLocal.zarr"]


def test_a_damaged_gzip_is_refused_and_a_short_one_can_be_salvaged(tmp_path: Path) -> None:
    plain = tmp_path / "plain.pkl"
    write_pickle(plain, [make_episodes([3] * 400)])
    packed = gzip.compress(plain.read_bytes())
    with pytest.raises(PickleError, match="gzip file is cut short") as caught:
        converted(tmp_path, packed[: len(packed) // 2])
    assert "--salvage" in caught.value.fix
    assert 100 < converted(tmp_path, packed[: len(packed) // 2], salvage=True).episodes < 300
    wrong = bytearray(packed)
    wrong[-6] ^= 1  # of the checksum
    for content in (bytes(wrong), packed + b"garbage"):
        with pytest.raises(PickleError, match="gzip file is damaged"):
            converted(tmp_path, content, overwrite=True)
    with pytest.raises(PickleError, match=r"names os\.system") as unsafe:
        converted(tmp_path, gzip.compress(b"\x80\x03cos\nsystem\n."), overwrite=True)
    assert unsafe.value.path == str(tmp_path / "BabyAI-GoToLocal-v0.pkl")


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from demotools.pickles import reader as gzipped

    monkeypatch.setattr(gzipped, "_MOST_BYTES", 1 << 24)
    with pytest.raises(PickleError, match="unpacks to more than 16,777,216 bytes"):
        converted(tmp_path, gzip.compress(bytes(1 << 25)))
    assert [file for file in (tmp_path / "data").glob("*") if file.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BabyAI-GoToLocal-v0_agent.pkl.shard3.pkl", ("GoToLocal", "train")),
        ("BabyAI-GoToLocal-v0_agent_valid.pkl.shard10.pkl", ("GoToLocal", "valid")),
        ("BabyAI-GoToLocal-v0_agent.pkl.shard3_valid.pkl", ("GoToLocal", "valid")),
        ("BabyAI-GoToLocal-v0_human.pkl", ("GoToLocal", "train")),
        ("BabyAI-GoToLocal-v0_human_valid.pkl", ("GoToLocal", "valid")),
        ("BabyAI-GoToLocal-v0_valid.pkl.gz", ("GoToLocal", "valid")),
        ("BabyAI-GoToLocal-v0_shard3.pkl.gz", ("GoToLocal", "train")),
        ("BabyAI-GoToLocal-v0_agent_0.pkl", ("GoToLocal", "train")),
        ("BabyAI-GoToLocal-v0-shard-00003-of-00010.pkl", ("GoToLocal", "train")),
        ("GoToLocal.pkl", ("GoToLocal", "train")),
    ],
)
def test_level_and_split_come_from_the_names_of_the_programs(
    name: str, expected: tuple[str, str]
) -> None:
    assert guessed_level_and_split(name) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        *("BabyAI-GoToLocal-v0_shard{}.pkl", "BabyAI-GoToLocal-v0_agent.pkl.shard{}.pkl"),
        *("BabyAI-GoToLocal-v0_agent_shard{}_valid.pkl", "BabyAI-GoToLocal-v0_{}.pkl"),
        *("BabyAI-GoToLocal-v0-shard-{:05}-of-00011.pkl", "BabyAI-GoToLocal-v0_part{}.pkl.gz"),
    ],
)
def test_shards_go_in_the_order_of_their_numbers(tmp_path: Path, pattern: str) -> None:
    paths = []
    for number in (10, 2, 0, 1, 3, 4, 9, 8, 5, 7, 6):
        paths.append(tmp_path / pattern.format(number))
        write_pickle(paths[-1], [make_episodes([number + 1], seed=number)])
        if pattern.endswith("gz"):
            paths[-1].write_bytes(gzip.compress(paths[-1].read_bytes()))
    options = ConvertOptions(quiet=True, workers=1, encoding=Encoding.TODAY)
    store = open_store(convert_files(paths, tmp_path / "data", options).path)
    assert np.diff(store.episode_offset).tolist() == list(range(1, 12))


def test_missions_that_share_tokens_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    demo = demos_of(make_episodes([2]))[0]
    for missions in (["go to the ball", "Go to the ball!"], ["!!!"]):
        with pytest.raises(DemotoolsError) as caught:
            converted(tmp_path, [(mission, *demo[1:]) for mission in missions])
        assert all(repr(mission) in caught.value.what for mission in missions)
        assert caught.value.path == str(tmp_path / "BabyAI-GoToLocal-v0.pkl")
        left = [file for file in (tmp_path / "data").glob(".*") if file.suffix != ".lock"]
        assert left == []


def test_missions_of_any_script_convert(tmp_path: Path) -> None:
    demo = demos_of(make_episodes([2]))[0]
    missions = [
        "빨간 공으로 가라",
        "파란 공으로 가라",
        "go there in 1 steps",
        "go there in 2 steps",
    ]
    missions += ["लाल गेंद", "लोल गेंद", "go to the grüne ball", "go to the gr ne ball"]
    store = open_store(converted(tmp_path, [(text, *demo[1:]) for text in missions]).path)
    assert len({row.tobytes() for row in store.mission_tokens}) == len(missions)


@pytest.mark.parametrize(
    ("name", "episodes"),
    [
        *(("stepwise_one_step_episode", 12), ("today_enum", 12), ("rgb_176", 3)),
        *(("missions_with_numbers", 12), ("missions_not_english", 12), ("seven_fields", 12)),
        *(("one_observation_more", 12), ("array_actions", 12)),
    ],
)
def test_files_of_public_programs_convert(tmp_path: Path, name: str, episodes: int) -> None:
    if not FAULTS.is_dir():
        pytest.skip(f"the folder {FAULTS.name} is not beside this checkout")
    options = ConvertOptions(quiet=True, workers=1, level="GoToLocal")
    result = convert_files([FAULTS / f"{name}.pkl"], tmp_path, options)
    assert result.episodes == episodes
    seeds = open_store(result.path).episode_seed.tolist()
    assert seeds == (list(range(12)) if name == "seven_fields" else [-1] * episodes)


def test_shards_of_public_programs_convert_together(tmp_path: Path) -> None:
    if not FAULTS.is_dir():
        pytest.skip(f"the folder {FAULTS.name} is not beside this checkout")
    options = ConvertOptions(quiet=True, workers=1, encoding=Encoding.TODAY)
    shards = sorted(FAULTS.glob("*shard*"), reverse=True)
    result = convert_files(shards, tmp_path, options)
    names = [source["name"].split("shard")[1] for source in result.source["files"]]
    assert names == ["0.pkl", "1.pkl", "2.pkl", "10.pkl"]
    assert result.path.name == "GoToLocal.zarr"
