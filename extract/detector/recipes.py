"""What a detector's name stands for: its Detectron2 configuration, preparation, names, and where its weights are known to be.

Detectron2's own `merge_from_file` lets YAML construct arbitrary Python objects; configurations come through `yaml.safe_load` here.

Imports Detectron2: load this module only where a detector is built.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from uniter.datasets.errors import BadInput, UniterError, WrongUsage, unknown_name
from uniter.datasets.storage.files import read_json_object, sha256_of
from uniter.datasets.vocabulary import visual_genome_attributes, visual_genome_objects
from uniter.extract.detector.butd import CAFFE_SCALES, butd_config
from uniter.extract.detector.configuration import merged_config, read_config
from uniter.extract.detector.lite import ON_BOARD_SHORTEST, ON_BOARD_WEIGHTS, lite_config
from uniter.extract.detector.network import RegionNetwork
from uniter.extract.detector.preparation import CaffePreparation, Preparation, ShortestEdgePreparation, VinvlPreparation
from uniter.extract.detector.vinvl import VINVL_ATTRIBUTES, VINVL_SCALES, vinvl_config
from uniter.extract.detector.vinvl_selection import VINVL_MODES, VinvlNetwork
from uniter.extract.weights.label_map import LABEL_MAP, label_map_beside, read_label_map
from uniter.extract.weights.sources import BUTD_36_SOURCES, BUTD_SOURCES, VINVL_SOURCES, is_url

log = logging.getLogger(__name__)

ON_BOARD = "on-board"


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
        caffe_anchors: the scales of Caffe's anchors, which stand in where the weight file has none; none: those of the configuration.
        min_boxes, max_boxes: how many regions its users keep.
        facts: further settings, such as the configuration's SHA-256.
        network: drives the network that Detectron2 builds.
        takes_label_map: its names are in a file of their own, see `with_label_map`.
    """

    name: str
    config: CfgNode
    preparation: Preparation
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...] = ()
    weights: str | None = None
    known_sources: tuple[str, ...] = ()
    caffe_anchors: tuple[int, ...] = ()
    min_boxes: int = 10
    max_boxes: int = 100
    facts: dict[str, Any] = field(default_factory=dict)
    network: Callable[..., RegionNetwork] = RegionNetwork
    takes_label_map: bool = False


def find_recipe(name: str) -> Recipe:
    """The recipe of `butd`, `butd-36`, `vinvl` and its modes, `on-board`, a model-zoo name, a YAML file, or a trained detector's folder.

    Raises:
        BadInput: the configuration or folder cannot be used.
        UniterError: the name is unknown.
    """
    if name in ("butd", "butd-36"):
        return _butd(name)
    if name in VINVL_MODES:
        return vinvl_recipe(name)
    if name == ON_BOARD:
        config = lite_config()
        config.INPUT.MIN_SIZE_TEST = ON_BOARD_SHORTEST
        return Recipe(ON_BOARD, config, _preparation(config, Path(name)), _class_names(config), weights=str(ON_BOARD_WEIGHTS))
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
        caffe_anchors=CAFFE_SCALES,
        min_boxes=36 if fixed else 10,
        max_boxes=36 if fixed else 100,
    )


def vinvl_recipe(name: str = "vinvl", *, config: CfgNode | None = None, attributes: int = VINVL_ATTRIBUTES) -> Recipe:
    """VinVL's X152-C4, in one of `VINVL_MODES`; `config` and `attributes` for narrow variants in tests.

    Its names are in its label map alone, which `with_label_map` reads; here classes and attributes are numbered.
    """
    config = config or vinvl_config()
    mode = VINVL_MODES[name]
    return Recipe(
        name=name,
        config=config,
        preparation=VinvlPreparation(),
        class_names=tuple(f"class {number}" for number in range(1, int(config.MODEL.ROI_HEADS.NUM_CLASSES) + 1)),
        attribute_names=tuple(f"attribute {number}" for number in range(1, attributes + 1)),
        known_sources=VINVL_SOURCES,
        caffe_anchors=VINVL_SCALES,
        facts={"selection_rule": mode.rule},
        network=functools.partial(VinvlNetwork, mode=mode),
        takes_label_map=True,
    )


def with_label_map(recipe: Recipe, label_map: str | None, *, weights: str | None) -> Recipe:
    """The recipe with the names of a label map: the one that the user names, else the one beside the weights; else numbered, which is said.

    Raises:
        BadInput: the label map cannot be used.
        UniterError: the detector takes none, or there is no such file.
    """
    if not recipe.takes_label_map:
        if label_map is not None:
            raise UniterError(f"--label-map {label_map}: detector {recipe.name!r} has its names already; leave it out")
        return recipe
    path = Path(label_map).expanduser() if label_map is not None else label_map_beside(weights)
    if path is None:
        log.warning(
            "detector %r: its classes and attributes are numbered, since their names are in its label map alone; name it with --label-map, "
            "or lay %s beside the weights", recipe.name, LABEL_MAP,
        )  # fmt: skip
        return recipe
    if not path.is_file():
        raise UniterError(f"--label-map {path}: no such file")
    classes, attributes = read_label_map(path, classes=len(recipe.class_names), attributes=len(recipe.attribute_names))
    log.info("names of classes and attributes: from %s", path)
    facts = {**recipe.facts, "label_map_sha256": sha256_of(path)}
    return replace(recipe, class_names=classes, attribute_names=attributes, facts=facts)


def _from_zoo(name: str) -> Recipe:
    short = name.removesuffix(".yaml")
    try:
        path = Path(model_zoo.get_config_file(f"{short}.yaml"))
    except RuntimeError:
        raise WrongUsage(unknown_name("detector", name, known_names())) from None
    recipe = _from_yaml(path, short)
    try:
        weights = str(model_zoo.get_checkpoint_url(f"{short}.yaml"))
    except RuntimeError:
        return recipe
    return Recipe(**{**vars(recipe), "known_sources": (weights,)})


def known_names() -> list[str]:
    """Every name that stands for a detector, Detectron2's model zoo last."""
    return ["butd", "butd-36", *VINVL_MODES, ON_BOARD, *_zoo_names()]


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
    if not described.is_file():
        raise BadInput(f"{folder}: no detector.json in this folder; expected one that `uniter-train detector` made and finished")
    content = read_json_object(described)
    try:
        config, weights, classes = content["config"], content["weights"], content["class_names"]
        attributes = content.get("attribute_names") or []
        if (
            content["format"] != 1
            or not isinstance(classes, list)
            or not all(isinstance(entry, str) for entry in (config, weights, *classes, *attributes))
        ):
            raise ValueError(f"format {content['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
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
