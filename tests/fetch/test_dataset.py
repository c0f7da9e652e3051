"""`demotools fetch` out of the JAT data set, from a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from demotools.babyai.levels import (
    level_names,
    level_of_configuration,
    levels_of_datasets,
    read_manifest,
)
from demotools.cli import main
from demotools.exchange.parquet import FAILURE
from demotools.store.reading import open_store
from tests.hub_server import HubServer
from tests.jat_files import jat_rows, write_rows

pytest.importorskip("pyarrow", reason="the extra hf is not installed")
pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")

CONFIG = "babyai-go-to-local"
TRAIN = (
    f"{CONFIG}/train-00000-of-00002-0a1b.parquet",
    f"{CONFIG}/train-00001-of-00002-2c3d.parquet",
)
VALID = f"{CONFIG}/test-00000-of-00001-4e5f.parquet"
Fetch = Callable[..., Result]


@pytest.fixture
def hub(bot_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with the bot's episodes: 40 train, a failure among them, and 20 test."""
    from huggingface_hub import constants

    rows = jat_rows(open_store(bot_data / "GoToLocal.zarr"))
    rows[5]["rewards"][-1] = 0.0
    folder = tmp_path / "hub" / CONFIG
    folder.mkdir(parents=True)
    write_rows(folder.parent / TRAIN[0], rows[:25])
    write_rows(folder.parent / TRAIN[1], rows[25:40], kind="int32")
    write_rows(folder.parent / VALID, rows[40:])
    with HubServer("jat-project/jat-dataset", folder.parent).running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        # nothing but the hub is reachable
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("demotools.fetch.transfer._LONGEST_WAIT_SECONDS", 0.02)
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def fetch(data: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", "")

    def run(level: str = "GoToLocal", *options: str) -> Result:
        hasty = ["--timeout", "5", "--retries", "0", "--data-dir", str(data)]
        return CliRunner().invoke(main, ["fetch", level, *hasty, *options])

    return run


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    message = result.stderr.rpartition("error: ")[2]
    assert [line[:9] for line in message.splitlines()[1:]] == ["  where: ", "  next:  "], message
    for word in words:
        assert word in message, message


def test_both_splits_come_from_the_hub_alone_with_their_provenance(
    hub: HubServer, bot_data: Path, fetch: Fetch, data: Path
) -> None:
    done = fetch("GoToLocal", "--source", "jat")
    assert done.exit_code == 0, done.output
    assert "fetched from jat babyai-go-to-local, as requested by --source jat" in done.stdout
    assert f"left out 1: {FAILURE}" in done.stdout
    bot = open_store(bot_data / "GoToLocal.zarr")
    kept = {"": np.delete(np.arange(40), 5), "-valid": np.arange(40, 60)}
    for suffix, rows in kept.items():
        store = open_store(data / f"GoToLocal{suffix}.zarr")
        theirs, ours = bot.take(rows), store.take(np.arange(store.episodes))
        for column in ("length", "mission", "view", "direction", "action"):
            assert np.array_equal(getattr(ours, column), getattr(theirs, column))
    about = open_store(data / "GoToLocal.zarr").attributes
    assert about.licence == "Apache-2.0"
    assert "arXiv:2402.09844" in about.citation
    assert about.source["repository"] == "jat-project/jat-dataset"
    assert about.source["revision"] == "1" * 40
    assert about.source["left_out"] == {FAILURE: 1}
    assert [file["name"] for file in about.source["files"]] == [Path(each).name for each in TRAIN]
    assert not (data / "downloads").exists()
    record = tomllib.loads((data / "fetched.toml").read_text())[f"jat {CONFIG} train"]
    assert record["commit"] == "1" * 40
    # and now there is nothing to do
    before = len(hub.asked)
    assert "nothing to do" in fetch("GoToLocal", "--source", "jat").stdout
    assert "nothing to do" in fetch("GoToLocal").stdout
    assert len(hub.asked) == before
    refused(fetch("GoToLocal", "--source", "drive"), "was made from jat babyai-go-to-local")


def test_what_nobody_else_gives_comes_from_the_data_set_and_it_is_said_why(
    hub: HubServer, fetch: Fetch
) -> None:
    done = fetch("GoToLocal", "--split", "valid")
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert "fetched from jat babyai-go-to-local, because gdrive 1Esy" in told
    assert "; archive copydemos, gdrive 1NeJ" in told
    assert hub.sent == [VALID]


@pytest.mark.usefixtures("hub")
def test_a_level_without_other_sources_can_be_fetched(
    fetch: Fetch, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "hub" / CONFIG).rename(tmp_path / "hub" / "babyai-go-to-obj-door")
    for way in (["--from", "jat"], []):  # the former is what people type
        done = fetch("GoToObjDoor", *way, "--overwrite")
        assert done.exit_code == 0, done.output
        assert open_store(data / "GoToObjDoor.zarr").episodes == 39
        assert open_store(data / "GoToObjDoor-valid.zarr").episodes == 20
    assert "its only source" in done.stdout
    refused(fetch("FindObjS6"), "names no file for this split", "demotools generate")


def test_a_later_fetch_asks_for_the_commit_of_the_first(
    hub: HubServer, fetch: Fetch, data: Path, tmp_path: Path
) -> None:
    assert fetch("GoToLocal", "--source", "jat").exit_code == 0
    newer = tmp_path / "newer"
    shutil.copytree(tmp_path / "hub", newer)
    shutil.copy(newer / VALID, newer / CONFIG / "train-00000-of-00001-9999.parquet")
    for name in TRAIN:
        (newer / name).unlink()
    hub.commits["2" * 40] = newer
    again = ["--source", "jat", "--split", "train", "--overwrite"]
    assert fetch("GoToLocal", *again).exit_code == 0
    assert open_store(data / "GoToLocal.zarr").attributes.source["revision"] == "1" * 40
    (data / "fetched.toml").unlink()
    assert fetch("GoToLocal", *again).exit_code == 0
    about = open_store(data / "GoToLocal.zarr").attributes
    assert (about.source["revision"], about.episodes) == ("2" * 40, 20)


def test_files_are_kept_on_request_and_not_downloaded_again(
    hub: HubServer, fetch: Fetch, data: Path
) -> None:
    options = ["--source", "jat", "--split", "train"]
    done = fetch("GoToLocal", *options, "--no-convert")
    assert done.exit_code == 0, done.output
    assert not (data / "GoToLocal.zarr").exists()
    kept = data / "downloads" / f"{CONFIG}-train"
    assert sorted(str(file.relative_to(kept)) for file in kept.rglob("*.parquet")) == list(TRAIN)
    assert fetch("GoToLocal", *options, "--keep-pickle").exit_code == 0
    assert open_store(data / "GoToLocal.zarr").episodes == 39
    assert hub.sent == list(TRAIN)
    imported = CliRunner().invoke(
        main, ["import", str(kept / CONFIG), "--name", "Again", "--data-dir", str(data)]
    )
    assert imported.exit_code == 0, imported.output
    again, first = open_store(data / "Again.zarr"), open_store(data / "GoToLocal.zarr")
    assert again.attributes.fingerprint == first.attributes.fingerprint


def test_every_failure_of_the_hub_is_a_message_and_leaves_no_store(
    hub: HubServer, fetch: Fetch, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--source", "jat", "--split", "train"]
    hub.corrupt = {TRAIN[1]}
    refused(fetch("GoToLocal", *options), "a different file: its sha256 is", "but the hub says")
    hub.corrupt = set()
    assert fetch("GoToLocal", *options, "--no-convert").exit_code == 0
    assert hub.sent.count(TRAIN[0]) == 1, "what was whole is kept"
    shutil.rmtree(data)
    (tmp_path / "hub" / TRAIN[1]).rename(tmp_path / "kept")
    refused(fetch("GoToLocal", *options), "the shards are incomplete", "1" * 40)
    (tmp_path / "hub" / TRAIN[0]).unlink()
    refused(fetch("GoToLocal", *options), "no parquet files of the train split")
    shutil.rmtree(tmp_path / "hub" / CONFIG)
    refused(fetch("GoToLocal", *options), "the Hugging Face hub refused", "Entry")
    hub.repository = "nobody/nothing"
    refused(fetch("GoToLocal", *options), "the Hugging Face hub refused", "--from FILE")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(fetch("GoToLocal", *options), "no connection to the Hugging Face hub")
    assert not list(data.glob("*.zarr"))


@pytest.mark.parametrize("package", ["pyarrow.parquet", "huggingface_hub"])
def test_without_a_package_the_extra_is_named(
    package: str, hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for way in (["--source", "jat"], []):  # alone, and when all others have refused
        refused(fetch("GoToLocal", *way), package, "run pip install -c constraints.txt '.[hf]'")
    assert hub.asked == []


def test_a_source_that_the_manifest_has_not_is_refused_with_those_that_it_has(
    hub: HubServer, fetch: Fetch, data: Path
) -> None:
    told = ("has no source 'kaggle'", "use one of gdrive, copydemos, jat")
    refused(fetch("GoToLocal", "--source", "kaggle", "--split", "train"), *told)
    both = fetch("GoToLocal", "--source", "jat", "--from", "a.pkl")
    assert both.exit_code == 2
    generated = ["generate", "GoToLocal", "-n", "3", "--workers", "1", "--data-dir", str(data)]
    assert CliRunner().invoke(main, generated).exit_code == 0
    refused(fetch("GoToLocal", "--source", "jat", "--split", "train"), "of kind bot", "--overwrite")
    plan = fetch("GoToLocal", "--source", "jat", "--split", "valid", "--dry-run", "--json")
    assert [each["sources"] for each in json.loads(plan.stdout)] == [[f"jat {CONFIG}"]]
    assert hub.asked == []


def test_all_39_configurations_have_a_level_and_both_splits() -> None:
    spelled = """action-obj-door blocked-unlock-pickup boss-level boss-level-no-unlock find-obj-s5
        go-to go-to-door go-to-imp-unlock go-to-local go-to-obj go-to-obj-door go-to-red-ball
        go-to-red-ball-grey go-to-red-ball-no-dists go-to-red-blue-ball go-to-seq key-corridor
        mini-boss-level move-two-across-s8n9 one-room-s8 open open-door open-doors-order-n4
        open-red-door open-two-doors pickup pickup-above pickup-dist pickup-loc put-next
        put-next-local synth synth-loc synth-seq unblock-pickup unlock unlock-local unlock-pickup
        unlock-to-unlock"""
    configurations = spelled.split()
    assert len(configurations) == 39
    found = {}
    for level in (*level_names(), *levels_of_datasets()):
        files = read_manifest(level).files
        configs = [
            [s.config for s in file.sources if s.dataset == "jat"] for file in files.values()
        ]
        if any(configs):
            assert len(configs) == 2
            assert configs[0] == configs[1]
            found[level] = configs[0][0]
            assert level_of_configuration(str(found[level])) == level
    assert sorted(found.values(), key=str) == [f"babyai-{name}" for name in configurations]
