"""Pickles of plain data (RefCOCO's `refs(unc).p`) read so that nothing in them can run: no name is ever looked up.

A pickle executes code only through the classes and functions that it names. Here every such name is refused, which leaves lists, maps,
strings and numbers.
"""

import pickle
from pathlib import Path
from typing import Any, NoReturn

from uniter.datasets.errors import BadInput


class _Plain(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and nothing in a file may run code")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside of it")


def load_plain_pickle(path: Path) -> Any:
    """The lists, maps, strings and numbers of a pickle, Python 2's as well.

    Raises:
        BadInput: it is no pickle, cut off, or names anything that could run.
    """
    try:
        with open(path, "rb") as file:
            return _Plain(file, encoding="latin1").load()
    except FileNotFoundError:
        raise BadInput(f"{path} is not there") from None
    except Exception as error:  # a hostile pickle can raise nearly anything from the unpickler
        raise BadInput(f"{path} is no pickle of plain lists and maps ({error or type(error).__name__})") from None
