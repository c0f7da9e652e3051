"""A policy written down for others says what the network says; its weights alone act the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gymnasium
import minigrid  # noqa: F401 - registers its environments
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from demotools.babyai.cells import EGOCENTRIC_CODES, unpacked_cells
from demotools.babyai.vocabulary import WORDS
from demotools.errors import CheckpointError
from trainer.cli import main
from trainer.learning.building import NETWORKS, build_network
from trainer.run.checkpoint import read_checkpoint, write_checkpoint
from trainer.run.export import export_policy
from trainer.run.loading import load_policy
from trainer.run.published import handed_on
from trainer.settings.models import read_settings, toml_of

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, dict[str, Any]] = {
    "small": {"embedding": 16, "features": 32, "memory": 32, "instruction": 16},
    "film": {"channels": 16, "memory": 32, "instruction": 16},
    "big": {"memory": 32, "instruction": 16, "channels": 16, "embedding": 8},
    "maze": {"features": 32, "memory": 32, "instruction": 16},
}


def written_policy(folder: Path, network: str = "small", scale: float = 3.0, *more: str) -> Path:
    """A checkpoint whose network acts variedly: its weights are larger than they begin."""
    torch.manual_seed(1)
    sizes = [f"model.{name}={size}" for name, size in SIZES[network].items()]
    overrides = [f"model.type={network}", "run.device=cpu", *sizes, *more]
    settings = read_settings("bc_small_cpu.toml", overrides)
    model = build_network(network, SIZES[network], len(WORDS))
    weights = {name: values * scale for name, values in model.state_dict().items()}
    write_checkpoint(
        folder / "last.pt",
        settings=toml_of(settings),
        words=tuple(WORDS),
        model=weights,
        training={"optimizer": {"moments": torch.zeros(100_000)}},
    )
    return folder / "last.pt"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tokens(words: list[str], mission: str) -> np.ndarray[Any, Any]:
    return np.array([[words.index(word) + 1 for word in mission.replace(",", "").split()]])


def test_onnx_says_for_1000_steps_of_minigrid_what_the_policy_says(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    checkpoint = written_policy(tmp_path)
    result = run("export", tmp_path, "--to", "onnx", "-q")
    assert result.exit_code == 0, result.output
    session = runtime.InferenceSession(tmp_path / "policy.onnx")
    described = session.get_modelmeta().custom_metadata_map
    words = json.loads(described["words"])
    assert json.loads(described["actions"])[2] == "forward" and described["level"] == "GoToLocal"

    policy = load_policy(checkpoint)
    environment = gymnasium.make("BabyAI-GoToLocal-v0", max_episode_steps=30)
    actions = set()
    seen, _ = environment.reset(seed=3)
    mask, memory = 0, np.zeros((1, 64), np.float32)
    for _ in range(1000):
        logits, value, memory = session.run(
            None,
            {
                "image": seen["image"][None],
                "mission": tokens(words, seen["mission"]),
                "mask": np.array([mask], np.uint8),
                "memory": memory,
            },
        )
        action = policy.act(seen, first=[mask == 0])
        acting = policy._policy
        np.testing.assert_allclose(logits, acting.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(value, acting.values, rtol=1e-5, atol=1e-5)
        actions.add(action)
        seen, _, terminated, truncated, _ = environment.step(action)
        mask = 1
        if terminated or truncated:
            seen, _ = environment.reset()
            mask = 0
    assert len(actions) > 1, "a policy that always does the same shows little"


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize("network", ["small", "film", "big"])
def test_torch_alone_plays_the_graph(tmp_path: Path, network: str) -> None:
    checkpoint = written_policy(tmp_path, network, scale=1.0)
    exported = export_policy(checkpoint, "torch")
    assert 0 <= exported.largest_difference < 1e-5
    extra = {"words": ""}
    graph = torch.jit.load(  # type: ignore[no-untyped-call]
        io.BytesIO((tmp_path / "policy.torchscript").read_bytes()), _extra_files=extra
    )
    assert json.loads(extra["words"]) == list(WORDS)
    played = read_checkpoint(checkpoint).network()
    random = np.random.default_rng(0)
    for rows, length in ((1, 2), (7, 9)):
        size = 64
        seen = torch.from_numpy(random.integers(0, EGOCENTRIC_CODES, (rows, 7, 7), np.uint8))
        direction = torch.from_numpy(random.integers(0, 4, rows, np.uint8))
        words = torch.from_numpy(random.integers(1, len(WORDS) + 1, (rows, length)))
        masks = torch.arange(rows, dtype=torch.uint8) % 2
        before = torch.from_numpy(random.random((rows, size), np.float32))
        images = torch.from_numpy(unpacked_cells(seen.numpy()))
        found = graph(images, direction, words, masks, before)
        batch = {
            **{"cells": seen[None], "direction": direction[None], "masks": masks[None]},
            **{"mission": torch.arange(rows)[None], "mission_tokens": words},
        }
        with torch.no_grad():
            logits, values, memory, *_ = played(batch, before)
        for ours, theirs in zip(found, (logits[0], values[0], memory), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_network_that_ships_is_exported_or_refused_for_what_it_is(tmp_path: Path) -> None:
    assert NETWORKS.keys() == SIZES.keys()
    result = run("export", written_policy(tmp_path, "maze"), "--to", "onnx")
    assert result.exit_code == 1 and "its map is computed with numpy" in result.output
    assert "--to weights" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_graph_that_would_say_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "branching.py").write_text(
        "from trainer.learning.networks.small import SmallNetwork\n"
        "class Branching(SmallNetwork):\n"
        "    def forward(self, batch, memory):\n"
        "        first, *more = super().forward(batch, memory)\n"
        "        return (first * (2 if batch['masks'].all() else 1), *more)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = written_policy(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["settings"] = content["settings"].replace('"small"', '"branching:Branching"')
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match="names code"):
        export_policy(checkpoint, "torch")
    with pytest.raises(CheckpointError, match="differ from the network's"):
        export_policy(checkpoint, "torch", trust=True)
    assert not (tmp_path / "policy.torchscript").exists()


def test_weights_alone_are_small_and_succeed_as_often(tmp_path: Path) -> None:
    checkpoint = written_policy(tmp_path)
    for options, size in (([], 1.0), (["--half"], 0.5)):
        result = run("export", checkpoint, "--to", "weights", *options, "--overwrite")
        assert result.exit_code == 0 and "made " in result.output, result.output
        weights = sum(w.nbytes for w in read_checkpoint(checkpoint).model.values())
        alone = tmp_path / "policy.pt"
        assert alone.stat().st_size < size * weights + 20_000
        figures = [run("evaluate", p, "--episodes", "20", "-m", "1") for p in (checkpoint, alone)]
        assert figures[0].exit_code == figures[1].exit_code == 0
        if not options:
            assert figures[0].output == figures[1].output


def test_what_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    checkpoint = written_policy(tmp_path)
    (tmp_path / "policy.pt").write_text("mine")
    result = run("export", checkpoint, "--to", "weights")
    assert result.exit_code == 1 and "the file already exists" in result.output
    assert (tmp_path / "policy.pt").read_text() == "mine"
    assert run("export", checkpoint, "--to", "onnx", "--half").exit_code == 2


@pytest.mark.parametrize("kind", ["weights", "onnx", "torch"])
def test_what_is_handed_on_names_no_folder_of_this_machine(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    off_policy = "stages.0.off_policy.store"
    checkpoint = written_policy(
        *(tmp_path, "small", 3.0, "run.init_from=/home/me/secret/runs/first/best.pt"),
        f"{off_policy}=[{{name='/home/me/secret/GoTo.zarr', proportion=2}}, {{name='Open'}}]",
        "stages.0.early_stopping={patience=3, hold_out='../secret/GoTo-valid.zarr'}",
    )
    exported = run("export", checkpoint, "--to", kind, "-o", tmp_path / "policy")
    assert exported.exit_code == 0, exported.output
    assert b"secret" not in (tmp_path / "policy").read_bytes()
    if kind == "weights":
        settings = read_checkpoint(tmp_path / "policy").parsed()
        assert settings.run.init_from == "first/best.pt"
        assert settings.store_names() == ["GoTo", "Open", "GoTo-valid"]
        one = settings.model_copy(
            update={"run": settings.run.model_copy(update={"init_from": None})}
        )
        hub = one.run.model_copy(update={"init_from": "hf:me/policy@main"})
        assert "hf:me/policy@main" in handed_on(one.model_copy(update={"run": hub}))
        named = read_settings("bc_small_cpu.toml", [f"{off_policy}=/home/me/secret/GoTo.zarr"])
        assert "secret" not in handed_on(named) and 'store = "GoTo"' in handed_on(named)
