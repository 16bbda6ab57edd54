"""The samples of pre-training: words hidden, regions hidden, or pairs that may not belong together."""

import random

import numpy as np

from uniter.datasets.batches.example import REGION_FIELDS, Example, Masking, Rows, Sample, TokenSequence
from uniter.datasets.batches.masking import NOT_PREDICTED, mask_regions, mask_words
from uniter.datasets.errors import BadInput


def masked_text(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """MLM: words hidden, the picture whole. Targets: `words` (T,) int64, -1 where nothing is predicted, [CLS] and [SEP] included.

    At least one word of each of VCR's texts is hidden.
    """
    shown = example.read()
    read, labels = [], [NOT_PREDICTED]
    for words in shown.told():
        hidden, wanted = mask_words(words, rng, mask_id=shown.text.mask_id, v_range=shown.text.v_range, probability=masking.words)
        read.append(hidden)
        labels += [*wanted, NOT_PREDICTED]
    return Sample(shown.id, [shown.sequence(read, shown.regions())], {"words": np.array(labels, dtype=np.int64)})


def masked_regions(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """MRFR: regions hidden, the text whole. Targets: `features` (S, D), what the S hidden regions held."""
    shown = example.read()
    regions = features, _ = shown.regions()
    masked = mask_regions(len(features), rng, probability=masking.regions)
    return Sample(shown.id, [shown.sequence(shown.told(), regions, masked)], {"features": Rows([(features, masked.nonzero()[0])])})


def masked_regions_with_classes(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """MRC and MRC-KL: as MRFR, but the targets are the detector's distributions, `soft_labels` (S, C), background in column 0.

    Only the hidden regions' distributions are read: they are nearly half of a record.
    """
    shown = example.read((*REGION_FIELDS, "soft_labels"))
    regions = features, _ = shown.regions()
    masked = mask_regions(len(features), rng, probability=masking.regions)
    classes, first = Rows([]), 0
    for image, picture in zip(example.images, shown.pictures, strict=True):
        if len(picture) < 3:
            key = example.corpus.images.keys_list[image]
            raise BadInput(f"image {key!r} has no soft labels, which MRC needs; leave mrc and mrc-kl out of the tasks")
        end = first + len(picture[0])
        classes.parts.append((picture[2], masked[first:end].nonzero()[0]))
        first = end
    return Sample(shown.id, [shown.sequence(shown.told(), regions, masked)], {"soft_labels": classes})


def matched_pair(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """ITM: nothing hidden; the picture may be another one. Targets: `matched` (1,) int64, 1 where it is the text's own."""
    shown = example.read()
    return Sample(shown.id, [shown.sequence(shown.words(), shown.regions())], {"matched": np.array([int(example.matched)], dtype=np.int64)})


def picture_alone(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """The regions of an example's pictures without its text; no targets."""
    return Sample(example.id, [TokenSequence([], *example.read().regions())])
