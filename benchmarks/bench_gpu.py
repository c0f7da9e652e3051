"""What does a GPU make of it? The feed, the updates of all networks, and GoToLocal to 99%.

    python benchmarks/bench_gpu.py                 # under four minutes on a GPU and a few cores

Prints the steps/s of the rollout iterator from a memory map and from the GPU's own memory; the
steps/s of a whole update of each network in both precisions, with the memory it takes; and the
seconds of training to 99% success on GoToLocal by the recipe bc_fast.toml, from demonstrations that
it records first, with the share of them spent waiting for data, with and without augmentation.
`--device cpu --few` shows on any machine that the script itself works.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median

import torch
from synthetic import FOLDER, synthetic_store

import trainer
from demotools.store.reading import Store
from trainer.batch import Layout, batch_missions
from trainer.data.batches import Residence
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.learning.building import NETWORKS, build_network
from trainer.learning.losses import ExpertCrossEntropy, LossStep
from trainer.learning.networks.base import memory_of
from trainer.run.log import read_log

B = T = 128
ROUNDS = 3
LAYOUTS: tuple[Layout, ...] = ("native", "tutorial")
RESIDENCES: tuple[Residence, ...] = ("map", "device")


def seconds_of(act: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one call, everything done on the device: the median of some rounds of calls."""
    rounds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(times):
            act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / times)
    return median(rounds[1:])  # the first one warms up


def print_feed(store: Store, device: torch.device, times: int) -> None:
    for layout in LAYOUTS:
        for residence in RESIDENCES:
            batches = ExpertTrajectoryIterator(
                store, rollouts=B, rollout_len=T, layout=layout, residence=residence, device=device
            )
            took = seconds_of(batches.__next__, device, times)
            rate = B * T / took / 1e6
            print(f"feed, {layout:8} store in {residence:6} {rate:8.1f} M steps/s", flush=True)


def print_updates(
    store: Store, device: torch.device, shape: tuple[int, int], kinds: Iterable[str]
) -> None:
    length, rollouts = shape
    batches = ExpertTrajectoryIterator(
        store, rollouts=rollouts, rollout_len=length, layout="native", device=device
    )
    for kind in kinds:
        for bfloat16 in (False, True):
            torch.manual_seed(0)
            network = build_network(kind, {}, len(batches.vocabulary)).to(device)
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
            step, memory = LossStep(network, bfloat16=bfloat16), memory_of(network, rollouts)

            def update() -> None:
                batch = batch_missions(next(batches), batches.mission_tokens)
                result = step({"ce": ExpertCrossEntropy()}, batch, {"ce": memory})["ce"]  # noqa: B023
                optimizer.zero_grad()  # noqa: B023
                result.loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()  # noqa: B023

            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = seconds_of(update, device, 1)
            peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            print(
                f"update, {kind:6} {'bfloat16' if bfloat16 else 'float32':8} "
                f"{length * rollouts / took:11,.0f} steps/s, {1000 * took:8.1f} ms, {peak:.1f} GB",
                flush=True,
            )


def print_training(folder: Path, device: torch.device, episodes: int, demo_steps: int) -> None:
    start = time.perf_counter()
    command = [sys.executable, "-m", "demotools", "generate", "GoToLocal", "--quiet"]
    command += ["--episodes", str(episodes), "--data-dir", str(folder)]
    subprocess.run(command, check=True)
    print(
        f"recorded {episodes:,} demonstrations in {time.perf_counter() - start:.0f} s", flush=True
    )
    common = [f"run.device={device.type}", "on_policy=", f"stages.0.max_demo_steps={demo_steps}"]
    for augment in ("[]", "['recolor', 'mirror']"):
        changes = [f"stages.0.off_policy.augment={augment}"]
        if augment == "[]":
            changes += [f"evaluation.every={demo_steps // 8}", "evaluation.episodes=500"]
        else:
            changes += ["evaluation="]
        run = trainer.train(
            "bc_fast",
            output=folder / f"run{len(augment)}",
            overrides=[*common, *changes],
            data_dir=folder,
            quiet=True,
        )
        lines = read_log(run)
        trained = [line for line in lines if line["group"] == "train"]
        waited = mean(line["share_data"] for line in trained)
        rate = median(line["demo_steps_per_second"] for line in trained)
        print(f"GoToLocal, augment {augment}: {rate:,.0f} steps/s, {waited:.1%} waiting for data")
        measured = [line for line in lines if line["group"].startswith("evaluation")]
        for line in measured:
            print(f"  {60 * line['minutes']:6.1f} s: {line['success']:.1%}", flush=True)
        reached = [60 * line["minutes"] for line in measured if line["success"] >= 0.99]
        if measured:
            print(f"  99% after {reached[0]:.1f} s of training" if reached else "  99% not reached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="little of everything")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("this torch finds no GPU; --device cpu --few tries the script")
        gpu = torch.cuda.get_device_properties(0)
        print(f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}", end="; ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    start = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    store = synthetic_store(2_000 if options.few else 1_000_000)
    print_feed(store, device, 1 if options.few else 100)
    if options.few:
        print_updates(store, device, (4, 8), ["small", "maze"])
    else:
        print_updates(store, device, (T, B), NETWORKS)
    with tempfile.TemporaryDirectory(dir=FOLDER.resolve()) as folder:
        few, many = (200, 20_480), (100_000, 1_500_000)
        print_training(Path(folder), device, *(few if options.few else many))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
