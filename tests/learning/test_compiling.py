from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from demotools.errors import SettingsError
from tests.learning.definitions import WORDS, random_batch
from tests.learning.test_film import little
from tests.learning.test_networks import LITTLE
from trainer.learning.building import build_network, compile_network


@pytest.mark.parametrize("name", LITTLE)
def test_a_network_that_gains_nothing_on_a_cpu_is_not_compiled_there(name: str) -> None:
    with pytest.raises(SettingsError, match=f"no part of the network `{name}`"):
        compile_network(build_network(name, LITTLE[name], WORDS), name)


def test_without_a_compiler_that_is_said_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SettingsError, match="needs a C") as failure:
        compile_network(nn.Linear(2, 2), "package:Mine")
    assert "CXX" in str(failure.value)


def test_a_compiler_is_sought_by_the_name_in_cxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    with pytest.raises(SettingsError, match="`there-is-no-such-compiler` is not installed"):
        compile_network(nn.Linear(2, 2), "package:Mine")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
def test_a_compiled_network_gives_what_it_gave_before_for_batches_of_any_shape() -> None:
    network, compiled = little(), little()
    compile_network(compiled.sight, "package:Mine")
    counters.clear()
    for T, B in [(5, 3), (4, 4), (1, 6)]:
        batch = random_batch(T, B, 3)
        memory = network.initial_memory(B)
        expected, found = network(batch, memory).logits, compiled(batch, memory).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for logits in (expected, found):
            logits.square().sum().backward()
    for mine, theirs in zip(compiled.parameters(), network.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"]
