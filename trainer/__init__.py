"""A thin PyTorch trainer for demonstrations: behaviour cloning, PPO, DAgger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.policy import LoadedPolicy, load_policy

__all__ = ["LoadedPolicy", "load_policy"]


def __getattr__(name: str) -> Any:
    # torch is imported only when a policy is loaded: `trainer --help` does not wait for it
    if name in __all__:
        from trainer import policy

        return getattr(policy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
