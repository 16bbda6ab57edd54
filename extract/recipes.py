"""What a detector's name stands for: its Detectron2 configuration, preparation, names, and where its weights are known to be.

Detectron2's own `merge_from_file` lets YAML construct arbitrary Python objects; configurations come through `yaml.safe_load` here.

Imports Detectron2: load this module only where a detector is built.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from uniter.datasets.errors import BadInput, UniterError, unknown_name
from uniter.datasets.vocabulary import visual_genome_attributes, visual_genome_objects
from uniter.extract.butd import butd_config
from uniter.extract.preparation import CaffePreparation, Preparation, ShortestEdgePreparation
from uniter.extract.weight_files import sha256_of
from uniter.extract.weights import is_url

ROI_HEADS = ("Res5ROIHeads", "StandardROIHeads", "UniterDilatedRes5ROIHeads")
PROPOSAL_GENERATORS = ("RPN", "UniterCaffeRPN")
LARGEST_CONFIG, LARGEST_VALUES = 1 << 20, 100_000

# Bottom-Up-Attention's weights, in the order in which they are tried: the original files, then ports of the same weights.
UNC = "http://nlp.cs.unc.edu/models"
BUTD_SOURCES = (
    "https://storage.googleapis.com/up-down-attention/resnet101_faster_rcnn_final.caffemodel",
    "https://www.dropbox.com/s/5xethd2nxa8qrnq/resnet101_faster_rcnn_final.caffemodel?dl=1",
    f"{UNC}/faster_rcnn_from_caffe_attr_original.pkl",
)
BUTD_36_SOURCES = (
    "https://storage.googleapis.com/bottom-up-attention/resnet101_faster_rcnn_final_iter_320000.caffemodel",
    "https://www.dropbox.com/s/2h4hmgcvpaewizu/resnet101_faster_rcnn_final_iter_320000.caffemodel?dl=1",
    f"{UNC}/faster_rcnn_from_caffe_attr.pkl",
    "unc-nlp/frcnn-vg-finetuned",
)


@dataclass(frozen=True)
class Recipe:
    """Everything about a detector but its weights' values.

    Attributes:
        name: as it goes into a database's settings.
        config: Detectron2's.
        preparation: from an upright image to the network's input.
        class_names, attribute_names: without background and "no attribute".
        weights: a file that belongs to the detector; None where it has to be fetched.
        known_sources: tried in order where `weights` is None and the user names none.
        caffe_anchors: Bottom-Up-Attention's anchors stand in where the weight file has none.
        min_boxes, max_boxes: how many regions its users keep.
        facts: further settings, such as the configuration's SHA-256.
    """

    name: str
    config: CfgNode
    preparation: Preparation
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...] = ()
    weights: str | None = None
    known_sources: tuple[str, ...] = ()
    caffe_anchors: bool = False
    min_boxes: int = 10
    max_boxes: int = 100
    facts: dict[str, Any] = field(default_factory=dict)


def find_recipe(name: str) -> Recipe:
    """The recipe of `butd`, `butd-36`, a model-zoo name, a YAML file, or a folder made by `uniter-train detector`.

    Raises:
        BadInput: the configuration or folder cannot be used.
        UniterError: the name is unknown.
    """
    if name in ("butd", "butd-36"):
        return _butd(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _trained(path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _from_yaml(path, path.stem)
    return _from_zoo(name)


def _butd(name: str) -> Recipe:
    fixed = name == "butd-36"
    return Recipe(
        name=name,
        config=butd_config(),
        preparation=CaffePreparation(),
        class_names=visual_genome_objects(),
        attribute_names=visual_genome_attributes(),
        known_sources=BUTD_36_SOURCES if fixed else BUTD_SOURCES,
        caffe_anchors=True,
        min_boxes=36 if fixed else 10,
        max_boxes=36 if fixed else 100,
    )


def _from_zoo(name: str) -> Recipe:
    short = name.removesuffix(".yaml")
    try:
        path = Path(model_zoo.get_config_file(f"{short}.yaml"))
    except RuntimeError:
        raise UniterError(unknown_name("detector", name, ["butd", "butd-36", *_zoo_names()])) from None
    recipe = _from_yaml(path, short)
    try:
        weights = str(model_zoo.get_checkpoint_url(f"{short}.yaml"))
    except RuntimeError:
        return recipe
    return Recipe(**{**vars(recipe), "known_sources": (weights,)})


def _zoo_names() -> list[str]:
    folder = Path(model_zoo.__file__).parent / "configs"
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if re.search(r"(^|/)faster_rcnn", name))


def _from_yaml(path: Path, name: str) -> Recipe:
    values = read_config(path)
    config = merged_config(values, path=path)
    weights = str(config.MODEL.WEIGHTS)
    return Recipe(
        name=name,
        config=config,
        preparation=_preparation(config, path),
        class_names=_class_names(config),
        weights=_beside(path, weights),
        # A backbone trained on ImageNet, from which training would begin, is no detector.
        known_sources=(weights,) if is_url(weights) and "ImageNetPretrained" not in weights else (),
        facts={"config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()},
    )


def _trained(folder: Path) -> Recipe:
    described = folder / "detector.json"
    try:
        content = json.loads(described.read_text(encoding="utf-8"))
        config, weights, classes = content["config"], content["weights"], content["class_names"]
        attributes = content.get("attribute_names") or []
        if content["format"] != 1 or not all(isinstance(entry, str) for entry in (config, weights, *classes, *attributes)):
            raise ValueError(f"format {content['format']!r}")
    except FileNotFoundError:
        raise BadInput(f"{folder}: no detector.json in this folder; expected one that `uniter-train detector` made and finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{described}: cannot be used ({error!r}); expected format 1 with config, weights and class_names") from error
    for entry in (config, weights):
        if Path(entry).is_absolute() or ".." in Path(entry).parts:
            raise BadInput(f"{described}: names {entry!r}, which lies outside its folder")
    recipe = _from_yaml(folder / config, folder.resolve().name)
    expected = content.get("sha256")
    if expected is not None and (not (folder / weights).is_file() or sha256_of(folder / weights) != expected):
        raise BadInput(
            f"{folder / weights}: not the weights that detector.json was written for; was the folder copied in part? Copy it again"
        )
    if len(classes) != len(recipe.class_names):
        raise BadInput(f"{described}: {len(classes)} class names, but {config} is for {len(recipe.class_names)} classes")
    return Recipe(
        **{
            **vars(recipe),
            "class_names": tuple(classes),
            "attribute_names": tuple(attributes),
            "weights": str(folder / weights),
        }
    )


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


def _preparation(config: CfgNode, path: Path) -> Preparation:
    if config.MODEL.BACKBONE.NAME == "uniter_caffe_resnet":
        blue, green, red = config.MODEL.PIXEL_MEAN
        return CaffePreparation(config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST, (blue, green, red))
    if config.INPUT.FORMAT not in ("BGR", "RGB"):
        raise BadInput(f"{path}: INPUT.FORMAT is {config.INPUT.FORMAT!r}; expected BGR or RGB")
    return ShortestEdgePreparation(config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST, config.INPUT.FORMAT)


def _class_names(config: CfgNode) -> tuple[str, ...]:
    """The names that Detectron2 knows for the training set, else numbers."""
    count = int(config.MODEL.ROI_HEADS.NUM_CLASSES)
    for dataset in config.DATASETS.TRAIN:
        names = MetadataCatalog.get(dataset).get("thing_classes", None)
        if names is not None and len(names) == count:
            return tuple(names)
    return tuple(f"class {number}" for number in range(count))


def _beside(path: Path, weights: str) -> str | None:
    """The weights that a YAML names, where they are a file: beside it or, as Detectron2 reads it, from the current folder."""
    candidates = (path.parent / weights, Path(weights)) if weights and not is_url(weights) else ()
    return next((str(candidate) for candidate in candidates if candidate.is_file()), None)
