"""Our vector environment with gymnasium's interface, for programs that use that one.

`gymnasium.make_vec("demotools/GoToLocal-v0", num_envs=64)` makes it. When an episode ends, the next
one begins in the same step, with the last observation in `final_obs` (`AutoresetMode.SAME_STEP`).
After `reset(seed=s)`, environment e of n plays the seeds s + e, s + e + n, s + e + 2n, ..., so the
observations do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from demotools.babyai.cells import UNPACKING_TABLE
from demotools.babyai.levels import EVALUATION_SEED
from demotools.errors import SettingsError
from demotools.recording.environment import make_environment
from trainer.acting.vector import EnvironmentKind, EnvironmentStep, VectorEnvironment

Observation = dict[str, Any]
_SEEDS = 1 << 62


class GymnasiumVector(VectorEnv[Observation, NDArray[np.int64], NDArray[Any]]):
    """`num_envs` environments of one level, with their fast views.

    num_envs    n
    level       by its name or environment id
    processes   that step them; at most one for every environment

    Observations are a dict of `image` uint8 [n, 7, 7, 3], `direction` int64 [n] and `mission`, n
    texts; rewards are float32 [n].
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, num_envs: int, level: str, *, processes: int = 1) -> None:
        single = make_environment(level)
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, num_envs)
        self.action_space = batch_space(single.action_space, num_envs)
        self.num_envs = num_envs
        self._environments = VectorEnvironment(
            EnvironmentKind(level), num_envs, processes=processes
        )
        self._missions: tuple[str, ...] = ()

    def reset(
        self,
        *,
        seed: int | Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin anew.

        seed   of the first environment, the next ones following it; or n seeds, one each; None: by
               chance

        SettingsError  not n seeds, or negative ones
        """
        if seed is None or isinstance(seed, int):
            super().reset(seed=seed)  # which keeps the generator that `np_random` gives
            drawn = int(self.np_random.integers(EVALUATION_SEED)) if seed is None else seed
            first = [drawn + number for number in range(self.num_envs)]
        else:
            first = list(map(int, seed))
        if len(first) != self.num_envs or min(first) < 0:
            raise SettingsError(
                f"these are not {self.num_envs} seeds of 0 or more",
                path="seed",
                fix="give one seed, or one for each environment",
            )
        streams = [range(start, _SEEDS, self.num_envs) for start in first]
        step = self._environments.reset(streams)
        self._missions = step.missions
        return _observation(step), {"seed": step.seed}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Step every environment; where an episode ends the next one begins.

        actions   int64 [n], 0..6
        """
        before = self._missions
        step = self._environments.step(np.asarray(actions, dtype=np.int64))
        self._missions = step.missions
        infos: dict[str, Any] = {"seed": step.seed}
        ended = step.terminated | step.truncated
        if ended.any():
            final = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(ended).tolist():
                final[row] = {
                    "image": UNPACKING_TABLE[step.final_cells[row]],
                    "direction": int(step.final_direction[row]),
                    "mission": before[row],
                }
            infos |= {
                "final_obs": final,
                "_final_obs": ended,
                "final_info": {},
                "_final_info": ended,
            }
        return _observation(step), step.reward, step.terminated, step.truncated, infos

    def close_extras(self, **_options: Any) -> None:
        """End the processes."""
        self._environments.close()


def _observation(step: EnvironmentStep) -> Observation:
    return {
        "image": UNPACKING_TABLE[step.cells],
        "direction": step.direction.astype(np.int64),
        "mission": step.missions,
    }
