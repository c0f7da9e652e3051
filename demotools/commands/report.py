"""`demotools report`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, json_output, print_json, say


@click.command("report")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The file.",
)
@click.option(
    "--instruction-len",
    type=click.IntRange(min=1),
    help="Tokens that a network reads of a mission: how many episodes are cut?",
)
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@json_output
@common
def command(
    stores: tuple[str, ...],
    output: Path,
    instruction_len: int | None,
    overwrite: bool,
    as_json: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Write one HTML file about the given stores: figures, pictures, findings.

    The findings are duplicate episodes and seeds within the stores and between them (train and
    valid, say), missions out of grammar or cut, unbalanced actions. With --json, they are printed
    and no file is written.

    \b
    Example:
      demotools report GoToLocal GoToLocal-valid -o report.html
    """
    from demotools.info import size_text
    from demotools.output import check_output, write_output
    from demotools.report import store_report
    from demotools.store import store_path

    if not as_json:
        check_output(output, overwrite=overwrite)
    paths = [store_path(store, folder) for store in stores]
    found = store_report(paths, instruction_len=instruction_len, quiet=quiet)
    if as_json:
        print_json(found.as_json())
        return
    content = found.html.encode()
    write_output(output, content, overwrite=overwrite)
    for finding in () if quiet else found.findings:
        mark = "LOOK" if finding.alarm else "fine"
        say(f"{mark}  {', '.join(finding.stores)}: {finding.name}: {finding.text}")
    if not quiet:
        say(f"made {output}: {size_text(len(content))}")
