"""How fast are whole PPO cycles, against sb3-contrib's RecurrentPPO and torch-ac?

    python benchmarks/bench_ppo.py                 # on one core, then on two
    python benchmarks/bench_ppo.py --cores 1 --environments-of-peers ours
    python benchmarks/bench_ppo.py --environments 64

A cycle is a rollout and the updates on it: 32 environments of GoToObj x 128 steps, 4 repeats of 2
minibatches, an LSTM of 128, as in the recipe ppo.toml. Ours is the loop of `trainer run` itself;
the peers have networks of the same sizes (benchmarks/peers/ppo_peers.py) and environments of stock
minigrid, or ours. Every contestant lives in processes of its own, in each of its settings of
processes and threads, and makes its cycles in turn with the others, so that all see the same
machine; of each its best setting counts. Where the processor time of all its processes is less than
the time of the clock, something else was running: then the processor time is what to compare.
Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Self

import psutil
import torch
from tqdm import tqdm

from demotools.output import counted

LENGTH = 128


@dataclass(frozen=True)
class Setting:
    """How a contestant uses its cores.

    processes   of environments, of each process that trains; 0: one for every environment
    threads     of torch, of each process that trains
    team        processes that train together
    """

    name: str
    processes: int = 1
    threads: int = 1
    team: int = 1

    def text(self) -> str:
        together = f"{self.team} training together, " if self.team > 1 else ""
        processes = counted(self.processes, "process") if self.processes else "a process each"
        return f"{self.name}: {together}{processes}, {counted(self.threads, 'thread')}"


OURS, RECURRENT, TORCH_AC = "ours", "RecurrentPPO", "torch-ac"
SETTINGS = {
    1: [Setting(OURS), Setting(RECURRENT), Setting(TORCH_AC, processes=0)],
    2: [
        Setting(OURS, team=2),
        Setting(OURS, processes=2),
        Setting(OURS, processes=2, threads=2),
        Setting(RECURRENT),
        Setting(RECURRENT, threads=2),
        Setting(RECURRENT, processes=0),
        Setting(RECURRENT, processes=0, threads=2),
        Setting(TORCH_AC, processes=0),
        Setting(TORCH_AC, processes=0, threads=2),
    ],
}


class Contestant:
    """The processes of a setting; a context manager."""

    def __init__(self, setting: Setting, cores: list[int], options: argparse.Namespace) -> None:
        self.setting = setting
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        command = [sys.executable, __file__, "--serve", setting.name]
        command += ["--processes", str(setting.processes), "--threads", str(setting.threads)]
        command += ["--level", options.level, "--environments", str(options.environments)]
        command += ["--environments-of-peers", options.environments_of_peers]
        self._processes = []
        for rank in range(setting.team):
            team = {"WORLD_SIZE": str(setting.team), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            team |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **team, "OMP_NUM_THREADS": str(setting.threads)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    preexec_fn=lambda: os.sched_setaffinity(0, cores),
                )
            )

    def wait(self) -> None:
        """Until every process has said that it waits for its turn."""
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit(f"{self.setting.text()}: it ended, see above")

    def cycle(self) -> tuple[float, float]:
        """Seconds of the clock, and of all its processors."""
        worked, start = self._worked(), time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        self.wait()
        return time.perf_counter() - start, self._worked() - worked

    def _worked(self) -> float:
        total = 0.0
        for process in self._processes:
            first = psutil.Process(process.pid)
            for one in (first, *first.children(recursive=True)):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self._processes:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                child.kill()
            process.wait()


def turn() -> None:
    """Say that a cycle has ended, and wait for what begins the next one."""
    print(json.dumps("ready"), flush=True)
    if not sys.stdin.readline():
        sys.exit()


def train(level: str, environments: int, processes: int) -> None:
    """Our own training loop, which asks at the end of each cycle whether it is to stop."""
    from demotools.babyai.vocabulary import WORDS
    from trainer.run.loop import run_stages
    from trainer.run.session import resolved
    from trainer.run.state import new_run
    from trainer.settings.models import read_settings
    from trainer.team import StopRequest, Team, joined_team

    class Turns(StopRequest):
        """Asked more than once a cycle, whose steps have been counted by then."""

        steps = 0

        def agreed(self, _team: Team) -> bool:
            if run.progress.env_steps > self.steps:
                self.steps = run.progress.env_steps
                turn()
            return False

    changes = [f"run.level={level}", "model.type=small", "run.device=cpu"]
    changes += [f"on_policy.environments={environments}"]
    changes += ["run.save_every_env_steps=1000000000", "stages.0.max_env_steps=1000000000"]
    settings, _ = resolved(read_settings("ppo.toml", changes), Path())
    with joined_team("cpu") as team:
        run = new_run(settings, {}, WORDS, Path(), team, workers=processes)
        turn()
        run_stages(run, Turns())


def serve(options: argparse.Namespace) -> None:
    """The life of a contestant's process."""
    torch.set_num_threads(options.threads)
    if options.serve == OURS:
        train(options.level, options.environments, options.processes)
        return
    from peers import ppo_peers

    learn: dict[str, Callable[..., None]] = {
        RECURRENT: ppo_peers.recurrent_ppo,
        TORCH_AC: ppo_peers.ppo_of_torch_ac,
    }
    make = ppo_peers.MAKERS[options.environments_of_peers]
    learn[options.serve](make, options.level, options.environments, LENGTH, options.processes, turn)


def measure(cores: int, options: argparse.Namespace) -> None:
    """Print what each contestant reaches on so many cores."""
    steps = options.environments * LENGTH
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    if len(chosen) < cores:
        raise SystemExit(f"this machine offers {len(chosen)} cores, not {cores}")
    times: dict[Setting, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        contestants = []
        for setting in SETTINGS[cores]:
            # one after another: so many environments of each take long enough to begin
            contestants.append(stack.enter_context(Contestant(setting, chosen, options)))
            contestants[-1].wait()
            times[setting] = []
        with tqdm(total=(options.rounds + 1) * len(contestants), unit="cycle", disable=None) as bar:
            for number in range(options.rounds + 1):
                for contestant in contestants:
                    elapsed = contestant.cycle()
                    bar.update()
                    if number:  # the first one warms up
                        times[contestant.setting].append(elapsed)
    print(f"\nenv steps/s on {counted(cores, 'core')}, median of {options.rounds} cycles")
    best: dict[str, tuple[float, float]] = {}
    for setting, pairs in times.items():
        clock, worked = zip(*pairs, strict=True)
        rate, rate_worked = steps / median(clock), steps / median(worked)
        spread = f"{steps / max(clock):,.0f} to {steps / min(clock):,.0f}"
        print(
            f"{setting.text():60} {rate:7,.0f} ({spread}); "
            f"{rate_worked:7,.0f} a second of processor time"
        )
        best[setting.name] = max(best.get(setting.name, (0.0, 0.0)), (rate, rate_worked))
    for name in (RECURRENT, TORCH_AC):
        ratio, ratio_worked = (a / b for a, b in zip(best[OURS], best[name], strict=True))
        print(f"ours is {ratio:.2f} times {name}; by processor time {ratio_worked:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", default="GoToObj")
    parser.add_argument("--cores", type=int, nargs="+", choices=list(SETTINGS), default=[1, 2])
    parser.add_argument("--environments", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environments-of-peers", choices=["stock", "ours"], default="stock")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    packages = ("torch", "sb3-contrib", "torch-ac", "minigrid")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="; ")
    print(f"Python {platform.python_version()}, {platform.machine()};", end=" ")
    print(f"{options.environments} environments of {options.level},", end=" ")
    print(f"peers in environments of {options.environments_of_peers} minigrid", flush=True)
    for cores in options.cores:
        measure(cores, options)


if __name__ == "__main__":
    main()
