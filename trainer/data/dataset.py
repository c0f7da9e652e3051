"""Rollouts as PyTorch's data loaders expect them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from trainer.batch import Batch
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.data.sources import Given


class RolloutDataset(IterableDataset[Batch]):
    """Rollouts as an iterable dataset, for `DataLoader(dataset, batch_size=None)`.

    stores    as for ExpertTrajectoryIterator
    settings  the other arguments of ExpertTrajectoryIterator

    With workers the loader gives the same batches in the same order as without: of W workers,
    number w makes batches w, w + W, ... and only counts the others. Stores travel to the workers
    by path. Every iteration goes on where the last one in this process stopped.
    """

    def __init__(self, stores: Given, **settings: Any) -> None:
        super().__init__()
        self._stores = stores
        self._settings = settings
        self._resumed: dict[str, Any] | None = None
        self._first_batch = 0
        # made here already, so that bad settings are refused before any worker starts
        self._rollouts: ExpertTrajectoryIterator | None = self._made()

    def __repr__(self) -> str:
        return f"<dataset of {repr(self._opened())[1:]}"

    def __iter__(self) -> Iterator[Batch]:
        rollouts = self._opened()
        worker = get_worker_info()
        if worker is not None:
            begin = (self._resumed or {}).get("first_batch", rollouts.batches)
            rollouts.take_turns(begin + worker.id, worker.num_workers)
            self._first_batch = begin
        return rollouts

    def __len__(self) -> int:
        """Batches until `max_steps`; TypeError where the stream is endless."""
        return len(self._opened())

    @property
    def passes(self) -> float:
        """Passes over everything that is played, as far as this process has played it."""
        return self._opened().passes

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, a JSON value. Without workers, or called inside a worker.

        torchdata's StatefulDataLoader calls it inside the workers. With a plain DataLoader that
        has workers, this process's own copy of the dataset never moves.
        """
        state = self._opened().state()
        if get_worker_info() is not None:
            state["first_batch"] = self._first_batch
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; see ExpertTrajectoryIterator.load_state."""
        self._opened().load_state(state)
        self._resumed = state

    def __getstate__(self) -> dict[str, Any]:
        # open files and threads stay behind; the other process makes its own
        return {**self.__dict__, "_rollouts": None, "_resumed": self.state_dict()}

    def _opened(self) -> ExpertTrajectoryIterator:
        if self._rollouts is None:
            self._rollouts = self._made()
            if self._resumed is not None:
                self._rollouts.load_state(self._resumed)
        return self._rollouts

    def _made(self) -> ExpertTrajectoryIterator:
        return ExpertTrajectoryIterator(self._stores, **self._settings)
