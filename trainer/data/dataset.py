"""Rollouts as a dataset for PyTorch's DataLoader."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from demotools.errors import SettingsError
from trainer.batch import Batch
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.data.sources import Given
from trainer.team import ALONE, present_team


class _Rollouts(dict[str, torch.Tensor]):
    """A batch, which no data loader stacks with others."""


def _refuse_to_stack(batches: Sequence[_Rollouts], **_others: object) -> NoReturn:
    raise SettingsError(
        "a RolloutDataset yields whole batches, but this data loader would stack them",
        path=f"DataLoader(…, batch_size={len(batches)})",
        fix="pass batch_size=None to the loader, and set rollouts and rollout_len of the dataset",
    )


def _refuse_disorder() -> None:
    """Refuse a loader whose workers' batches come in any order, where it starts a worker.

    A dataset is told nothing of its loader, but a worker starts inside the loader's own calls: a
    fork begins there, and what is sent to a new process is pickled there.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        loader = frame.f_locals.get("self")
        if isinstance(loader, DataLoader) and not getattr(loader, "in_order", True):
            raise SettingsError(
                "the batches of several workers would come out of order, so that no rollout "
                "continues in the next batch",
                path="DataLoader(…, in_order=False)",
                fix="leave in_order at True, or use no workers, which is fastest",
            )
        frame = frame.f_back


class RolloutDataset(IterableDataset[Batch]):
    """Rollouts as an iterable dataset, for `DataLoader(dataset, batch_size=None)`.

    stores    as for ExpertTrajectoryIterator
    settings  the other arguments of ExpertTrajectoryIterator; without `rank` and `world`, those of
              torch's process group, as soon as there is one

    With workers the loader gives the same batches in the same order as without: of W workers,
    number w makes batches w, w + W, ... and only counts the others. Stores travel to the workers
    by path. Every iteration goes on where the last one in this process stopped; new workers begin
    where this process stands, and a second time this is warned of.

    SettingsError  a loader with a batch size, or whose workers' batches come in any order; a second
                   iteration in workers that stay. From a worker torch raises it as a RuntimeError
                   with the same text
    """

    def __init__(self, stores: Given, **settings: Any) -> None:
        super().__init__()
        self._stores = stores
        self._settings = settings
        self._is_placed = not {"rank", "world"}.isdisjoint(settings)
        self._team = ALONE
        self._resumed: dict[str, Any] | None = None
        self._first_batch = 0
        self._begun: int | None = None
        # shared with the workers, which alone are told that an iteration begins
        self._iterations = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        # made here already, so that bad settings are refused before any worker starts
        self._rollouts: ExpertTrajectoryIterator | None = None
        self._opened()

    def __repr__(self) -> str:
        return f"<dataset of {repr(self._opened())[1:]}"

    def __iter__(self) -> Iterator[Batch]:
        # the process that iterates is also the one that would stack; torch documents this way to
        # extend default_collate, and no other
        default_collate_fn_map[_Rollouts] = _refuse_to_stack
        rollouts = self._opened()
        worker = get_worker_info()
        if worker is not None:
            _refuse_disorder()
            begin = (self._resumed or {}).get("first_batch", rollouts.batches)
            rollouts.take_turns(begin + worker.id, worker.num_workers)
            self._first_batch = begin
        return self._batches(rollouts, None if worker is None else worker.id)

    def _batches(self, rollouts: ExpertTrajectoryIterator, worker: int | None) -> Iterator[Batch]:
        """What is left of the stream, or for a worker of its share."""
        if worker is not None:
            self._count_iteration(worker, rollouts.batches)
        yield from map(_Rollouts, rollouts)

    def _count_iteration(self, worker: int, batches: int) -> None:
        """An iteration begins in a worker that stands after so many batches."""
        if self._begun not in (None, batches):
            raise SettingsError(
                "persistent workers have prefetched batches, which a second iteration would skip",
                path="DataLoader(…, persistent_workers=True)",
                fix="iterate once, or use no workers, which is fastest",
            )
        if self._begun is None and worker == 0:
            self._iterations += 1
            if self._iterations > 1:
                warnings.warn(
                    "with workers, a second iteration repeats the batches of the first; without "
                    "workers it continues, and load_state_dict sets where",
                    stacklevel=4,
                )
        self._begun = batches

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
        self._begun = None
        self._iterations.zero_()

    def __getstate__(self) -> dict[str, Any]:
        _refuse_disorder()
        state = self.state_dict()
        # open files and threads stay behind; the other process makes its own
        return {**self.__dict__, "_rollouts": None, "_begun": None, "_resumed": state}

    def _opened(self) -> ExpertTrajectoryIterator:
        self._join()
        if self._rollouts is None:
            place = {} if self._is_placed else vars(self._team)
            self._rollouts = ExpertTrajectoryIterator(self._stores, **self._settings, **place)
            if self._resumed is not None:
                self._rollouts.load_state(self._resumed)
        return self._rollouts

    def _join(self) -> None:
        """Take this process's share, if a process group has come; workers need not know of it."""
        team = present_team()
        if self._is_placed or team in (ALONE, self._team):
            return
        if self._rollouts is not None:
            self._resumed, self._rollouts = self._rollouts.state(), None
        self._team = team
