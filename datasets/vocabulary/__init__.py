"""The vocabularies on board: BERT's word pieces and the detector's class and attribute names.

Class names are counted from 0 without the background; column k + 1 of `soft_labels` is class k.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.streams import lines_of


def bert_base_cased_path() -> Path:
    """The `bert-base-cased` vocabulary file (Google, Apache-2.0), 28,996 lines."""
    return Path(str(files(__name__) / "bert-base-cased-vocab.txt"))


@cache
def visual_genome_objects() -> tuple[str, ...]:
    """The 1,600 class names of Bottom-Up-Attention; the first of each line's aliases is the name."""
    return _first_aliases("visual_genome_objects.txt")


@cache
def visual_genome_attributes() -> tuple[str, ...]:
    """The 400 attribute names of Bottom-Up-Attention."""
    return _first_aliases("visual_genome_attributes.txt")


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in somebody's list of classes: one a line in the order of their numbers, from 0 and without a background; of the aliases of
    a line, with commas between, the first is the name, as in Bottom-Up-Attention's `objects_vocab.txt`.

    Raises:
        BadInput: there is none, or a line between others is empty, after which every number would name another class.
    """
    lines = list(lines_of(path))
    while lines and not lines[-1].strip():
        lines.pop()
    names = tuple(line.split(",")[0].strip() for line in lines)
    if not names or not all(names):
        what = f"line {names.index('') + 1:,} is empty" if names else "it is empty"
        raise BadInput(f"{path} is no list of class names: {what}; expected one name a line, in the order of their numbers")
    if names[0].startswith(("{", "[")):
        raise BadInput(f"{path} is no list of class names but JSON; expected one name a line, in the order of their numbers")
    return names


def _first_aliases(name: str) -> tuple[str, ...]:
    lines = (files(__name__) / name).read_text(encoding="utf-8").splitlines()
    return tuple(line.split(",")[0].strip() for line in lines if line.strip())
