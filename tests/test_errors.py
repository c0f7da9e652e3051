"""What pydantic finds wrong in files is told in our words, whoever reads the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from demotools.babyai import levels
from demotools.errors import DemotoolsError, in_our_words
from demotools.exchange import export, minari_import
from demotools.fetch import plan
from demotools.fetch.job import read_records
from demotools.store import format as store_format
from demotools.store.reading import Store, open_store
from demotools.store.verify import verify_store

WRONG: list[Any] = [None, True, 1.5, -1, 2**60, "", "a b", [], [1], [None], {}, {"a": 1}]
MODULES = (levels, export, minari_import, plan, store_format)


def models() -> Iterator[type[BaseModel]]:
    for module in MODULES:
        for name, one in sorted(vars(module).items()):
            if isinstance(one, type) and issubclass(one, BaseModel) and not name.startswith("Base"):
                yield one


@pytest.mark.parametrize("model", dict.fromkeys(models()), ids=lambda model: model.__name__)
def test_every_wrong_value_in_a_file_is_told_in_our_words(model: type[BaseModel]) -> None:
    trees = [{name: value} for name in [*model.model_fields, "more"] for value in WRONG]
    told = 0
    for tree in [*trees, *WRONG]:
        for as_json in (False, True):
            try:
                if as_json:
                    model.model_validate_json(json.dumps(tree))
                else:
                    model.model_validate(tree)
            except ValidationError as error:
                for problem in error.errors():
                    told += 1
                    said = in_our_words(problem, "json" if as_json else "toml")
                    assert said != problem["msg"], (tree, problem)
    assert told


def damaged(file: Path, *changes: tuple[str, object]) -> None:
    content = json.loads(file.read_text())
    for key, value in changes:
        place = content
        *parents, last = key.split(".")
        for part in parents:
            place = place[part]
        place[last] = value
    file.write_text(json.dumps(content))


def test_the_files_of_stores_manifests_and_records_are_told_of_in_our_words(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    def refused(act: Callable[[], object], *said: str) -> None:
        with pytest.raises(DemotoolsError) as caught:
            act()
        assert "nput should" not in caught.value.what and "validation error" not in str(caught)
        for text in said:
            assert text in caught.value.what

    store = make_store(lengths=[3, 2]).path
    damaged(store / "action" / "zarr.json", ("zarr_format", 2))
    refused(lambda: open_store(store), "action/zarr.json is invalid at zarr_format: it must be 3")
    damaged(store / "action" / "zarr.json", ("shape", ["x"]))
    refused(lambda: open_store(store), "invalid at shape.0: it must be a whole number")
    damaged(store / "zarr.json", ("attributes.steps", 0))
    refused(lambda: verify_store(store), "invalid at steps: it must be at least 1")
    damaged(store / "zarr.json", ("attributes.steps", 5), ("attributes.source", []))
    refused(lambda: verify_store(store), 'at source: it must be an object as in `{"key": value}`')
    (tmp_path / "Mine.toml").write_text("level = 5")
    mine = partial(levels.read_manifest, "Mine", tmp_path)
    refused(mine, "invalid at `level`: it must be a string")
    (tmp_path / "Mine.toml").write_text("level = 'Mine'\nmission_pattern = 'x'\nfiles = 5")
    refused(mine, "invalid at `files`: it must be a section, or a table as in `{key = value}`")
    (tmp_path / "fetched.toml").write_text('[a]\nlevel = "GoTo"')
    refused(lambda: read_records(tmp_path), "cannot be read: at a.split: it is missing")
