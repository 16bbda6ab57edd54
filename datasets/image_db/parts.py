"""Databases that one command makes together, in a folder that reads as one: whether they fit together at this moment.

FOLDER/.parts.json    while they are not all there yet, or while new ones take the places of old ones
"""

from pathlib import Path
from typing import Final

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object

PARTS: Final = ".parts.json"
MAKING, SWAPPING = "making", "swapping"

_WORDS: Final = {
    MAKING: "is unfinished: not all of its databases are there yet",
    SWAPPING: "holds new databases beside old ones, which do not fit together",
}


def parts_under_way(folder: Path) -> str | None:
    """What happens there: MAKING, SWAPPING, or None: the databases are as they should be."""
    if not (folder / PARTS).is_file():
        return None
    return SWAPPING if SWAPPING in read_json_object(folder / PARTS) else MAKING


def misfit_in_words(folder: Path, state: str) -> str:
    """What is said of a folder in such a state."""
    return f"{folder} {_WORDS[state]}; the `uniter-db split` that was stopped there finishes it, when it is run again"


def refuse_misfits(folder: Path, *, allow_partial: bool = False) -> None:
    """BadInput where the databases of a folder do not fit together; with `allow_partial` some may be missing."""
    state = parts_under_way(folder)
    if state == SWAPPING or (state is not None and not allow_partial):
        raise BadInput(misfit_in_words(folder, state))
