"""`demotools push` against a stand-in for the hub on this machine, and `fetch` back from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from demotools.babyai.levels import read_manifest
from demotools.errors import FetchError
from demotools.exchange.publish import PushedStore, push_stores, write_manifests
from demotools.store.reading import Store, open_store
from demotools.store.shrink import shrink_store
from tests.conftest import build_store, make_episodes
from tests.upload_server import TOKEN, Hub, Run, runner

pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    return runner(hub, tmp_path / "hub-home", "demotools")


def test_a_store_is_published_with_its_card_and_comes_back_bit_for_bit(
    make_store: Callable[..., Store], hub: Hub, run: Run, tmp_path: Path
) -> None:
    store = make_store(lengths=[3, 2, 4])
    pushed = run("push", str(store.path), "hf:me/demos")
    assert pushed.returncode == 0, pushed.stderr
    assert sorted(hub.files) == ["GoToLocal.zarr.zip", "README.md"]
    assert hub.files["README.md"].decode().startswith("---\npretty_name:")
    assert hub.created[0]["type"] == "dataset"
    assert "/datasets/me/demos/commit/1" in pushed.stdout
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in pushed.stdout + pushed.stderr
    # neither the archive nor anything else is left beside the store
    assert [file.name for file in tmp_path.iterdir() if "push" in file.name] == []

    back = tmp_path / "back"
    origin = "hf:me/demos/GoToLocal.zarr.zip"
    fetched = run("fetch", "GoToLocal", "--from", origin, "--data-dir", str(back))
    assert fetched.returncode == 0, fetched.stderr
    again = open_store(back / "GoToLocal.zarr")
    assert again.attributes.fingerprint == store.attributes.fingerprint
    assert TOKEN not in fetched.stdout + fetched.stderr


def test_a_card_that_is_there_already_is_kept(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    hub.files["README.md"] = b"mine"
    pushed = run("push", str(make_store(lengths=[3]).path), "hf:me/demos", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert hub.files["README.md"] == b"mine"
    assert f"published GoToLocal.zarr.zip: {hub.url}/datasets/me/demos/commit/" in pushed.stdout
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"


def test_a_refusal_is_a_message_without_the_token(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    hub.forbidden = True
    store = make_store(lengths=[3])
    pushed = run("push", str(store.path), "hf:me/demos")
    assert pushed.returncode == 1
    assert "error: the Hugging Face hub did not accept it: " in pushed.stderr
    assert "  next:  check OWNER/NAME" in pushed.stderr
    assert "Traceback" not in pushed.stderr
    assert TOKEN not in pushed.stdout + pushed.stderr
    assert open_store(store.path).episodes == 1


def test_without_a_token_it_is_said_how_to_get_one(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    pushed = run("push", str(make_store(lengths=[3]).path), "hf:me/demos", token=None)
    assert pushed.returncode == 1
    assert "run `hf auth login`, or set $HF_TOKEN" in pushed.stderr
    assert hub.tokens == set()


def test_a_hub_that_cannot_be_reached_is_a_message(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    store = make_store(lengths=[3])
    hub.server_close()
    pushed = run("push", str(store.path), "hf:me/demos")
    assert pushed.returncode == 1
    assert "error: the Hugging Face hub did not accept it: " in pushed.stderr
    assert "Traceback" not in pushed.stderr


@pytest.mark.parametrize("place", ["me/demos", "hf:demos", "hf:me/demos/more", "hf:me/demos:x"])
def test_a_place_that_is_no_dataset_is_refused(
    make_store: Callable[..., Store], place: str
) -> None:
    with pytest.raises(FetchError) as error:
        list(push_stores([make_store(lengths=[3]).path], place))
    assert error.value.fix == "write it as hf:OWNER/NAME"


def test_a_part_of_a_level_is_no_source_of_its_published_file(tmp_path: Path) -> None:
    whole = PushedStore("GoToLocal", "GoToLocal", "train", None, [], "me/d/a.zarr.zip", None)
    others = [
        replace(whole, store="GoToLocal-train", part_of="GoToLocal"),
        # beside a whole training store it would be held out of nothing
        replace(whole, store="GoToLocal-valid", split="valid", part_of="GoToLocal"),
        replace(whole, store="mine"),
        replace(whole, store="GoToLocal-test", split="test"),
    ]
    none = write_manifests(others, tmp_path / "none", overwrite=False)
    assert not none.paths and not (tmp_path / "none").exists()
    made = write_manifests([whole, *others], tmp_path, overwrite=False)
    assert "me/d/a.zarr.zip" in made.paths[0].read_text("utf-8")
    assert read_manifest("GoToLocal", tmp_path).files["valid"].sources[0].hf is None
    assert made.text(tmp_path).split("\n") == [
        f"made 1 manifest in {tmp_path}",
        "  without GoToLocal-train: it holds only a part of GoToLocal",
        "  without GoToLocal-valid: it holds only a part of GoToLocal",
        "  without mine: `demotools fetch` would call it GoToLocal",
        "  without GoToLocal-test: its split is 'test'",
    ]


@pytest.mark.slow
def test_all_stores_go_in_one_command_and_fetch_finds_them_first(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    data, manifests = tmp_path / "data", tmp_path / "manifests"
    stores = [
        build_store(data / f"{name}.zarr", make_episodes(lengths), level=level, split=split)
        for name, level, split, lengths in (
            ("GoToLocal", "GoToLocal", "train", [3, 2]),
            ("GoToLocal-valid", "GoToLocal", "valid", [4]),
            ("GoToLocalS5N2", "GoToLocalS5N2", "train", [2, 2]),
        )
    ]
    small = data / "GoToLocal-small.zarr"
    shrunken = open_store(shrink_store(stores[0].path, small, episodes=1, seed=0).path)
    command = ("push", "--all", "hf:me/demos", "--data-dir", str(data))
    tried = run(*command, "--dry-run", token=None)
    assert tried.returncode == 0 and tried.stdout.count("would publish") == 4, tried.stderr
    assert hub.files == {}

    pushed = run(*command, "--manifests", str(manifests))
    assert pushed.returncode == 0, pushed.stderr
    names = sorted(f"{store.name}.zarr.zip" for store in [*stores, shrunken])
    assert sorted(hub.files) == [*names, "README.md"]
    card = hub.files["README.md"].decode()
    assert "3 BabyAI levels" not in card and "2 BabyAI levels: 6 episodes" in card
    assert all(f"| {name} |" in card for name in names)
    assert "made 2 manifests" in pushed.stdout
    assert "without GoToLocal-small: it holds only a part of GoToLocal\n" in pushed.stdout
    first = read_manifest("GoToLocal", manifests).files["train"].sources
    assert [str(each) for each in first[:1]] == ["hf me/demos/GoToLocal.zarr.zip"] and len(
        first
    ) > 1

    back = tmp_path / "back"
    fetch = ("fetch", "GoToLocal", "GoToLocalS5N2", "--split", "train", "--data-dir", str(back))
    for _ in range(2):
        fetched = run(*fetch, "--manifests", str(manifests))
        assert fetched.returncode == 0, fetched.stderr
    for store in (stores[0], stores[2]):
        again = open_store(back / f"{store.name}.zarr")
        assert again.attributes.fingerprint == store.attributes.fingerprint
