"""One example -> what its task shows the model and what the model shall answer. One function a task.

Text is masked only where the picture is whole, regions only where the text is whole ("conditional masking").

What a reader would get wrong: the pre-training tasks serve VCR's second stage as they are. A VCR example tells three texts (the
question, its right answer, its right rationale) and shows two sets of regions (annotated, then detected), each told or shown after
the other; every other example tells one text beside one picture.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.batches.candidates import IOU_THRESHOLD, Pictures, candidate_boxes, inclusive_iou, overlap, picture_of
from uniter.datasets.batches.example import (
    UNKNOWN,
    Example,
    Masking,
    Rows,
    Sample,
    TokenSequence,
    right_choices,
)
from uniter.datasets.errors import BadInput


def answered_question(example: Example, rng: random.Random, masking: Masking, *, answers: int) -> Sample:
    """VQA and SNLI-VE. Targets: `answers` (1, A) float32, each answer's soft score; all 0 where the record has no target."""
    shown = example.read()
    wanted = np.zeros((1, answers), dtype=np.float32)
    target = shown.record.get("target")
    if isinstance(target, dict):
        labels = np.array(target["labels"], dtype=np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < answers:
            raise BadInput(
                f"example {shown.id!r} has answer {labels.max()}, but there are {answers} answers; were its texts built otherwise?"
            )
        wanted[0, labels] = target["scores"]
    return Sample(shown.id, [shown.sequence(shown.words(), shown.regions())], {"answers": wanted})


def statement_about_each(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """NLVR2, paired: the statement with the left picture (regions of type 1), and again with the right one (type 2).

    Targets: `truth` (1,) int64, 1 where the statement holds, -100 (which cross-entropy leaves out) where unknown.
    """
    shown = example.read()
    sequences = [shown.sequence(shown.words(), picture) for picture in shown.pictures]
    for number, sequence in enumerate(sequences, start=1):
        sequence.region_type = number
    return Sample(shown.id, sequences, {"truth": _truth(shown.record)})


def statement_about_both(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """NLVR2, triplet: the statement, the left picture's regions (type 1) and the right one's (type 2) in one sequence."""
    shown = example.read()
    sequence = shown.sequence(shown.words(), shown.regions())
    sequence.region_type = np.repeat(np.array([1, 2], dtype=np.int64), [len(picture[0]) for picture in shown.pictures])
    return Sample(shown.id, [sequence], {"truth": _truth(shown.record)})


def ranked_group(example: Example, rng: random.Random, masking: Masking, *, pictures: NDArray[np.int32], negatives: int = 1) -> Sample:
    """Retrieval: a text with its picture, with `negatives` other pictures, and its picture with `negatives` texts of others.

    Args:
        pictures: (M,) the distinct pictures of the corpus, at least two.

    No targets: which sequence is the right one is its place, the first of 1 + 2 * negatives.

    Source: ChenRocks/UNITER `data/itm.py`: pictures first, then texts, each drawn again while it is the positive's.
    """
    corpus, own = example.corpus, example.images[0]
    shown = example.read()
    words, regions = shown.words(), shown.regions()
    sequences = [shown.sequence(words, regions)]
    for _ in range(negatives):
        picture = own
        while picture == own:
            picture = int(pictures[rng.randrange(len(pictures))])
        sequences.append(shown.sequence(words, corpus.region_arrays(picture)))
    for _ in range(negatives):
        number = example.number
        while corpus.image_rows_NK[number, 0] == own:
            number = rng.randrange(len(corpus))
        sequences.append(shown.sequence([corpus.record(number)["input_ids"]], regions))
    return Sample(shown.id, sequences)


def mined_groups(example: Example, rng: random.Random, masking: Masking, *, pictures: NDArray[np.int32], drawn: int = 399) -> Sample:
    """Retrieval with hard negatives: a text with its picture and `drawn` others, then the picture with its text and `drawn` others.

    The model scores them all and trains with the best-scoring ones of each group. Fewer are drawn where the corpus has fewer.
    Differs from the published code, which draws the text of the one group and the picture of the other independently.

    Args:
        pictures: (M,) the distinct pictures of the corpus, at least two.

    Targets: `group_sizes` (2,) int64, sequences of each group, its positive first.

    Source: ChenRocks/UNITER `data/itm.py`.
    """
    corpus, own = example.corpus, example.images[0]
    shown = example.read()
    words, regions = shown.words(), shown.regions()
    others = [picture for picture in rng.sample(pictures.tolist(), min(drawn + 1, len(pictures))) if picture != own]
    of_text = [shown.sequence(words, corpus.region_arrays(picture)) for picture in (own, *others[:drawn])]
    of_own = int((corpus.image_rows_NK[:, 0] == own).sum())
    numbers = rng.sample(range(len(corpus)), min(drawn + of_own, len(corpus)))
    strangers = [number for number in numbers if corpus.image_rows_NK[number, 0] != own]
    texts = [*words, *(corpus.record(number)["input_ids"] for number in strangers[:drawn])]
    of_picture = [shown.sequence([text], regions) for text in texts]
    return Sample(shown.id, of_text + of_picture, {"group_sizes": np.array([len(of_text), len(of_picture)])})


def referred_region(example: Example, rng: random.Random, masking: Masking, *, pictures: Sequence[Pictures], annotated: bool) -> Sample:
    """RefCOCO: a phrase with the regions it may mean.

    Args:
        pictures: of each text database of the corpus.
        annotated: the regions are the annotated boxes in the order of `pictures`; otherwise they were detected.

    Targets: `region` (1,) int64, the number of the region that is meant; of detected ones that which overlaps most, or -100 (which
    the losses leave out) where none overlaps by more than half. `overlaps` (R,) float32, how far each region covers the annotated
    box. `rival` (1,) int64, the wrong region that the ranking loss compares with, -1 for the wrong one that scores best (`drawn_rival`).
    """
    corpus, shown = example.corpus, example.read()
    record, regions = shown.record, shown.regions()
    picture = picture_of(pictures, corpus, example.number, record)
    _, norm_bb = regions
    boxes = candidate_boxes(norm_bb, picture.size).tolist()
    overlaps = np.array([inclusive_iou(box, record["bbox"]) for box in boxes], dtype=np.float32)
    if annotated:
        if len(boxes) != len(picture.annotations) or record["ann_id"] not in picture.annotations:
            raise BadInput(
                f"example {shown.id!r}: picture {record['image_id']} has {len(boxes)} regions, but its {len(picture.annotations)} "
                f"annotations are expected (annotation {record['ann_id']} is meant); extract with --boxes from the texts' instances.json"
            )
        region = picture.annotations.index(record["ann_id"])
    else:
        best = int(overlaps.argmax())
        region = best if overlaps[best] > IOU_THRESHOLD else UNKNOWN
    rival = np.array([drawn_rival(len(boxes), region, rng)])
    targets: dict[str, NDArray[np.generic] | Rows] = {"region": np.array([region]), "overlaps": overlaps, "rival": rival}
    return Sample(shown.id, [shown.sequence(shown.words(), regions)], targets)


def grounded_phrase(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """Flickr30k Entities: a phrase with the detected regions of its photograph.

    Targets: `right` (R,) bool, whether each region overlaps one of the phrase's boxes by half or more.
    """
    shown = example.read()
    record, regions = shown.record, shown.regions()
    boxes, size = record.get("boxes"), record.get("size")
    if not boxes or not size:
        raise BadInput(f"example {shown.id!r} says no boxes or no size of its photograph; was its text database built for this task?")
    overlaps = overlap(candidate_boxes(regions[1], (size[0], size[1])), np.array(boxes, dtype=np.float32))
    return Sample(shown.id, [shown.sequence(shown.words(), regions)], {"right": overlaps.max(axis=1) >= IOU_THRESHOLD})


def drawn_rival(regions: int, region: int, rng: random.Random, *, hard_ratio: float = 0.3) -> int:
    """A wrong one of so many regions, each as likely; -1, the one that scores best, with probability `hard_ratio` or where there is none.

    Source: ChenRocks/UNITER `model/re.py`.
    """
    if regions < 2 or rng.random() < hard_ratio:
        return -1
    drawn = rng.randrange(regions - 1)
    return drawn + (drawn >= max(region, 0))


def multiple_choice(example: Example, rng: random.Random, masking: Masking, *, every_answer: bool = False) -> Sample:
    """VCR: the question with each answer, then with the right answer and each rationale; each is a sequence of its own.

    All sequences show the annotated regions and then the detected ones. Token types: [CLS] and question 0, answer 2, rationale 3; a
    [SEP] has the type of what follows it, the last one that of what stands before it. Differs from the published code, where Q->A and QA->R
    are separate examples: here a question's two halves are in one batch.

    Args:
        every_answer: for a submission: rationales with each answer, 4 + 16 sequences instead of 4 + 4, whichever is right.

    Targets: `correct` (4 + 4 or 4 + 16,) int64, 1 at the right choice; with `every_answer` and no label all 0.
    """
    shown = example.read()
    record, text, regions = shown.record, shown.text, shown.regions()
    answers, rationales = record["input_ids_as"], record["input_ids_rs"]
    right_answer, right_rationale = right_choices(record, shown.id, known=not every_answer)

    def sequence(*parts: list[int]) -> TokenSequence:
        words, types = [text.cls_id, *record["input_ids"]], [0] * (1 + len(record["input_ids"]))
        for token_type, part in enumerate(parts, start=2):
            words += [text.sep_id, *part]
            types += [token_type] * (1 + len(part))
        return TokenSequence([*words, text.sep_id], *regions, text_types=[*types, types[-1]])

    sequences = [sequence(answer) for answer in answers]
    correct = [number == right_answer for number in range(len(answers))]
    for number, answer in enumerate(answers):
        if every_answer or number == right_answer:
            sequences += [sequence(answer, rationale) for rationale in rationales]
            correct += [place == right_rationale for place in range(len(rationales))]
    return Sample(shown.id, sequences, {"correct": np.array(correct, dtype=np.int64)})


def _truth(record: dict[str, Any]) -> NDArray[np.int64]:
    target = record.get("target")
    return np.array([UNKNOWN if target is None else int(target)], dtype=np.int64)
