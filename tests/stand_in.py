"""A device beside the CPU that every machine has: to see that code works where a GPU would be.

Its tensors hold their values on the CPU, but say that they are elsewhere: numpy cannot look into
them, and an operation on one of them and a tensor of the CPU is refused, as a GPU refuses it.

Torch has to be told of it before its first gradient, and does not forget it: it is for processes of
their own (tests/test_stand_in.py).
"""

# mypy: disable-error-code="no-untyped-call, override, unused-ignore, attr-defined"
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
_PACK = "aten::_pack_padded_sequence"
# what takes tensors of two devices on a GPU too: copies, an index on the CPU, and packed sequences,
# whose lengths stay there
_MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", _PACK, f"{_PACK}_backward")


class StandIn(Tensor):
    """A tensor on the stand-in device; `held` are its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> StandIn:
        made: StandIn = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """A copy to the CPU, as of any device."""
        return self.held.tolist()

    def new_tensor(self, data: Any) -> StandIn:  # type: ignore[override]
        """It goes past what is dispatched."""
        return StandIn(self.held.new_tensor(data))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _done(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees what makes tensors from nothing as well."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _done(func, args, kwargs or {})


def _done(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives, done with the values and put where it belongs."""
    tensors = [one for one in tree_leaves((args, dict(kwargs))) if isinstance(one, Tensor)]
    there = {id(one.held): one for one in tensors if isinstance(one, StandIn)}
    is_mixed = there and any(one.dim() for one in tensors if not isinstance(one, StandIn))
    if is_mixed and func.name() not in _MAY_MIX:
        raise RuntimeError(f"{func.name()}: tensors of the CPU and of {NAME} in one operation")

    def held(value: Any) -> Any:
        return value.held if isinstance(value, StandIn) else value

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return there[id(value)] if id(value) in there else StandIn(value)

    inner, named = tree_map(held, args), tree_map(held, dict(kwargs))
    stays_there = bool(there)
    if (device := named.get("device")) is not None:
        stays_there = torch.device(device).type == NAME
        named["device"] = "cpu"
    result = _FUSED.get(func.name(), func)(*inner, **named)
    if torch.Tag.inplace_view in func.tags and stays_there:
        with no_dispatch():  # shape and strides are told by the tensor itself
            return func(*args, **kwargs)
    if func.name() == "aten::copy_":
        return args[0]
    if func.name() == _PACK:
        return put(result[0]), result[1]
    return tree_map(put, result) if stays_there else result


def _gru_cell(
    given: Tensor,
    recurrent: Tensor,
    hidden: Tensor,
    bias: Tensor | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    given = given if bias is None else given + bias
    recurrent = recurrent if more is None else recurrent + more
    (i_r, i_z, i_n), (h_r, h_z, h_n) = given.chunk(3, 1), recurrent.chunk(3, 1)
    r, z = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
    n = (i_n + r * h_n).tanh()
    return n + z * (hidden - n), torch.cat([r, z, n, hidden, h_n], 1)


def _gru_cell_backward(gradient: Tensor, kept: Tensor, has_bias: bool) -> tuple[Any, ...]:
    r, z, n, hidden, h_n = kept.chunk(5, 1)
    by_n = gradient * (1 - z) * (1 - n * n)
    by_z = gradient * (hidden - n) * z * (1 - z)
    by_r = by_n * h_n * r * (1 - r)
    given, recurrent = torch.cat([by_r, by_z, by_n], 1), torch.cat([by_r, by_z, by_n * r], 1)
    biases = (given.sum(0), recurrent.sum(0)) if has_bias else (None, None)
    return given, recurrent, gradient * z, *biases


# what torch has for GPUs only
_FUSED: dict[str, Callable[..., Any]] = {
    "aten::_thnn_fused_gru_cell": _gru_cell,
    "aten::_thnn_fused_gru_cell_backward": _gru_cell_backward,
}


@cache
def _registered() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    module: Any = torch.get_device_module(NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.get_rng_state = lambda *_device: torch.empty(0)
    module.set_rng_state = lambda *_state: None


@contextmanager
def stand_in_device() -> Iterator[torch.device]:
    """The device; it is there inside."""
    _registered()
    with _Everywhere():
        yield torch.device(NAME, 0)
