"""Three logs of one run that tell the same, whatever became of it; and logs that are not ours."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor

from demotools.errors import DemotoolsError, SettingsError
from trainer.acting.watched import watched_gif
from trainer.batch import Batch
from trainer.cli import main
from trainer.learning.losses import PPO, LossResult
from trainer.learning.networks.base import Model
from trainer.report.watch import watched_episodes
from trainer.run.log import (
    FILE_NAME,
    Meter,
    RunLog,
    gif_path,
    read_log,
)
from trainer.settings.models import read_settings, toml_of

ROOT = Path(__file__).parents[2]
WHERE = {"minutes": 1.0, "env_steps": 8, "demo_steps": 0}
EVALUATED = {
    **{"success": 0.5, "interval_low": 0.4, "interval_high": 0.6},
    **{"episodes": 4, "episode_length": 5.0},
}
TIMED = ("minutes", "share_", "_per_second", "resident_mib")

# What Weights & Biases does with these calls: a run has an id, and a step is taken once, in order.
STAND_IN = """
import json, os
from pathlib import Path

FILE = Path(os.environ["STAND_IN"])
FILE.touch()


def Video(path, format):
    assert format == "gif"
    return path


class Run:
    def __init__(self, id):
        self.id = id

    def log(self, values, step=None):
        if os.environ.get("STAND_IN_FAILS") == "log":
            raise ConnectionError("no network")
        calls = map(json.loads, FILE.read_text().splitlines())
        taken = [one["step"] for one in calls if one.get("id") == self.id]
        last = max(taken, default=-1)
        step = last + 1 if step is None else step
        if step > last:
            with FILE.open("a") as file:
                file.write(json.dumps({"id": self.id, "step": step, "values": values}) + "\\n")

    def finish(self, exit_code=None):
        pass


def init(**given):
    if os.environ.get("STAND_IN_FAILS") == "init":
        raise RuntimeError("api_key not configured")
    with FILE.open("a") as file:
        file.write(json.dumps({"begun": given}) + "\\n")
    return Run(given.get("id") or f"another-{os.getpid()}")
"""


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Import a package anew in this test, and in the next ones again."""
    monkeypatch.setitem(sys.modules, name, None)  # so that it is taken out afterwards, too
    monkeypatch.delitem(sys.modules, name)


def killing() -> Any:
    """PPO that kills its process when its KILL_AT-th batch comes."""
    ppo, calls = PPO(), [0]

    def loss(model: Model, batch: Batch, memory: Tensor) -> LossResult:
        calls[0] += 1
        if calls[0] == int(os.environ.get("KILL_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        return ppo(model, batch, memory)

    return loss


def trained(data: Path, folder: Path, *arguments: str, **variables: str) -> Any:
    """`trainer run` with the stand-in for Weights & Biases, in a process of its own."""
    package = folder.parent / "stand_in"
    package.mkdir(exist_ok=True)
    (package / "wandb.py").write_text(STAND_IN, "utf-8")
    line = [sys.executable, "-m", "trainer", "run", "bc_and_ppo", "--tiny", "-m", "1"]
    line += ["--set", "run.wandb=project", "--set", "run.deterministic=true"]
    line += ["--set", "losses.ppo={type='tests.run.test_log:killing'}", *arguments]
    environment = {
        **os.environ,
        **variables,
        "OMP_NUM_THREADS": "1",
        "STAND_IN": str(folder.parent / "stand_in.jsonl"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(package)]),
    }
    return subprocess.run(
        [*line, "-o", str(folder), "--data-dir", str(data)],
        env=environment,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def board_series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(point.step, point.value) for point in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def log_series(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard must show: tags, steps and values of `log.jsonl`."""
    series: dict[str, list[tuple[int, Any]]] = {}
    for line in read_log(folder):
        axis = "env_steps" if line["group"] in ("onpolicy", "environment") else "demo_steps"
        for name in line.keys() - {"group", *WHERE}:
            point = line[axis], pytest.approx(line[name], rel=1e-6)
            series.setdefault(f"{line['group']}/{name}", []).append(point)
    return series


def stand_in_calls(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "stand_in.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not any(t in name for t in TIMED)}


def test_all_three_logs_agree_after_a_kill_and_a_resume(bot_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    # saved after the second cycle; killed in the fourth, when the third has been logged
    killed = trained(bot_data, folder, KILL_AT="27")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lines = (folder / FILE_NAME).read_text("utf-8")
    assert '"env_steps": 96' in lines
    resumed = trained(bot_data, folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert board_series(folder) == log_series(folder)
    again = trained(bot_data, folder, "--resume")  # a second one, at the end
    assert again.returncode == 0, again.stderr
    assert board_series(folder) == log_series(folder)

    calls = stand_in_calls(tmp_path)
    begun = [call["begun"] for call in calls if "begun" in call]
    assert len(begun) == 3
    assert len({one["id"] for one in begun}) == 1
    assert {one["resume"] for one in begun} == {"allow"}
    assert begun[0]["config"]["run"]["level"] == "GoToLocal"
    ours = [
        untimed({k if k in WHERE else f"{line['group']}/{k}": v for k, v in line.items()})
        for line in map(dict, read_log(folder))
    ]
    for line in ours:
        del line[next(name for name in line if name.endswith("/group"))]
    theirs = [untimed(call["values"]) for call in calls if "values" in call]
    assert theirs == ours


@pytest.mark.slow
def test_a_run_begun_anew_is_another_one_there(bot_data: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--overwrite"]):
        assert trained(bot_data, tmp_path / "a", *arguments).returncode == 0
    calls = stand_in_calls(tmp_path)
    assert len({call["begun"]["id"] for call in calls if "begun" in call}) == 2


def test_where_weights_and_biases_fails_the_run_does_not_begin_or_goes_on_and_says_so(
    bot_data: Path, tmp_path: Path
) -> None:
    refused = trained(bot_data, tmp_path / "a", STAND_IN_FAILS="init")
    assert refused.returncode == 1
    assert "Weights & Biases does not start: RuntimeError: api_key" in refused.stderr
    assert "\n  next:  " in refused.stderr and "Traceback" not in refused.stderr
    finished = trained(bot_data, tmp_path / "b", STAND_IN_FAILS="log")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("gets no more numbers of this run: ConnectionError") == 1
    assert board_series(tmp_path / "b") == log_series(tmp_path / "b")


# The events of TensorBoard are several times longer than the lines: they meet the limit first.
FULL = """
import resource, sys
from pathlib import Path
from demotools.errors import DemotoolsError, SettingsError
from trainer.run.log import RunLog

limit = int(sys.argv[2])
with RunLog(Path(sys.argv[1]), say=print) as log:
    where = {"minutes": 1.0, "env_steps": 8, "demo_steps": 0}
    log.write("train", {"a": 0.5}, where=where)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        for _ in range(int(sys.argv[3])):
            names = [f"a_rather_long_name_of_a_scalar_{n}" for n in range(20)]
            log.write("train", dict.fromkeys(names, 1), where=where)
    except DemotoolsError as error:
        print(error)
"""


@pytest.mark.parametrize(("limit", "cycles"), [(20_000, 15), (3_000, 15)])
def test_a_full_disk_ends_the_curves_but_not_the_run_and_the_log_with_a_message(
    limit: int, cycles: int, tmp_path: Path
) -> None:
    line = [sys.executable, "-c", FULL, str(tmp_path), str(limit), str(cycles)]
    result = subprocess.run(
        line, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("TensorBoard's curves are no longer written (file too large)") == 1
    lines = read_log(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes().endswith(b"\n")
    if limit == 20_000:
        assert len(lines) == 1 + cycles and "where:" not in result.stdout
    else:
        assert 1 < len(lines) < cycles
        assert f"file too large\n  where: {tmp_path / FILE_NAME}\n  next:  " in result.stdout


def test_a_place_for_the_curves_that_is_a_file_is_said_and_the_lines_are_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "tensorboard").touch()
    said: list[str] = []
    with RunLog(tmp_path, say=said.append) as log:
        log.write("train", {"lr": 0.5}, where=WHERE)
    assert len(said) == 1 and "no longer written" in said[0]
    assert read_log(tmp_path) == [{"group": "train", **WHERE, "lr": 0.5}]


def test_a_folder_whose_name_is_not_utf8_has_the_lines_and_says_that_it_has_no_curves(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "\udcff"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    said: list[str] = []
    with RunLog(folder, say=said.append) as log:
        log.write("train", {"lr": 0.5}, where=WHERE)
    assert len(said) == 1 and "no longer written" in said[0] and said[0].isprintable()
    assert read_log(folder) == [{"group": "train", **WHERE, "lr": 0.5}]


def test_a_value_that_is_not_finite_is_left_out_everywhere(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("onpolicy", {"own/x": float("nan"), "own/y": 1.0}, where=WHERE)
    assert read_log(tmp_path) == [{"group": "onpolicy", **WHERE, "own/y": 1.0}]
    assert board_series(tmp_path) == {"onpolicy/own/y": [(8, 1.0)]}


def test_a_log_cut_within_a_line_goes_on_with_a_whole_one(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for _ in range(2):
            log.write("train", {"lr": 0.5}, where=WHERE)
        size = log.size_bytes()
    with RunLog(tmp_path) as log:
        log.cut(size - 3)
        log.write("train", {"lr": 0.25}, where=WHERE)
    assert [line["lr"] for line in read_log(tmp_path)] == [0.5, 0.25]
    assert board_series(tmp_path) == {"train/lr": [(0, 0.5), (0, 0.25)]}


def board_gifs(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    return {
        tag: [(image.step, image.encoded_image_string) for image in board.Images(tag)]
        for tag in board.Tags()["images"]
    }


def test_gifs_after_the_checkpoint_are_forgotten_and_the_others_shown_anew(tmp_path: Path) -> None:
    def measured(log: RunLog, steps: int) -> None:
        where = {**WHERE, "demo_steps": steps}
        for number in range(2):
            gif = gif_path(tmp_path, "evaluation", where, number)
            gif.parent.mkdir(exist_ok=True)
            gif.write_bytes(b"GIF89a" + bytes([7, 0, 5, 0, number, steps]))
        log.write("evaluation", EVALUATED, where=where)

    with RunLog(tmp_path) as log:
        measured(log, 10)
        size = log.size_bytes()
        measured(log, 20)
    shown = board_gifs(tmp_path)
    assert [step for step, _ in shown["evaluation/episode_1"]] == [10, 20]
    with RunLog(tmp_path) as log:
        log.cut(size)
        measured(log, 30)
    shown = board_gifs(tmp_path)
    assert shown == {
        f"evaluation/episode_{number}": [
            (steps, b"GIF89a" + bytes([7, 0, 5, 0, number, steps])) for steps in (10, 30)
        ]
        for number in range(2)
    }
    assert len(list((tmp_path / "gifs").iterdir())) == 4


@pytest.mark.usefixtures("one_thread")
def test_episodes_of_every_measurement_are_drawn_where_a_recipe_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(STAND_IN, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STAND_IN", str(tmp_path / "stand_in.jsonl"))
    forget(monkeypatch, "wandb")
    folder = tmp_path / "a"
    asked = ("evaluation.gifs=1", "evaluation.sample=both", "evaluation.every=96", "run.wandb=p")
    command = ["run", "ppo", "--tiny", "-m", "1", "-o", str(folder)]
    command += [word for one in asked for word in ("--set", one)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    lines = [line for line in read_log(folder) if line["group"].startswith("evaluation")]
    shown = board_gifs(folder)
    assert set(shown) == {"evaluation/episode_0", "evaluation_sampled/episode_0"}
    for tag, gifs in shown.items():
        steps = [line["env_steps"] for line in lines if line["group"] == tag.partition("/")[0]]
        assert [step for step, _ in gifs] == steps and len(steps) == 2
        played = watched_episodes(folder, episodes=1, sample="sampled" in tag)
        assert gifs[-1][1] == watched_gif(played)
    sent = [call["values"] for call in stand_in_calls(tmp_path) if "values" in call]
    videos = [value for values in sent for value in values.values() if isinstance(value, str)]
    assert len(videos) == 4 and all(Path(file).is_file() for file in videos)


OURS = {"group": "offpolicy", **WHERE, "ce/loss": 1.0}
MEASURED = {"group": "evaluation", **WHERE, **EVALUATED}
FOREIGN_LINES: list[Any] = [
    "{",
    "",
    "[]",
    "null",
    "3",
    '"group"',
    "[" * 100_000,
    '{"group": "offpolicy"}',
    "\udcff",
    "1" * 5000,
    *(
        {**OURS, key: value}
        for key in ("minutes", "env_steps", "demo_steps", "ce/loss")
        for value in (float("nan"), float("inf"), 10**400, "1", None, True, [1], {"a": 1})
    ),
    *({**OURS, key: -1} for key in WHERE),
    *({**OURS, "group": value} for value in ("other", 1, None, ["train"], {"a": 1})),
    *({key: value for key, value in MEASURED.items() if key != left} for left in MEASURED),
    *({**MEASURED, "success": value} for value in (-0.5, 1.5)),
    {**OURS, "group": "environment", "success": 0.5},
    {**OURS, "group": "environment", "success": 0.5, "episodes": 0},
]


@pytest.mark.parametrize("line", FOREIGN_LINES, ids=lambda line: str(line)[:60])
@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_line_that_no_run_writes_is_refused_in_three_parts(
    line: Any, command: str, tmp_path: Path
) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    content = f"{json.dumps(OURS)}\n{text}\n{json.dumps(MEASURED)}\n"
    (tmp_path / FILE_NAME).write_text(content, "utf-8", errors="surrogateescape")
    settings = read_settings("bc_small_cpu", ("run.device=cpu",))
    (tmp_path / "settings.toml").write_text(toml_of(settings), "utf-8")
    result = CliRunner().invoke(main, [command, str(tmp_path), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "the log is damaged: line 2 was not written by a run" in result.output
    assert f"\n  where: {tmp_path / FILE_NAME}\n  next:  " in result.output
    assert not (tmp_path / "out").exists()


def test_huge_numbers_that_a_diverging_run_may_log_are_drawn(tmp_path: Path) -> None:
    huge = [{**OURS, "ce/loss": value} for value in (1e299, -1e299, 1e-320, 0)]
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(one) + "\n" for one in huge), "utf-8")
    settings = read_settings("bc_small_cpu", ("run.device=cpu",))
    (tmp_path / "settings.toml").write_text(toml_of(settings), "utf-8")
    for command in ("plot", "report"):
        output = tmp_path / command
        result = CliRunner().invoke(main, [command, str(tmp_path), "-o", str(output)])
        assert "Traceback" not in result.output
        assert (result.exit_code == 0 and output.exists()) or "cannot be drawn" in result.output


def test_a_pipe_or_a_folder_in_place_of_the_log_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(DemotoolsError, match="not a regular file"):
        read_log(tmp_path)
    (tmp_path / "b" / FILE_NAME).mkdir(parents=True)
    with pytest.raises(DemotoolsError):
        read_log(tmp_path / "b")


# What these programs do with the calls: MLflow names its runs, and both keep a step twice.
MLFLOW = """
from types import SimpleNamespace

RUNS, EXPERIMENTS = {}, {}


class entities(SimpleNamespace):
    Param = Metric = staticmethod(lambda *given: given)


class MlflowClient:
    def get_experiment_by_name(self, name):
        return EXPERIMENTS.get(name)

    def create_experiment(self, name):
        EXPERIMENTS[name] = entities(experiment_id=name)
        return name

    def create_run(self, experiment, run_name):
        name = f"run {len(RUNS)} of {experiment}"
        RUNS[name] = entities(status="RUNNING", params=[], metrics=[])
        return entities(info=entities(run_id=name))

    def log_batch(self, run, metrics=(), params=()):
        assert len(params) <= 100
        RUNS[run].params += params
        RUNS[run].metrics += metrics

    def log_artifact(self, run, path, folder):
        RUNS[run].artifacts = [*getattr(RUNS[run], "artifacts", []), (folder, path)]

    def get_metric_history(self, run, key):
        return [entities(step=step) for name, _, _, step in RUNS[run].metrics if name == key]

    def update_run(self, run, status):
        RUNS[run].status = status

    def set_terminated(self, run, status):
        RUNS[run].status = status
"""
TRACKIO = """
RUNS = {}


class Run(list):
    def log(self, values, step):
        self.append((step, values))

    def finish(self):
        pass


def init(project, name, config, resume, embed):
    assert resume == "allow" and not embed
    return RUNS.setdefault((project, name), Run())
"""


def test_mlflow_and_trackio_take_every_line_once_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projects = {"mlflow": "a", "trackio": "b"}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "mlflow", None)
        with pytest.raises(SettingsError, match="MLflow is not installed") as missing:
            RunLog(tmp_path, projects=projects)
        assert "pip install -c constraints.txt '.[mlflow]'" in missing.value.fix
    for name, text in (("mlflow", MLFLOW), ("trackio", TRACKIO)):
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in projects:  # in a session that has the real ones, too
        forget(monkeypatch, name)
    config = {"run": {"seed": 1}, "options": {f"key {n}": n for n in range(150)}}
    with RunLog(tmp_path, projects=projects, config=config) as log:
        log.write("train", {"lr": 0.0}, where=WHERE)
        size = log.size_bytes()
        log.write("train", {"lr": 1.0}, where=WHERE)
    gif = gif_path(tmp_path, "evaluation", WHERE, 0)
    with RunLog(tmp_path, projects=projects, config=config) as log:
        log.cut(size)  # the checkpoint was written before the second line
        for value in (1.0, 2.0):
            log.write("train", {"lr": value}, where=WHERE)
        gif.parent.mkdir(exist_ok=True)
        gif.write_bytes(b"GIF89a\1\0\1\0")
        log.write("evaluation", EVALUATED, where=WHERE)
    mlflow, trackio = (importlib.import_module(name) for name in projects)
    (run,) = mlflow.RUNS.values()
    assert run.status == "FINISHED" and len(run.params) == 151 and ("run.seed", "1") in run.params
    taken = [(step, value) for name, value, _time, step in run.metrics if name == "train/lr"]
    assert taken == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert run.artifacts == [("gifs", str(gif))]
    ((project, _name), lines) = next(iter(trackio.RUNS.items()))
    assert project == "b" and len(trackio.RUNS) == 1
    assert len(lines) == 4 and "evaluation/success" in lines.pop()[1]
    assert [(step, values["train/lr"]) for step, values in lines] == taken
    assert lines[0][1] == {**WHERE, "train/lr": 0.0}


def test_the_bar_shows_of_how_many_episodes_success_is_and_nothing_stale() -> None:
    meter = Meter()
    meter.add("environment", {"success": 1.0, "episodes": 1})
    meter.add("onpolicy", {"ppo/loss": 0.5, "bc/accuracy": 0.25})
    assert meter.shown() == {"loss": "0.500", "accuracy": "0.250", "success": "1.000 of 1 episode"}
    meter.means()
    meter.add("environment", {"success": 0.25, "episodes": 4})
    meter.add("onpolicy", {"ppo/loss": 0.75})
    meter.means()
    assert meter.shown() == {"loss": "0.750", "success": "0.400 of 5 episodes"}
    for _ in range(9):  # the next stage: nothing ends in the rollouts, its loss has another name
        meter.add("environment", {})
        meter.means()
    assert meter.shown() == {"success": "0.250 of 4 episodes"}
    meter.add("environment", {})
    assert meter.shown() == {}
