"""Pickles of plain data (RefCOCO's `refs(unc).p`) read so that nothing in them can run: no name is ever looked up.

A pickle executes code only through the classes and functions that it names. Here every such name is refused but the few that NumPy writes
for arrays and numbers, and those are not looked up either: inert stand-ins collect what the file says, and the arrays are made from it
afterwards, of plain numbers only.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from uniter.datasets.errors import BadInput

_NUMBER_KINDS: Final = frozenset("biuf")


class _Type:
    """What a pickle says of an array's type."""

    def __init__(self, spelling: Any, *_: Any) -> None:
        self.type = np.dtype(str(spelling))
        if self.type.kind not in _NUMBER_KINDS:
            raise pickle.UnpicklingError(f"it holds an array of {self.type}, expected numbers")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.type = self.type.newbyteorder(state[1])


class _Array:
    """What a pickle says of an array."""

    def __init__(self) -> None:
        self.array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, column_order, content = state
        raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
        self.array = np.frombuffer(raw, dtype=kind.type).reshape(shape, order="F" if column_order else "C").copy()


def _number(kind: _Type, content: Any) -> Any:
    raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
    return np.frombuffer(raw, dtype=kind.type, count=1)[0].item()


def _bytes_of_text(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes for readers of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("it encodes something else than text")
    return text.encode("latin1")


_STAND_INS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _bytes_of_text,
}


class _Plain(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and nothing in a file may run code")
        return _STAND_INS[module_name, global_name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of it")


def load_plain_pickle(path: Path) -> Any:
    """The lists, maps, strings, numbers and arrays of numbers of a pickle, Python 2's as well.

    Raises:
        BadInput: it is no pickle, cut off, or names anything that could run.
    """
    try:
        with open(path, "rb") as file:
            return _without_stand_ins(_Plain(file, encoding="latin1").load())
    except FileNotFoundError:
        raise BadInput(f"{path} is not there") from None
    except Exception as error:  # a hostile pickle can raise nearly anything from the unpickler
        raise BadInput(f"{path} is no pickle of plain lists and maps ({error or type(error).__name__})") from None


def _without_stand_ins(value: Any) -> Any:
    """The value with arrays in the stand-ins' places; a list that holds itself ends in a RecursionError."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {_without_stand_ins(name): _without_stand_ins(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(_without_stand_ins, value))
    if value is None or isinstance(value, str | bytes | bytearray | int | float | complex):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
