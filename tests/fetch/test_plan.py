from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from demotools.babyai.levels import PublishedFile, Source
from demotools.fetch.places import place_named
from demotools.fetch.plan import FetchedRecord, FetchOptions, Found, decided

FILE = PublishedFile(
    name="a.pkl", sources=(Source(gdrive="abcdefghijk"), Source(archive="copydemos"))
)
RECORD = FetchedRecord(
    level="GoTo", split="train", size_bytes=100, sha256="f" * 64, source="s", day="2026-01-02"
)
MADE_FROM_IT = {"kind": "pickle", "files": [{"sha256": "f" * 64}]}
MADE_FROM_ANOTHER = {"kind": "pickle", "files": [{"sha256": "0" * 64}]}


def action(
    found: Found, options: FetchOptions | None = None, record: FetchedRecord | None = RECORD
) -> tuple[str, str]:
    plan = decided("GoTo", "train", FILE, found, record, options or FetchOptions())
    return plan.action, plan.reason


def test_what_is_missing_is_downloaded() -> None:
    assert action(Found()) == ("download", "100 bytes")
    assert action(Found(), record=None) == ("download", "its size is not published")
    found = Found(part_bytes=1234)
    assert action(found) == ("download", "1,234 bytes are already downloaded")


def test_what_is_there_is_left_or_checked() -> None:
    found = Found(store_source=MADE_FROM_IT)
    assert action(found)[0] == "nothing"
    assert action(found, FetchOptions(check=True))[0] == "check"
    assert action(Found(pickle_bytes=100), FetchOptions(convert=False))[0] == "nothing"


def test_a_download_that_lies_there_whole_is_converted_and_a_wrong_one_replaced() -> None:
    assert action(Found(pickle_bytes=100))[0] == "convert"
    assert action(Found(pickle_bytes=99)) == ("download", "the file has 99 bytes, not 100")
    assert action(Found(pickle_bytes=99), record=None)[0] == "convert"


def test_a_store_that_is_not_the_fetched_one_is_refused() -> None:
    assert action(Found(store_source=MADE_FROM_ANOTHER))[0] == "refuse"
    assert action(Found(store_source={"kind": "bot"}))[0] == "refuse"
    assert action(Found(store_problem="it is damaged")) == ("refuse", "it is damaged")
    assert (
        action(Found(store_source=MADE_FROM_IT), FetchOptions(origin=place_named("b.pkl")))[0]
        == "refuse"
    )


def test_a_split_that_the_manifest_does_not_name_is_refused() -> None:
    plan = decided("GoTo", "valid", None, Found(), None, FetchOptions())
    assert (plan.action, plan.store) == ("refuse", "GoTo-valid")


options = st.builds(
    FetchOptions,
    convert=st.booleans(),
    keep_pickle=st.booleans(),
    check=st.booleans(),
    overwrite=st.booleans(),
    origin=st.none() | st.just(place_named("b.pkl")),
)
found = st.builds(
    Found,
    store_source=st.sampled_from([None, MADE_FROM_IT, MADE_FROM_ANOTHER, {"kind": "bot"}]),
    store_problem=st.none() | st.just("damaged"),
    pickle_bytes=st.none() | st.sampled_from([99, 100]),
)


@given(options, found, st.none() | st.just(RECORD))
def test_nothing_replaces_a_store_without_overwrite(
    options: FetchOptions, found: Found, record: FetchedRecord | None
) -> None:
    plan = decided("GoTo", "train", FILE, found, record, options)
    there = found.store_source is not None or found.store_problem is not None
    if there and options.convert and not options.overwrite:
        assert plan.action in ("nothing", "check", "refuse")
    assert bool(plan.fix) == (plan.action == "refuse")
    assert plan.text().startswith("GoTo (")
