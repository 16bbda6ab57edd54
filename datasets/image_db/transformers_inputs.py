"""What the `transformers` models LXMERT and VisualBERT take, from region records.

What a reader would get wrong: both models accept any four numbers as a box and any numbers as classes, in silence. LXMERT wants
fractions of the image, not pixels; its classes count from 0 without the background; and a class that is not known must bear the number
that the loss passes over.

Source: `LxmertModel`, `LxmertForPreTraining` and `VisualBertModel` of Hugging Face's transformers.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

_Best = tuple[NDArray[np.integer], NDArray[np.floating]]


PASSED_OVER: Final = -100
"""The label that PyTorch's cross-entropy passes over, and LXMERT's with it."""


class Regions(Protocol):
    """What is asked of a `RegionFeatures`, which offers these functions as methods."""

    @property
    def features(self) -> NDArray[np.floating]:
        """(N, D) features."""

    @property
    def norm_bb(self) -> NDArray[np.floating]:
        """(N, 6 or 7) x0 y0 x1 y1 w h (area), fractions of the image."""

    @property
    def boxes(self) -> NDArray[np.floating] | None:
        """(N, 4) x0 y0 x1 y1, pixels of the upright image; None where they are not known."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the image in pixels; None where it is not known."""

    def __len__(self) -> int: ...
    def best_objects(self) -> _Best | None:
        """As of `RegionFeatures`: each region's likeliest class and its probability."""

    def best_attributes(self) -> _Best | None:
        """As of `RegionFeatures`: each region's likeliest attribute and its probability."""


_ROUNDING: Final = 2e-3
"""How far a box may be off the image: float16 fractions near 1 are 0.0005 apart, and detectors round."""


def lxmert_inputs(records: Sequence[Regions], *, labels: bool = False) -> dict[str, Any]:
    """The pictures' part of what `LxmertModel` takes, a batch of B pictures, padded to the most regions R.

    Args:
        records: B >= 1 pictures with at least one region each.
        labels: also what `LxmertForPreTraining` learns from.

    Returns:
        `visual_feats` (B, R, D) float32, `visual_pos` (B, R, 4) float32, x0 y0 x1 y1 as fractions of the image, and
        `visual_attention_mask` (B, R) float32, 1 at regions. With labels `obj_labels`, too: "obj" and "attr" -> (ids (B, R) int64 counted
        from 0 without the background, -100 where none is known; their probabilities (B, R) float32, 0 there), "feat" -> (`visual_feats`,
        the mask).

    Raises:
        BadInput: no picture, one without regions, other widths, or boxes that do not lie in their image.
    """
    features, mask = _features(records)
    boxes = _padded([_fractions(record, place) for place, record in enumerate(records)])
    inputs: dict[str, Any] = {"visual_feats": features, "visual_pos": _tensor(boxes), "visual_attention_mask": mask}
    if labels:
        inputs["obj_labels"] = {
            "obj": _labels(records, lambda record: record.best_objects()),
            "attr": _labels(records, lambda record: record.best_attributes()),
            "feat": (features, mask),
        }
    return inputs


def visualbert_inputs(records: Sequence[Regions]) -> "dict[str, Tensor]":
    """The pictures' part of what `VisualBertModel` takes, a batch of B pictures, padded to the most regions R. It reads no boxes.

    Returns:
        `visual_embeds` (B, R, D) float32, `visual_attention_mask` (B, R) float32, 1 at regions, `visual_token_type_ids` (B, R) int64, 1.

    Raises:
        BadInput: as of `lxmert_inputs`.
    """
    features, mask = _features(records)
    return {"visual_embeds": features, "visual_attention_mask": mask, "visual_token_type_ids": mask.new_ones(mask.shape).long()}


def _features(records: Sequence[Regions]) -> "tuple[Tensor, Tensor]":
    if not records:
        raise BadInput("a batch of no pictures; expected at least one record")
    widths = {record.features.shape[1] for record in records}
    if len(widths) > 1:
        raise BadInput(f"pictures with features {' and '.join(map(str, sorted(widths)))} wide in one batch; take those of one detector")
    for place, record in enumerate(records):
        if not len(record):
            raise BadInput(f"picture {place} of the batch has no regions, and the model needs one at least; leave it out")
    mask = _padded([np.ones(len(record), np.float32) for record in records])
    return _tensor(_padded([np.asarray(record.features, np.float32) for record in records])), _tensor(mask)


def _fractions(record: Regions, place: int) -> NDArray[np.float32]:
    """(N, 4) float32: from the pixels where they and the size are known, since fractions are kept in float16."""
    boxes: NDArray[np.float32] = np.asarray(record.norm_bb[:, :4], np.float32)
    if record.boxes is not None and record.size is not None:
        height, width = record.size
        boxes = np.divide(record.boxes, np.array([width, height, width, height]), dtype=np.float32)
    if len(boxes) and not boxes.any():
        raise BadInput(f"picture {place}: the record does not say where its regions are, and LXMERT needs that; give records with boxes")
    outside = ~((boxes >= -_ROUNDING) & (boxes <= 1 + _ROUNDING)).all(axis=1)
    if outside.any():
        row = int(outside.argmax())
        numbers = ", ".join(f"{number:.4g}" for number in boxes[row])
        raise BadInput(
            f"picture {place}, region {row}: the box is {numbers} of the image, and 0 to 1 was expected; "
            "are the boxes pixels, or of an image of another size?"
        )
    return boxes.clip(0, 1)


def _labels(records: Sequence[Regions], best: Callable[[Regions], _Best | None]) -> "tuple[Tensor, Tensor]":
    ids, probabilities = [], []
    for record in records:
        found = best(record)
        known = np.zeros(len(record), bool) if found is None else found[0] >= 0
        number, probability = (known, known) if found is None else found
        ids.append(np.where(known, number, PASSED_OVER).astype(np.int64))
        probabilities.append(np.where(known, probability, 0).astype(np.float32))
    return _tensor(_padded(ids, fill=PASSED_OVER)), _tensor(_padded(probabilities))


def _padded(arrays: Sequence[NDArray[Any]], *, fill: float = 0) -> NDArray[Any]:
    """(B, R, ...) from B arrays (N, ...)."""
    together = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, array in enumerate(arrays):
        together[row, : len(array)] = array
    return together


def _tensor(array: NDArray[Any]) -> "Tensor":
    import torch  # records are read where no network is near

    return torch.from_numpy(array)
