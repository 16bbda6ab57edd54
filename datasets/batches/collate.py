"""From samples to a packed batch: no padding, all sequences end to end.

Legend of shape suffixes: B sequences, T text tokens of all sequences, R regions of all sequences, D feature width.
Sequence b is its text tokens followed by its regions; the texts of all sequences stand together and so do the regions.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.batches.example import Rows, Sample
from uniter.datasets.batches.layout import Layout, counted_within, lay_out
from uniter.datasets.batches.masking import NOT_PREDICTED
from uniter.datasets.errors import BadInput

ON_HOST = ("group_sizes",)  # targets by which the host plans


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
        word_shifts_TH, region_shifts_RD: (T, H) and (R, D) float32 that are added to the words' embeddings and to the regions'
            features, masked ones too; None where nothing is. Adversarial training makes them, on the model's device.
        embedded_regions_RH: (R, H), the regions as they enter the first layer, on the model's device, where they are known already (many
            texts about the same pictures); then the batch has no features, and counts alone say whose they are.
        targets: what the task's losses read, by name; of what is hidden also `places` (S,) int64, where it stands among the text tokens
            or among the regions, so that nobody has to look for it.
        example_ids: the ids of the examples, for messages and for predictions.
        layout: where everything stands among the rows that the model computes; follows from the lengths.
        hidden: how many of `places` are real, where the batch was filled up with ghosts (filling.py); of those the lengths know nothing.
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
    word_shifts_TH: Tensor | None = None
    region_shifts_RD: Tensor | None = None
    embedded_regions_RH: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    example_ids: list[str] = field(default_factory=list)
    layout: Layout = None  # type: ignore[assignment]  # made from the lengths where it is not given
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.layout is None:
            self.layout = lay_out(self.text_lengths_B, self.region_counts_B)

    def __len__(self) -> int:
        """The number of examples (an example may be several sequences)."""
        return len(self.example_ids)

    @property
    def tokens(self) -> int:
        """Word pieces and regions, all of them real."""
        return int(self.text_lengths_B.sum() + self.region_counts_B.sum())

    @property
    def rows(self) -> int:
        """What is computed: the tokens, and the ghosts of a batch that was filled up."""
        return len(self.layout.source_rows_N)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on `device`; lengths and sizes of groups stay on the host as well, which plans by them without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked memory (called by the data loader)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch that `to` moves."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._each(note)
        return found

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        return replace(
            self,
            input_ids_T=change(self.input_ids_T),
            text_positions_T=change(self.text_positions_T),
            text_types_T=change(self.text_types_T),
            features_RD=change(self.features_RD),
            positions_R7=change(self.positions_R7),
            region_types_R=change(self.region_types_R),
            masked_regions_R=None if self.masked_regions_R is None else change(self.masked_regions_R),
            targets={name: target if name in ON_HOST else change(target) for name, target in self.targets.items()},
            layout=self.layout.each(change),
        )


def collate(samples: Sequence[Sample]) -> PackedBatch:
    """Put samples end to end. Each feature is copied once, straight into the batch, in the precision of the database.

    Args:
        samples: at least one; all with the same targets and the same feature width.

    Returns:
        The batch; targets are concatenated along their first axis, int64 or the float type they came in.

    Raises:
        BadInput: widths or numbers of rows do not fit, naming the example.
    """
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    text_lengths = np.fromiter((len(sequence.input_ids) for sequence in sequences), dtype=np.int64, count=len(sequences))
    region_counts = np.fromiter((len(sequence.features) for sequence in sequences), dtype=np.int64, count=len(sequences))
    rows, masked = _features(samples, int(region_counts.sum()))
    positions = np.empty((len(rows), 7), dtype=np.float32)
    positions[:, :6] = np.concatenate([sequence.norm_bb for sequence in sequences])
    # The area in float32, after the cast: as UNITER's reader does.
    np.multiply(positions[:, 4], positions[:, 5], out=positions[:, 6])
    region_types = np.ones(len(rows), dtype=np.int64)
    for sequence, end in zip(sequences, np.cumsum(region_counts).tolist(), strict=True):
        if not isinstance(sequence.region_type, int) or sequence.region_type != 1:
            region_types[end - len(sequence.features) : end] = sequence.region_type
    text_types = np.zeros(int(text_lengths.sum()), dtype=np.int64)
    if any(sequence.text_types is not None for sequence in sequences):
        text_types = np.concatenate([np.asarray(s.text_types or [0] * len(s.input_ids), dtype=np.int64) for s in sequences])
    words = itertools.chain.from_iterable(sequence.input_ids for sequence in sequences)
    targets = {name: torch.from_numpy(_joined([sample.targets[name] for sample in samples])) for name in samples[0].targets}
    if (hidden := hidden_places(targets.get("words"), None if masked is None else torch.from_numpy(masked))) is not None:
        targets["places"] = hidden
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.fromiter(words, dtype=np.int64, count=int(text_lengths.sum()))),
        text_positions_T=torch.from_numpy(counted_within(text_lengths)),
        text_types_T=torch.from_numpy(text_types),
        features_RD=torch.from_numpy(rows),
        positions_R7=torch.from_numpy(positions),
        region_types_R=torch.from_numpy(region_types),
        text_lengths_B=torch.from_numpy(text_lengths),
        region_counts_B=torch.from_numpy(region_counts),
        masked_regions_R=None if masked is None else torch.from_numpy(masked),
        targets=targets,
        example_ids=[sample.id for sample in samples],
    )


def hidden_places(words_T: Tensor | None, masked_R: Tensor | None) -> Tensor | None:
    """(S,) int64, the places of the words that are predicted, or of the masked regions; None where a task hides neither."""
    if words_T is not None:
        return (words_T != NOT_PREDICTED).nonzero().squeeze(1)
    return None if masked_R is None else masked_R.nonzero().squeeze(1)


def _features(samples: Sequence[Sample], regions: int) -> tuple[NDArray[np.floating], NDArray[np.bool_] | None]:
    """Features (R, D), zero where they are masked, and where that is, (R,); None where no task masks regions."""
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    width = sequences[0].features.shape[1]
    half = all(sequence.features.dtype == np.float16 for sequence in sequences)
    # NumPy asks for huge pages where torch does not: filling a fresh batch takes half the page faults.
    rows = np.empty((regions, width), dtype=np.float16 if half else np.float32)
    masked = np.zeros(regions, dtype=np.bool_) if any(sequence.masked is not None for sequence in sequences) else None
    begin = 0
    for sample in samples:
        for sequence in sample.sequences:
            features, hidden = sequence.features, sequence.masked
            if features.shape[1] != width or sequence.norm_bb.shape != (len(features), 6):
                raise BadInput(
                    f"example {sample.id!r}: features of shape {features.shape} and boxes of shape {sequence.norm_bb.shape} beside "
                    f"features {width} wide, expected boxes of 6 numbers; were the region databases made with different detectors? "
                    "See uniter-db check"
                )
            end = begin + len(features)
            own = rows[begin:end]
            own[:] = features
            if masked is not None and hidden is not None:
                masked[begin:end] = hidden
                own[hidden] = 0  # at once, while the rows are in the processor's cache
            begin = end
    return rows, masked


def _joined(targets: Sequence[NDArray[np.generic] | Rows]) -> NDArray[np.generic]:
    """Targets end to end; rows of larger arrays go straight to their place."""
    if not isinstance(targets[0], Rows):
        return np.concatenate(targets)
    parts = [part for target in targets if isinstance(target, Rows) for part in target.parts]
    shape = (sum(len(rows) for _, rows in parts), *parts[0][0].shape[1:])
    joined = np.empty(shape, dtype=np.result_type(*{array.dtype for array, _ in parts}))
    begin = 0
    for array, rows in parts:
        end = begin + len(rows)
        joined[begin:end] = array[rows]
        begin = end
    return joined
