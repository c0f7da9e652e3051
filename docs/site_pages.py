"""Pages of the site that are made from other files: the README, the results, the notebook.

Source: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOK = "tutorial.ipynb"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the site, with the pages that are made here."""
    docs = Path(config.docs_dir)
    readme = (docs.parent / "README.md").read_text("utf-8")
    # the site has the files of docs/ and the results beside its first page
    start = readme.replace("](docs/", "](").replace("](benchmarks/results", "](results")
    files.append(File.generated(config, "index.md", content=start))
    results = (docs.parent / "benchmarks" / "results.md").read_text("utf-8")
    files.append(File.generated(config, "results.md", content=results.replace("](../docs/", "](")))
    tutorial = notebook_page((docs / NOTEBOOK).read_text("utf-8"))
    files.append(File.generated(config, "tutorial.md", content=tutorial))
    return files


def notebook_page(notebook: str) -> str:
    """The cells of a notebook as Markdown, outputs left out."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join([*parts, f"This page as a notebook: [{NOTEBOOK}]({NOTEBOOK})."]) + "\n"
