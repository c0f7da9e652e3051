from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from demotools.cli import main
from demotools.errors import StoreError
from demotools.exchange.archive import archive_store, archived_attributes, unarchive_store
from demotools.store.reading import Episodes, Store, open_store
from tests.conftest import build_store, make_episodes

Change = Callable[[dict[str, bytes]], object]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store(lengths=[3, 2, 4])


@pytest.fixture
def several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of several chunk files with padding."""
    monkeypatch.setattr("demotools.store.building._CHUNK_STEPS", 9000)
    return build_store(tmp_path / "GoToLocal.zarr", make_episodes([7] * 3001))


def rewritten(file: Path, change: Change, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    file.unlink()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def test_a_store_comes_back_bit_for_bit(several_chunks: Store, tmp_path: Path) -> None:
    assert len(several_chunks.view.chunks) == 3
    file = archive_store(several_chunks.path)
    assert file == tmp_path / "GoToLocal.zarr.zip"
    restored = unarchive_store(file, tmp_path / "back" / "GoToLocal.zarr")
    assert files_of(restored) == files_of(several_chunks.path)
    assert open_store(restored).attributes == several_chunks.attributes


def test_nothing_but_the_result_is_left_beside_it(store: Store, tmp_path: Path) -> None:
    file = archive_store(store.path, tmp_path / "out" / "a.zip")
    unarchive_store(file, tmp_path / "out" / "B.zarr")
    visible = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in visible if not name.endswith(".lock")} == {"a.zip", "B.zarr"}


def test_plain_zarr_reads_an_archive(several_chunks: Store) -> None:
    with zarr.storage.ZipStore(archive_store(several_chunks.path), mode="r") as file:
        group = zarr.open_group(file, mode="r")
        assert sorted(group.array_keys()) == sorted(zarr.open_group(several_chunks.path))
        for name, array in zarr.open_group(several_chunks.path, mode="r").arrays():
            np.testing.assert_array_equal(group[name][:], array[:])  # type: ignore[index]
        assert group.attrs["fingerprint"] == several_chunks.attributes.fingerprint


def test_the_same_store_gives_the_same_archive(store: Store, tmp_path: Path) -> None:
    first = archive_store(store.path, tmp_path / "1.zip").read_bytes()
    assert archive_store(store.path, tmp_path / "2.zip").read_bytes() == first


def test_views_that_are_images_are_archived_too(tmp_path: Path) -> None:
    episodes = make_episodes([3, 4])
    view = np.random.default_rng(0).integers(0, 256, (7, 56, 56, 3), dtype=np.uint8)
    columns = {**vars(episodes), "view": view}
    store = build_store(tmp_path / "Open.zarr", Episodes(**columns), level="Open")
    restored = unarchive_store(archive_store(store.path), tmp_path / "Back.zarr")
    assert files_of(restored) == files_of(store.path)


def test_an_archive_tells_what_it_holds(store: Store) -> None:
    about = archived_attributes(archive_store(store.path))
    assert (about["level"], about["split"], about["steps"]) == ("GoToLocal", "train", 9)
    assert "archived" not in about


def test_neither_way_overwrites(store: Store) -> None:
    file = archive_store(store.path)
    before = file.read_bytes()
    with pytest.raises(StoreError, match="archive already exists"):
        archive_store(store.path)
    with pytest.raises(StoreError, match="store already exists"):
        unarchive_store(file, store.path)
    assert file.read_bytes() == before
    open_store(store.path)


@pytest.mark.parametrize("folder", [".", "..", "/", "data"])
def test_a_folder_in_place_of_the_archive_is_refused(
    store: Store, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.path.parent / "data").mkdir()
    monkeypatch.chdir(store.path.parent)
    result = CliRunner().invoke(main, ["archive", str(store.path), "-o", folder])
    assert result.exit_code == 1
    assert f"name a file: -o {Path(folder, 'GoToLocal.zarr.zip')}" in result.stderr


def test_an_archive_is_replaced_on_request_and_only_by_a_whole_one(
    store: Store, tmp_path: Path
) -> None:
    file = tmp_path / "GoToLocal.zarr.zip"
    file.write_bytes(b"older")
    command = ["archive", "GoToLocal", "--data-dir", str(tmp_path)]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "add --overwrite" in refused.stderr
    assert file.read_bytes() == b"older"
    assert CliRunner().invoke(main, [*command, "--overwrite"]).exit_code == 0
    assert archived_attributes(file)["steps"] == 9
    whole = file.read_bytes()
    (store.path / "action/c/0").write_bytes(b"x")
    assert CliRunner().invoke(main, [*command, "--overwrite"]).exit_code == 1
    assert file.read_bytes() == whole
    folder = CliRunner().invoke(main, [*command, "--overwrite", "-o", str(tmp_path)])
    assert folder.exit_code == 1


def test_a_damaged_store_is_not_archived(several_chunks: Store, tmp_path: Path) -> None:
    chunk = several_chunks.path / "cells/c/1/0/0"
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match="cells/c/1/0/0 fails its checksum"):
        archive_store(several_chunks.path)
    assert not list(tmp_path.glob("*.zip")) + list(tmp_path.glob(".*.building"))


def edit_metadata(name: str, **values: object) -> Change:
    """Change the metadata of one array."""

    def change(members: dict[str, bytes]) -> None:
        file = f"{name}/zarr.json"
        members[file] = json.dumps(json.loads(members[file]) | values).encode()

    return change


def rename_array(new: str) -> Change:
    def change(members: dict[str, bytes]) -> None:
        for name in [name for name in members if name.startswith("mask/")]:
            members[new + name.removeprefix("mask")] = members.pop(name)

    return change


def put(name: str, content: bytes) -> Change:
    return lambda members: members.update({name: content})


def flip(name: str, position: int) -> Change:
    def change(members: dict[str, bytes]) -> None:
        content = bytearray(members[name])
        content[position] ^= 1
        members[name] = bytes(content)

    return change


HUGE = {"name": "regular", "configuration": {"chunk_shape": [1 << 50]}}
HOSTILE: dict[str, Change] = {
    "a member that climbs out": put("../outside", b"x"),
    "an absolute member": put("/tmp/outside", b"x"),
    "an array whose name climbs out": rename_array("../outside"),
    "an array of an absolute name": rename_array("/outside"),
    "a member too many": put("cells/c/9/0/0", b"x"),
    "a missing chunk": lambda members: members.pop("action/c/0"),
    "a missing text": lambda members: members.pop("mission_text/c/0"),
    "no metadata": lambda members: members.pop("zarr.json"),
    "metadata that are no JSON": put("zarr.json", b"{"),
    "metadata that are a list": put("zarr.json", b"[]"),
    "somebody else's group": put("zarr.json", b'{"attributes": {}, "node_type": "group"}'),
    "a flipped bit in a chunk": flip("cells/c/0/0/0", 20),
    "a flipped bit in a checksum": flip("cells/c/0/0/0", -1),
    "a flipped bit in a text": flip("mission_text/c/0", -1),
    "a bomb": put("action/c/0", bytes(1 << 28)),
    "a bomb of metadata": put("zarr.json", b" " * (1 << 27)),
    "a bomb of texts": put("mission_text/c/0", bytes((1 << 28) + 1)),
    "nested metadata": put("zarr.json", b'{"attributes":' + b"[" * 200_000),
    "nested metadata of an array": put("action/zarr.json", b"[" * 200_000),
    "half a character": put("zarr.json", b'{"attributes": {"level": "\\ud800"}}'),
    "text that is no UTF-8": put("zarr.json", b"\xff"),
    "a folder too many": put("more/", b""),
    "a hidden file": put(".DS_Store", b"x"),
    "a chunk of nothing": put("action/c/0", b""),
    "a petabyte of steps": edit_metadata("action", shape=[1 << 50]),
    "a petabyte of padding": edit_metadata("action", chunk_grid=HUGE),
    "a negative shape": edit_metadata("action", shape=[-9]),
    "a shape of text": edit_metadata("action", shape=["9"]),
    "a shape of nothing": edit_metadata("action", shape=[]),
    "a type unknown": edit_metadata("action", data_type="object"),
    "codecs of another kind": edit_metadata("action", codecs=[{"name": "bytes"}]),
    "codecs without names": edit_metadata("action", codecs=7),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_damaged_archive_is_refused(what: str, store: Store, tmp_path: Path) -> None:
    file = rewritten(archive_store(store.path), HOSTILE[what])
    before = {path for path in tmp_path.rglob("*") if not path.name.endswith(".lock")}
    with pytest.raises(StoreError) as failure:
        unarchive_store(file, tmp_path / "Back.zarr")
    assert failure.value.fix
    assert failure.value.path
    after = {path for path in tmp_path.rglob("*") if not path.name.endswith(".lock")}
    assert after == before
    assert not (tmp_path.parent / "outside").exists()


def test_any_zip_program_packs_and_unpacks_an_archive(store: Store, tmp_path: Path) -> None:
    shutil.unpack_archive(archive_store(store.path), tmp_path / "Unpacked.zarr")
    assert files_of(tmp_path / "Unpacked.zarr") == files_of(store.path)
    packed = Path(shutil.make_archive(str(tmp_path / "Packed.zarr"), "zip", store.path))
    assert "cells/" in zipfile.ZipFile(packed).namelist()
    restored = unarchive_store(packed, tmp_path / "Back.zarr")
    assert files_of(restored) == files_of(store.path)


@pytest.mark.parametrize("what", ["twice", "encrypted", "a link", "bzip2"])
def test_a_member_of_a_strange_kind_is_refused(what: str, store: Store, tmp_path: Path) -> None:
    file = archive_store(store.path)
    if what == "encrypted":
        content = bytearray(file.read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1
        file.write_bytes(content)
    elif what == "twice":
        with pytest.warns(UserWarning), zipfile.ZipFile(file, "a") as archive:
            archive.writestr("action/c/0", b"x")
    else:
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, each in members.items():
                about = zipfile.ZipInfo(name)
                if what == "a link" and name == "action/c/0":
                    about.external_attr = 0o120777 << 16
                elif what == "bzip2":
                    about.compress_type = zipfile.ZIP_BZIP2
                archive.writestr(about, each)
    with pytest.raises(StoreError, match="cannot be used"):
        unarchive_store(file, tmp_path / "Back.zarr")


def test_a_member_longer_than_it_announces_is_refused(store: Store, tmp_path: Path) -> None:
    file = archive_store(store.path)
    with zipfile.ZipFile(file) as archive:
        size = archive.getinfo("action/c/0").file_size
    longer = rewritten(file, put("action/c/0", bytes(1000)))
    announced = struct.pack("<I", 1000), struct.pack("<I", size)
    longer.write_bytes(longer.read_bytes().replace(*announced))
    with pytest.raises(StoreError, match="cannot be used"):
        unarchive_store(file, tmp_path / "Back.zarr")


def test_every_byte_of_the_central_directory_is_refused_or_stands_for_nothing(
    store: Store, tmp_path: Path
) -> None:
    file = archive_store(store.path)
    content, good = file.read_bytes(), files_of(store.path)
    for position in range(content.index(b"PK\x01\x02"), len(content), 7):
        changed = bytearray(content)
        changed[position] ^= (0x01, 0x80, 0xFF)[position % 3]
        file.write_bytes(changed)
        try:
            restored = unarchive_store(file, tmp_path / "Back.zarr", overwrite=True, quiet=True)
        except StoreError as refused:
            assert refused.fix
        else:
            assert files_of(restored) == good


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_a_regular_file_is_an_archive(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "A.zarr.zip"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    done = subprocess.run(
        [sys.executable, "-m", "demotools", "unarchive", file, "--data-dir", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "regular file" in done.stderr


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_an_archive_cut_short_is_refused(kept: float, store: Store, tmp_path: Path) -> None:
    file = archive_store(store.path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(StoreError, match="cannot be used"):
        unarchive_store(file, tmp_path / "Back.zarr")


def test_every_flipped_byte_of_a_member_is_found(store: Store, tmp_path: Path) -> None:
    file = archive_store(store.path)
    content = file.read_bytes()
    random = np.random.default_rng(1)
    good = files_of(store.path)
    for position in random.integers(0, len(content), 60):
        changed = bytearray(content)
        changed[position] ^= 0x10
        file.write_bytes(changed)
        try:
            restored = unarchive_store(file, tmp_path / "Back.zarr", overwrite=True)
        except StoreError:
            continue
        assert files_of(restored) == good  # a byte that stands for nothing, such as a date


def test_the_commands_say_what_they_made_and_verify(store: Store, tmp_path: Path) -> None:
    run = CliRunner().invoke
    folder = ["--data-dir", str(tmp_path)]
    made = run(main, ["archive", "GoToLocal", *folder])
    assert made.exit_code == 0, made.output
    assert "GoToLocal.zarr.zip" in made.output
    file = str(tmp_path / "GoToLocal.zarr.zip")
    refused = run(main, ["unarchive", file, *folder])
    assert refused.exit_code == 1
    back = run(main, ["unarchive", file, *folder, "--name", "Copy"])
    assert back.exit_code == 0, back.output
    assert files_of(tmp_path / "Copy.zarr") == files_of(store.path)
    assert run(main, ["verify", "Copy", *folder]).exit_code == 0


PEAK = """
import resource, sys
from pathlib import Path
from demotools.exchange.archive import archive_store, unarchive_store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
file = archive_store(Path(sys.argv[1]), quiet=True)
unarchive_store(file, Path(sys.argv[2]), quiet=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="needs POSIX")
def test_the_memory_of_both_ways_does_not_grow_with_the_chunks(tmp_path: Path) -> None:
    store = build_store(tmp_path / "Big.zarr", *[make_episodes([50] * 40_000, n) for n in range(2)])
    assert (store.path / "cells/c/0/0/0").stat().st_size > 40 << 20
    command = [sys.executable, "-c", PEAK, str(store.path), str(tmp_path / "Back.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # mapped pages of the store count too; the figure without them is in docs/log.md
    assert int(done.stdout) < 400
