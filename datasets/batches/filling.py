"""Batches filled up to sizes that do not change, so that a compiler makes one graph of each task.

Behind the real sequences stand ghosts: rows that no real row attends to, in sequences of their own. What a model says of ghosts stands
behind what it says of the real ones, and `only_real` takes it away; so losses and metrics know nothing of them.

What a reader would get wrong: a size that is too small is never cut to, but doubled. A batch may need another graph, it is never wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.corpus import SPECIAL_TOKENS
from uniter.datasets.batches.plans import Part

MULTIPLE = 64  # rows, for the matrix units


@dataclass(frozen=True, slots=True)
class Room:
    """Up to which sizes batches are filled, if they fit; else to the next doubling.

    Attributes:
        rows: word pieces and regions together. sequences: of a batch. hidden: words or regions that are predicted.
        longest_text, most_regions: of a sequence.
    """

    rows: int
    sequences: int
    hidden: int
    longest_text: int
    most_regions: int


def room_of(part: Part, *, budget: int) -> Room:
    """What fits the batches of a part: its budget, its longest text, its largest picture, and as many sequences as its short ones make."""
    corpus = part.corpus
    lengths = part.lengths(corpus, corpus.image_rows_NK)
    of_sequence = corpus.lengths
    rows = _up(max(budget, int(lengths.max())), MULTIPLE)
    regions = np.asarray(corpus.images.region_counts)[np.unique(corpus.image_rows_NK)]
    return Room(
        rows=rows,
        sequences=_up(int(rows / max(float(np.quantile(of_sequence, 0.05)), 1.0)) + 2, 8),
        hidden=_up(rows // 16, MULTIPLE),
        longest_text=_up(int(corpus.text_lengths_N.max()) + SPECIAL_TOKENS, 8),
        most_regions=_up(int(regions.max()) * corpus.image_rows_NK.shape[1], 8),
    )


def fill(batch: PackedBatch, room: Room) -> PackedBatch:
    """The same batch, on the host, filled up with ghosts."""
    layout, texts, regions = batch.layout, len(batch.input_ids_T), len(batch.features_RD)
    rows = _fitting(texts + regions, room.rows)
    sequences = _fitting(len(batch.text_lengths_B), room.sequences)
    longest_text, most_regions = _fitting(layout.longest_text, room.longest_text), _fitting(layout.most_regions, room.most_regions)
    longest = longest_text + most_regions
    places = batch.targets.get("places")
    ghosts = np.arange(texts + regions, rows)
    source = layout.source_rows_N.numpy()
    source = np.where(source >= texts, source + (rows - texts), source)  # the regions stand behind the filled texts
    # A ghost row is one of the ghost word pieces; a ghost sequence is said to be the first row and the one behind it.
    layout = replace(
        layout,
        source_rows_N=torch.from_numpy(np.concatenate([source, ghosts - regions])),
        text_rows_T=_filled(layout.text_rows_T, rows),
        region_rows_R=_filled(layout.region_rows_R, rows),
        first_rows_B=_filled(layout.first_rows_B, sequences),
        text_lengths_B=_filled(layout.text_lengths_B, sequences, 1),
        region_counts_B=_filled(layout.region_counts_B, sequences, 1),
        offsets=_filled(torch.from_numpy(_offsets(layout.offsets.numpy(), rows, longest)), 1 + sequences + -(-rows // longest), rows),
        longest=longest,
        longest_text=longest_text,
        most_regions=most_regions,
    )
    return replace(
        batch,
        input_ids_T=_filled(batch.input_ids_T, rows),
        text_positions_T=_filled(batch.text_positions_T, rows),
        text_types_T=_filled(batch.text_types_T, rows),
        features_RD=_filled(batch.features_RD, rows),
        positions_R7=_filled(batch.positions_R7, rows),
        region_types_R=_filled(batch.region_types_R, rows, 1),
        masked_regions_R=None if batch.masked_regions_R is None else _filled(batch.masked_regions_R, rows, False),
        targets=batch.targets if places is None else {**batch.targets, "places": _filled(places, _fitting(len(places), room.hidden))},
        layout=layout,
        hidden=None if places is None else len(places),
    )


def only_real(outputs: Mapping[str, Tensor], batch: PackedBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A head's outputs, and the targets, without the ghosts of the batch; views, of a batch that was not filled all.

    Numbers without a dimension are the model's, not the sequences', and stay.
    """
    real, targets = dict(outputs), batch.targets
    if batch.hidden is not None:
        return {name: values[: batch.hidden] for name, values in real.items()}, {**targets, "places": targets["places"][: batch.hidden]}
    sequences, filled = len(batch.text_lengths_B), len(batch.layout.first_rows_B)
    return {name: values[: len(values) * sequences // filled] if values.dim() else values for name, values in real.items()}, targets


def _offsets(offsets: NDArray[np.int32], rows: int, longest: int) -> NDArray[np.int32]:
    """Where the sequences begin, with ghosts as long as a sequence may be behind them, up to so many rows."""
    return np.append(offsets, np.arange(offsets[-1] + longest, rows + longest, longest, dtype=np.int32).clip(max=rows))


def _filled(values: Tensor, length: int, value: float = 0) -> Tensor:
    filled = values.new_full((length, *values.shape[1:]), value)
    filled[: len(values)] = values
    return filled


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _fitting(needed: int, size: int) -> int:
    while size < needed:
        size *= 2
    return size
