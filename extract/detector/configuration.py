"""A Detectron2 configuration from a YAML that may come from anywhere: read, merged, and refused in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from uniter.datasets.errors import BadInput

ROI_HEADS = ("Res5ROIHeads", "StandardROIHeads", "UniterDilatedRes5ROIHeads", "UniterSecondLookROIHeads")


PROPOSAL_GENERATORS = ("RPN", "UniterCaffeRPN")


LARGEST_CONFIG, LARGEST_VALUES = 1 << 20, 100_000


def read_config(path: Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A Detectron2 YAML and what it is based on (`_BASE_`), as plain values; nothing in it can construct an object.

    Raises:
        BadInput: the file is missing, too large, no mapping, based on itself, or uses YAML beyond plain values.
    """
    path = path.resolve()
    if path in above or len(above) > 16:
        raise BadInput(f"{path}: is based on itself; check its _BASE_")
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise BadInput(f"{path}: {path.stat().st_size:,} bytes; a Detectron2 configuration is far smaller")
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: no readable Detectron2 YAML of plain values ({reason[:300]})") from error
    if _values_in(values, LARGEST_VALUES) >= LARGEST_VALUES:
        raise BadInput(f"{path}: more than {LARGEST_VALUES:,} values once its aliases are written out; a configuration has a few hundred")
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a {type(values).__name__} where a mapping of Detectron2 settings was expected")
    base = values.pop("_BASE_", None)
    if base is None:
        return values
    if not isinstance(base, str) or "://" in base:
        raise BadInput(f"{path}: _BASE_ {base!r}; expected the path of one YAML file")
    return _merged(read_config(path.parent / Path(base).expanduser(), above=(*above, path)), values)


def _values_in(value: Any, most: int) -> int:
    """How many values there are, shared ones counted each time they are met (aliases nested in aliases grow without bound)."""
    count, left = 0, [value]
    while left and count < most:
        current = left.pop()
        count += 1
        if isinstance(current, dict):
            left += current.values()
        elif isinstance(current, list):
            left += current
    return count


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in values.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def merged_config(values: Mapping[str, Any], *, path: Path) -> CfgNode:
    """Plain values over Detectron2's defaults, checked to be a detector that regions can be taken from."""
    config = get_cfg()
    try:
        config.merge_from_other_cfg(CfgNode(dict(values)))
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: not a configuration of this Detectron2 ({error})") from error
    return checked_config(config, path=path)


def checked_config(config: CfgNode, *, path: Path | str) -> CfgNode:
    """The configuration itself, of a detector that regions can be taken from, with what else it may hold (masks ...) switched off.

    Raises:
        BadInput: regions cannot be taken from it; `path` says where it comes from.
    """
    model = config.MODEL
    for what, got, known in (
        ("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, ("GeneralizedRCNN",)),
        ("MODEL.PROPOSAL_GENERATOR.NAME", model.PROPOSAL_GENERATOR.NAME, PROPOSAL_GENERATORS),
        ("MODEL.ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS),
    ):
        if got not in known:
            raise BadInput(f"{path}: {what} is {got!r}; regions can be taken from a Faster R-CNN, which has {' or '.join(known)} there")
    if model.ROI_BOX_HEAD.get("USE_SIGMOID_CE", False):
        raise BadInput(f"{path}: MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE; regions need a detector with a soft-max over classes")
    model.MASK_ON = model.KEYPOINT_ON = model.LOAD_PROPOSALS = False
    return config
