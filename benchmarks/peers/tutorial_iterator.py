"""An iterator as the off-policy tutorial describes it, written from that description.

The whole pickle is in RAM; each of the B rollouts has a queue of steps; when a queue runs empty,
the next demo's frame is decompressed and unpickled, its mission tokenised, and a tensor is made
for every step; a batch stacks T steps of every rollout. Every pass shuffles with Python's global
random state. It cannot resume, and each worker process holds the whole file.
"""

from __future__ import annotations

import pickle
import random
from collections import deque
from typing import Any

import torch
from numcodecs.blosc import decompress

WORDS = {
    word: number
    for number, word in enumerate(
        (
            *("go", "to", "the", "a", "red", "green", "blue", "purple", "yellow", "grey"),
            *("ball", "box", "key"),
        ),
        start=1,
    )
}


class TutorialIterator:
    def __init__(self, demos: list[Any], rollouts: int, rollout_len: int, length: int = 5) -> None:
        self.demos = demos
        self.rollout_len = rollout_len
        self.length = length
        self.queues: list[deque[dict[str, Any]]] = [deque() for _ in range(rollouts)]
        self.waiting: deque[int] = deque()

    def add_episode(self, queue: deque[dict[str, Any]]) -> None:
        if not self.waiting:
            order = list(range(len(self.demos)))
            random.shuffle(order)
            self.waiting.extend(order)
        mission, frame, _directions, actions = self.demos[self.waiting.popleft()]
        images = pickle.loads(decompress(frame))
        tokens = [WORDS[word] for word in mission.split()][: self.length]
        tokens += [0] * (self.length - len(tokens))
        for step, action in enumerate(actions):
            queue.append(
                {
                    "minigrid_ego_image": torch.tensor(images[step]),
                    "minigrid_mission": torch.tensor(tokens),
                    "expert_action": torch.tensor(action),
                    "masks": torch.tensor([float(step > 0)]),
                }
            )

    def __next__(self) -> dict[str, torch.Tensor]:
        columns = []
        for queue in self.queues:
            while len(queue) < self.rollout_len:
                self.add_episode(queue)
            steps = [queue.popleft() for _ in range(self.rollout_len)]
            columns.append({key: torch.stack([step[key] for step in steps]) for key in steps[0]})
        return {key: torch.stack([column[key] for column in columns], dim=1) for key in columns[0]}
