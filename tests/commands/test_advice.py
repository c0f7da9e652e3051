"""What a message advises exists: commands, options and settings are those there are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from pydantic import BaseModel

import demotools
import trainer
from demotools.babyai.levels import Manifest, PublishedFile
from demotools.cli import main as demotools_main
from trainer.cli import main as trainer_main
from trainer.settings.models import Settings, shipped_recipes

ROOT = Path(__file__).parents[2]
PROGRAMS: dict[str, click.Command] = {"demotools": demotools_main, "trainer": trainer_main}
FOREIGN_OPTIONS = {"--nproc-per-node", "--port", "--nworkers", "--nthreads"}  # torchrun, dask


def messages(package: Path) -> Iterator[tuple[str, str]]:
    """Where, and what is said: the text of every string that is no docstring."""
    for file in sorted(package.rglob("*.py")):
        if file.name == "reference.py":  # it names settings with N for a number, and is compared
            continue
        tree = ast.parse(file.read_text("utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        parts = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in ast.walk(node)
            if part is not node
        }
        for node in ast.walk(tree):
            if id(node) in docstrings or id(node) in parts:
                continue
            where = f"{file.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield where, node.value
            elif isinstance(node, ast.JoinedStr):
                yield (
                    where,
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "X"
                        for part in node.values
                    ),
                )


ALL = [
    said
    for package in (demotools, trainer)
    for said in messages(Path(str(package.__file__)).parent)
]


def children_of(command: click.Command) -> dict[str, click.Command]:
    """The commands of a group, those too that are imported only when asked for."""
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    found = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {name: child for name, child in found.items() if child is not None}


@cache
def options_of(command: click.Command) -> set[str]:
    own = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    for child in children_of(command).values():
        own |= options_of(child)
    return own | {"--help", "--version", "-h"}


def wrong_command(text: str) -> str:
    """What is wrong with `demotools NAME --option`; empty where nothing is."""
    program, *words = text.split()
    command = PROGRAMS[program]
    for word in words:
        children = children_of(command)
        if not children or word.startswith("-"):
            break
        if not re.fullmatch("[a-z-]+", word):
            return ""
        if word not in children:
            return f"`{program}` has no command {word}"
        command = children[word]
    known = options_of(command)
    unknown = [word for word in words if re.match("--?[a-z]", word) and word not in known]
    return f"`{text}`: no option {unknown[0]}" if unknown else ""


def test_no_message_installs_from_an_index_that_has_no_demotools() -> None:
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
    said = [*ALL, *((page.name, page.read_text("utf-8")) for page in pages)]
    wrong = [where for where, text in said if re.search(r"install\S* '?\"?demotools", text)]
    assert [where for where in wrong if where != "log.md"] == []


def test_every_command_that_a_message_names_exists() -> None:
    wrong = [
        f"{where}: {why}"
        for where, text in ALL
        for found in re.findall(r"`((?:demotools|trainer) [a-z][^`\n]*)`", text)
        if (why := wrong_command(found))
    ]
    assert not wrong


def test_every_option_that_a_message_names_exists() -> None:
    known = set.union(FOREIGN_OPTIONS, *map(options_of, PROGRAMS.values()))
    wrong = [
        f"{where}: {option}"
        for where, text in ALL
        if " " in text
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
        if option not in known
    ]
    assert not wrong


@cache
def settings_keys() -> frozenset[str]:
    """Every key of the settings, without the numbers of stages."""

    def keys(model: type[BaseModel], path: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            place = f"{path}{field.serialization_alias or field.alias or name}"
            yield place
            for inner in models(field.annotation):
                yield from keys(inner, f"{place}.")

    def models(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for argument in get_args(annotation):
            yield from models(argument)

    return frozenset(keys(Settings, ""))


def test_every_setting_that_a_message_names_exists() -> None:
    sections = "run|model|optimizer|on_policy|off_policy|losses|stages|evaluation"
    inner = {key.removeprefix("stages.") for key in settings_keys()} | settings_keys()
    wrong = []
    for where, text in ALL:
        for key in re.findall(rf"(?<![\w./])(?:{sections})(?:\.\w+)+", text):
            plain = re.sub(r"\.(\d+|X)(?=\.|$)", "", key)
            free = re.match(r"(model|optimizer|losses)\.|.*\.schedule\.|.*\.losses\.", plain)
            if key.endswith("_"):
                continue  # how several keys begin
            if plain not in inner and not free and not re.search(r"\.(toml|pt|py|json|html)$", key):
                wrong.append(f"{where}: {key}")
    assert not wrong


def test_no_message_sets_something_that_is_no_setting() -> None:
    names = {key.rpartition(".")[2] for key in settings_keys()}
    names |= {"type", "value", *Manifest.model_fields, *PublishedFile.model_fields}
    wrong = [
        f"{where}: {name}"
        for where, text in ALL
        if " " in text
        for name in re.findall(r"(?<![\w.\"'])([a-z_]+) = [\"'\[{]", text)
        if name not in names
    ]
    assert not wrong


def test_every_recipe_that_a_message_names_ships() -> None:
    named = {
        recipe for _, text in ALL for recipe in re.findall(r"`trainer run (\w+\.toml)[`\s]", text)
    }
    assert named and named <= set(shipped_recipes())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("trainer run a.toml --resume", ""),
        ("trainer walk", "`trainer` has no command walk"),
        ("trainer recipes copy x --force", "no option --force"),
        ("demotools info --vaild", "no option --vaild"),
    ],
)
def test_the_judge_of_commands_knows_right_from_wrong(text: str, why: str) -> None:
    assert why in wrong_command(text) if why else not wrong_command(text)
