"""Hostile pickles: each tries to run, import or allocate something. None may be run by a test
through `pickle`; they are only ever given to our own reader."""

from __future__ import annotations

import pickle
import struct

from numcodecs import blosc


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def demo(images: bytes, actions: bytes = b"K\x02") -> bytes:
    """A file of one episode of one step with these opcodes for its images and its action."""
    return (
        b"\x80\x03](" + b"(" + text("go to the red ball") + images + b"]K\x00a]" + actions + b"ate."
    )


def framed(inner: bytes) -> bytes:
    """Opcodes that push a blosc frame which holds the inner pickle."""
    frame: bytes = blosc.compress(inner, b"blosclz", 9, blosc.SHUFFLE)
    return b"B" + struct.pack("<I", len(frame)) + frame


def header(holds: int, size: int) -> bytes:
    """Opcodes that push a blosc frame which announces these sizes."""
    frame = b"\x02\x01\x01\x01" + struct.pack("<III", holds, holds, size) + bytes(8)
    return b"B" + struct.pack("<I", len(frame)) + frame


SYSTEM = called(named("os", "system"), text("touch hostile"))
GETATTR = named("builtins", "getattr")
ENVIRONMENT = named("gym_minigrid.minigrid", "MiniGridEnv")
ACTIONS = called(GETATTR, ENVIRONMENT, text("Actions"))
NDARRAY = called(
    named("numpy.core.multiarray", "_reconstruct"),
    named("numpy", "ndarray"),
    b"K\x00\x85",
    b"C\x01b",
)
FRAME = framed(b"\x80\x04N.")

# name: (file, a word of the refusal)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (b"\x80\x03" + SYSTEM + b".", "names os.system"),
    "posix.system": (b"\x80\x03" + called(named("posix", "system"), text("ls")) + b".", "posix"),
    "subprocess": (b"\x80\x03" + called(named("subprocess", "Popen"), text("ls")) + b".", "Popen"),
    "builtins.eval": (b"\x80\x03" + called(named("builtins", "eval"), text("1")) + b".", "eval"),
    "builtins.exec": (b"\x80\x03" + called(named("builtins", "exec"), text("1")) + b".", "exec"),
    "protocol 2 exec": (
        b"\x80\x02" + called(named("__builtin__", "exec"), text("1")) + b".",
        "exec",
    ),
    "builtins.open": (b"\x80\x03" + called(named("builtins", "open"), text("x")) + b".", "open"),
    "importlib": (
        b"\x80\x03" + called(named("importlib", "import_module"), text("antigravity")) + b".",
        "import_module",
    ),
    "numpy.load": (b"\x80\x03" + called(named("numpy", "load"), text("x")) + b".", "numpy.load"),
    "computed name": (
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text("ls") + b"\x85R.",
        "names os.system",
    ),
    "name out of the memo": (
        b"\x80\x04"
        + text("os")
        + b"\x94"
        + text("system")
        + b"\x94h\x00h\x01\x93"
        + text("ls")
        + b"\x85R.",
        "names os.system",
    ),
    "name that is no text": (b"\x80\x04K\x01K\x02\x93.", "not text"),
    "dotted name": (
        b"\x80\x04" + text("gym_minigrid.minigrid") + text("MiniGridEnv.Actions.mro") + b"\x93.",
        "MiniGridEnv.Actions.mro",
    ),
    "dotted path to os": (
        b"\x80\x04" + text("numpy") + text("os.system") + b"\x93.",
        "numpy.os.system",
    ),
    "nested getattr": (
        demo(FRAME, called(called(GETATTR, ACTIONS, text("__class__")), b"K\x00")),
        "calls getattr(Actions, '__class__')",
    ),
    "getattr of getattr": (
        demo(FRAME, called(GETATTR, GETATTR, text("__self__"))),
        "calls getattr(getattr, '__self__')",
    ),
    "getattr of another attribute": (
        demo(FRAME, called(GETATTR, ENVIRONMENT, text("__init__"))),
        "calls getattr(MiniGridEnv, '__init__')",
    ),
    "getattr of text": (demo(FRAME, called(GETATTR, text("x"), text("format"))), "getattr('x'"),
    "call of an action": (demo(FRAME, called(ACTIONS, b"K\x07")), "calls Actions(7)"),
    "the environment made": (demo(FRAME, called(ENVIRONMENT)), "calls MiniGridEnv()"),
    "call of a call": (demo(FRAME, ACTIONS + b"K\x01\x85RK\x01\x85R"), "not a name"),
    "reduce bomb": (
        b"\x80\x03"
        + called(
            named("builtins", "list"), called(named("builtins", "range"), b"J\xff\xff\xff\x7f")
        )
        + b".",
        "builtins.list",
    ),
    "bytearray bomb": (
        b"\x80\x03" + called(named("builtins", "bytearray"), b"J\xff\xff\xff\x7f") + b".",
        "bytearray",
    ),
    "setstate of an environment": (
        demo(FRAME, ENVIRONMENT + b"}" + text("a") + b"K\x01sb"),
        "state",
    ),
    "setstate of an array": (demo(FRAME, NDARRAY + b"}b"), "sets the state"),
    "NEWOBJ": (b"\x80\x02" + ENVIRONMENT + b")\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (b"\x80\x04" + ENVIRONMENT + b")}\x92.", "opcode NEWOBJ_EX"),
    "INST": (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
    "OBJ": (b"\x80\x02(" + ENVIRONMENT + b"o.", "opcode OBJ"),
    "extension code": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "long extension code": (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "persistent id": (b"\x80\x02Pdevice\n.", "opcode PERSID"),
    "binary persistent id": (b"\x80\x02K\x01Q.", "opcode BINPERSID"),
    "buffer from outside": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "set": (b"\x80\x04\x8f.", "opcode EMPTY_SET"),
    "memo bomb": (b"\x80\x03]r\xff\xff\xff\x07.", "memo slot 134217727"),
    "long byte string": (b"\x80\x04]\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "announces"),
    "long text": (b"\x80\x04]\x8d\xff\xff\xff\xff\xff\x00\x00\x00", "announces"),
    "long number": (b"\x80\x04]\x8b\xff\xff\xff\x7f", "opcode LONG4"),
    "billion laughs": (
        b"\x80\x04]("
        + text("ha" * 1000)
        + b"\x94"
        + b"".join(b"(" + b"h%c" % (n + 0) * 200 + b"t\x94" for n in range(9))
        + b"e.",
        "it is a str",
    ),
    "deep nesting": (b"\x80\x04" + b"(" * 100_000, "nests deeper"),
    "endless stack": (b"\x80\x04" + b"N" * 200_000, "wait on its stack"),
    "a list in itself": (b"\x80\x04]\x94(h\x00e.", "its steps are not"),
    "frame that announces gigabytes": (demo(header(1 << 31, 24)), "announces"),
    "frame that announces another length": (demo(header(1000, 1 << 20)), "another length"),
    "os.system inside a frame": (demo(framed(b"\x80\x04" + SYSTEM + b".")), "names os.system"),
    "getattr inside a frame": (demo(framed(b"\x80\x04" + ACTIONS + b".")), "getattr"),
    "numpy object array": (
        demo(
            framed(
                b"\x80\x04" + called(named("numpy", "dtype"), text("O8"), b"\x89", b"\x88") + b"."
            )
        ),
        "calls dtype('O8'",
    ),
    "memo bomb inside a frame": (demo(framed(b"\x80\x04Nr\xff\xff\xff\xff.")), "memo slot"),
    "array that is too large": (
        demo(framed(pickle.dumps(b"")[:-1] + b".")),
        "its images are",
    ),
    "protocol 0": (b"cos\nsystem\n(S'ls'\ntR.", "protocol 2 to 5"),
    "protocol 9": (b"\x80\x09].", "protocol 9"),
}
