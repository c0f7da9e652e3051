"""Losses: functions of a network, a batch and the memory before it; PPO's advantages among them.

A loss is any callable `(model, batch, memory) -> LossResult`. Ours are built by name; a user's own
is `type = "package.module:Name"`, a class or function that takes the keys beside `type` and gives
such a callable (docs/own_parts.md has one). The loop carries `LossResult.memory` on to the next
batch; it comes without gradient, so back-propagation stops at the border of the batch.

The arithmetic is in pure functions of tensors; recipes name the classes below by `type`.
`trainer.batch` describes the batches of stores and of environment rollouts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, SupportsFloat, cast

import torch
from torch import Tensor, nn

from demotools.errors import SettingsError
from trainer.batch import Batch
from trainer.learning.networks.base import Model, Output, output_of
from trainer.settings.user_code import users_code
from trainer.team import ALONE, Team


class LossResult(NamedTuple):
    """What a loss gives: T x B steps.

    loss      scalar with a gradient, a mean over the steps
    scalars   what the log shows: numbers, or tensors of one
    memory    [B, memory size] after the batch, without gradient
    steps     number of steps that the loss is a mean of, an int or a tensor of one
    """

    loss: Tensor
    scalars: Mapping[str, Tensor | float]
    memory: Tensor
    steps: int | Tensor


class Loss(Protocol):
    """The one interface of all losses, off-policy and on-policy."""

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The loss of a batch; see `trainer.batch` for what it holds."""


class LossStep:
    """All losses of a batch in one call.

    Losses that ask for the same batch after the same memory share one pass through the network.

    bfloat16   whether the network computes in bfloat16 where that is safe; losses never do
    """

    def __init__(self, network: nn.Module, *, bfloat16: bool = False) -> None:
        self.network = network
        self._bfloat16 = bfloat16

    def on(self, network: nn.Module) -> LossStep:
        """The same with another network."""
        return LossStep(network, bfloat16=self._bfloat16)

    def __call__(
        self, losses: Mapping[str, Loss], batch: Batch, memories: Mapping[str, Tensor]
    ) -> dict[str, LossResult]:
        """The result of each loss, by its name; `memories` before the batch by the same names."""
        model = _OnePass(self.network, self._bfloat16)
        return {name: loss(model, batch, memories[name]) for name, loss in losses.items()}


class _OnePass:
    """A network that computes the same thing once: a `Model`."""

    def __init__(self, network: nn.Module, bfloat16: bool) -> None:
        self._network = network
        self._bfloat16 = bfloat16
        self._asked: tuple[Batch, Tensor] | None = None

    def __call__(self, batch: Batch, memory: Tensor) -> Output:
        if self._asked is None or self._asked[0] is not batch or self._asked[1] is not memory:
            self._asked = (batch, memory)
            with torch.autocast(memory.device.type, torch.bfloat16, enabled=self._bfloat16):
                output = output_of(self._network, batch, memory)
            dtype, features = memory.dtype, output.features
            self._output = Output(
                output.logits.to(dtype),
                output.values.to(dtype),
                output.memory.to(dtype),
                None if features is None else lambda: features().to(dtype),
            )
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def weighted_sum(
    results: Mapping[str, LossResult], weights: Mapping[str, float], team: Team = ALONE
) -> Tensor:
    """The weighted sum of losses: a scalar.

    Its mean over a team is that of means over the steps of all, however unequally these lie.
    """
    losses = [weights[name] * result.loss for name, result in results.items()]
    if team.world > 1:
        steps = torch.stack([torch.as_tensor(one.steps).to(losses[0]) for one in results.values()])
        shares = steps * team.world / team.total(steps).clamp(min=1)
        losses = [loss * share for loss, share in zip(losses, shares, strict=True)]
    return torch.stack(losses).sum()


def gae_advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantages of T x B steps: float [T, B].

    value        [T, B], of the observation that each action answered
    next_value   [T, B], of the observation that followed it; where an episode was cut off at its
                 step limit that is its last observation, never the first of the next episode
    terminated   bool [T, B]: nothing comes after, the value there is 0
    truncated    bool [T, B]: more would have come, `next_value` stands for it
    source       Schulman et al. 2016, equations 11 and 16
    """
    surprise = reward + gamma * next_value * ~terminated - value
    carried = gamma * gae_lambda * (~(terminated | truncated)).to(value.dtype)
    advantage = torch.zeros_like(surprise)
    after = torch.zeros_like(surprise[0])
    for step in reversed(range(len(surprise))):
        after = surprise[step] + carried[step] * after
        advantage[step] = after
    return advantage


def normalised(advantage: Tensor, team: Team = ALONE) -> Tensor:
    """With mean 0 and standard deviation 1 over all steps, those of the whole team."""
    exact = advantage.double()
    count = team.total(exact.new_tensor(exact.numel()))
    mean = team.total(exact.sum()) / count
    deviation = (team.total(((exact - mean) ** 2).sum()) / count).sqrt()
    return ((exact - mean) / (deviation + 1e-5)).to(advantage.dtype)


def ppo_policy_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped surrogate, a mean over all steps.

    log_prob, old   of the actions taken, by the present network and by the one that took them
    source          Schulman et al. 2017, equation 7
    """
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def clipped_value_loss(value: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, the worse of the value and the value at most `clip` from the old."""
    clipped = old + (value - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2).mean()


def approximate_kl(log_prob: Tensor, old: Tensor) -> Tensor:
    """Of the policy from the one that took the actions, in nats: a mean over all steps, never < 0.

    log_prob, old   as in `ppo_policy_loss`
    source          Schulman 2020, "Approximating KL divergence", the estimator k3
    """
    gap = log_prob - old
    return (gap.exp() - 1 - gap).mean()


def explained_variance(value: Tensor, returns: Tensor) -> Tensor:
    """Share of the variance of the returns that the values predicted: 1 is all of it, 0 none.

    It is below 0 where the values mislead, and 0 where all returns are the same.
    """
    spread = returns.var(correction=0)
    unexplained = (returns - value).var(correction=0)
    return torch.where(spread > 0, 1 - unexplained / spread, torch.zeros_like(spread))


def entropy(logits: Tensor) -> Tensor:
    """Of the policy in nats, a mean over all steps.

    >>> f"{entropy(torch.zeros(2, 3, 7)):.4f}"  # log 7
    '1.9459'
    """
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


def masked_cross_entropy(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy against the actions that are valid, a mean over these; and how many they are.

    action   any integers, -1 where it is not valid; the mean of none is 0
    """
    target = action.long().flatten()
    valid = (target >= 0).sum()
    total = nn.functional.cross_entropy(
        logits.flatten(0, -2), target, ignore_index=-1, reduction="sum"
    )
    return total / valid.clamp(min=1), valid


def taken_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability of the actions taken, in the shape of `action`."""
    return logits.log_softmax(-1).gather(-1, action.long()[..., None]).squeeze(-1)


def linear_decay(steps: int | Tensor, over: int | None) -> float:
    """From 1 at step 0 to 0 at step `over`, and 0 from then on; always 1 where `over` is None.

    >>> linear_decay(250, 1000), linear_decay(2000, 1000), linear_decay(9, None)
    (0.75, 0.0, 1.0)
    """
    return 1.0 if over is None else max(1.0 - float(steps) / over, 0.0)


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimization: clipped ratio, clipped value loss, entropy bonus.

    clip               the furthest that a ratio counts from 1, and a value from the old one
    clip_decay_steps   environment steps of the stage over which `clip` goes to 0; None: never
    target_kl          an update whose approximate KL exceeds it is the rollout's last; None: all
                       are made. The schedule of the learning rate counts those left out too.
    """

    clip: float = 0.1
    clip_decay_steps: int | None = None
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    target_kl: float | None = None

    def __post_init__(self) -> None:
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError("target_kl must be above 0")

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The loss of a batch; see `trainer.batch` for what it holds."""
        output = model(batch, memory)
        clip = self.clip * linear_decay(batch["stage_steps"], self.clip_decay_steps)
        log_prob = taken_log_prob(output.logits, batch["action"])
        policy = ppo_policy_loss(log_prob, batch["log_prob"], batch["advantage"], clip)
        value = clipped_value_loss(output.values, batch["value"], batch["returns"], clip)
        bonus = entropy(output.logits)
        taken, old = log_prob.detach(), batch["log_prob"]
        return LossResult(
            loss=policy + self.value_weight * value - self.entropy_weight * bonus,
            scalars={
                "policy": policy.detach(),
                "value": value.detach(),
                "entropy": bonus.detach(),
                "clip_fraction": (((taken - old).exp() - 1).abs() > clip).float().mean(),
                "approximate_kl": approximate_kl(taken, old),
                "explained_variance": explained_variance(batch["value"], batch["returns"]),
            },
            memory=output.memory,
            steps=log_prob.numel(),
        )


@dataclass(frozen=True)
class A2C:
    """Advantage actor-critic. Source: Mnih et al. 2016, with generalised advantages."""

    value_weight: float = 0.5
    entropy_weight: float = 0.01

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The loss of a batch; see `trainer.batch` for what it holds."""
        output = model(batch, memory)
        log_prob = taken_log_prob(output.logits, batch["action"])
        policy = -(log_prob * batch["advantage"]).mean()
        value = 0.5 * ((output.values - batch["returns"]) ** 2).mean()
        bonus = entropy(output.logits)
        return LossResult(
            loss=policy + self.value_weight * value - self.entropy_weight * bonus,
            scalars={
                "policy": policy.detach(),
                "value": value.detach(),
                "entropy": bonus.detach(),
            },
            memory=output.memory,
            steps=log_prob.numel(),
        )


@dataclass(frozen=True)
class ExpertCrossEntropy:
    """Cross-entropy of the policy against the expert's actions: on a store, behaviour cloning; on
    rollouts, against what the expert advises where the policy goes (DAgger, Ross et al. 2011).

    Steps at which the expert has no advice do not count. Scalar: accuracy, the share of the others
    at which the most probable action is the expert's.

    entropy_weight   of a bonus for the policy's entropy, as BabyAI's own cloning had (0.01)
    """

    needs_expert: ClassVar[bool] = True
    entropy_weight: float = 0.0

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The loss of a batch; see `trainer.batch` for what it holds."""
        output = model(batch, memory)
        expert = batch["expert_action"]
        loss, valid = masked_cross_entropy(output.logits, expert)
        hits = output.logits.detach().argmax(-1) == expert
        if self.entropy_weight:
            loss = loss - self.entropy_weight * entropy(output.logits)
        return LossResult(loss, {"accuracy": hits.sum() / valid.clamp(min=1)}, output.memory, valid)


class SubgoalCrossEntropy(nn.Module):
    """Cross-entropy against the bot's subgoals, of a linear layer on what actor and critic see.

    An auxiliary target (Hu and Clune 2023, Thought Cloning): the network learns what the expert is
    about beside what it does. The layer is the loss's own, and acting does without it. Steps whose
    subgoal is not known do not count. Scalar: accuracy, as in `ExpertCrossEntropy`.

    features   size of what actor and critic see
    subgoals   how many codes there are, the first of them for "unknown"
    """

    def __init__(self, features: int, subgoals: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, subgoals)

    def forward(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The loss of a batch; see `trainer.batch` for what it holds."""
        output = model(batch, memory)
        assert output.features is not None  # it was asked for its size
        logits = self.head(output.features())
        target = batch["subgoal"].long()
        target = target.where(target > 0, -1)
        loss, valid = masked_cross_entropy(logits, target)
        hits = logits.detach().argmax(-1) == target
        return LossResult(loss, {"accuracy": hits.sum() / valid.clamp(min=1)}, output.memory, valid)


class Held(Protocol):
    """What a loss may have to hold something: weights, statistics, a place in a plan."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, numbers and text, in lists, tuples and dicts: a checkpoint holds no others."""

    def load_state_dict(self, state: Any) -> object:
        """Go on where `state_dict` was asked."""


class UsersLoss:
    """A loss of the user's, whose result is checked: what is wrong in it could go unnoticed.

    made   as the user's code made it
    """

    def __init__(self, key: str, name: str, made: Loss) -> None:
        self._key, self._name, self.made = key, name, made
        self.needs_expert = needs_expert(made)

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The loss of a batch; see `trainer.batch` for what it holds."""
        with users_code(self._key, self._name, batch):
            result = self.made(model, batch, memory)
            if not isinstance(result, LossResult):
                raise ValueError(f"it returns {type(result).__name__}, not a LossResult")
            for what in ("loss", "memory"):
                if not isinstance(getattr(result, what), Tensor):
                    given = type(getattr(result, what)).__name__
                    raise ValueError(f"the {what} of its result is {given}, not a tensor")
            if result.loss.dim():
                raise ValueError(f"the loss has shape {tuple(result.loss.shape)}, not ()")
            if torch.is_grad_enabled() and not result.loss.requires_grad:
                raise ValueError("the loss has no gradient")
            if result.memory.shape != memory.shape:
                raise ValueError("the loss returns a memory of another shape than it received")
            for name, value in result.scalars.items():
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise ValueError(f"the scalar `{name}` has shape {tuple(value.shape)}")
                if not isinstance(value, Tensor | SupportsFloat):
                    raise ValueError(f"the scalar `{name}` is {type(value).__name__}, not a number")
        return result


_HOLDING = ("state_dict", "load_state_dict")
_PLAIN = (bool, int, float, str, bytes, type(None))


def loss_weights(losses: Mapping[str, Loss]) -> list[nn.Parameter]:
    """The weights of losses that are modules, each once; they are trained with the network's."""
    modules = [made for made in map(_made, losses.values()) if isinstance(made, nn.Module)]
    return list(dict.fromkeys(weights for one in modules for weights in one.parameters()))


def loss_states(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """The state of the losses that hold something, by their names; not a copy.

    SettingsError  it is of kinds that no checkpoint holds
    """
    states = {}
    for name, held in held_by(losses).items():
        states[name] = dict(held.state_dict())
        for strange in not_plain(states[name], "state"):
            raise SettingsError(
                f"the state of this loss has a value that checkpoints cannot store: {strange}",
                path=f"losses.{name}",
                fix="return only tensors, numbers, text, lists, tuples and dicts in state_dict()",
            )
    return states


def held_by(losses: Mapping[str, Loss]) -> dict[str, Held]:
    """The losses that hold something, as the user's code made them, or ours."""
    made = {name: _made(loss) for name, loss in losses.items()}
    return {
        name: cast(Held, loss)
        for name, loss in made.items()
        if all(callable(getattr(loss, method, None)) for method in _HOLDING)
    }


def _made(loss: Loss) -> Loss:
    return loss.made if isinstance(loss, UsersLoss) else loss


def not_plain(value: Any, place: str) -> Iterator[str]:
    """What in it is read back from no checkpoint, each with its place.

    Tensors, numbers and text are, in lists, tuples and dicts.
    """
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield from not_plain(key, f"the key {key!r} of {place}")
            yield from not_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from not_plain(item, f"{place}[{number}]")
    elif not (isinstance(value, Tensor) or type(value) in _PLAIN):
        yield f"{place} is {type(value).__name__}"


def kl_targets(losses: Mapping[str, Loss]) -> dict[str, float]:
    """The `target_kl` of the losses that have one, by their names."""
    targets = {name: loss.target_kl for name, loss in losses.items() if isinstance(loss, PPO)}
    return {name: target for name, target in targets.items() if target is not None}


def needs_expert(loss: Loss) -> bool:
    """Whether a loss takes `expert_action` from rollouts: it says so by `needs_expert = True`."""
    return bool(getattr(loss, "needs_expert", False))
