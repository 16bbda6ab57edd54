"""Detectron2's tensors as a `.caffemodel`: the inverse of what `weights.from_caffe` reads, in the protobuf wire format."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
PREDICTOR, RPN = "roi_heads.box_predictor.", "proposal_generator.rpn_head."
BRANCHES = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}
DIVISOR = 0.5


def varint(value: int) -> bytes:
    out = b""
    while True:
        value, low = value >> 7, value & 0x7F
        out += bytes([low | (0x80 if value else 0)])
        if not value:
            return out


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(array: Array, *, legacy: bool = False, double: bool = False) -> bytes:
    """A BlobProto; the legacy one has four sizes instead of a shape."""
    if legacy:
        sizes = (1,) * (4 - array.ndim) + array.shape
        shape = b"".join(varint(number << 3) + varint(size) for number, size in enumerate(sizes, start=1))
    else:
        shape = field(7, field(1, b"".join(varint(size) for size in array.shape)))
    return shape + (field(8, array.astype("<f8").tobytes()) if double else field(5, array.astype("<f4").tobytes()))


def layer(name: str, arrays: Sequence[Array], *, old: bool = False, double: bool = False) -> bytes:
    """One layer of a NetParameter, in the new format or the one before it."""
    if old:
        return field(2, field(4, name.encode()) + b"".join(field(6, blob(array, legacy=True, double=double)) for array in arrays))
    kind = field(2, b"Convolution")
    return field(100, field(1, name.encode()) + kind + b"".join(field(7, blob(array, double=double)) for array in arrays))


def caffe_convolution(name: str) -> str:
    """`backbone.res4.11.conv2` is `res4b11_branch2b`; stages 2 and 5 letter their blocks, stages 3 and 4 number them from the second."""
    if name == "backbone.stem.conv1":
        return "conv1"
    stage, block, branch = name.split(".")[1:]
    place = "abc"[int(block)] if stage in ("res2", "res5") else ("a" if block == "0" else f"b{block}")
    return f"{stage}{place}_branch{BRANCHES[branch]}"


def background_first(array: Array) -> Array:
    return np.concatenate([array[-1:], array[:-1]])


def caffe_layers(state: Mapping[str, Array]) -> dict[str, list[Array]]:
    """Layers and their blobs as Bottom-Up-Attention's training left them."""
    layers: dict[str, list[Array]] = {"data": []}
    for name in state:
        if not name.endswith(".norm.weight"):
            continue
        convolution = name.removesuffix(".norm.weight")
        caffe = caffe_convolution(convolution)
        layers[caffe] = [state[f"{convolution}.weight"]]
        tag = "_conv1" if caffe == "conv1" else caffe.removeprefix("res")
        statistics = [state[f"{convolution}.norm.{kind}"] * np.float32(DIVISOR) for kind in ("running_mean", "running_var")]
        layers[f"bn{tag}"] = [*statistics, np.array([DIVISOR], dtype=np.float32)]
        layers[f"scale{tag}"] = [state[f"{convolution}.norm.weight"], state[f"{convolution}.norm.bias"]]

    def both(name: str) -> list[Array]:
        return [state[f"{name}.weight"], state[f"{name}.bias"]]

    layers["rpn_conv/3x3"] = both(RPN + "conv")
    # Two scores an anchor whose difference is the logit.
    layers["rpn_cls_score"] = [np.concatenate([-array / 2, array / 2]).astype(np.float32) for array in both(RPN + "objectness_logits")]
    layers["rpn_bbox_pred"] = both(RPN + "anchor_deltas")
    for head in ("cls_score", "attr_score"):
        layers[head] = [background_first(array) for array in both(PREDICTOR + head)]
    layers["cls_embedding"] = [background_first(state[PREDICTOR + "cls_embedding.weight"])]
    layers["fc_attr"] = both(PREDICTOR + "fc_attr")
    boxes = []
    for array in both(PREDICTOR + "bbox_pred"):
        weights = np.tile(np.array([10, 10, 5, 5], dtype=np.float32), len(array) // 4).reshape(-1, *[1] * (array.ndim - 1))
        boxes.append(np.concatenate([np.zeros_like(array[:4]), array / weights]).astype(np.float32))
    layers["bbox_pred"] = boxes
    layers["fc_rel"] = [np.ones((4, 3), dtype=np.float32)]
    layers["heatmap_conv"] = [np.ones((2, 2, 1, 1), dtype=np.float32)]
    return layers


def caffemodel_of(state: Mapping[str, Array], *, old: bool = False, double: bool = False) -> bytes:
    """A whole file: a name, then every layer."""
    name = field(1, b"ResNet-101-butd")
    return name + b"".join(layer(title, arrays, old=old, double=double) for title, arrays in caffe_layers(state).items())
