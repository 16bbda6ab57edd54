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
from uniter.datasets.errors import BadInput


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
    word_shifts_TH: Tensor | None = None
    region_shifts_RD: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    example_ids: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of examples (an example may be several sequences)."""
        return len(self.example_ids)

    @property
    def tokens(self) -> int:
        """Word pieces and regions, all of them real."""
        return len(self.input_ids_T) + len(self.features_RD)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on `device`; the lengths stay on the host, where the model plans its attention by them without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked memory (called by the data loader)."""
        return self._each(lambda tensor: tensor.pin_memory())

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
            targets={name: change(target) for name, target in self.targets.items()},
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
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.fromiter(words, dtype=np.int64, count=int(text_lengths.sum()))),
        text_positions_T=torch.from_numpy(_count_up(text_lengths)),
        text_types_T=torch.from_numpy(text_types),
        features_RD=torch.from_numpy(rows),
        positions_R7=torch.from_numpy(positions),
        region_types_R=torch.from_numpy(region_types),
        text_lengths_B=torch.from_numpy(text_lengths),
        region_counts_B=torch.from_numpy(region_counts),
        masked_regions_R=None if masked is None else torch.from_numpy(masked),
        targets={name: torch.from_numpy(_joined([sample.targets[name] for sample in samples])) for name in samples[0].targets},
        example_ids=[sample.id for sample in samples],
    )


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


def _count_up(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)


def take_sequences(batch: PackedBatch, numbers: Tensor) -> PackedBatch:
    """A batch of some sequences of another one, in the given order; without its targets and ids, which belong to examples.

    Args:
        numbers: (K,) int64 numbers of sequences.
    """
    host = numbers.cpu()

    def places(lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        lengths_B = lengths_B.cpu()
        starts_B, taken = lengths_B.cumsum(0) - lengths_B, lengths_B[host]
        ends = taken.cumsum(0)
        within = torch.arange(int(taken.sum())) - (ends - taken).repeat_interleave(taken)
        return (starts_B[host].repeat_interleave(taken) + within).to(batch.input_ids_T.device), taken

    texts, text_lengths = places(batch.text_lengths_B)
    regions, region_counts = places(batch.region_counts_B)
    return PackedBatch(
        input_ids_T=batch.input_ids_T[texts],
        text_positions_T=batch.text_positions_T[texts],
        text_types_T=batch.text_types_T[texts],
        features_RD=batch.features_RD[regions],
        positions_R7=batch.positions_R7[regions],
        region_types_R=batch.region_types_R[regions],
        text_lengths_B=text_lengths,
        region_counts_B=region_counts,
        masked_regions_R=None if batch.masked_regions_R is None else batch.masked_regions_R[regions],
        word_shifts_TH=None if batch.word_shifts_TH is None else batch.word_shifts_TH[texts],
        region_shifts_RD=None if batch.region_shifts_RD is None else batch.region_shifts_RD[regions],
    )
