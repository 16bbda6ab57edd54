"""Pickles of plain data (RefCOCO's `refs(unc).p`) read so that nothing in them can run: no name is ever looked up.

A pickle executes code only through the classes and functions that it names. Here every such name is refused but the few that NumPy writes
for arrays and numbers, and those are not looked up either: inert stand-ins collect what the file says, and the arrays are made from it
afterwards, of plain numbers only.

What a reader would get wrong: names are not all that a hostile pickle has. Twelve bytes make the C unpickler clear gigabytes for its
memo, a file of lists that each hold the one before twice unfolds to more than any memory, and tuples in tuples as the name of something
end the process when their hash is taken. Hence the unpickler that is written in Python (its memo is a dict; it takes seconds for
RefCOCO's 50,000 refs), a bound on what a file may unfold to, and names that are texts or numbers.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from uniter.datasets.errors import BadInput

MOST_BYTES = 1 << 28


# RefCOCO's unfold to about their size; texts that are written once and referred to again (the names of fields) count each time.
UNFOLDS_TO, AT_LEAST = 8, 1 << 20


_NUMBER_KINDS: Final = frozenset("biuf")


class _Type:
    """What a pickle says of an array's type."""

    def __init__(self, spelling: Any, *_: Any) -> None:
        if not isinstance(spelling, str) or len(spelling) > 16:
            raise pickle.UnpicklingError("it holds an array of unknown type")
        self.type = np.dtype(spelling)
        if self.type.kind not in _NUMBER_KINDS and self.type != np.dtype(object):
            raise pickle.UnpicklingError(f"it holds an array of {self.type}, expected numbers")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.type = self.type.newbyteorder(state[1])


class _Array:
    """What a pickle says of an array; an array of objects is the list of what it holds, one without dimensions what it holds."""

    def __init__(self) -> None:
        self.array = np.zeros(0)
        self.members: list[Any] | None = None
        self.single = False

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, column_order, content = state
        if kind.type == np.dtype(object):
            if not isinstance(content, list) or len(content) != math.prod(shape):
                raise pickle.UnpicklingError("it holds an array of objects without them")
            self.members, self.single = content, shape == ()
            return
        self.array = np.frombuffer(_raw(content), dtype=kind.type).reshape(shape, order="F" if column_order else "C").copy()


def _raw(content: Any) -> bytes:
    if not isinstance(content, str | bytes):
        raise pickle.UnpicklingError(f"it holds an array made of a {type(content).__name__}")
    return content.encode("latin1") if isinstance(content, str) else content


def _number(kind: _Type, content: Any) -> Any:
    if kind.type == np.dtype(object):
        raise pickle.UnpicklingError("it holds a number that is an object")
    return np.frombuffer(_raw(content), dtype=kind.type, count=1)[0].item()


def _bytes_of_text(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes for readers of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("it encodes something else than text")
    return text.encode("latin1")


def _no_bytes(*words: Any) -> bytes:
    """How protocols before 3 write bytes of which there are none."""
    if words:
        raise pickle.UnpicklingError("it makes bytes of something else than nothing")
    return b""


def _set(members: Any) -> set[Any]:
    """How protocols before 4 write sets."""
    if not isinstance(members, list | tuple):
        raise pickle.UnpicklingError("it makes a set of something else than a list")
    return set(map(_name, members))


_STAND_INS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _bytes_of_text,
    **{(module, "bytes"): _no_bytes for module in ("builtins", "__builtin__")},
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
}


# The instructions that plain data and arrays are written with. What makes objects by other ways is none of them, nor is BYTEARRAY8, which
# clears as much memory as eleven bytes ask for.
_INSTRUCTIONS: Final = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "APPEND", "APPENDS", "LIST"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "EMPTY_SET", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
)


def _name(value: Any) -> Any:
    """A name within a map, or a member of a set."""
    if value is None or isinstance(value, str | bytes | int | float):
        return value
    raise pickle.UnpicklingError(f"it has a {type(value).__name__} as a name")


class _Plain(pickle._Unpickler):
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    append: Callable[[Any], None]

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and nothing in a file may run code")
        return _STAND_INS[module_name, global_name]

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Type | _Array):
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append(dict(zip(map(_name, items[::2]), items[1::2], strict=True)))

    def _set_items(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(zip(map(_name, items[::2]), items[1::2], strict=True))

    def _set_item(self) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self.stack[-1].update([(_name(name), value)])

    def _add_items(self) -> None:
        members = self.pop_mark()
        self.stack[-1].update(map(_name, members))

    def _frozenset(self) -> None:
        members = self.pop_mark()
        self.append(frozenset(map(_name, members)))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS},
        pickle.BUILD[0]: _build,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _frozenset,
    }


def load_plain_pickle(path: Path) -> Any:
    """The lists, maps, strings, numbers and arrays of numbers of a pickle, Python 2's as well.

    Raises:
        BadInput: it is no pickle, cut off, too large, unfolds to far more than its size, or names anything that could run.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise BadInput(
                f"{path} is {size / 1e6:,.0f} MB, expected a pickle of at most {MOST_BYTES / 1e6:,.0f}; RefCOCO's are some 20 MB"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path} is not there") from None
    return plain_pickle(content, str(path))


def plain_pickle(content: bytes | memoryview, name: str) -> Any:
    """The same of a pickle in memory.

    Args:
        name: what it is, for messages.
    """
    try:
        value, unfolded = _Plainly()(_Plain(io.BytesIO(content), encoding="latin1").load())
    except KeyError as error:  # an instruction that is none of ours, or a reference to nothing
        raise BadInput(f"{name} is no pickle of plain lists and maps (instruction or reference {error})") from None
    except Exception as error:  # a hostile pickle can raise nearly anything from the unpickler
        raise BadInput(f"{name} is no pickle of plain lists and maps ({error or type(error).__name__})") from None
    if unfolded > UNFOLDS_TO * len(content) + AT_LEAST:
        raise BadInput(
            f"{name} is no pickle of plain lists and maps: its {len(content):,} bytes unfold to {unfolded:.3g} values and characters"
        )
    return value


class _Pickler(pickle._Pickler):
    """Names NumPy's functions as NumPy 1 did: every NumPy reads that, while those before 1.26 know nothing of `numpy._core`."""

    write: Callable[[bytes], Any]
    memoize: Callable[[Any], None]

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__module__", None) != "numpy._core.multiarray":
            super().save_global(obj, name)  # type: ignore[misc]
            return
        self.write(pickle.GLOBAL + f"numpy.core.multiarray\n{obj.__name__}\n".encode())
        self.memoize(obj)


def to_plain_pickle(value: Any) -> bytes:
    """A pickle of plain lists, maps, texts, numbers and arrays, for layouts whose own readers take nothing else (protocol 3)."""
    fast = pickle.dumps(value, protocol=3)
    # A name stands once, and is referred to after that; where it comes oftener, it is in somebody's text or array.
    count = fast.count(_NEWER)
    names = [name for name in (b"_reconstruct\n", b"scalar\n")[: 2 if count > 1 else 1] if count and _NEWER + name in fast]
    if count == len(names):
        for name in names:
            fast = fast.replace(_NEWER + name, _OLDER + name, 1)
        return fast
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=3).dump(value)
    return buffer.getvalue()


_OLDER, _NEWER = (pickle.GLOBAL + f"numpy.{core}.multiarray\n".encode() for core in ("core", "_core"))


class _Plainly:
    """Values with arrays in the stand-ins' places, and what each unfolds to: values and characters, every reference followed.

    A list that holds itself ends in a RecursionError, and so does one that is nested too deep.
    """

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, int]] = {}  # what stands twice in a file is looked at once

    def __call__(self, value: Any) -> tuple[Any, int]:
        if value is None or isinstance(value, int | float):
            return value, 1
        if isinstance(value, str | bytes):
            return value, 1 + len(value)
        if isinstance(value, set | frozenset):
            return value, sum(self(member)[1] for member in value)
        if id(value) not in self._done:
            self._done[id(value)] = self._looked_at(value)
        return self._done[id(value)]

    def _looked_at(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, _Array) and value.members is not None:
            inside, size = self(value.members)
            return inside[0] if value.single else inside, size
        if isinstance(value, _Array):
            return value.array, 1 + value.array.nbytes
        if isinstance(value, dict):
            items = {name: self(item) for name, item in value.items()}
            unfolded = sum(self(name)[1] + size for name, (_, size) in items.items())
            return {name: item for name, (item, _) in items.items()}, 1 + unfolded
        if isinstance(value, list | tuple):
            members = [self(member) for member in value]
            return type(value)(member for member, _ in members), 1 + sum(size for _, size in members)
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
