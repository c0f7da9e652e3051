"""Draw what a command printed, colours and all, as an SVG: the picture of a terminal.

demotools show STORE --ansi | python docs/pictures/terminal.py FILE --title TEXT --lines N
"""

from __future__ import annotations

import io
import re
import sys
from itertools import islice
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--title", default="", help="What stands above.")
@click.option("--lines", default=24, help="So many of the first lines.")
def main(file: Path, title: str, lines: int) -> None:
    """Draw the first lines of the standard input into FILE."""
    text = "".join(islice(sys.stdin, lines))
    # what follows is not drawn, and its writer should not fail
    sys.stdin.read()
    # one column more, so that nothing wraps
    width = 1 + max(len(line) for line in Text.from_ansi(text).plain.splitlines())
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(Text.from_ansi(text))
    drawing = console.export_svg(title=title)
    # its fonts would be loaded from elsewhere; every system has one of its own
    file.write_text(re.sub(r"@font-face \{.*?\}", "", drawing, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
