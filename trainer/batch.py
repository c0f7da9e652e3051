"""What a batch contains: T consecutive steps of B rollouts, as a dict of tensors.

`expert_action` is always the expert's; `action` is the one taken, and exists only in environment
rollouts. A rollout may span several episodes; `masks` are 0 where one begins, else 1.

Batches from a store, `layout="native"`, which our networks take:

    cells            uint8 [T, B, 7, 7], packed views (of stores, images of other sizes: [T, B, H,
                     W, C]; of environments, [T, B, H, W] of any cells, [T, B, H, W, C] of images)
    direction        uint8 [T, B], 0 right, 1 down, 2 left, 3 up
    mission          int32 [T, B], row of the iterator's `mission_tokens` int64 [M, L]
    expert_action    uint8 [T, B]
    masks            uint8 [T, B]
    taken            uint8 [T, B], of stores recorded with noise: the action that was taken
    subgoal          uint8 [T, B], of stores with subgoals: the bot's, a code of their attribute
                     `subgoals`

Batches from a store, `layout="tutorial"`:

    minigrid_ego_image   uint8 [T, B, 7, 7, 3]      expert_action   int64 [T, B]
    minigrid_mission     int64 [T, B, L]            masks           float32 [T, B, 1]

In training, networks and losses get the native layout, where `mission` int64 [T, B] is the row in
the batch's own `mission_tokens` int64 [M, L] (0 = padding), which contains each mission once.

Environment rollouts contain all of that, and values from the time of collection, [T, B]:

    expert_action    int64, -1 where the expert was not asked or had no advice
    action           uint8, the action taken             reward        float32
    log_prob         float32, of `action`                terminated    bool
    value            float32, the critic's               truncated     bool
    next_value       float32, of what followed the step, zeros where no loss needs it
    advantage        float32, normalised if so set       returns       float32, advantage + value
    stage_steps      int64 [], environment steps of the stage before this rollout
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["tutorial", "native"]
Batch = dict[str, Tensor]


def batch_missions(batch: Batch, tokens: Tensor) -> Batch:
    """The batch with the distinct missions in it, so that a network reads each only once.

    tokens    int64 [M, L]
    returns   the batch, `mission` int64 [T, B] now a row of its `mission_tokens` int64 [M', L]
    """
    row, place = torch.unique(batch["mission"], return_inverse=True)
    distinct, again = torch.unique(tokens[row.long()], dim=0, return_inverse=True)
    return {**batch, "mission": again[place], "mission_tokens": distinct}
