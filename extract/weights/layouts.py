"""The layouts in which the weights of Bottom-Up-Attention and VinVL went around, turned into Detectron2's names."""

import re
from pathlib import Path

import torch
from torch import Tensor

from uniter.datasets.errors import BadInput
from uniter.extract.weights.files import Tensors
from uniter.extract.weights.vinvl import from_vinvl, is_vinvl

BOX_PREDICTOR, RPN_HEAD = "roi_heads.box_predictor.", "proposal_generator.rpn_head."


ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"


BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def to_detectron2(found: Tensors, *, path: Path | str = "weights") -> tuple[Tensors, str]:
    """Any published layout to Detectron2's, all values in float32.

    Returns:
        The tensors and the layout they had: "detectron2", "huggingface", "milvlg", "vinvl" or "caffe".

    Raises:
        BadInput: MILVLG's pre-activation ResNet-152, a value that is not finite, or see `from_vinvl`.
    """
    names = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    counters = [name for name in names if name.endswith(".num_batches_tracked")]
    plain = {name: tensor.to(torch.float32) for name, tensor in names.items() if name not in counters}
    objectness = plain.get(RPN_HEAD + "objectness_logits.weight")
    deltas = plain.get(RPN_HEAD + "anchor_deltas.weight")
    if "conv1[0]" in plain or any(name.startswith("res2a_branch") for name in plain):
        converted, layout = from_caffe(plain), "caffe"
    elif is_vinvl(plain):
        converted, layout = from_vinvl(plain, path=path), "vinvl"
    elif BOX_PREDICTOR + "attr_linear1.weight" in plain or (
        objectness is not None and deltas is not None and 2 * objectness.shape[0] == deltas.shape[0]
    ):
        converted, layout = from_milvlg(plain), "milvlg"
    else:
        converted, layout = plain, "huggingface" if counters else "detectron2"
    if layout == "milvlg" and "backbone.stem.conv1.weight" not in converted:
        raise BadInput(f"{path}: MILVLG's pre-activation ResNet-152 is of another architecture; use its r101 files")
    for name, tensor in converted.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(f"{path}: {name} holds values that are not finite; is the file damaged?")
    return {name: tensor.contiguous() for name, tensor in converted.items()}, layout


def from_milvlg(tensors: Tensors) -> Tensors:
    """MILVLG's caffe-mode layout to Detectron2's: background first, soft-max RPN, box deltas of weight 1."""
    renamed = {"attr_linear1": "fc_attr", "attr_linear2": "attr_score", "cls_embed": "cls_embedding"}
    converted = {}
    for name, tensor in tensors.items():
        head, _, kind = name.removeprefix(BOX_PREDICTOR).rpartition(".")
        if name.startswith(BOX_PREDICTOR):
            converted[f"{BOX_PREDICTOR}{renamed.get(head, head)}.{kind}"] = _predictor_rows(renamed.get(head, head), tensor)
        elif name.startswith(RPN_HEAD + "objectness_logits."):
            converted[name] = _foreground_minus_background(tensor)
        else:
            converted[name] = tensor
    return converted


# A bottleneck's convolutions: Detectron2's name by Caffe's branch.
CAFFE_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}


CAFFE_HEADS = {
    "rpn_conv/3x3": RPN_HEAD + "conv",
    "rpn_cls_score": RPN_HEAD + "objectness_logits",
    "rpn_bbox_pred": RPN_HEAD + "anchor_deltas",
    **{name: BOX_PREDICTOR + name for name in ("cls_score", "bbox_pred", "cls_embedding", "fc_attr", "attr_score")},
}


def from_caffe(blobs: Tensors) -> Tensors:
    """Bottom-Up-Attention's Caffe blobs, named `layer[k]`, to Detectron2's layout.

    Layers of other heads (`rel_*`, `fc_rel*`, `heatmap_*`) are left out.
    """
    converted: Tensors = {}
    for name, blob in blobs.items():
        layer, at = name[:-3], int(name[-2])
        kind = ("weight", "bias")[at] if at < 2 else ""
        if layer in CAFFE_HEADS and kind:
            tensor = blob
            target = CAFFE_HEADS[layer]
            if target.startswith(BOX_PREDICTOR):
                tensor = tensor.reshape(tensor.shape[-2:] if kind == "weight" else (-1,))  # old files keep matrices with four dimensions
                tensor = _predictor_rows(layer, tensor)
            elif layer == "rpn_cls_score":
                tensor = _foreground_minus_background(tensor if kind == "weight" else tensor.reshape(-1))
            converted[f"{target}.{kind}"] = tensor if kind == "weight" else tensor.reshape(-1)
        elif (convolution := _caffe_convolution(layer)) and at == 0:
            converted[f"{convolution}.weight"] = blob
            tag = layer.removeprefix("res") if layer != "conv1" else "_conv1"
            converted |= _caffe_norm(f"{convolution}.norm", f"bn{tag}", f"scale{tag}", blobs)
    return converted


def _caffe_convolution(layer: str) -> str | None:
    """Detectron2's name of a convolution of Caffe's ResNet: `res4b11_branch2b` is `backbone.res4.11.conv2`."""
    if layer == "conv1":
        return "backbone.stem.conv1"
    match = re.fullmatch(r"res([2-5])([a-z])(\d*)_branch(1|2[abc])", layer)
    if match is None:
        return None
    stage, letter, number, branch = match.groups()
    block = int(number) if number else ord(letter) - ord("a")
    return f"{'roi_heads' if stage == '5' else 'backbone'}.res{stage}.{block}.{CAFFE_BRANCHES[branch]}"


def _caffe_norm(target: str, norm: str, scale: str, blobs: Tensors) -> Tensors:
    """Caffe's BatchNorm (mean, variance, divisor of both) and Scale as one BatchNorm."""
    found = {}
    if f"{norm}[0]" in blobs:
        divisor = float(blobs[f"{norm}[2]"].reshape(-1)[0]) if f"{norm}[2]" in blobs else 1.0
        factor = 0.0 if divisor == 0 else 1.0 / divisor
        found = {"running_mean": blobs[f"{norm}[0]"] * factor, "running_var": blobs[f"{norm}[1]"] * factor}
    if f"{scale}[0]" in blobs:
        found |= {"weight": blobs[f"{scale}[0]"], "bias": blobs[f"{scale}[1]"]}
    return {f"{target}.{kind}": tensor.reshape(-1) for kind, tensor in found.items()}


def _predictor_rows(head: str, tensor: Tensor) -> Tensor:
    """Rows of a box predictor's tensor with the background first to Detectron2's order."""
    if head in ("cls_score", "cls_embedding", "attr_score"):
        return torch.cat([tensor[1:], tensor[:1]])
    if head == "bbox_pred":
        kept = tensor[4:]
        weights = torch.tensor(BOX_WEIGHTS).repeat(len(kept) // 4)
        return kept * weights.reshape(-1, *[1] * (kept.ndim - 1))
    return tensor


def _foreground_minus_background(tensor: Tensor) -> Tensor:
    """The RPN's two scores an anchor (all backgrounds, then all foregrounds) as one logit."""
    half = len(tensor) // 2
    return tensor[half:] - tensor[:half]
