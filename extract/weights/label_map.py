"""VinVL's label map: the names of classes and attributes, which are not in its weights.

Numbers begin at 1 in it, since 0 stands for the background and for "no attribute".

Source: microsoft/scene_graph_benchmark (`maskrcnn_benchmark/data/datasets/relation_tsv.py`).
"""

from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object

LABEL_MAP = "VG-SGG-dicts-vgoi6-clipped.json"
"""The name under which it is published; it is found by itself where it lies beside the weights."""


def label_map_beside(weights: str | None) -> Path | None:
    """The label map in the folder of a weight file that is on this machine."""
    beside = Path(weights).expanduser().parent / LABEL_MAP if weights is not None and Path(weights).expanduser().is_file() else None
    return beside if beside is not None and beside.is_file() else None


def read_label_map(path: Path, *, classes: int, attributes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes and of the attributes, each in the order of their numbers, the first being number 1.

    Raises:
        BadInput: the file is no label map, or one of another number of classes or attributes.
    """
    content = read_json_object(path)
    return _names(content, "label_to_idx", classes, path), _names(content, "attribute_to_idx", attributes, path)


def _names(content: dict[str, Any], key: str, count: int, path: Path) -> tuple[str, ...]:
    found = content.get(key)
    if not isinstance(found, dict):
        raise BadInput(f"{path}: no {key} in it; expected a label map such as {LABEL_MAP}, with label_to_idx and attribute_to_idx")
    by_number = {number: name for name, number in found.items() if isinstance(number, int) and not isinstance(number, bool)}
    if len(found) != count or set(by_number) != set(range(1, count + 1)):
        raise BadInput(
            f"{path}: {key} holds {len(found):,} names, with {len(by_number):,} different whole numbers; these weights have {count:,}, "
            f"numbered from 1 to {count:,}. Take the label map that was published with them"
        )
    return tuple(by_number[number] for number in range(1, count + 1))
