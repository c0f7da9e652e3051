from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest
import trustme
from click.testing import CliRunner, Result

from demotools.babyai.levels import read_archive, read_manifest
from demotools.cli import main
from demotools.exchange.archive import archive_store
from demotools.fetch.job import fetch_plans
from demotools.fetch.part_file import download, part_bytes
from demotools.fetch.places import RefusedError, UnreachableError, place_named
from demotools.fetch.plan import Expected, FetchOptions
from demotools.fetch.transfer import Transfer
from demotools.pickles.writer import write_pickle
from demotools.store.reading import open_store
from tests.conftest import build_store, make_episodes, set_aside, without_root
from tests.drive_server import PERMISSION, QUOTA, QUOTA_JSON, DriveServer, Served

TRAIN = "BabyAI-GoToLocal-v0.pkl"
HASTY = FetchOptions(timeout_seconds=1.0, retries=2, quiet=True)
COMMAND = [sys.executable, "-c", "from demotools.cli import main; main()"]
Fetch = Callable[..., Result]


def drive_id(level: str = "GoToLocal") -> str:
    found = read_manifest(level).files["train"].sources[0].gdrive
    assert found is not None
    return found


ARCHIVE_ID = str(read_archive("copydemos").sources[0].gdrive)


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A legacy file of 40 bot episodes of GoToLocal."""
    folder = tmp_path_factory.mktemp("demos")
    command = ["generate", "GoToLocal", "--episodes", "40", "--workers", "1"]
    made = CliRunner().invoke(main, [*command, "--data-dir", str(folder), "-q"])
    assert made.exit_code == 0, made.output
    store = open_store(folder / "GoToLocal.zarr")
    write_pickle(folder / TRAIN, [store.take(np.arange(store.episodes))])
    return (folder / TRAIN).read_bytes()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DriveServer]:
    """A server that https clients take for Google Drive's, by proxy and certificate authority."""
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    with DriveServer(authority).running() as running:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", running.proxy)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
        yield running


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demotools.fetch.transfer._LONGEST_WAIT_SECONDS", 0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def fetch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """`fetch("GoToLocal")` types the command, impatient and for the training file alone."""
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", "")  # put back after the test: --manifests sets it

    def run(level: str = "GoToLocal", *options: str) -> Result:
        split = [] if "--split" in options else ["--split", "train"]
        hasty = ["--timeout", "1", "--retries", "2", "--data-dir", str(folder)]
        return CliRunner().invoke(main, ["fetch", level, *split, *hasty, *options])

    return run


def refused(result: Result, *words: str) -> str:
    """The message of a failure: exit 1, three parts, each of the words in it.

    Before it on stderr stand only the waits for retries.
    """
    assert result.exit_code == 1, result.output
    waits, start, message = result.stderr.rpartition("error: ")
    assert all(": waiting " in line for line in waits.splitlines()), waits
    message = start + message
    assert re.fullmatch(r"error: .+\n  where: .+\n  next:  .+\n", message, re.DOTALL), message
    for word in words:
        assert word in message, message
    return message


def visible(folder: Path) -> set[str]:
    """What has a final name; the folder of downloads counts where it is empty."""
    downloads = folder / "downloads"
    found = {path for path in folder.rglob("*") if not path.name.startswith(".")}
    return {p.name for p in found if p != downloads or not list(p.iterdir())}


def store_files(folder: Path) -> dict[str, bytes]:
    store = folder / "GoToLocal.zarr"
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


# ------------------------------------------------------------------ what works


def test_a_level_comes_from_behind_drives_form_page_and_becomes_a_store(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(demos)
    done = fetch()
    assert done.exit_code == 0, done.output
    assert open_store(folder / "GoToLocal.zarr").episodes == 40
    assert server.connects == ["drive.google.com:443", "drive.usercontent.google.com:443"]
    record = tomllib.loads((folder / "fetched.toml").read_text())[TRAIN]
    assert record["sha256"] == hashlib.sha256(demos).hexdigest()
    assert record["size_bytes"] == len(demos)
    source = open_store(folder / "GoToLocal.zarr").attributes.source
    assert source["files"][0]["sha256"] == record["sha256"]
    assert source["fetched_from"] == f"gdrive {drive_id()}"
    assert visible(folder) >= {"GoToLocal.zarr", "fetched.toml"}
    assert TRAIN not in visible(folder)


def test_the_real_file_comes_from_behind_the_form_page(
    server: DriveServer, real_demos: Path, fetch: Fetch, folder: Path
) -> None:
    real = real_demos / "BabyAI-GoToLocal-v0_agent.pkl"
    server.files[f"drive/{drive_id()}"] = Served(real)
    assert fetch().exit_code == 0
    store = open_store(folder / "GoToLocal.zarr").attributes
    assert (store.episodes, store.steps, store.missions) == (1000, 5511, 36)
    verified = CliRunner().invoke(main, ["verify", "GoToLocal", "--data-dir", str(folder)])
    assert verified.exit_code == 0, verified.output


def test_nothing_is_written_into_the_home_folder(
    server: DriveServer,
    demos: bytes,
    fetch: Fetch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    server.files[f"drive/{drive_id()}"] = Served(demos)
    assert fetch().exit_code == 0
    assert list(home.rglob("*")) == []


def test_a_second_run_asks_the_server_for_nothing(
    server: DriveServer, demos: bytes, fetch: Fetch
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(demos)
    fetch()
    before = len(server.requests)
    again = fetch()
    assert again.exit_code == 0
    assert "nothing to do" in again.output
    checked = fetch("GoToLocal", "--check")
    assert "every byte of it was checked" in checked.output
    assert len(server.requests) == before


def test_a_store_that_lies_aside_is_not_fetched_again(tmp_path: Path) -> None:
    set_aside(build_store(tmp_path / "GoToLocal.zarr", make_episodes([3])))
    (plan,) = fetch_plans(["GoToLocal"], ["train"], tmp_path, FetchOptions())
    assert plan.reason == "there is another store of this name, of kind test"


def test_the_pickle_is_kept_on_request_and_converted_later(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(demos)
    assert fetch("GoToLocal", "--no-convert").exit_code == 0
    assert (folder / "downloads" / TRAIN).read_bytes() == demos
    assert not (folder / "GoToLocal.zarr").exists()
    assert "nothing to do" in fetch("GoToLocal", "--no-convert").output
    before = len(server.requests)
    assert fetch("GoToLocal", "--keep-pickle").exit_code == 0
    assert len(server.requests) == before
    assert (folder / "downloads" / TRAIN).read_bytes() == demos
    assert open_store(folder / "GoToLocal.zarr").episodes == 40


def test_a_copy_fetched_by_browser_is_taken_and_left_where_it_is(
    demos: bytes, fetch: Fetch, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "uc?export=download (1)"
    copy.write_bytes(demos)
    done = fetch("GoToLocal", "--from", str(copy))
    assert done.exit_code == 0, done.output
    assert open_store(folder / "GoToLocal.zarr").episodes == 40
    assert copy.read_bytes() == demos


def test_any_address_is_taken(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["copies/anything"] = Served(demos)
    assert fetch("GoToLocal", "--from", f"{server.url}/copies/anything").exit_code == 0
    source = open_store(folder / "GoToLocal.zarr").attributes.source
    assert source["url"] == f"{server.url}/copies/anything"


def test_an_archive_of_ours_is_taken_from_any_source(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path, tmp_path: Path
) -> None:
    server.files["demos.pkl"] = Served(demos)
    fetch("GoToLocal", "--from", f"{server.url}/demos.pkl")
    packed = archive_store(folder / "GoToLocal.zarr", tmp_path / "Packed.zarr.zip")
    before = store_files(folder)
    server.files["GoToLocal.zarr.zip"] = Served(packed)
    address = f"{server.url}/GoToLocal.zarr.zip"
    for origin in (str(packed), address, f"{address}?download=true"):
        done = fetch("GoToLocal", "--from", origin, "--overwrite")
        assert done.exit_code == 0, done.output
        assert store_files(folder) == before
    refused(fetch("GoTo", "--from", str(packed)), "holds level GoToLocal, train split", "unarchive")


@pytest.mark.parametrize("level", [None, "", "../GoToObj", "x.zarr.zip", "\x1b[2J", 7])
def test_an_archive_without_a_level_or_with_an_odd_one_is_refused_and_changes_nothing(
    level: object, server: DriveServer, demos: bytes, fetch: Fetch, folder: Path, tmp_path: Path
) -> None:
    server.files["demos.pkl"] = Served(demos)
    fetch("GoToLocal", "--from", f"{server.url}/demos.pkl")
    before = store_files(folder)
    packed = archive_store(folder / "GoToLocal.zarr", tmp_path / "Packed.zarr.zip")
    odd = tmp_path / "Odd.zarr.zip"
    with zipfile.ZipFile(packed) as archive, zipfile.ZipFile(odd, "w") as edited:
        for name in archive.namelist():
            content = json.loads(archive.read(name)) if name == "zarr.json" else None
            if content and level is None:
                del content["attributes"]["level"]
            elif content:
                content["attributes"]["level"] = level
            edited.writestr(name, json.dumps(content) if content else archive.read(name))
    server.files["Odd.zarr.zip"] = Served(odd)
    for origin in (str(odd), f"{server.url}/Odd.zarr.zip"):
        refused(fetch("GoToLocal", "--from", origin, "--overwrite"), "Odd.zarr.zip", "level")
        refused(fetch("GoTo", "--from", origin), "level")
    assert store_files(folder) == before
    assert {path.name for path in folder.glob("*.zarr")} == {"GoToLocal.zarr"}


@pytest.mark.parametrize(
    "level",
    ["Packed.zarr.zip", "./Packed.zarr.zip", "a.pkl", "https://example.org/a.pkl", "hf:me/x/a.pkl"],
)
def test_a_file_or_an_address_in_place_of_a_level_is_told_how_to_be_fetched(
    level: str, fetch: Fetch, folder: Path
) -> None:
    for options in ([], ["-q"], ["--dry-run"], ["--from", "a.zarr.zip"]):
        refused(fetch(level, *options), "not the name of a level", f"where: {level}", "--from FILE")
    assert not folder.exists()


def tar_of(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def test_a_level_without_an_address_of_its_own_comes_out_of_the_archive(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    noise = random.Random(0).randbytes(300_000)
    packed = tar_of(
        {
            "demos/notes.txt": b"x",
            "demos/../../BabyAI-GoToObj-v0.pkl": demos,
            "demos/noise": noise,
            "demos/BabyAI-Open-v0.pkl": demos,
        }
    )
    server.files[f"drive/{ARCHIVE_ID}"] = Served(packed, cuts=[10_000, 50_000])
    done = fetch("GoToObj")
    assert done.exit_code == 0, done.output
    assert "archive copydemos" in done.output
    assert "not published" in done.output
    assert open_store(folder / "GoToObj.zarr").episodes == 40
    assert not (folder / "downloads").exists()


def test_several_levels_come_out_of_one_pass_over_the_archive(
    server: DriveServer, demos: bytes, folder: Path
) -> None:
    members = {f"BabyAI-{level}-v0.pkl": demos for level in ("GoToObj", "GoToRedBall", "Open")}
    server.files[f"drive/{ARCHIVE_ID}"] = Served(tar_of(members))
    command = ["fetch", "GoToObj", "GoToRedBall", "--split", "train", "--data-dir", str(folder)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert {path.name for path in folder.glob("*.zarr")} == {"GoToObj.zarr", "GoToRedBall.zarr"}
    assert len(server.sent) == 1


def test_with_check_the_archives_published_md5_is_compared_at_its_end(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path, tmp_path: Path
) -> None:
    packed = tar_of({"BabyAI-GoToObj-v0.pkl": demos})
    server.files[f"drive/{ARCHIVE_ID}"] = Served(packed)
    refused(fetch("GoToObj", "--check"), "md5 is not the published 1df202ef")
    assert visible(folder) == set()
    ours = tmp_path / "manifests"
    ours.mkdir()
    (ours / "archives.toml").write_text(
        f'[copydemos]\nname = "a.tar.gz"\nmd5 = "{hashlib.md5(packed).hexdigest()}"\n'
        f'sources = [{{ gdrive = "{ARCHIVE_ID}" }}]\n'
    )
    done = fetch("GoToObj", "--check", "--manifests", str(ours))
    assert done.exit_code == 0, done.output


def test_hugging_face_is_asked_through_its_own_package(
    server: DriveServer,
    demos: bytes,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("huggingface_hub")
    commit = "1" * 40
    served = Served(demos, headers={"X-Repo-Commit": commit})
    for revision in ("v1", commit):
        server.files[f"datasets/me/demos/resolve/{revision}/train/a.pkl"] = served
    ours = user_manifest(tmp_path, 'hf = "me/demos/train/a.pkl@v1"')
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    process = start(folder, "--manifests", str(ours))
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    source = open_store(folder / "GoToLocal.zarr").attributes.source
    assert source["fetched_from"] == f"hf me/demos/train/a.pkl@{commit}"
    assert source["files"][0]["sha256"] == hashlib.sha256(demos).hexdigest()
    assert not (tmp_path / "hub").exists()
    assert not (folder / "downloads").exists()

    server.files.clear()
    process = start(folder, "--manifests", str(ours), "--overwrite")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"no source could provide {TRAIN}: hf me/demos/train/a.pkl@v1: the Hugging" in told
    assert "Traceback" not in told


def test_without_the_hubs_package_the_extra_is_named(
    fetch: Fetch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        fetch("GoToLocal", "--from", "hf:me/demos/a.pkl"), "pip install -c constraints.txt '.[hf]'"
    )
    assert visible(folder) == set()


@pytest.mark.parametrize(
    "name", ["me/demos", "me/demos:a.pkl", "me/demos/../a.pkl", "me/demos/@v1"]
)
def test_what_names_no_file_on_the_hub_is_refused(name: str, fetch: Fetch, folder: Path) -> None:
    refused(fetch("GoToLocal", "--from", f"hf:{name}"), "hf:OWNER/NAME/PATH@REVISION")
    assert not folder.exists()


def user_manifest(tmp_path: Path, source: str, more: str = "") -> Path:
    """A folder with a manifest of GoToLocal whose training file has one source."""
    folder = tmp_path / "manifests"
    folder.mkdir(exist_ok=True)
    (folder / "GoToLocal.toml").write_text(
        'level = "GoToLocal"\nenvironment_id = "BabyAI-GoToLocal-v0"\n'
        f'mission_pattern = ".*"\n[files.train]\nname = "{TRAIN}"\n'
        f"sources = [{{ {source} }}]\n{more}"
    )
    return folder


def test_the_dry_run_says_what_would_be_done_and_does_nothing(
    server: DriveServer, fetch: Fetch, folder: Path
) -> None:
    told = fetch("GoToLocal", "--dry-run")
    assert told.exit_code == 0
    assert told.output == (
        f"GoToLocal ({TRAIN}): download, its size is not published\n"
        f"  from gdrive {drive_id()}\n  from archive copydemos\n  from jat babyai-go-to-local\n"
    )
    assert server.requests == []
    assert not folder.exists()


def test_proxy_variables_are_honoured_for_plain_http_too(
    server: DriveServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.proxy)
    monkeypatch.delenv("NO_PROXY")
    refused(fetch("GoToLocal", "--from", "http://example.invalid/a.pkl"), "HTTP 405")
    assert server.connects == ["http://example.invalid/a.pkl"]


# ------------------------------------------------------------------ what goes wrong


def from_url(fetch: Fetch, server: DriveServer, *options: str) -> Result:
    return fetch("GoToLocal", "--from", f"{server.url}/a.pkl", *options)


@pytest.mark.parametrize(
    ("page", "status", "words"),
    [
        (QUOTA, 200, ["quota page", "Sorry, you can't view"]),
        (QUOTA_JSON, 403, ["HTTP 403", "downloadQuotaExceeded"]),
        (PERMISSION, 200, ["permission page", "Sign-in"]),
        ("<html><title>Moved house</title></html>", 200, ["web page", "Moved house"]),
        ("", 404, ["HTTP 404"]),
    ],
)
def test_a_page_of_drive_instead_of_the_file_is_named(
    page: str, status: int, words: list[str], server: DriveServer, fetch: Fetch, folder: Path
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(b"", page=page, page_status=status)
    ways = ["--from FILE", "demotools generate GoToLocal"]
    message = refused(fetch(), *words, *ways, f"gdrive {drive_id()}", "copydemos", "HTTP 404")
    assert ("wait a day" in message) == (page in (QUOTA, QUOTA_JSON))
    assert visible(folder) == set()


def test_when_drive_refuses_the_archive_is_asked(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(b"", page=QUOTA)
    server.files[f"drive/{ARCHIVE_ID}"] = Served(tar_of({f"deep/down/{TRAIN}": demos}))
    assert fetch().exit_code == 0
    source = open_store(folder / "GoToLocal.zarr").attributes.source
    assert source["fetched_from"] == f"gdrive {ARCHIVE_ID}"


def test_a_page_served_as_a_file_is_refused_at_its_first_bytes(
    server: DriveServer, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(QUOTA.encode() + b" " * 5_000_000, pause=0.01)
    refused(from_url(fetch, server), "quota page")
    assert server.body_bytes() < 5_000_000
    assert visible(folder) == set()
    assert not (folder / "downloads").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"demos"), "gzip file"),
        (b"PAR1 rows PAR1", "next:  use `demotools import FILE.parquet`, pass"),
        (b"demos", "not a pickle (first bytes 64656d6f73)"),
        (b"", "cut short|no demo file|not a demo file"),
        (b"\x80\x04K\x01", "cut short"),
        (b"PK\x03\x04 half of an archive", "cut short"),
    ],
)
def test_what_is_no_demo_file_is_refused(
    content: bytes, words: str, server: DriveServer, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(content)
    message = refused(from_url(fetch, server))
    assert re.search(words, message) or words in message
    assert visible(folder) == set()


def test_first_bytes_that_come_one_by_one_are_not_judged_too_early(
    server: DriveServer, fetch: Fetch
) -> None:
    # two bytes of a web page, of an archive or of nothing known look alike
    server.files["a.pkl"] = Served(b"demos", piece=1, pause=0.05)
    assert "first bytes 64656d6f73" in refused(from_url(fetch, server))


def test_a_pickle_that_is_none_of_ours_is_set_aside(
    server: DriveServer, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(b"\x80\x04cos\nsystem\n(S'echo'\ntR.")
    refused(from_url(fetch, server), "cannot be converted", "os")
    assert visible(folder) == {f"{TRAIN}.refused"}


def test_a_connection_cut_twenty_times_still_gives_the_same_bytes(
    server: DriveServer, tmp_path: Path
) -> None:
    chance = random.Random(3)
    content = b"\x80\x04" + chance.randbytes(900_000) + b"."
    cuts = sorted(chance.sample(range(1, 900_000), 20))
    lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
    server.files["a.pkl"] = Served(content, cuts=lengths)
    final = tmp_path / "a.pkl"
    file = download(place_named(f"{server.url}/a.pkl"), final, Expected(), HASTY)
    assert final.read_bytes() == content
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert [sent.start for sent in server.sent] == [0, *cuts]
    assert server.body_bytes() == len(content)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_connection_that_is_always_cut_at_once_ends_and_can_be_resumed(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos, cuts=[1000] + [0] * 3)
    refused(from_url(fetch, server), "3 times in a row", f"after 1,000 of {len(demos):,} bytes")
    assert visible(folder) == set()
    assert from_url(fetch, server).exit_code == 0
    assert server.sent[-1].start == 1000
    assert server.body_bytes() == len(demos)


def test_a_server_that_ignores_ranges_is_read_from_the_start(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos, ranges=False, cuts=[2000, 1000])
    assert from_url(fetch, server).exit_code == 0
    assert [sent.start for sent in server.sent] == [0, 0, 0]
    assert open_store(folder / "GoToLocal.zarr").episodes == 40


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("between_runs", [True, False])
def test_a_file_replaced_between_attempts_is_never_spliced(
    if_range: bool, between_runs: bool, server: DriveServer, demos: bytes, tmp_path: Path
) -> None:
    old = Served(b"\x80\x04" + b"o" * len(demos) + b".", etag='"old"', if_range=if_range)
    new = b"\x80\x04" + b"n" * len(demos) + b"."
    old.cuts = [1500, 0, 0, 0] if between_runs else [1500]
    server.files["a.pkl"] = old
    place, final = place_named(f"{server.url}/a.pkl"), tmp_path / "a.pkl"

    def replace() -> None:
        while not server.sent:
            time.sleep(0.001)
        old.content, old.etag = new, '"new"'

    if between_runs:
        with pytest.raises(RefusedError):
            download(place, final, Expected(), HASTY)
        replace()
    else:
        threading.Thread(target=replace).start()
    download(place, final, Expected(), HASTY)
    assert final.read_bytes() == new


def test_without_a_validator_a_cut_file_is_read_from_the_start(
    server: DriveServer, demos: bytes, fetch: Fetch
) -> None:
    server.files["a.pkl"] = Served(demos, etag=None, cuts=[1000])
    assert from_url(fetch, server).exit_code == 0
    assert [sent.start for sent in server.sent] == [0, 0]


def test_the_hash_that_google_sends_serves_as_validator_where_there_is_no_tag(
    server: DriveServer, demos: bytes, fetch: Fetch
) -> None:
    hashed = {"X-Goog-Hash": "crc32c=AAAAAA=="}
    server.files["a.pkl"] = Served(demos, etag=None, headers=hashed, cuts=[1000])
    assert from_url(fetch, server).exit_code == 0
    assert [sent.start for sent in server.sent] == [0, 1000]


@pytest.mark.parametrize("etag", [None, 'W/"1"', "1"])
def test_a_date_or_a_weak_tag_is_no_validator(
    etag: str | None, server: DriveServer, demos: bytes, fetch: Fetch
) -> None:
    server.files["a.pkl"] = Served(demos, etag=etag, modified=1.5e9, cuts=[1000])
    assert from_url(fetch, server).exit_code == 0
    assert [sent.start for sent in server.sent] == [0, 0]


def test_a_body_shorter_than_announced_is_refused(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos, announce=100)
    refused(from_url(fetch, server), "times in a row")
    assert visible(folder) == set()


def test_a_body_longer_than_announced_is_refused(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos, announce=-100)
    refused(from_url(fetch, server), "cut short")
    assert visible(folder) == set()


def test_a_body_of_unknown_length_that_ends_early_is_refused(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos, announce=None, cuts=[len(demos) - 100])
    refused(from_url(fetch, server), "cut short")
    assert visible(folder) == set()


@pytest.mark.parametrize("known", ['sha256 = "' + "0" * 64 + '"', 'md5 = "' + "0" * 32 + '"'])
def test_a_wrong_published_hash_is_refused(
    known: str, server: DriveServer, demos: bytes, fetch: Fetch, folder: Path, tmp_path: Path
) -> None:
    server.files["a.pkl"] = Served(demos)
    ours = user_manifest(tmp_path, f'https = "{server.url}/a.pkl"', known)
    refused(
        fetch("GoToLocal", "--manifests", str(ours)), "different file", "the manifest says 0000"
    )
    assert visible(folder) == set()


def test_a_wrong_published_size_is_refused_before_the_body_is_read(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path, tmp_path: Path
) -> None:
    server.files["a.pkl"] = Served(demos * 1000, pause=0.05)
    ours = user_manifest(tmp_path, f'https = "{server.url}/a.pkl"', "size_bytes = 7")
    refused(fetch("GoToLocal", "--manifests", str(ours)), "size", "the manifest says 7")
    assert server.body_bytes() < len(demos) * 500
    assert visible(folder) == set()


def test_what_was_fetched_before_is_what_a_later_fetch_must_give(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(demos)
    fetch()
    before = store_files(folder)
    server.files[f"drive/{drive_id()}"] = Served(demos[:2] + b"\x95" + demos[2:], etag='"2"')
    refused(fetch("GoToLocal", "--overwrite"), "a different file", "fetched.toml")
    assert store_files(folder) == before


def test_a_stall_is_survived_by_asking_for_the_rest(
    server: DriveServer, demos: bytes, fetch: Fetch
) -> None:
    server.files["a.pkl"] = Served(demos, stalls=[3.0], piece=1000)
    assert from_url(fetch, server, "--timeout", "0.3").exit_code == 0
    assert server.sent[1].start > 0


def test_a_server_that_stalls_for_ever_is_given_up(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos, stalls=[3.0] * 9, piece=1000)
    server.files["a.pkl"].ranges = False
    refused(from_url(fetch, server, "--timeout", "0.2"), "stopped sending", "3 times in a row")
    assert visible(folder) == set()


def test_a_busy_server_is_asked_again(server: DriveServer, demos: bytes, fetch: Fetch) -> None:
    server.files["a.pkl"] = Served(demos, statuses=[503, 429], headers={"Retry-After": "1"})
    assert from_url(fetch, server).exit_code == 0


@pytest.mark.parametrize(
    ("url", "host", "why"),
    [
        ("http://127.0.0.1:9/a.pkl", "127.0.0.1", "connection refused"),
        ("http://nobody.invalid/a.pkl", "nobody.invalid", "name not known"),
    ],
)
def test_without_a_connection_it_gives_up_after_one_retry_in_plain_words(
    url: str, host: str, why: str, fetch: Fetch, folder: Path
) -> None:
    done = fetch("GoToLocal", "--from", url, "--retries", "9", "-q")
    assert refused(done) == (
        f"error: no connection to {host} ({why}): no network?\n"
        f"  where: {folder / 'downloads' / TRAIN}\n"
        "  next:  pass `--from FILE` with a copy you have, or record the bot: "
        "`demotools generate GoToLocal --episodes 100000`\n"
    )
    assert visible(folder) == set()
    loud = fetch("GoToLocal", "--from", url, "--retries", "9")
    assert f"{TRAIN}: waiting 0 s, try 2 of 2: no connection ({why})\n" in loud.stderr
    assert loud.stderr.count("waiting") == 1


def test_two_different_failures_say_what_each_is_of(
    fetch: Fetch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_store(folder / "GoTo.zarr", make_episodes([3]), level="GoTo")  # not one that was fetched
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    told = refused(fetch("GoTo", "--source", "jat", "--split", "all"))
    what, _where, fix = told.splitlines()
    # where the extra hf is missing, pyarrow is looked for first
    missing = "huggingface_hub" if importlib.util.find_spec("pyarrow") else "pyarrow"
    assert re.fullmatch(
        f"error: 2 downloads failed. GoTo: .*; GoTo-valid: .*{missing}.* is not installed",
        what,
    )
    assert re.fullmatch("  next:  for GoTo: .*--overwrite.*; for GoTo-valid: .*pip install .*", fix)
    assert " | " not in fix


@pytest.mark.usefixtures("server")
def test_many_levels_without_a_network_fail_in_one_short_message(
    fetch: Fetch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("huggingface_hub", "pyarrow"):  # without them a source is left out beforehand
        pytest.importorskip(package, reason="the extra hf is not installed")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    levels = ["GoTo", "GoToLocal", "GoToObj", "Open", "Pickup", "Synth"]
    what, where, fix = refused(fetch(*levels)).splitlines()
    assert re.search("proxy does not answer.*; no connection to the Hugging Face hub: ", what)
    paths = [str(folder / "downloads" / f"BabyAI-{level}-v0.pkl") for level in levels]
    assert where == f"  where: {', '.join(paths[:4])}, 2 more"
    assert fix.endswith("`demotools generate GoTo --episodes 100000`, and likewise for the others")


def test_a_connection_lost_in_the_middle_is_borne_as_long_as_any_other_failure(
    server: DriveServer, demos: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    server.files["a.pkl"] = Served(demos, cuts=[1000])
    place = place_named(f"{server.url}/a.pkl")
    transfer = Transfer("a.pkl", place, replace(HASTY, quiet=False))
    blocks = transfer.blocks()
    while not transfer.offset:
        next(blocks)
    transfer.place = place_named("http://127.0.0.1:9/a.pkl")
    with pytest.raises(UnreachableError):
        list(blocks)
    said = capfd.readouterr().err.splitlines()
    assert [re.sub(r"a.pkl: waiting \d+ s, ", "", text) for text in said] == [
        "try 1 of 3: the connection was lost",
        "try 2 of 3: no connection (connection refused)",
        "try 3 of 3: no connection (connection refused)",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_bar_says_why_it_waits(
    server: DriveServer, demos: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["a.pkl"] = Served(demos, cuts=[1000])
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    place = place_named(f"{server.url}/a.pkl")
    assert b"".join(filter(None, Transfer("a.pkl", place, replace(HASTY, quiet=False)).blocks()))
    assert "a.pkl, waiting 0 s, try 1 of 3: the connection was lost: " in terminal.getvalue()


@pytest.mark.usefixtures("server")
def test_a_proxy_that_is_not_there_is_named(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    refused(fetch(), "the proxy does not answer", "HTTPS_PROXY and HTTP_PROXY): connection refused")


@pytest.mark.usefixtures("server")
def test_a_certificate_of_an_unknown_authority_is_refused(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    refused(fetch(), "certificate was rejected")


def test_two_fetches_of_a_level_at_once_leave_one_in_charge(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    folder.mkdir()
    with filelock.FileLock(folder / ".GoToLocal.fetch.lock"):
        refused(fetch(), "another process is writing this", "wait for it to finish")
    assert server.requests == []
    server.files[f"drive/{drive_id()}"] = Served(demos)
    assert fetch().exit_code == 0


def test_too_little_room_on_the_disk_is_said_before_the_first_byte(
    server: DriveServer, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(b"\x80\x04.", announce=10**15)
    refused(from_url(fetch, server), "bytes free", "--data-dir")
    assert visible(folder) == set()


def test_a_disk_that_fills_up_is_said_and_the_rest_can_be_resumed(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos)
    resource = pytest.importorskip("resource")
    _soft, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        refused(from_url(fetch, server), "file too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert visible(folder) == set()
    assert from_url(fetch, server).exit_code == 0
    assert server.sent[-1].start == 1000


def test_a_data_folder_that_cannot_be_written_is_said() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = ["fetch", "GoToLocal", "--data-dir", f"{folder}/data"]
        CliRunner().invoke(main, [*command, "--dry-run"])  # imports what nobody may not read
        Path(folder).chmod(0o555)
        with without_root():
            done = CliRunner().invoke(main, command)
        refused(done, "permission denied", "check the permissions", "--data-dir")


def test_existing_stores_are_untouched_by_every_failure(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files["a.pkl"] = Served(demos)
    from_url(fetch, server)
    before = store_files(folder)
    refused(from_url(fetch, server), "already exists", "--overwrite")
    for served in (
        Served(QUOTA.encode()),
        Served(demos, announce=5),
        Served(demos[:-1]),
        Served(b"\x80\x04cos\nsystem\n."),
    ):
        server.files["a.pkl"] = served
        refused(from_url(fetch, server, "--overwrite"))
        assert store_files(folder) == before


def test_a_store_made_by_the_bot_is_not_taken_for_a_fetched_one(
    server: DriveServer, fetch: Fetch, folder: Path
) -> None:
    command = ["generate", "GoToLocal", "--episodes", "3", "--workers", "1", "-q"]
    CliRunner().invoke(main, [*command, "--data-dir", str(folder)])
    refused(fetch(), "of kind bot", "--overwrite")
    assert server.requests == []


def test_one_level_that_fails_does_not_keep_the_others_from_coming(
    server: DriveServer, demos: bytes, folder: Path, fetch: Fetch
) -> None:
    server.files[f"drive/{drive_id('GoTo')}"] = Served(demos)
    refused(fetch("GoToLocal", "GoTo"), f"no source could provide {TRAIN}")
    assert open_store(folder / "GoTo.zarr").episodes == 40


def test_levels_unknown_and_records_that_do_not_parse_are_refused(
    fetch: Fetch, folder: Path
) -> None:
    refused(fetch("GoToLocl"), "GoToLocal")
    folder.mkdir()
    (folder / "fetched.toml").write_text("[x")
    refused(fetch(), "records of earlier fetches")


def test_a_damaged_download_that_lies_there_is_found(
    server: DriveServer, demos: bytes, fetch: Fetch, folder: Path
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(demos)
    fetch("GoToLocal", "--no-convert")
    pickle = folder / "downloads" / TRAIN
    pickle.write_bytes(demos[:100] + bytes([demos[100] ^ 1]) + demos[101:])
    assert fetch("GoToLocal", "--no-convert").exit_code == 0
    refused(fetch("GoToLocal", "--no-convert", "--check"), "sha256", "remove it, then fetch")
    refused(fetch(), "sha256", "remove it, then fetch")
    pickle.write_bytes(demos[:100])
    assert fetch("GoToLocal", "--no-convert").exit_code == 0
    assert pickle.read_bytes() == demos


# ------------------------------------------------------------------ killed and run again


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "fetch", "GoToLocal", "--split", "train"]
    return subprocess.Popen(
        [*command, "--data-dir", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_and_run_again(
    server: DriveServer, folder: Path, content: Path, kills: int, signal_number: int
) -> None:
    """Kill a fetch at random moments, then let it end; no byte on disk is ever sent again."""
    chance = random.Random(kills)
    size = content.stat().st_size
    server.files[f"drive/{drive_id()}"] = Served(content, pause=0.02, piece=-(-size // 100))
    final = folder / "downloads" / TRAIN
    for kill in range(kills + 1):
        there = part_bytes(final, f"gdrive {drive_id()}")
        before = len(server.sent)
        process = start(folder)
        if kill < kills:
            while process.poll() is None and len(server.sent) == before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(signal_number)
        _, told = process.communicate(timeout=60)
        for sent in server.sent[before:]:
            assert sent.start >= there
        assert kill < kills or process.returncode == 0, told
        if signal_number == signal.SIGINT and kill < kills:
            assert process.returncode in (130, 0)
            kept = process.returncode == 130 and part_bytes(final, f"gdrive {drive_id()}")
            assert not kept or "interrupted; the partial download is kept: run the same" in told


def test_ctrl_c_then_resume_gives_the_store(
    server: DriveServer, demos: bytes, folder: Path, tmp_path: Path
) -> None:
    content = tmp_path / "demos.pkl"
    content.write_bytes(demos)
    killed_and_run_again(server, folder, content, kills=2, signal_number=signal.SIGINT)
    assert open_store(folder / "GoToLocal.zarr").episodes == 40


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_store(
    server: DriveServer, real_demos: Path, folder: Path, tmp_path: Path
) -> None:
    real = real_demos / "BabyAI-GoToLocal-v0_agent.pkl"
    killed_and_run_again(server, folder, real, kills=10, signal_number=signal.SIGKILL)
    assert open_store(folder / "GoToLocal.zarr").episodes == 1000
    undisturbed = tmp_path / "undisturbed"
    server.files[f"drive/{drive_id()}"] = Served(real)
    process = start(undisturbed)
    process.communicate(timeout=60)
    assert process.returncode == 0
    ours = json.loads((folder / "GoToLocal.zarr/zarr.json").read_text())["attributes"]
    theirs = json.loads((undisturbed / "GoToLocal.zarr/zarr.json").read_text())["attributes"]
    assert ours == theirs
    assert store_files(folder) == store_files(undisturbed)


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_when_its_store_is_made_it_is_tidied_by_the_next(
    server: DriveServer, demos: bytes, folder: Path, tmp_path: Path, keep: bool
) -> None:
    content = tmp_path / "demos.pkl"
    content.write_bytes(demos)
    server.files[f"drive/{drive_id()}"] = Served(content)
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / ".fetched.toml.lock"):  # the record cannot be written yet
        process = start(folder)
        while not (folder / "GoToLocal.zarr").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)
    assert (folder / "downloads" / TRAIN).is_file() and not (folder / "fetched.toml").exists()
    sent = len(server.sent)
    again = start(folder, *(["--keep-pickle"] if keep else []))
    told = again.communicate(timeout=60)
    assert again.returncode == 0 and "nothing to do" in told[0], told
    assert len(server.sent) == sent
    assert "sha256" in (folder / "fetched.toml").read_text("utf-8")
    left = {path.name for path in folder.glob("downloads/*")}
    assert left == ({TRAIN} if keep else set()) and (keep or not (folder / "downloads").exists())


@pytest.mark.parametrize("name", ["..", ".", "", "../GoToLocal.zarr"])
def test_what_a_note_of_somebody_else_names_is_not_removed(
    fetch: Fetch, server: DriveServer, demos: bytes, folder: Path, name: str
) -> None:
    server.files[f"drive/{drive_id()}"] = Served(demos)
    assert fetch("GoToLocal").exit_code == 0
    note = folder / "downloads/.GoToLocal.left.json"
    note.parent.mkdir(exist_ok=True)
    record = tomllib.loads((folder / "fetched.toml").read_text("utf-8"))[TRAIN]
    note.write_text(json.dumps({"key": TRAIN, "record": record, "remove": name}), "utf-8")
    before = store_files(folder)
    again = fetch("GoToLocal")
    assert again.exit_code == 0 and "nothing to do" in again.output
    assert store_files(folder) == before and not note.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--from", "http://[bad/x.pkl"], ["--from", "ftp://host/x.pkl"]],
)
def test_what_is_no_web_address_is_refused_before_anything_else(
    tmp_path: Path, arguments: list[str]
) -> None:
    line = ["fetch", "GoToLocal", "--data-dir", str(tmp_path), "--dry-run", *arguments]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 1
    assert "not a web address" in result.stderr
    assert not list(tmp_path.iterdir())
