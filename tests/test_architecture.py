"""The pages name every room and file there is, and nothing that there is not."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "results.md", *sorted(ROOT.glob("docs/*.md"))]
PACKAGES = ("demotools", "trainer")
FILE = re.compile(r"[\w/]+\.py|manifests/\w+\.toml")
FOLDER = re.compile(r"\w+/(?:\w+/)*")
NAME = re.compile(r"([A-Za-z]\w*(?:\.\w+)?)(\(\))?")


def quoted(text: str) -> list[str]:
    """What stands in backticks, in order."""
    return re.findall(r"`([^`]+)`", text)


def rows(heading: str) -> list[list[str]]:
    """The rows of the table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@cache
def defined(path: Path) -> set[str]:
    """Names that a file defines at its top, and `Class.method` for those of classes."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@cache
def public_names(package: str) -> set[str]:
    """What users import from a package."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} says nothing of what is public")


def wrong(line: str) -> list[str]:
    """What a line names that does not exist.

    A file lies below the root or below the folder named before it on the line; a function, class
    or constant is defined in one of the line's files, or is public.
    """
    found: list[str] = []
    names = set().union(*map(public_names, PACKAGES))
    folder = ROOT
    for word in quoted(line):
        if FOLDER.fullmatch(word):
            folder = ROOT / word
            found += [] if folder.is_dir() else [word]
        elif FILE.fullmatch(word):
            files = [path for path in (ROOT / word, folder / word) if path.is_file()]
            found += [] if files else [word]
            names |= defined(files[0]) if files and files[0].suffix == ".py" else set()
    for word in quoted(line):
        name = NAME.fullmatch(word)
        if name and (name[2] or name[1][0].isupper()) and name[1] not in names:
            found.append(word)
    return found


def test_every_file_folder_and_function_on_the_page_exists() -> None:
    assert [word for line in PAGE.splitlines() for word in wrong(line)] == []


@pytest.mark.parametrize(
    "line",
    [
        "| `demotools/store/` | x | `nowhere.py` |",
        "see `trainer/nowhere/`",
        "`trainer/run/loop.py`, `nobody()`",
        "`trainer/run/state.py`, `DemoStream.nothing()`",
        "`trainer/learning/losses.py`, `Nothing`",
        "`LOSSES` of no file",
    ],
)
def test_a_name_that_does_not_exist_is_found(line: str) -> None:
    assert len(wrong(line)) == 1


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_stands_in_its_room(package: str) -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
    }
    named = set()
    for room, _what, files in rows(f"The rooms of `{package}`"):
        (place,) = quoted(room)
        inside = [word for word in quoted(files) if FILE.fullmatch(word)]
        named |= {place + file for file in inside} if place.endswith("/") else {place}
    assert named == there


@pytest.mark.parametrize("package", PACKAGES)
def test_the_rooms_stand_in_the_order_in_which_they_may_import(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c.get("containers") == [package])
    allowed = [room for layer in layers for room in layer.split(" | ") if room != "__main__"]
    shown = [quoted(row[0])[0] for row in rows(f"The rooms of `{package}`")]
    assert [place.removeprefix(f"{package}/").rstrip("/") for place in shown] == [
        f"{room}.py" if (ROOT / package / f"{room}.py").is_file() else room for room in allowed
    ]


def test_the_page_names_what_users_import_and_no_more() -> None:
    (paragraph,) = (part for part in PAGE.split("\n\n") if part.startswith("What users import"))
    assert set(quoted(paragraph)) == set(PACKAGES).union(*map(public_names, PACKAGES))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_by_its_path_exists(page: Path) -> None:
    path = (
        r"\b(?:(?:demotools|trainer|tests|benchmarks|manifests)/[\w/]+|docs/\w+)\.(?:py|md|toml)\b"
    )
    named = set(re.findall(path, page.read_text("utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def examples(page: Path) -> list[str]:
    """The Python on a page or in a notebook; what goes to the shell is left out."""
    text = page.read_text("utf-8")
    if page.suffix == ".md":
        return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return [re.sub(r"(?m)^!(?:.*\\\n)*.*$", "", "".join(source)) for source in cells]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "docs" / "tutorial.ipynb"], ids=lambda page: page.name
)
def test_examples_import_public_names_only(page: Path) -> None:
    imported = [
        (node.module or "", alias.name)
        for code in examples(page)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES
        for alias in node.names
    ]
    # what a loss of the user's own gives
    allowed = {("trainer.learning.losses", "LossResult")}
    allowed |= {(package, name) for package in PACKAGES for name in public_names(package)}
    assert set(imported) <= allowed


@cache
def imports(file: Path) -> frozenset[str]:
    """The modules that a file imports, anywhere in it; of `from a import b` both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
    return frozenset(found)


def importers_of(package: str, file: Path, folders: tuple[Path, ...]) -> list[Path]:
    """The files that import a package, among this one and all that it imports from the folders."""
    seen, waiting = {file}, [file]
    while waiting:
        for name in imports(waiting.pop()):
            parts = name.split(".")
            # whoever imports a.b imports a
            places = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
            files = [f for place in places for f in (f"{place}.py", f"{place}/__init__.py")]
            found = {folder / name for folder in folders for name in files} - seen
            waiting += [one for one in found if one.is_file()]
            seen |= found
    return [
        one
        for one in sorted(seen)
        if one.is_file() and any(name.partition(".")[0] == package for name in imports(one))
    ]


def test_an_import_is_found_however_deep_it_is(tmp_path: Path) -> None:
    for name, text in {
        "a.py": "from tests import b",
        "tests/__init__.py": "",
        "tests/b.py": "def f():\n    import tests.c.d",
        "tests/c/__init__.py": "import pytest.x\nimport a",
        "tests/c/d.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = importers_of("pytest", tmp_path / "a.py", (tmp_path,))
    assert found == [tmp_path / "tests/c/__init__.py"]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda it: it.name
)
def test_a_benchmark_needs_no_pytest(file: Path) -> None:
    assert importers_of("pytest", file, (ROOT, ROOT / "benchmarks")) == []
