"""Every setting is explained, the page and the schema say what the models say."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from trainer.cli import main
from trainer.learning.building import LOSSES, NETWORKS
from trainer.settings.models import SUBGOALS, shipped_recipes
from trainer.settings.reference import (
    MEANINGS,
    SCHEMA_FILE,
    recipe_schema,
    schema_text,
    setting_rows,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"
SHIPPED = ROOT / "trainer" / "recipes" / SCHEMA_FILE
HEAD = """# Every setting

One row a key, written by `python -m tests.settings.test_reference` from the trainer's own models;
[training.md](training.md) and [pipelines.md](pipelines.md) explain how they work together. A step
is one (observation, action): env steps are taken in environments, demo steps are shown from a
store. N is the number of a stage or of a store, from 0; NAME is the name of a loss. A key without a
default must be given where its section stands.

`trainer schema -o recipe.schema.json` writes the same as a JSON Schema. With the line
`#:schema ./recipe.schema.json` at the top of a recipe, editors that use Taplo complete and check
its keys. `trainer validate FILE` checks a recipe in a moment, without a store and without torch.
"""


def arguments(kind: str, parts: Mapping[str, Callable[..., Any]], given: int) -> list[str]:
    """A row for each argument of our own parts; `given` are not the user's."""
    rows = []
    for name, part in parts.items():
        for argument in list(inspect.signature(part, eval_str=False).parameters.values())[given:]:
            default = "" if argument.default is argument.empty else f"`{argument.default!r}`"
            rows.append(
                f"| {kind} `{name}` | `{argument.name}` | {argument.annotation} | {default} |"
            )
    return [row.replace(" | None", " or None") for row in rows]


def page() -> str:
    """docs/settings.md, made anew."""
    parts, section = [HEAD], ""
    for row in setting_rows():
        head = row.key.partition(".")[0]
        if head != section:
            parts.append(
                f"\n## {head}\n\n| key | type | unit | default | what it is |\n{'| --- ' * 5}|\n"
            )
            section = head
        key = f"`{row.key}`"
        parts.append(f"| {' | '.join([key, row.type, row.unit, row.default, row.meaning])} |\n")
    parts.append("\n## Arguments of our own networks and losses\n\nThey stand beside `type`.\n\n")
    parts.append(f"| part | argument | type | default |\n{'| --- ' * 4}|\n")
    losses = {name: loss for name, loss in LOSSES.items() if name != SUBGOALS}  # it has no keys
    rows = [*arguments("network", NETWORKS, 1), *arguments("loss", losses, 0)]
    return "".join(parts) + "\n".join(rows) + "\n"


def test_every_setting_is_explained_and_nothing_else_is() -> None:
    assert {row.key for row in setting_rows()} == set(MEANINGS), (
        "write unit and meaning of each setting into trainer/settings/reference.py"
    )


def test_the_page_and_the_shipped_schema_are_those_of_the_models() -> None:
    again = "run `python -m tests.settings.test_reference`"
    assert PAGE.read_text("utf-8") == page(), again
    assert SHIPPED.read_text("utf-8") == schema_text(), again


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_names_the_schema_and_fits_it(name: str) -> None:
    text = shipped_recipes()[name].read_text("utf-8")
    assert text.startswith(f"#:schema ./{SCHEMA_FILE}\n")
    jsonschema.validate(tomllib.loads(text), recipe_schema())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed = 1", "sed = 1"),
        ("seed = 1", "seed = -1"),
        ("rollout_len = 20", "rollout_len = 0"),
        ('augment = ["recolor"', 'augment = ["recolour"'),
    ],
)
def test_what_is_wrong_in_a_recipe_is_so_for_the_schema_and_for_validate(
    old: str, new: str, tmp_path: Path
) -> None:
    text = shipped_recipes()["bc_small_cpu.toml"].read_text("utf-8")
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    assert CliRunner().invoke(main, ["validate", str(file)]).exit_code == 0
    file.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(file.read_text("utf-8")), recipe_schema())
    result = CliRunner().invoke(main, ["validate", str(file)])
    assert result.exit_code == 1 and "next:" in result.stderr


def test_a_copied_recipe_has_its_schema_beside_it(tmp_path: Path) -> None:
    copy = ["recipes", "copy", "ppo", "-o", str(tmp_path / "mine.toml")]
    assert CliRunner().invoke(main, copy).exit_code == 0
    assert json.loads((tmp_path / SCHEMA_FILE).read_text("utf-8")) == recipe_schema()
    assert CliRunner().invoke(main, ["schema"]).stdout == schema_text()


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    SHIPPED.write_text(schema_text(), "utf-8")
