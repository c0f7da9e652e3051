"""What stands for the values of a pickle: inert, and bounded in number and size.

The allow-list of names is here, with what the few allowed calls give; and the window through which
the bytes of a file are seen. Nothing in this module imports, calls or builds what a pickle names.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import IO, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from demotools.grid import ACTIONS

MAX_BYTES = 1 << 27
"""The longest byte string a file may announce; the longest episode on record needs a tenth."""
MAX_TEXT = 1 << 14
"""The longest text, in bytes; missions have a few hundred."""
MAX_STACK = 1 << 17
MAX_DEPTH = 32
MAX_KEPT = 1 << 16
"""Memo slots whose values are kept; later ones are counted only, so that memory stays bounded."""
MAX_KEPT_BYTES = 1 << 25
_BLOCK_BYTES = 1 << 18
_NAME_BYTES = 200


class TruncatedError(Exception):
    """The file ends in the middle of the pickle."""


class Digest(Protocol):
    """What is told every byte of the file, in order."""

    def update(self, data: bytes, /) -> None:
        """Take the next bytes."""


class Window:
    """A sliding part of a pickle: `buffer[at:]` is what comes next."""

    def __init__(
        self, stream: IO[bytes] | None, digest: Digest | None = None, buffer: bytes = b""
    ) -> None:
        self.buffer = buffer
        self.at = 0
        self.base = 0
        self._stream = stream
        self._digest = digest

    @property
    def position(self) -> int:
        """Offset in the file of what comes next."""
        return self.base + self.at

    def ahead(self, size: int) -> bool:
        """Whether `size` bytes are in the buffer, after reading on if need be."""
        if len(self.buffer) - self.at >= size:
            return True
        if self._stream is None:
            return False
        wanted = max(size, _BLOCK_BYTES)
        more = self._stream.read(wanted)
        if not more:
            self._stream = None
        elif self._digest is not None:
            self._digest.update(more)
        self.base += self.at
        self.buffer = self.buffer[self.at :] + more
        self.at = 0
        return len(self.buffer) >= size

    def take(self, size: int) -> bytes:
        """The next `size` bytes; TruncatedError at the end of the file."""
        if not self.ahead(size):
            raise TruncatedError
        start = self.at
        self.at = start + size
        return self.buffer[start : self.at]

    def line(self) -> bytes:
        """The bytes up to the next line feed, which is dropped."""
        self.ahead(_NAME_BYTES)
        end = self.buffer.find(b"\n", self.at, self.at + _NAME_BYTES)
        if end < 0:
            if len(self.buffer) - self.at >= _NAME_BYTES:
                raise ValueError
            raise TruncatedError
        text = self.buffer[self.at : end]
        self.at = end + 1
        return text


@dataclass(frozen=True, slots=True)
class Blob:
    """A byte string and where it lies in the file (-1 where it lies nowhere).

    size    its length; `data` may have been let go since
    holds   what a blosc frame announces to hold, in bytes
    """

    data: bytes
    offset: int
    size: int
    holds: int

    @classmethod
    def of(cls, data: bytes, offset: int = -1) -> Self:
        """The blob of some bytes."""
        return cls(data, offset, len(data), int.from_bytes(data[4:8], "little"))


@dataclass(frozen=True, slots=True)
class Run:
    """A list of small integers, one byte each."""

    values: bytes


@dataclass(frozen=True, slots=True)
class Named:
    """The stand-in of an allowed name: it can do nothing."""

    name: str


@dataclass(slots=True)
class Array:
    """A numpy array that a pickle describes."""

    shape: tuple[int, ...] = ()
    dtype: str = "u1"
    data: bytes = b""
    fortran: bool = False

    def values(self) -> NDArray[Any]:
        """The array; ValueError where its parts contradict each other."""
        order = "F" if self.fortran else "C"
        flat = np.frombuffer(self.data, dtype=np.dtype(self.dtype))
        return flat.reshape(self.shape, order=order)  # type: ignore[call-overload,no-any-return]


@dataclass(slots=True)
class Dtype:
    """A numpy dtype: its name, one of `_DTYPES`, and its byte order."""

    name: str
    order: str = "<"

    def __str__(self) -> str:
        return self.order + self.name


_DTYPES = frozenset(
    ["b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"],
)

# byte order, and none of the fields of a structured dtype
DTYPE_STATES = tuple((order, None, None, None) for order in "|<>")

_GETATTR, _ENVIRONMENT, _ACTIONS = Named("getattr"), Named("MiniGridEnv"), Named("Actions")
_ENCODE, _DTYPE, _NDARRAY = Named("encode"), Named("dtype"), Named("ndarray")
_RECONSTRUCT, _FROMBUFFER, _SCALAR = Named("_reconstruct"), Named("_frombuffer"), Named("scalar")

# Where the environment and its actions have lived: gym-minigrid, its last versions, minigrid.
_ENVIRONMENTS = (
    *("gym_minigrid.minigrid", "gym_minigrid.minigrid_env"),
    *("minigrid.minigrid", "minigrid.minigrid_env"),
)
_ACTION_CLASSES = (
    *((module, "MiniGridEnv.Actions") for module in _ENVIRONMENTS),
    *((module, "Actions") for module in ("minigrid.core.actions", "gym_minigrid.actions")),
)

ALLOWED: dict[tuple[str, str], Named | int] = {
    ("builtins", "getattr"): _GETATTR,
    ("__builtin__", "getattr"): _GETATTR,
    **{(module, "MiniGridEnv"): _ENVIRONMENT for module in _ENVIRONMENTS},
    **dict.fromkeys(_ACTION_CLASSES, _ACTIONS),
    **{
        (module, f"{name}.{action}"): number
        for module, name in _ACTION_CLASSES
        for number, action in enumerate(ACTIONS)
    },
    ("_codecs", "encode"): _ENCODE,
    ("numpy", "dtype"): _DTYPE,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.numeric", "_frombuffer"): _FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROMBUFFER,
}
"""Every name that may stand in a demo file, and its stand-in; an action is its number."""

ARRAY_NAMES: frozenset[Named | int] = frozenset(
    {_ENCODE, _DTYPE, _NDARRAY, _RECONSTRUCT, _FROMBUFFER}
)
"""What may stand in the inner pickle of the images."""

# Third-party modules that unpickle, install or build what they are given.
_RUNS_CODE = frozenset(
    (
        *("cloudpickle", "dill", "joblib", "pip", "setuptools", "distutils", "IPython", "imp"),
        *("commands", "execnet", "ray"),
    )
)
# Parts of a dotted name that reach or run code, whatever module they stand in.
_REACHES_CODE = frozenset(
    (
        *("os", "posix", "nt", "sys", "subprocess", "builtins", "importlib", "runpy", "ctypes"),
        *("eval", "exec", "execfile", "compile", "open", "getattr", "setattr", "__import__"),
        *("import_module", "system", "popen", "Popen", "spawn", "run", "runstring", "call"),
        *("check_call", "check_output", "load", "loads", "load_module", "hub", "f2py"),
        *("testing", "mro"),
    )
)
# Plain data of the standard library: a file that holds it is strange, not hostile.
_PLAIN_DATA = {
    "array": "array _array_reconstructor",
    "collections": "OrderedDict defaultdict deque Counter",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "enum": "Enum IntEnum",
    "fractions": "Fraction",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "types": "SimpleNamespace",
    "uuid": "UUID",
    "zoneinfo": "ZoneInfo",
    **dict.fromkeys(
        ("builtins", "__builtin__"),
        "bool bytearray bytes complex dict float frozenset int list long object range set slice "
        "str tuple unicode xrange",
    ),
}


def may_run_code(module: str, name: str) -> bool:
    """Whether a name that is not allowed is known as a way to run code.

    That is all of Python's library but plain data, and what unpickles, imports or builds. Any other
    name is unknown: it is refused as well, but nobody is accused.
    """
    if name in _PLAIN_DATA.get(module, "").split():
        return False
    parts = f"{module}.{name}".split(".")
    root = parts[0]
    # `__main__` is the script that wrote the file
    in_library = root in sys.stdlib_module_names or root in ("__builtin__", "copy_reg")
    return in_library or root in _RUNS_CODE or not _REACHES_CODE.isdisjoint(parts)


def called(function: Named, arguments: tuple[Any, ...]) -> Any:
    """What an allowed call gives; None where the arguments are not the allowed ones."""
    match function, arguments:
        case Named("getattr"), (Named("MiniGridEnv"), "Actions"):
            return _ACTIONS
        case Named("getattr"), (Named("Actions"), str(name)) if name in ACTIONS:
            return ACTIONS.index(name)
        case Named("Actions"), (number,) if type(number) is int and 0 <= number < len(ACTIONS):
            return number
        case Named("encode"), (str(text), "latin1"):
            return Blob.of(text.encode("latin1"))
        case Named("dtype"), (str(name), *_flags) if name in _DTYPES and len(arguments) <= 3:
            return Dtype(name)
        case Named("_reconstruct"), (Named("ndarray"), (0,), Blob(data=b"b")):
            return Array()
        case Named("_frombuffer"), (Blob() as data, Dtype() as dtype, shape, "C" | "F" as order):
            if is_array(shape, dtype, data):
                return Array(shape, str(dtype), data.data, order == "F")
        case Named("scalar"), (Dtype() as dtype, Blob() as data):
            return np.frombuffer(data.data, dtype=np.dtype(str(dtype))).item()
    return None


def is_array(shape: Any, dtype: Any, data: Any) -> bool:
    """Whether these are the shape, dtype and bytes of an array."""
    if not (isinstance(shape, tuple) and isinstance(dtype, Dtype) and isinstance(data, Blob)):
        return False
    if not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape):
        return False
    return len(shape) <= 8


def size_bytes(value: Any) -> int:
    """About what a memo slot with this value takes."""
    if isinstance(value, Blob | Array):
        return 64 + len(value.data)
    return 64 + len(value) if isinstance(value, str) else 64


def shown(value: Any) -> str:
    """The value in an error message."""
    if isinstance(value, Named):
        return value.name
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, int | float | None):
        return repr(value)
    return type(value).__name__.lower()
