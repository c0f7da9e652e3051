"""The `trainer` command line: one thin function per command; other modules do the work.

Modules that import torch are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from click.core import ParameterSource

from demotools.errors import exit_with_message, optional_package
from demotools.output import counted, data_folder, log_to_stderr

if TYPE_CHECKING:
    from trainer.acting.policy import Sample

_PATIENCE_SECONDS = 2.0
Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        with exit_with_message():
            return super().invoke(ctx)


class _RunCommand(click.Command):
    """`--resume` has a value that may be left out; a word after it is one only if it is `auto`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        words = [
            "--resume=always" if word == "--resume" and args[at + 1 : at + 2] != ["auto"] else word
            for at, word in enumerate(args[:end])
        ]
        return super().parse_args(ctx, words + args[end:])


# as with demotools, what people type who have not read the help
_WORKERS = ("processes", "jobs", "num-workers", "num-processes")


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: "workers" if token in _WORKERS else token,
    },
)
@click.version_option(package_name="demotools", prog_name="trainer")
def main() -> None:
    """Train networks on BabyAI demonstrations and measure them.

    \b
    Example:
      trainer run bc_small_cpu.toml
      trainer evaluate runs/BabyAIGoToLocalBCSmall
    """
    # before torch is loaded: threads that wait must sleep, not spin, or a second process on the
    # same cores makes every update many times slower (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log_to_stderr()


def _load_torch() -> None:
    """Load torch, or say which extra is missing.

    Its half a million objects live as long as the process. To look for garbage among them, while
    they are made and when the process ends, takes half of the time that loading takes.
    """
    if "torch" in sys.modules:
        optional_package("torch", "train")
        return
    gc.disable()
    notice = threading.Timer(_PATIENCE_SECONDS, click.echo, ["loading torch"], {"err": True})
    if sys.stderr.isatty() and not click.get_current_context().params.get("quiet"):
        notice.start()
    try:
        optional_package("torch", "train")
        gc.freeze()
    finally:
        gc.enable()
        notice.cancel()


def _load_torch_for(checkpoint: Path | None, level: str | None = None) -> None:
    """Load torch where there is such a checkpoint, and such a level; else say so at once."""
    from trainer.run.folder import refuse_level, refuse_missing

    refuse_missing(checkpoint)
    refuse_level(level, checkpoint)
    _load_torch()


def _checkpoint(*, required: bool = True) -> Callable[[Command], Command]:
    return click.argument("checkpoint", type=click.Path(path_type=Path), required=required)


def _output(
    help_text: str, default: Path | None = None, **kind: Any
) -> Callable[[Command], Command]:
    """`-o`; `kind` says what it must not be: see `click.Path`."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, **kind),
        default=default,
        show_default=default is not None,
        help=help_text,
    )


def _episodes(default: int, help_text: str) -> Callable[[Command], Command]:
    return click.option(
        "-n",
        "--episodes",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help=help_text,
    )


def _only(levels: tuple[str, ...]) -> str | None:
    """The level that was given; of several click itself would keep the last, and say nothing."""
    if len(levels) > 1:
        raise click.BadParameter(f"give one level a call, not {', '.join(levels)}")
    return levels[0] if levels else None


def _trust(holder: str = "the checkpoint") -> Callable[[Command], Command]:
    help_text = f"Import and run the code that {holder} names."
    return click.option("--trust", is_flag=True, help=help_text)


_quiet = click.option("--quiet", "-q", is_flag=True, help="Print no progress bar and no summary.")
_data_dir = click.option(
    "--data-dir",
    "data",
    type=click.Path(file_okay=False, path_type=Path),
    callback=lambda _ctx, _param, value: data_folder(value),
    help="Folder of the stores [default: $DEMOTOOLS_DATA, else the user's data folder].",
)
_workers = click.option(
    "-m",
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="one per processor",
    help="Run environments in at most N processes; any N gives the same result.",
)
_folders = click.argument(
    "folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR..."
)
_against = click.option(
    "-x",
    "--against",
    type=click.Choice(["demo_steps", "env_steps", "minutes"]),
    help="X axis of the curves [default: the steps that all runs took].",
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing file.")
_sample = click.option(
    "--sample",
    "--stochastic",
    is_flag=True,
    help="Sample actions from the policy [default: take the most probable].",
)
_sample_loops = click.option(
    "--sample-loops",
    is_flag=True,
    help="Sample only from the third time that the same view comes up in an episode.",
)


def _how_sampled(*, sample: bool, sample_loops: bool) -> Sample:
    """The value of `sample` that two flags stand for."""
    if sample and sample_loops:
        raise click.UsageError("--sample and --sample-loops exclude each other")
    return "loops" if sample_loops else sample


def _level(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--level",
        multiple=True,
        callback=lambda _ctx, _param, value: _only(value),
        help=f"Play this level [default: {default}].",
    )


_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="cpu",
    show_default=True,
    help="Device that runs the network.",
)
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, as in stages.0.max_demo_steps=1000; an empty VALUE removes the key.",
)
_tiny = click.option(
    "--tiny", is_flag=True, help="Apply the recipe's [tiny] overrides, for a run of seconds."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON.")


@main.command(cls=_RunCommand)
@click.argument("recipe")
@_output(
    "Write the run to this folder [default: runs/NAME plus what --set changes].", file_okay=False
)
@_set
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the resolved settings and the expected cost; train nothing.",
)
@_tiny
@click.option(
    "--init-from",
    metavar="CHECKPOINT|RUN",
    help="Start from the weights of this checkpoint, run folder, or hf:OWNER/NAME.",
)
@click.option(
    "--resume",
    type=click.Choice(["always", "auto"]),
    metavar="[=auto]",
    help="Resume from the checkpoint in the output folder; =auto starts anew if there is none.",
)
@click.option(
    "--force-settings",
    is_flag=True,
    help="Resume even if settings that do not affect the weights have changed.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing run in the output folder.")
@_trust("a run's settings.toml")
@click.option(
    "--seeds",
    metavar="SEEDS",
    help="Train once per seed (1-5 or 1,3,7, for example), each in DIRECTORY/seed-N.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Level of the log on stderr; outside a terminal, info prints a line a minute.",
)
@_workers
@_data_dir
@_quiet
def run(
    recipe: str,
    output: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    tiny: bool,
    init_from: str | None,
    resume: str | None,
    force_settings: bool,
    overwrite: bool,
    trust: bool,
    seeds: str | None,
    log_level: str,
    workers: int | None,
    data: Path,
    quiet: bool,
) -> None:
    """Train a network from a recipe.

    RECIPE is a TOML file, or the name of an included recipe (`trainer recipes`).

    The output folder receives settings.toml (fully resolved), the checkpoint last.pt, log.jsonl,
    tensorboard/ and the learning curve, curve.png. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save the
    checkpoint before exiting. A recipe may name your own code; --dry-run does not import it.

    \b
    Example:
      trainer run bc_small_cpu.toml -m 2 -o runs/first --set run.seed=3
      trainer run ppo.toml --set run.level=GoToLocal --init-from runs/first
      trainer run bc_small_cpu.toml --seeds 1-5
    """
    if resume and overwrite:
        raise click.UsageError("--resume continues a run, --overwrite replaces it: give only one")
    log_to_stderr(log_level)
    from trainer.run.folder import refuse_early, seed_runs

    common: dict[str, Any] = {"tiny": tiny, "data_dir": data, "init_from": init_from}
    runs: list[tuple[Path | None, tuple[str, ...]]] = [(output, overrides)]
    if seeds is not None and not dry_run:
        named: dict[str, Any] = {"tiny": tiny, "init_from": init_from, "output": output}
        runs[:] = seed_runs(seeds, recipe, overrides, resume=resume is not None, **named)
    new = not (dry_run or resume or overwrite)
    for place, chosen in runs:
        refuse_early(recipe, **common, overrides=chosen, output=place, new=new)
    _load_torch()
    from trainer.report.plot import LiveCurve, drawn_curve
    from trainer.run.session import Stopped, train
    from trainer.run.session import dry_run as described

    common |= {"trust": trust, "workers": workers}
    if dry_run:
        click.echo(described(recipe, overrides=overrides, **common), nl=False)
        return
    try:
        for place, chosen in runs:
            folder = train(
                recipe,
                **common,
                overrides=chosen,
                output=place,
                # of several some may not have begun
                resume="auto" if resume and (seeds or resume == "auto") else resume is not None,
                force_settings=force_settings,
                overwrite=overwrite,
                quiet=quiet,
                say=_say,
                on_save=LiveCurve().refresh,
            )
            drawn = drawn_curve(folder) if _writes() else ""
    except Stopped as stopped:
        if not quiet:
            _say_how_to_go_on(stopped.checkpoint, resume=resume is not None)
        raise
    if seeds is not None and _writes():
        drawn = drawn_curve(folder.parent)
    if not quiet and drawn:
        _say(drawn)


def _say_how_to_go_on(checkpoint: Path, *, resume: bool) -> None:
    """After a signal; `resume` whether the command line says so already."""
    if _writes():
        again = [word for word in sys.argv[1:] if word != "--overwrite"]
        again += [] if resume else ["--resume"]
        _say(f"stopped; the checkpoint is {checkpoint}; to resume from it:")
        _say(f"  {shlex.join(['trainer', *again])}")
    else:
        _say(f"process {os.environ['RANK']} stopped; process 0 has saved {checkpoint}")


def _writes() -> bool:
    """Whether this is the process that prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@main.command()
@_checkpoint(required=False)
@_episodes(1000, "Number of unseen episodes to play.")
@click.option(
    "--seeds",
    metavar="SEEDS",
    help="Play these environment seeds instead, such as 1000-1511 or 1,2,7-9.",
)
@_sample
@_sample_loops
@click.option(
    "--policy",
    type=click.Choice(["bot", "random"]),
    help="Play this reference policy instead, on the same level.",
)
@_level("all that it was trained on")
@_output("Write every episode to this file, one JSON object per line.", dir_okay=False)
@_overwrite
@_device
@_trust()
@_json
@_workers
@_quiet
def evaluate(
    checkpoint: Path | None,
    policy: str | None,
    level: str | None,
    seeds: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    sample: bool,
    sample_loops: bool,
    **played: Any,
) -> None:
    """Measure how often a policy succeeds on unseen episodes.

    CHECKPOINT is a file, a run's folder, or hf:OWNER/NAME. The result is also added to the run's
    evaluations.jsonl.

    An episode is a success if its reward is above 0 within the level's step limit. The environment
    seeds start at 2,000,000,000, a range that no store uses.

    \b
    Example:
      trainer evaluate runs/BabyAIGoToLocalBCSmall --episodes 1000
      trainer evaluate runs/BabyAIGoToObjPPO --sample -o episodes.jsonl
      trainer evaluate --policy bot --level GoToLocal
    """
    if checkpoint is None and (policy is None or level is None):
        raise click.UsageError("give a CHECKPOINT, or both --policy and --level")
    of_episodes = click.get_current_context().get_parameter_source("episodes")
    if seeds is not None and of_episodes is ParameterSource.COMMANDLINE:
        raise click.UsageError(
            "--seeds lists the episodes one by one, --episodes counts them: give only one, "
            "for example --seeds 1000-1019 for 20 episodes"
        )
    how = _how_sampled(sample=sample, sample_loops=sample_loops)
    if how and policy is not None:
        raise click.UsageError("sampling is for the policy of a CHECKPOINT, not for --policy")
    from demotools.babyai.levels import listed_seeds
    from demotools.output import check_output, write_output

    _load_torch_for(checkpoint, level)
    from trainer.run.success import measured_success

    if output is not None:
        check_output(output, overwrite=overwrite)
    result, said = measured_success(
        checkpoint,
        policy,
        level,
        seeds=None if seeds is None else listed_seeds(seeds),
        quiet=quiet,
        sample=how,
        **played,
    )
    if output is not None:
        lines = [json.dumps(outcome.as_json()) + "\n" for outcome in result.outcomes]
        write_output(output, "".join(lines).encode(), overwrite=overwrite)
        said = f"made {output}\n{said}".strip()
    _print(result, as_json=as_json, quiet=False)
    if said and not (quiet or as_json):
        click.echo(said)


@main.command()
@_checkpoint()
@_json
def info(checkpoint: Path, as_json: bool) -> None:
    """Show the level, network and steps of a checkpoint.

    CHECKPOINT is a file, a run's folder, or hf:OWNER/NAME. None of the code that it names is run.

    \b
    Example:
      trainer info runs/BabyAIGoToLocalBCSmall/best.pt
    """
    _load_torch_for(checkpoint)
    from trainer.run.checkpoint import read_checkpoint

    # what its settings name would be imported by whoever builds it: nobody does
    _print(read_checkpoint(checkpoint, trust=True).about(), as_json=as_json, quiet=False)


@main.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the included recipes, or copy one to edit.

    \b
    Example:
      trainer recipes
      trainer recipes copy bc_small_cpu.toml
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command(name="list")
def list_recipes() -> None:
    """List the included recipes.

    \b
    Example:
      trainer recipes list
    """
    from trainer.settings.models import recipe_summary, shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        click.echo(f"{name:{width}}  {recipe_summary(path)}")


@recipes.command()
@click.argument("name")
@_output("Write the copy to this file [default: NAME, in this folder].")
@_overwrite
@_quiet
def copy(name: str, output: Path | None, overwrite: bool, quiet: bool) -> None:
    """Copy the recipe NAME to edit it, with the schema for editors.

    \b
    Example:
      trainer recipes copy bc_small_cpu.toml -o mine.toml
    """
    from demotools.output import read_regular, write_output
    from trainer.settings.models import recipe_path
    from trainer.settings.reference import SCHEMA_FILE, schema_text

    source = recipe_path(name)
    target = output or Path(source.name)
    write_output(target, read_regular(source), overwrite=overwrite)
    if not target.with_name(SCHEMA_FILE).exists():
        write_output(target.with_name(SCHEMA_FILE), schema_text().encode(), overwrite=False)
    if not quiet:
        click.echo(f"made {target}; train with `trainer run {target}`")


@main.command()
@click.argument("recipe")
@_set
@_tiny
@_quiet
def validate(recipe: str, overrides: tuple[str, ...], tiny: bool, quiet: bool) -> None:
    """Check the keys and values of a recipe.

    This needs neither torch nor a store; `trainer run --dry-run` reports if one of them is missing.

    \b
    Example:
      trainer validate mine.toml
    """
    from trainer.settings.models import read_settings

    settings = read_settings(recipe, overrides, tiny=tiny)
    if not quiet:
        click.echo(
            f"{recipe} is valid: {settings.run.name}, {counted(len(settings.stages), 'stage')}"
        )


@main.command()
@_output("Write the schema to this file [default: print it].", dir_okay=False)
@_overwrite
@_quiet
def schema(output: Path | None, overwrite: bool, quiet: bool) -> None:
    """Print the JSON Schema of recipes, for editors.

    The line `#:schema ./recipe.schema.json` at the top of a recipe points editors to it.

    \b
    Example:
      trainer schema -o recipe.schema.json
    """
    from demotools.output import write_output
    from trainer.settings.reference import schema_text

    if output is None:
        click.echo(schema_text(), nl=False)
        return
    write_output(output, schema_text().encode(), overwrite=overwrite)
    if not quiet:
        click.echo(f"made {output}")


@main.command()
@_folders
@_against
@_output("Write the picture to this file.", Path("curve.png"), dir_okay=False)
@_overwrite
@_quiet
def plot(
    folders: tuple[Path, ...], against: Any, output: Path, overwrite: bool, quiet: bool
) -> None:
    """Draw the learning curves of several runs in one picture.

    \b
    Example:
      trainer plot runs/* --against minutes -o curve.png
    """
    from demotools.output import check_output
    from trainer.report.plot import plot_runs
    from trainer.run.folder import check_suffix

    check_suffix(output, ".png")
    check_output(output, overwrite=overwrite)
    path = plot_runs(folders, output, against, overwrite=overwrite)
    if not quiet:
        click.echo(f"made {path}")


@main.command()
@_checkpoint()
@_episodes(4, "Number of episodes to watch.")
@_sample
@_sample_loops
@click.option("--worst", is_flag=True, help="Watch the worst of at least a hundred episodes.")
@_level("the first that it was trained on")
@_trust()
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="First environment seed [default: the first of the evaluation].",
)
@click.option(
    "-o", "--gif", type=click.Path(path_type=Path), help="Write an animation to this file."
)
@click.option("--ansi", is_flag=True, help="Print all steps in colour.")
@_overwrite
@_json
@_quiet
def watch(
    checkpoint: Path,
    level: str | None,
    seed: int | None,
    gif: Path | None,
    ansi: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    sample: bool,
    sample_loops: bool,
    trust: bool,
    **played: Any,
) -> None:
    """Watch a policy play unseen episodes.

    CHECKPOINT is a file, a run's folder, or hf:OWNER/NAME.

    Each picture shows what the policy sees, the room, the mission, and the probability of each
    action. In a terminal, step with the arrow keys; otherwise all steps are printed.

    \b
    Example:
      trainer watch runs/BabyAIGoToLocalBCSmall --worst
      trainer watch runs/BabyAIGoToLocalBCSmall --level GoToObj --gif agent.gif
    """
    from trainer.run.folder import check_suffix

    how = _how_sampled(sample=sample, sample_loops=sample_loops)
    if gif:
        check_suffix(gif, ".gif")
    _load_torch_for(checkpoint, level)
    from demotools.babyai.levels import EVALUATION_SEED
    from demotools.look.terminal import is_interactive, is_plain
    from demotools.output import check_output, write_output
    from trainer.acting.watched import watched_gif
    from trainer.report.watch import (
        levels_note,
        watch_in_terminal,
        watched_episodes,
        watched_text,
    )
    from trainer.run.checkpoint import named_checkpoint

    if gif:
        check_output(gif, overwrite=overwrite)
    saved = named_checkpoint(checkpoint, trust=trust)
    note = "" if level else levels_note(saved)
    in_terminal = not gif and is_interactive() and not (ansi or as_json)
    if note and not (in_terminal or quiet):
        click.echo(note, err=True)
    first = EVALUATION_SEED if seed is None else seed
    watched = watched_episodes(
        saved, level=level, first_seed=first, sample=how, trust=trust, quiet=quiet, **played
    )
    if gif:
        write_output(gif, watched_gif(watched, quiet=quiet), overwrite=overwrite)
        if not quiet and not as_json:
            won = sum(one.success for one in watched)
            click.echo(f"made {gif}: {won} of {len(watched)} episodes succeeded")
    if as_json:
        click.echo(json.dumps([one.as_json() for one in watched], indent=2))
    elif in_terminal:
        watch_in_terminal(watched, coloured=not is_plain(), note=note)
    elif ansi or not gif:
        for text in watched_text(watched, coloured=ansi and not is_plain()):
            click.echo(text, color=ansi and not is_plain())


@main.command()
@_checkpoint()
@click.option(
    "--to",
    "--format",
    "kind",
    type=click.Choice(["onnx", "torch", "weights"]),
    required=True,
    help="Export a graph for ONNX runtimes or plain torch, or the weights as a small checkpoint.",
)
@_output(
    "Write the policy to this file [default: policy.onnx, .torchscript or .pt next to it].",
    dir_okay=False,
)
@click.option("--half", is_flag=True, help="With --to weights: store them in 16 bits.")
@click.option("--level", help="Level to check a graph on [default: the one it was trained on].")
@_trust()
@_overwrite
@_json
@_quiet
def export(
    checkpoint: Path, kind: Any, level: str | None, as_json: bool, quiet: bool, **written: Any
) -> None:
    """Export a policy to a file that needs no trainer.

    CHECKPOINT is a file, a run's folder, or hf:OWNER/NAME.

    A graph computes one step for any number of environments. It is written only if its outputs
    match the network's to within 1e-5 over 1,000 steps. ONNX needs the extra `onnx`.

    \b
    Example:
      trainer export runs/BabyAIGoToLocalBCSmall --to onnx
      trainer export runs/BabyAIGoToLocalBCSmall --to weights --half -o GoToLocal.pt
    """
    if written["half"] and kind != "weights":
        raise click.UsageError("--half needs --to weights")
    _load_torch_for(checkpoint, level)
    from trainer.run.export import export_policy

    exported = export_policy(checkpoint, kind, level=level, quiet=quiet, **written)
    _print(exported, as_json=as_json, quiet=quiet)


@main.command()
@_checkpoint()
@click.argument("place", metavar="hf:OWNER/NAME")
@_episodes(1000, "Number of unseen episodes to measure the card's success rate on.")
@click.option("--private", is_flag=True, help="Make a new model private.")
@click.option("--license", "licence", metavar="ID", help="Licence to state in the card.")
@click.option("--dry-run", is_flag=True, help="Prepare everything, but upload nothing.")
@_trust()
@_json
@_workers
@_quiet
def push(checkpoint: Path, place: str, as_json: bool, quiet: bool, **published: Any) -> None:
    """Publish a policy on the Hugging Face hub.

    CHECKPOINT is a file or a run's folder.

    Uploads the weights (safetensors), settings, vocabulary, success rate, an animation, the
    learning curve and a model card. Needs the extra `hf`, and a token from `hf auth login` or
    $HF_TOKEN. Other commands then accept hf:OWNER/NAME as a checkpoint.

    \b
    Example:
      trainer push runs/BabyAIGoToLocalBCSmall hf:me/babyai-gotolocal
      trainer evaluate hf:me/babyai-gotolocal
    """
    _load_torch_for(checkpoint)
    from trainer.report.push import push_policy

    pushed = push_policy(checkpoint, place, quiet=quiet, **published)
    _print(pushed, as_json=as_json, quiet=quiet)


@main.command()
@_folders
@_against
@_output("Write the report to this file.", Path("runs.html"), dir_okay=False)
@_overwrite
@_json
@_quiet
def report(
    folders: tuple[Path, ...],
    against: Any,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write an HTML report about one or more runs.

    It shows curves, success, cost and settings side by side. With --json, the figures are printed
    and no report is written.

    \b
    Example:
      trainer report runs/* -o runs.html
    """
    from demotools.output import check_output, write_output
    from trainer.report.page import run_report
    from trainer.run.folder import check_suffix

    if not as_json:
        check_suffix(output, ".html", ".htm")
        check_output(output, overwrite=overwrite)
    found = run_report(folders, against)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    write_output(output, found.html.encode(), overwrite=overwrite)
    if not quiet:
        click.echo(
            f"made {output}: {counted(len(found.runs), 'run')}, "
            f"{counted(len(found.differing), 'differing setting')}"
        )


class _Result(Protocol):
    def as_json(self) -> Any: ...

    def text(self) -> str: ...


def _print(result: _Result, *, as_json: bool, quiet: bool) -> None:
    """What was done: for a program, for a person, or not at all."""
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2))
    elif not quiet:
        click.echo(result.text())


def _say(line: str) -> None:
    """Print a line; where its reader has gone (`| head`), the run goes on and the rest is lost."""
    for stream, text in (
        (sys.stdout, line),
        (sys.stderr, "nothing reads the output any more; the run continues"),
    ):
        try:
            click.echo(text, file=stream)
            return
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
