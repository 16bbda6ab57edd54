"""VinVL's published names (`maskrcnn_benchmark`'s) turned into Detectron2's.

Easy to get wrong: background and "no attribute" stand first there; the last stage is shared by the box and the attribute head, so a file
may name it twice, or under either name.

Source: microsoft/scene_graph_benchmark (`maskrcnn_benchmark/modeling`, `scene_graph_benchmark/attribute_head`).
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from uniter.datasets.errors import BadInput
from uniter.extract.weights.files import Tensors

STEM = "backbone.body.stem.conv1.weight"


SHARED_STAGE = ("roi_heads.box.feature_extractor.head.layer4.", "attribute.feature_extractor.head.layer4.")


HEADS = {
    "rpn.anchor_generator.cell_anchors.0": "proposal_generator.anchor_generator.cell_anchors.0",
    "rpn.head.conv": "proposal_generator.rpn_head.conv",
    "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box.predictor.cls_score": "roi_heads.box_predictor.cls_score",
    "roi_heads.box.predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
    "attribute.predictor.cls_embedding": "roi_heads.box_predictor.cls_embedding",
    "attribute.predictor.fc_attr": "roi_heads.box_predictor.fc_attr",
    "attribute.predictor.attr_score": "roi_heads.box_predictor.attr_score",
}


FIRST_ROW_LAST = ("cls_score", "cls_embedding", "attr_score")


def is_vinvl(tensors: Tensors) -> bool:
    """Whether the names are VinVL's."""
    return STEM in tensors


def from_vinvl(tensors: Tensors, *, path: Path | str) -> Tensors:
    """VinVL's tensors under Detectron2's names, background last. Names that are none of VinVL's stay as they are.

    Raises:
        BadInput: the two names of the shared stage hold different values, or a variance is not above 0 (nothing is added to it here).
    """
    box, attribute = SHARED_STAGE
    plain = dict(tensors)
    for name in [name for name in tensors if name.startswith(attribute)]:
        twin = box + name.removeprefix(attribute)
        second = plain.pop(name)
        if twin in plain and not torch.equal(plain[twin], second):
            raise BadInput(
                f"{path}: {twin} and {name} are one layer of the network, but hold different values; export the file again, with a model "
                f"whose attribute head shares the box head's last stage"
            )
        plain[twin] = second
    converted = {}
    for name, tensor in plain.items():
        if name.endswith(".running_var") and not bool((tensor > 0).all()):
            raise BadInput(f"{path}: {name} holds a variance that is not above 0, which this detector divides by; is the file damaged?")
        converted[_renamed(name)] = _reordered(name, tensor)
    return converted


def _renamed(name: str) -> str:
    if name in HEADS:
        return HEADS[name]
    layer, _, kind = name.rpartition(".")
    if layer in HEADS:
        return f"{HEADS[layer]}.{kind}"
    if name.startswith(SHARED_STAGE[0]):
        return f"roi_heads.res5.{_in_block(name.removeprefix(SHARED_STAGE[0]))}"
    if name.startswith("backbone.body.stem."):
        return f"backbone.stem.{_in_block(name.removeprefix('backbone.body.stem.'))}"
    if match := re.fullmatch(r"backbone\.body\.layer([123])\.(.+)", name):
        return f"backbone.res{int(match[1]) + 1}.{_in_block(match[2])}"
    return name


def _in_block(name: str) -> str:
    """`0.bn2.bias` to `0.conv2.norm.bias`, `0.downsample.1.bias` to `0.shortcut.norm.bias`."""
    name = re.sub(r"\bbn([123])\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def _reordered(name: str, tensor: Tensor) -> Tensor:
    head = name.rpartition(".")[0].rpartition(".")[2]
    if head in FIRST_ROW_LAST:
        return torch.cat([tensor[1:], tensor[:1]])
    return tensor[4:] if name.startswith("roi_heads.box.predictor.bbox_pred.") else tensor
