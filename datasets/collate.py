"""From samples to a packed batch: no padding, all sequences end to end.

Legend of shape suffixes: B sequences, T text tokens of all sequences, R regions of all sequences, D feature width.
Sequence b is its text tokens followed by its regions; the texts of all sequences stand together and so do the regions.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class PackedBatch:
    """What the model reads.

    Attributes:
        input_ids_T: (T,) int64 word pieces, [CLS] words [SEP] of each sequence, end to end.
        text_positions_T: (T,) int64, 0.. within each sequence.
        text_types_T: (T,) int64 token types of the text (0 unless a task says otherwise).
        features_RD: (R, D) float16 or float32 region features; masked rows already zero.
        positions_R7: (R, 7) float32: x0, y0, x1, y1, w, h, w * h as fractions of the image.
        region_types_R: (R,) int64 token types of the regions (1 unless a task says otherwise).
        text_lengths_B: (B,) int64, word pieces of each sequence with [CLS] and [SEP].
        region_counts_B: (B,) int64, regions of each sequence.
        masked_regions_R: (R,) bool, True where the features were zeroed; None where the task masks no regions.
        targets: what the task's losses read, by name.
        example_ids: the ids of the examples, for messages and for predictions.
    """

    input_ids_T: Tensor
    text_positions_T: Tensor
    text_types_T: Tensor
    features_RD: Tensor
    positions_R7: Tensor
    region_types_R: Tensor
    text_lengths_B: Tensor
    region_counts_B: Tensor
    masked_regions_R: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    example_ids: list[str] = field(default_factory=list)
