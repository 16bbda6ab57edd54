"""The vocabularies on board: BERT's word pieces and the detector's class and attribute names.

Class names are counted from 0 without the background; column k + 1 of `soft_labels` is class k.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path


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


def _first_aliases(name: str) -> tuple[str, ...]:
    lines = (files(__name__) / name).read_text(encoding="utf-8").splitlines()
    return tuple(line.split(",")[0].strip() for line in lines if line.strip())
