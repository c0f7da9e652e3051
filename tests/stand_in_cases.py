"""What must work on a device beside the CPU; run by tests/test_stand_in.py, in its own process."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from demotools.store.reading import open_store
from tests.learning.definitions import WORDS, random_batch
from tests.learning.test_networks import LITTLE, asked
from tests.run.test_device import new
from tests.stand_in import StandIn, stand_in_device
from trainer.batch import Batch
from trainer.learning.building import build_network
from trainer.learning.losses import ExpertCrossEntropy, LossStep
from trainer.learning.networks.base import Model
from trainer.run.loop import run_stages
from trainer.run.state import Run, new_run
from trainer.team import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, dict[str, object]] = {
    **LITTLE,
    "maze": {"embedding": 8, "features": 16, "memory": 24, "instruction": 16},
}


_OF_STEPS = ("cells", "direction", "masks", "mission", "expert_action")


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with stand_in_device() as device:
        there = torch.arange(3.0).to(device)
        assert there.device == device
        assert (there * 2).tolist() == [0, 2, 4]
        with pytest.raises(RuntimeError, match="in one operation"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("kind", SIZES)
def test_a_network_learns_on_another_device_as_on_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    network = build_network(kind, SIZES[kind], WORDS)
    batch = random_batch(6, 4, missions=3)
    step = LossStep(network)

    def learnt(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        memory = cast(Model, network).initial_memory(4)
        result = step({"ce": ExpertCrossEntropy()}, batch, {"ce": memory})["ce"]
        network.zero_grad()
        result.loss.backward()  # type: ignore[no-untyped-call]
        gradients = [one.grad.cpu() for one in network.parameters() if one.grad is not None]
        return result.memory.cpu(), gradients

    here = learnt(batch)
    with stand_in_device() as device:
        network.to(device)
        assert all(isinstance(one.data, StandIn) for one in network.parameters())
        moved = {name: values.to(device) for name, values in batch.items()}
        there = learnt(moved)
        with torch.no_grad():
            acted = asked(network, {**moved, **{n: moved[n][:1] for n in _OF_STEPS}})
        assert acted.memory.device == device
    torch.testing.assert_close(there[0], here[0])
    assert len(there[1]) == len(here[1])
    for mine, theirs in zip(there[1], here[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def on(device: torch.device, run: Run) -> Run:
    """The run as if its settings had named this device."""
    named = run.settings.run.model_copy(update={"device": str(device)})
    settings = run.settings.model_copy(update={"run": named})
    return new_run(settings, run.stores, run.words, run.folder)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("bc_small_cpu", ("model.type=maze", "stages.0.off_policy.store=GoToLocal")),
        ("ppo", ("model.type=small",)),
    ],
)
def test_a_run_learns_on_another_device_what_it_learns_on_the_cpu(
    recipe: str, overrides: tuple[str, ...], bot_data: Path, tmp_path: Path
) -> None:
    stores = {"GoToLocal": open_store(bot_data / "GoToLocal.zarr")} if recipe != "ppo" else {}
    here = new(tmp_path / "here", recipe, stores, *overrides)
    run_stages(here, StopRequest())
    with stand_in_device() as device:
        there = on(device, new(tmp_path / "there", recipe, stores, *overrides))
        run_stages(there, StopRequest())
        assert all(isinstance(one.data, StandIn) for one in there.network.parameters())
        learnt = [one.detach().cpu() for one in there.network.parameters()]
    assert there.progress.updates == here.progress.updates > 0
    for mine, theirs in zip(learnt, here.network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-3, atol=1e-4)
