"""Commands that share stores with others: export, card, push."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.cli import (
    Shell,
    common,
    output_option,
    overwrite_file,
    say,
    stores_argument,
)

_KINDS = ("pickle", "parquet", "jsonl", "minari")
_MINARI_FORMATS = ("hdf5", "arrow", "parquet")
_SUFFIXES = {".pkl": "pickle", ".parquet": "parquet", ".jsonl": "jsonl"}


@click.command("export")
@click.argument("store")
@click.option(
    "--to",
    "target",
    type=click.Choice(_KINDS),
    show_default="from the suffix of -o",
    help="Target format.",
)
@click.option(
    "--format",
    "file_format",
    # the others are for those who write `--format jsonl` and mean `--to jsonl`
    type=click.Choice(sorted({*_KINDS, *_MINARI_FORMATS})),
    metavar="hdf5|arrow|parquet",
    show_default="hdf5",
    help="Storage format of the Minari dataset.",
)
@output_option(
    "File to write (`-` prints jsonl), or folder of Minari datasets.",
    "next to the store; Minari's own folder",
    allow_dash=True,
)
@click.option(
    "--id", "dataset_id", show_default="babyai/STORE-v0", help="Id of the Minari dataset."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file or dataset.")
@common
def export_command(
    shell: Shell,
    store: str,
    target: str | None,
    file_format: str | None,
    output: Path | None,
    dataset_id: str | None,
    overwrite: bool,
) -> None:
    """Export a store for other programs.

    The pickle is for babyai's own loader. The parquet file has the schema of the JAT data set and
    is for `datasets.load_dataset`. The jsonl file has one episode per line, as text: the mission, a
    description of each view, and the actions (docs/exchange.md).

    \b
    Example:
      demotools export GoToLocal --to pickle -o BabyAI-GoToLocal-v0_agent.pkl
      demotools export GoToLocal --to jsonl
      demotools export GoToLocal --to minari --format arrow
    """
    from demotools.exchange.export import export_minari, export_pickle
    from demotools.exchange.jsonl import STDOUT, export_jsonl
    from demotools.exchange.parquet import export_parquet
    from demotools.store.reading import open_store

    kind = _export_kind(target, file_format, output)
    if kind != "minari" and dataset_id:
        raise click.UsageError("--id needs --to minari")
    if kind != "jsonl" and output == STDOUT:
        raise click.UsageError("only jsonl can be printed")
    opened = open_store(shell.store(store))
    if kind == "minari":
        exported = export_minari(
            opened,
            root=output,
            dataset_id=dataset_id,
            data_format=file_format if file_format in _MINARI_FORMATS else "hdf5",
            overwrite=overwrite,
            quiet=shell.quiet,
        )
    else:
        export = {"pickle": export_pickle, "parquet": export_parquet, "jsonl": export_jsonl}[kind]
        exported = export(opened, output, overwrite=overwrite, quiet=shell.quiet)
    if output != STDOUT:
        shell.print_result(exported)


def _export_kind(target: str | None, file_format: str | None, output: Path | None) -> str:
    """What is meant; `--format` alone stands for `--to`, where it can."""
    if target is None and file_format is not None:
        return file_format if file_format in _KINDS else "minari"
    suffix = output.suffix if output else ""
    kind = target or _SUFFIXES.get(suffix)
    if kind is None:
        raise click.UsageError(f"Missing option '--to': {', '.join(_KINDS)}")
    allowed = _MINARI_FORMATS if kind == "minari" else (kind,)
    if file_format not in (None, *allowed):
        raise click.UsageError(f"--to {kind} has no format {file_format}")
    return kind


@click.command("card")
@stores_argument
@output_option("Write the card to this file.", "print it", dir_okay=False)
@overwrite_file
@common
def card_command(
    shell: Shell, stores: tuple[str, ...], output: Path | None, overwrite: bool
) -> None:
    """Write a Hugging Face dataset card for one or more stores.

    The card is Markdown with the header that the hub reads.

    \b
    Example:
      demotools card GoToLocal -o README.md
    """
    from demotools.exchange.publish import stores_card
    from demotools.output import write_output

    text = stores_card([shell.store(store) for store in stores])
    if output is None:
        say(*text.removesuffix("\n").split("\n"))
        return
    write_output(output, text.encode(), overwrite=overwrite)
    shell.print({"path": output}, f"made {output}")


@click.command("push")
@click.argument("stores", nargs=-1, metavar="STORE...")
@click.argument("place", metavar="hf:OWNER/NAME")
@click.option("--all", "every", is_flag=True, help="Publish every store in the data folder.")
@click.option("--private", is_flag=True, help="Make a new dataset private.")
@click.option("--replace-card", is_flag=True, help="Replace an existing card.")
@click.option(
    "--manifests",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the levels' manifests to this folder, with the published stores as first sources.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and stop.")
@click.option("--overwrite", is_flag=True, help="With --manifests: replace existing files.")
@common
def push_command(
    shell: Shell,
    stores: tuple[str, ...],
    place: str,
    every: bool,
    private: bool,
    replace_card: bool,
    manifests: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Publish stores on the Hugging Face hub.

    Uploads each store's archive, and a card for all of them if the dataset has none. Needs the
    extra `hf`, and a token from `hf auth login` or $HF_TOKEN. To get a store back, use
    `demotools fetch LEVEL --from hf:OWNER/NAME/STORE.zarr.zip`, or `demotools fetch LEVEL
    --manifests DIR` with the manifests that --manifests wrote.

    \b
    Example:
      demotools push GoToLocal hf:me/babyai-demos
      demotools push --all hf:me/babyai-demos --manifests manifests
    """
    from demotools.exchange.publish import push_stores, write_manifests
    from demotools.store.reading import list_stores

    if every == bool(stores):
        raise click.UsageError("name the stores, or give --all")
    paths = [shell.store(name) for name in (list_stores(shell.folder) if every else stores)]
    if not paths:
        raise click.UsageError(f"there is no store in {shell.folder}")
    pushed = []
    for one in push_stores(
        paths, place, private=private, replace_card=replace_card, dry_run=dry_run, quiet=shell.quiet
    ):
        pushed.append(one)
        if not shell.as_json:
            shell.print({}, one.text())
    figures: dict[str, object] = {"stores": pushed, "manifests": [], "left_out": {}}
    lines: list[str] = []
    if manifests is not None and not dry_run:
        written = write_manifests(pushed, manifests, overwrite=overwrite)
        figures |= {"manifests": written.paths, "left_out": written.left_out}
        lines = written.text(manifests).split("\n")
    if shell.as_json or lines:
        shell.print(figures, *lines)
