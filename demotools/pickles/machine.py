"""A pickle machine that cannot do anything: the pickle language over inert values.

It never imports, calls or builds what a pickle names. A name that is not in the exact allow-list
of `ALLOWED` is refused at once; the names that are allowed become inert stand-ins, and the few
calls
that demo files make (`getattr` for the action class, an action by its number, numpy's array and
scalar recipes) are carried out by hand. Every length that a file announces has a cap. What is not
here, and why: no EXT, PERSID, INST, OBJ, NEWOBJ, BUFFER opcodes (no demo file has them); no
protocol 0 and 1 (no BabyAI ever wrote them). Source of the opcodes: CPython's Lib/pickletools.py.

What stands for the values of a pickle: inert, and bounded in number and size.

The allow-list of names is here, with what the few allowed calls give; and the window through which
the bytes of a file are seen. Nothing in this module imports, calls or builds what a pickle names.
"""

from __future__ import annotations

import pickletools
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.errors import PickleError, UnsafePickleError

# Opcodes that make objects, or take them from outside; the others that are refused are data.
_OBJECT_OPCODES = frozenset(
    (
        *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"),
        *("NEXT_BUFFER", "REDUCE", "BUILD"),
    )
)
# Of the names that may stand in a file, those whose call with other arguments reaches further.
_OPENING = frozenset(["getattr", "MiniGridEnv"])
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


class Machine:
    """Runs a pickle opcode by opcode; see the module's text.

    path      the file, for error messages
    allowed   the stand-ins that may be named
    """

    def __init__(self, window: Window, path: Path | str, allowed: frozenset[Named | int]) -> None:
        self.window = window
        self.path = path
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.memo_size = 0
        self.protocol = 0
        self.stopped = False
        self.fallback: Callable[[int], Any] | None = None
        self._kept_bytes = 0
        self._allowed = allowed

    def step(self) -> None:
        """Carry out one opcode.

        TruncatedError          the pickle ends here
        UnsafePickleError  it names something, or does something, that no demo file does
        PickleError        it is damaged
        """
        code = self.window.take(1)[0]
        handler = _HANDLERS.get(code)
        if handler is None:
            raise self.unsafe_opcode(code)
        try:
            handler(self)
        except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
            what = f"opcode {_opcode_name(code)} does not fit here (or an unknown layout)"
            raise self.damaged(what) from error
        if len(self.stack) > MAX_STACK:
            raise self.too_large(f"more than {MAX_STACK} values wait on its stack")

    def damaged(self, what: str) -> PickleError:
        """The error for a pickle that is not whole."""
        return PickleError(
            f"the pickle is damaged near byte {self.window.position}: {what}",
            path=self.path,
            fix="download or copy the file again and compare its size and hash",
        )

    def too_large(self, what: str) -> PickleError:
        """The error for a pickle that asks for more than any demo file needs."""
        return PickleError(
            f"the pickle asks for too much near byte {self.window.position}: {what}; this limit "
            "bounds the memory",
            path=self.path,
            fix="compare the file's size and hash with its publisher's; if it is whole, split it",
        )

    def unsupported(self, what: str) -> PickleError:
        """The error for a pickle with something harmless, or unknown, that is not read."""
        return PickleError(
            f"not supported: the pickle {what}; nothing was run",
            path=self.path,
            fix="write it again with text, numbers, bytes, lists and numpy arrays of numbers only",
        )

    def unsafe(self, what: str) -> UnsafePickleError:
        """The error for a pickle that does what no demo file does."""
        return UnsafePickleError(
            f"the pickle {what}, which no demo file does; nothing was run",
            path=self.path,
            fix="do not load this file with anything else; get it again from its publisher",
        )

    def unsafe_opcode(self, code: int) -> PickleError:
        """The error for an opcode that is refused or does not exist."""
        name = _opcode_name(code)
        if name == "unknown":
            return self.damaged(f"byte {code:#04x} is no opcode")
        refused = self.unsafe if name in _OBJECT_OPCODES else self.unsupported
        return refused(f"uses opcode {name}")

    def keep(self, index: int, value: Any) -> None:
        """Fill a memo slot; only small values of the first slots are really kept."""
        # every slot took a byte at least, so no pickler can have filled more of them
        if index > self.window.position:
            raise self.damaged(f"memo slot {index} is filled after {self.memo_size} others")
        self.memo_size += 1
        if len(self.memo) < MAX_KEPT and self._kept_bytes < MAX_KEPT_BYTES:
            self._kept_bytes += size_bytes(value)
            self.memo[index] = value
        else:
            self.memo.pop(index, None)

    def fetch(self, index: int) -> Any:
        """The value of a memo slot."""
        if index in self.memo:
            return self.memo[index]
        if self.fallback is not None:
            with suppress(KeyError):
                return self.fallback(index)
        if index < self.memo_size:
            raise PickleError(
                f"memo slot {index} is fetched again near byte {self.window.position}, but only "
                "what stands early in the file is kept, to bound the memory",
                path=self.path,
                fix="write the file again without objects that episodes share",
            )
        raise self.damaged(f"memo slot {index} was never filled")

    def fetched_text(self, index: int) -> str | None:
        """The text of a memo slot; None where there is none."""
        value = self.memo.get(index)
        if value is None and self.fallback is not None:
            with suppress(KeyError):
                value = self.fallback(index)
        return value if type(value) is str else None

    def push_named(self, module: str, name: str) -> None:
        """Push the stand-in of an allowed name; refuse every other."""
        found = ALLOWED.get((module, name))
        if found is None or found not in self._allowed:
            known = found is not None or may_run_code(module, name)
            refused = self.unsafe if known else self.unsupported
            raise refused(f"names {module[:80]}.{name[:80]}")
        self.stack.append(found)

    def pop_to_mark(self) -> list[Any]:
        """The values above the last mark."""
        values = self.stack
        self.stack = self.below.pop()
        return values

    def reduce(self) -> None:
        """Carry out one of the calls that demo files make."""
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._called(function, arguments))

    def _called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise self.unsafe("calls something that is not a name")
        result = called(function, arguments)
        if result is None:
            listed = ", ".join(shown(value) for value in arguments[:4])
            refused = self.unsafe if function.name in _OPENING else self.unsupported
            raise refused(f"calls {function.name}({listed})")
        return result

    def build(self) -> None:
        """Fill in an array or a dtype; nothing else has a state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Array) and isinstance(state, tuple) and len(state) == 5:
            _version, shape, dtype, fortran, data = state
            if is_array(shape, dtype, data) and isinstance(fortran, bool):
                target.shape, target.dtype, target.fortran = shape, str(dtype), fortran
                target.data = data.data
                return
        if isinstance(target, Dtype) and isinstance(state, tuple) and state[1:5] in DTYPE_STATES:
            target.order = state[1]
            return
        refused = self.unsupported if isinstance(target, Array | Dtype) else self.unsafe
        raise refused(f"sets the state of {shown(target)}")


def _opcode_name(code: int) -> str:
    return _OPCODE_NAMES.get(code, "unknown")


Handler = Callable[[Machine], None]


def _number(size: int) -> Callable[[Machine], int]:
    def read(machine: Machine) -> int:
        return int.from_bytes(machine.window.take(size), "little")

    return read


_u1, _u2, _u4, _u8 = (_number(size) for size in (1, 2, 4, 8))


def _length(machine: Machine, announced: int, limit: int) -> int:
    if announced > limit:
        raise machine.too_large(f"it announces {announced} bytes, more than {limit} for one value")
    return announced


def _text(size: Callable[[Machine], int]) -> Handler:
    def handle(machine: Machine) -> None:
        length = _length(machine, size(machine), MAX_TEXT)
        machine.stack.append(machine.window.take(length).decode("utf-8", "surrogatepass"))

    return handle


def _binary_text(machine: Machine) -> None:
    # protocol <= 2 spells a byte string as text of code points 0 to 255, up to 2 bytes each
    length = _length(machine, _u4(machine), 2 * MAX_BYTES)
    machine.stack.append(machine.window.take(length).decode("utf-8", "surrogatepass"))


def _bytes(size: Callable[[Machine], int]) -> Handler:
    def handle(machine: Machine) -> None:
        length = _length(machine, size(machine), MAX_BYTES)
        data = machine.window.take(length)
        machine.stack.append(Blob.of(data, machine.window.position - length))

    return handle


def _integer(machine: Machine) -> None:
    machine.stack.append(struct.unpack("<i", machine.window.take(4))[0])


def _long(machine: Machine) -> None:
    size = _u1(machine)
    if size > 8:
        raise machine.unsupported(f"holds a whole number of {size} bytes, more than 8")
    machine.stack.append(int.from_bytes(machine.window.take(size), "little", signed=True))


def _float(machine: Machine) -> None:
    machine.stack.append(struct.unpack(">d", machine.window.take(8))[0])


def _constant(value: Any) -> Handler:
    def handle(machine: Machine) -> None:
        machine.stack.append(value)

    return handle


def _protocol(machine: Machine) -> None:
    machine.protocol = _u1(machine)
    if not 2 <= machine.protocol <= 5:
        raise machine.damaged(f"there is no pickle protocol {machine.protocol} in demo files")


def _frame(machine: Machine) -> None:
    # a frame only says how much to read ahead; what is inside is bounded opcode by opcode
    _u8(machine)


def _mark(machine: Machine) -> None:
    if len(machine.below) >= MAX_DEPTH:
        raise machine.too_large(f"it nests deeper than {MAX_DEPTH}")
    machine.below.append(machine.stack)
    machine.stack = []


def _tuple_of(size: int) -> Handler:
    def handle(machine: Machine) -> None:
        if len(machine.stack) < size:
            raise IndexError
        values = tuple(machine.stack[-size:])
        del machine.stack[-size:]
        machine.stack.append(values)

    return handle


def _tuple(machine: Machine) -> None:
    values = tuple(machine.pop_to_mark())
    machine.stack.append(values)


def _append(machine: Machine) -> None:
    value = machine.stack.pop()
    _list_on_top(machine).append(value)


def _appends(machine: Machine) -> None:
    values = machine.pop_to_mark()
    _list_on_top(machine).extend(values)


def _list_on_top(machine: Machine) -> list[Any]:
    target = machine.stack[-1]
    if type(target) is not list:
        raise TypeError
    if len(target) > MAX_STACK:
        raise machine.too_large(f"a list holds more than {MAX_STACK} values")
    return target


def _set_items(machine: Machine) -> None:
    _fill(machine, machine.pop_to_mark())


def _set_item(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _fill(machine, [key, value])


def _fill(machine: Machine, values: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict:
        raise TypeError
    for key in values[::2]:
        if type(key) not in (str, int):
            raise machine.unsupported(f"has a dictionary with a key of type {type(key).__name__}")
    target.update(zip(values[::2], values[1::2], strict=True))


def _global(machine: Machine) -> None:
    module, name = machine.window.line(), machine.window.line()
    machine.push_named(module.decode("utf-8"), name.decode("utf-8"))


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise machine.unsafe("computes a name from something that is not text")
    machine.push_named(module, name)


def _put(size: Callable[[Machine], int]) -> Handler:
    def handle(machine: Machine) -> None:
        machine.keep(size(machine), machine.stack[-1])

    return handle


def _memoize(machine: Machine) -> None:
    machine.keep(machine.memo_size, machine.stack[-1])


def _get(size: Callable[[Machine], int]) -> Handler:
    def handle(machine: Machine) -> None:
        machine.stack.append(machine.fetch(size(machine)))

    return handle


def _stop(machine: Machine) -> None:
    if len(machine.stack) != 1 or machine.below:
        raise machine.damaged("it stops with values left over")
    machine.stopped = True


_HANDLERS: dict[int, Handler] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): _mark,
    ord("."): _stop,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("K"): lambda machine: machine.stack.append(_u1(machine)),
    ord("M"): lambda machine: machine.stack.append(_u2(machine)),
    ord("J"): _integer,
    0x8A: _long,
    ord("G"): _float,
    ord("X"): _binary_text,
    0x8C: _text(_u1),
    0x8D: _text(_u8),
    ord("C"): _bytes(_u1),
    ord("B"): _bytes(_u4),
    0x8E: _bytes(_u8),
    0x96: _bytes(_u8),
    ord(")"): lambda machine: machine.stack.append(()),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("t"): _tuple,
    ord("]"): lambda machine: machine.stack.append([]),
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): lambda machine: machine.stack.append({}),
    ord("s"): _set_item,
    ord("u"): _set_items,
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): Machine.reduce,
    ord("b"): Machine.build,
    ord("q"): _put(_u1),
    ord("r"): _put(_u4),
    0x94: _memoize,
    ord("h"): _get(_u1),
    ord("j"): _get(_u4),
}

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
