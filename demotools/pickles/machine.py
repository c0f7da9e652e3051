"""A pickle machine that runs nothing: it interprets pickles over plain, inert values.

It never imports, calls or builds what a pickle names. A name that is not in the exact allow-list
`ALLOWED` is refused at once; allowed names become stand-ins, and the few calls that demo files make
(`getattr` for the action class, an action by its number, numpy's array and scalar recipes) are
carried out here by hand. Every length that a file announces has a limit. Left out on purpose: the
opcodes EXT, PERSID, INST, OBJ, NEWOBJ and BUFFER (no demo file has them), and protocols 0 and 1 (no
version of BabyAI ever wrote them). Source of the opcodes: CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import pickletools
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

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
# The bytes in which pickletools says that the length of an argument is announced.
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


class Machine:
    """Runs a pickle opcode by opcode; see the module's text.

    path      the file, for error messages
    allowed   the stand-ins that may be named
    fallback  gives the values of memo slots that `keep` did not fill, or KeyError
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
        self.fallback: Callable[[int], Any] = dict[int, Any]().__getitem__
        self._kept_bytes = 0
        self._allowed = allowed

    def step(self) -> None:
        """Carry out one opcode.

        TruncatedError          the pickle ends here
        UnsafePickleError  it names something, or does something, that no demo file does
        PickleError        it is damaged
        """
        code = self.window.take(1)[0]
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise self.damaged(f"byte {code:#04x} is no opcode")
        name, size, length_bytes = opcode
        found = _ACTIONS_OF_OPCODES.get(name)
        if found is None:
            refused = self.unsafe if name in _OBJECT_OPCODES else self.unsupported
            raise refused(f"uses opcode {name}")
        act, limit = found
        if length_bytes:
            size = int.from_bytes(self.window.take(length_bytes), "little")
            if size > limit:
                what = f"it announces {size} bytes, more than {limit} for one value"
                raise self.too_large(what)
        try:
            act(self, self.window.take(size))
        except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
            what = f"opcode {name} does not fit here (or an unknown layout)"
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
            fix="compare the file's size and hash with the publisher's; if they match, split it",
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
        with suppress(KeyError):
            return self.kept(index)
        if index < self.memo_size:
            raise PickleError(
                f"memo slot {index} is fetched again near byte {self.window.position}, but only "
                "what stands early in the file is kept, to bound the memory",
                path=self.path,
                fix="rewrite the file so that episodes share no objects",
            )
        raise self.damaged(f"memo slot {index} was never filled")

    def kept(self, index: int) -> Any:
        """The value of a memo slot; KeyError where it was not kept."""
        return self.memo[index] if index in self.memo else self.fallback(index)

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
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise self.unsafe("calls something that is not a name")
        result = called(function, arguments)
        if result is None:
            listed = ", ".join(shown(value) for value in arguments[:4])
            refused = self.unsafe if function.name in _OPENING else self.unsupported
            raise refused(f"calls {function.name}({listed})")
        self.stack.append(result)

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

    def extend_list(self, values: list[Any]) -> None:
        """Append to the list on top."""
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError
        if len(target) > MAX_STACK:
            raise self.too_large(f"a list holds more than {MAX_STACK} values")
        target.extend(values)

    def fill_dict(self, values: list[Any]) -> None:
        """Set keys and values, in turn, of the dictionary on top."""
        target = self.stack[-1]
        if type(target) is not dict:
            raise TypeError
        for key in values[::2]:
            if type(key) not in (str, int):
                kind = type(key).__name__
                raise self.unsupported(f"has a dictionary with a key of type {kind}")
        target.update(zip(values[::2], values[1::2], strict=True))

    def pop(self, count: int) -> list[Any]:
        """The uppermost values."""
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values


def _protocol(machine: Machine, number: bytes) -> None:
    machine.protocol = number[0]
    if not 2 <= machine.protocol <= 5:
        raise machine.damaged(f"there is no pickle protocol {machine.protocol} in demo files")


def _mark(machine: Machine, _none: bytes) -> None:
    if len(machine.below) >= MAX_DEPTH:
        raise machine.too_large(f"it nests deeper than {MAX_DEPTH}")
    machine.below.append(machine.stack)
    machine.stack = []


def _stop(machine: Machine, _none: bytes) -> None:
    if len(machine.stack) != 1 or machine.below:
        raise machine.damaged("it stops with values left over")
    machine.stopped = True


def _bytes(machine: Machine, data: bytes) -> None:
    machine.stack.append(Blob.of(data, machine.window.position - len(data)))


def _long(machine: Machine, data: bytes) -> None:
    if len(data) > 8:
        raise machine.unsupported(f"holds a whole number of {len(data)} bytes, more than 8")
    machine.stack.append(int.from_bytes(data, "little", signed=True))


def _tuple(machine: Machine, _none: bytes) -> None:
    values = tuple(machine.pop_to_mark())
    machine.stack.append(values)


def _global(machine: Machine, _none: bytes) -> None:
    module, name = machine.window.line(), machine.window.line()
    machine.push_named(module.decode("utf-8"), name.decode("utf-8"))


def _stack_global(machine: Machine, _none: bytes) -> None:
    module, name = machine.pop(2)
    if type(name) is not str or type(module) is not str:
        raise machine.unsafe("computes a name from something that is not text")
    machine.push_named(module, name)


_Act = Callable[[Machine, bytes], None]


def _push(value: Callable[[bytes], Any]) -> _Act:
    return lambda machine, data: machine.stack.append(value(data))


def _tuple_of(size: int) -> _Act:
    return lambda machine, _none: machine.stack.append(tuple(machine.pop(size)))


def _unsigned(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


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

# By code: the name, the bytes of the argument, and those that announce how many it has.
_OPCODES = {
    ord(opcode.code): (
        opcode.name,
        max(opcode.arg.n, 0) if opcode.arg else 0,
        _LENGTH_BYTES.get(opcode.arg.n, 0) if opcode.arg else 0,
    )
    for opcode in pickletools.opcodes
}
# What the opcodes of demo files do with their argument, and the most bytes that it may announce.
_ACTIONS_OF_OPCODES: dict[str, tuple[_Act, int]] = {
    "PROTO": (_protocol, 0),
    # a frame only says how much to read ahead; what is inside is bounded opcode by opcode
    "FRAME": (lambda _machine, _size: None, 0),
    "MARK": (_mark, 0),
    "STOP": (_stop, 0),
    "NONE": (_push(lambda _none: None), 0),
    "NEWTRUE": (_push(lambda _none: True), 0),
    "NEWFALSE": (_push(lambda _none: False), 0),
    "BININT1": (_push(_unsigned), 0),
    "BININT2": (_push(_unsigned), 0),
    "BININT": (_push(lambda data: int.from_bytes(data, "little", signed=True)), 0),
    "LONG1": (_long, 255),
    "BINFLOAT": (_push(lambda data: struct.unpack(">d", data)[0]), 0),
    # protocol <= 2 spells a byte string as text of code points 0 to 255, up to 2 bytes each
    "BINUNICODE": (_push(_text), 2 * MAX_BYTES),
    "SHORT_BINUNICODE": (_push(_text), MAX_TEXT),
    "BINUNICODE8": (_push(_text), MAX_TEXT),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), (_bytes, MAX_BYTES)),
    "EMPTY_TUPLE": (_push(lambda _none: ()), 0),
    "TUPLE1": (_tuple_of(1), 0),
    "TUPLE2": (_tuple_of(2), 0),
    "TUPLE3": (_tuple_of(3), 0),
    "TUPLE": (_tuple, 0),
    "EMPTY_LIST": (_push(lambda _none: []), 0),
    "APPEND": (lambda machine, _none: machine.extend_list(machine.pop(1)), 0),
    "APPENDS": (lambda machine, _none: machine.extend_list(machine.pop_to_mark()), 0),
    "EMPTY_DICT": (_push(lambda _none: {}), 0),
    "SETITEM": (lambda machine, _none: machine.fill_dict(machine.pop(2)), 0),
    "SETITEMS": (lambda machine, _none: machine.fill_dict(machine.pop_to_mark()), 0),
    "GLOBAL": (_global, 0),
    "STACK_GLOBAL": (_stack_global, 0),
    "REDUCE": (lambda machine, _none: machine.reduce(), 0),
    "BUILD": (lambda machine, _none: machine.build(), 0),
    **dict.fromkeys(
        ("BINPUT", "LONG_BINPUT"),
        (lambda machine, slot: machine.keep(_unsigned(slot), machine.stack[-1]), 0),
    ),
    "MEMOIZE": (lambda machine, _none: machine.keep(machine.memo_size, machine.stack[-1]), 0),
    **dict.fromkeys(
        ("BINGET", "LONG_BINGET"),
        (lambda machine, slot: machine.stack.append(machine.fetch(_unsigned(slot))), 0),
    ),
}


class TruncatedError(Exception):
    """The file ends in the middle of the pickle."""


class Window:
    """A sliding part of a pickle: `buffer[at:]` is what comes next.

    digest   is given every byte that is read, in order
    """

    def __init__(
        self,
        stream: IO[bytes],
        digest: Callable[[bytes], None] = lambda _data: None,
    ) -> None:
        self.buffer = b""
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
        more = self._stream.read(max(size, _BLOCK_BYTES))
        self._digest(more)
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

# Where the environment and its actions have lived: gym-minigrid, its last versions, minigrid.
_ENVIRONMENTS = (
    *("gym_minigrid.minigrid", "gym_minigrid.minigrid_env"),
    *("minigrid.minigrid", "minigrid.minigrid_env"),
)
_ACTION_CLASSES = (
    *((module, "MiniGridEnv.Actions") for module in _ENVIRONMENTS),
    *((module, "Actions") for module in ("minigrid.core.actions", "gym_minigrid.actions")),
)

_NAMES = {
    "builtins": "getattr",
    "__builtin__": "getattr",
    **dict.fromkeys(_ENVIRONMENTS, "MiniGridEnv"),
    "_codecs": "encode",
    "numpy": "dtype ndarray",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct scalar"),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer"),
}

ALLOWED: dict[tuple[str, str], Named | int] = {
    **{(module, name): Named(name) for module, names in _NAMES.items() for name in names.split()},
    **dict.fromkeys(_ACTION_CLASSES, Named("Actions")),
    **{
        (module, f"{name}.{action}"): number
        for module, name in _ACTION_CLASSES
        for number, action in enumerate(ACTIONS)
    },
}
"""Every name that may stand in a demo file, and its stand-in; an action is its number."""

ARRAY_NAMES: frozenset[Named | int] = frozenset(
    map(Named, ("encode", "dtype", "ndarray", "_reconstruct", "_frombuffer"))
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
    # 3.13 says where in pathlib they are made
    **dict.fromkeys(
        ("pathlib", "pathlib._local"),
        "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    ),
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
            return Named("Actions")
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
