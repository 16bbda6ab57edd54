"""A recipe and weights to a network: builds Detectron2's model, fills in every tensor, sets the anchors.

Imports Detectron2: load this module only where a detector is built.
"""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.modeling import build_model

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.detector.butd import add_attribute_branch, caffe_anchors
from uniter.extract.detector.network import RegionNetwork
from uniter.extract.detector.recipes import Recipe
from uniter.extract.weights.layouts import ANCHORS, BOX_PREDICTOR
from uniter.extract.weights.load import Weights, load_known_weights, load_weights

log = logging.getLogger(__name__)

ATTRIBUTE_LAYERS = ("cls_embedding.", "fc_attr.", "attr_score.")


# Of checkpoints of the same detectors: other heads, and what Detectron2 keeps in the model itself.
NOT_NEEDED = ("roi_heads.mask_head.", "roi_heads.keypoint_head.", "pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")


PIXEL_DEVIATION = 60.0


def assemble(
    recipe: Recipe, weights: str | None, *, device: str, precision: str, attributes: bool
) -> tuple[RegionNetwork, Weights, dict[str, object]]:
    """Build the network of a recipe.

    Args:
        recipe: what to build.
        weights: as the user named them; None takes the recipe's own or its known sources.
        device, precision: see `RegionNetwork`.
        attributes: with the attribute branch.

    Returns:
        The network, the weights, and what is to be said of the anchors in the settings.

    Raises:
        BadInput: the weights do not fit the detector, or know no attributes though they are asked for.
        UniterError: there are no weights.
    """
    spec = weights or recipe.weights
    # Weights that cannot be had are said before seconds go into building; random ones need to know the shapes.
    loaded = None if spec is not None and spec.startswith("random:") else _weights(recipe, spec)
    config = recipe.config.clone()
    config.MODEL.DEVICE, config.MODEL.WEIGHTS = "cpu", ""
    try:
        model = build_model(config)
    except (KeyError, AssertionError, ValueError, RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise BadInput(f"detector {recipe.name!r}: Detectron2 cannot build this configuration ({error})") from error
    if attributes:
        if not recipe.attribute_names:
            raise UniterError(f"detector {recipe.name!r} knows no attributes; leave --attributes out, or use butd")
        predictor = model.roi_heads.box_predictor
        add_attribute_branch(predictor, classes=len(predictor.cls_score.weight) - 1, attributes=len(recipe.attribute_names))
    if loaded is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith(NOT_NEEDED)}
        loaded = load_weights(str(spec), shapes=shapes, input_deviation=PIXEL_DEVIATION / float(model.pixel_std.mean()))
    _fill(model, loaded, recipe)
    anchors = _set_anchors(model, loaded, recipe)
    return recipe.network(model, device=device, precision=precision), loaded, anchors


def _weights(recipe: Recipe, spec: str | None) -> Weights:
    if spec is not None:
        return load_weights(spec, shapes={})
    if not recipe.known_sources:
        raise UniterError(f"detector {recipe.name!r} has no weights of its own; name them with --weights FILE, or try random:1")
    return load_known_weights(recipe.known_sources, detector=recipe.name)


def _fill(model: Any, loaded: Weights, recipe: Recipe) -> None:
    """Copy every tensor of the model from the weights; what is missing, of another shape or left over is an error."""
    # A trained BatchNorm also counts its batches, which no value depends on and `load_weights` leaves out.
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".num_batches_tracked")}
    wanted = {name: tensor for name, tensor in own.items() if not name.startswith(NOT_NEEDED)}
    missing = [name for name in wanted if name not in loaded.tensors]
    if missing and all(name.removeprefix(BOX_PREDICTOR).startswith(ATTRIBUTE_LAYERS) for name in missing):
        raise BadInput(
            f"{loaded.source}: these weights know no attributes ({missing[0]} is missing); leave --attributes out, or take an _attr file"
        )
    if missing:
        raise _unfit(loaded, recipe, f"{_some(missing)} missing")
    for name, tensor in wanted.items():
        if tensor.shape != loaded.tensors[name].shape:
            raise _unfit(loaded, recipe, f"{name} is {tuple(loaded.tensors[name].shape)} where {tuple(tensor.shape)} is expected")
    left_over = [
        name
        for name in loaded.tensors
        if name not in wanted and not name.startswith(NOT_NEEDED) and not name.removeprefix(BOX_PREDICTOR).startswith(ATTRIBUTE_LAYERS)
    ]
    if left_over:
        raise _unfit(loaded, recipe, f"{_some(left_over)} left over")
    model.load_state_dict({name: loaded.tensors[name] for name in wanted}, strict=False)


def _set_anchors(model: Any, loaded: Weights, recipe: Recipe) -> dict[str, object]:
    """Anchors belong to the weights; Detectron2 registers its own as not persistent and would keep them without a word."""
    own = list(model.proposal_generator.anchor_generator.cell_anchors.buffers())
    prefix = ANCHORS.removesuffix("0")
    from_file = [loaded.tensors.get(f"{prefix}{level}") for level in range(len(own))]
    if all(anchors is not None for anchors in from_file):
        used, origin = [anchors for anchors in from_file if anchors is not None], "weights"
    elif recipe.caffe_anchors:
        used, origin = [caffe_anchors(recipe.caffe_anchors)], "caffe"
    else:
        used, origin = own, "configuration"
    for buffer, anchors in zip(own, used, strict=True):
        if buffer.shape != anchors.shape:
            raise _unfit(loaded, recipe, f"its anchors are {tuple(anchors.shape)} where {tuple(buffer.shape)} are expected")
        buffer.copy_(anchors.clone())
    words = {"weights": "from the weight file", "caffe": "Caffe's own (the weight file has none)", "configuration": "as configured"}
    log.info("anchors: %s, %s", words[origin], ", ".join(f"{len(anchors)} a place" for anchors in used))
    return {"origin": origin, "first": [float(value) for value in used[0][0]], "count": [len(anchors) for anchors in used]}


def _unfit(loaded: Weights, recipe: Recipe, difference: str) -> BadInput:
    return BadInput(
        f"{loaded.source}: these weights are of another detector than {recipe.name!r} ({difference}); "
        f"choose the --detector that they belong to"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{', '.join(names[:2])}{more}"
