"""One example -> what its task shows the model and what the model shall answer. One function a task.

Text is masked only where the picture is whole, regions only where the text is whole ("conditional masking").

What a reader would get wrong: the pre-training tasks serve VCR's second stage as they are. A VCR example tells three texts (the
question, its right answer, its right rationale) and shows two sets of regions (annotated, then detected), each told or shown after
the other; every other example tells one text beside one picture.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.candidates import IOU_THRESHOLD, Pictures, candidate_boxes, inclusive_iou, picture_of
from uniter.datasets.corpus import Corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.masking import NOT_PREDICTED, mask_regions, mask_words

UNKNOWN = -100  # a target that cross-entropy leaves out
Regions = tuple[NDArray[np.floating], NDArray[np.floating]]  # features (N, D) and norm_bb (N, 6); may be views of the database


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a corpus, shown with these pictures (rows of the region database), its own ones if `matched`."""

    corpus: Corpus
    number: int
    images: tuple[int, ...]
    matched: bool = True

    @property
    def id(self) -> str:
        return self.corpus.example_id(self.number)

    def words(self) -> list[int]:
        """Its word pieces without [CLS] and [SEP]."""
        return list(self.corpus.record(self.number)["input_ids"])

    def told(self) -> list[list[int]]:
        """What pre-training reads, without [CLS] and [SEP]: its text, or VCR's question, right answer and right rationale.

        Raises:
            BadInput: a VCR question of a test part, whose right choices nobody knows.
        """
        record = self.corpus.record(self.number)
        if "input_ids_as" not in record:
            return [record["input_ids"]]
        answer, rationale = right_choices(record, self.id)
        return [record["input_ids"], record["input_ids_as"][answer], record["input_ids_rs"][rationale]]


@dataclass(frozen=True, slots=True)
class Masking:
    """Chances of a word and of a region to be hidden."""

    words: float = 0.15
    regions: float = 0.15


@dataclass(slots=True)
class TokenSequence:
    """One sequence of the encoder: text, then regions.

    Attributes:
        input_ids: word pieces with [CLS] and [SEP].
        features: (N, D) float16 or float32, not yet zeroed where masked; may be a view of the database.
        norm_bb: (N, 6) float16 or float32.
        masked: (N,) bool, True where the features shall be zeroed; None where the task masks no regions.
        text_types: token type of each word piece, None for all 0.
        region_type: token type of the regions, one for all or one for each.
    """

    input_ids: list[int]
    features: NDArray[np.floating]
    norm_bb: NDArray[np.floating]
    masked: NDArray[np.bool_] | None = None
    text_types: Sequence[int] | None = None
    region_type: int | NDArray[np.int64] = 1


@dataclass(slots=True, eq=False)
class Rows:
    """Rows of arrays that may be views of the database: they are copied once, when the batch is made.

    Attributes:
        parts: (an array (N, W), the numbers (S,) of the rows that count), end to end; all of one width.
    """

    parts: list[tuple[NDArray[np.generic], NDArray[np.intp]]]

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.parts)

    def __array__(self, dtype: "np.dtype[Any] | None" = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(np.concatenate([array[rows] for array, rows in self.parts]), dtype=dtype)


@dataclass(slots=True)
class Sample:
    """One example ready for a batch: its sequences (one for most tasks) and its targets, joined along their first axis."""

    id: str
    sequences: list[TokenSequence]
    targets: dict[str, NDArray[np.generic] | Rows] = field(default_factory=dict)


SampleFunction = Callable[[Example, random.Random, Masking], Sample]


def masked_text(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """MLM: words hidden, the picture whole. Targets: `words` (T,) int64, -1 where nothing is predicted, [CLS] and [SEP] included.

    At least one word of each of VCR's texts is hidden.
    """
    text = example.corpus.text_of(example.number)
    read, labels = [], [NOT_PREDICTED]
    for words in example.told():
        shown, wanted = mask_words(words, rng, mask_id=text.mask_id, v_range=text.v_range, probability=masking.words)
        read.append(shown)
        labels += [*wanted, NOT_PREDICTED]
    return Sample(example.id, [_sequence(example, read, _regions(example))], {"words": np.array(labels, dtype=np.int64)})


def masked_regions(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """MRFR: regions hidden, the text whole. Targets: `features` (S, D), what the S hidden regions held."""
    regions = features, _ = _regions(example)
    masked = mask_regions(len(features), rng, probability=masking.regions)
    return Sample(example.id, [_sequence(example, example.told(), regions, masked)], {"features": Rows([(features, masked.nonzero()[0])])})


def masked_regions_with_classes(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """MRC and MRC-KL: as MRFR, but the targets are the detector's distributions, `soft_labels` (S, C), background in column 0.

    Only the hidden regions' distributions are read: they are nearly half of a record.
    """
    pictures = [example.corpus.region_arrays(image, ("features", "norm_bb", "soft_labels")) for image in example.images]
    regions = features, _ = _end_to_end(pictures)
    masked = mask_regions(len(features), rng, probability=masking.regions)
    classes, first = Rows([]), 0
    for image, picture in zip(example.images, pictures, strict=True):
        if len(picture) < 3:
            key = example.corpus.images.keys_list[image]
            raise BadInput(f"image {key!r} has no soft labels, which MRC needs; leave mrc and mrc-kl out of the tasks")
        end = first + len(picture[0])
        classes.parts.append((picture[2], masked[first:end].nonzero()[0]))
        first = end
    return Sample(example.id, [_sequence(example, example.told(), regions, masked)], {"soft_labels": classes})


def matched_pair(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """ITM: nothing hidden; the picture may be another one. Targets: `matched` (1,) int64, 1 where it is the text's own."""
    return Sample(
        example.id,
        [_sequence(example, [example.words()], _regions(example))],
        {"matched": np.array([int(example.matched)], dtype=np.int64)},
    )


def answered_question(example: Example, rng: random.Random, masking: Masking, *, answers: int) -> Sample:
    """VQA and SNLI-VE. Targets: `answers` (1, A) float32, each answer's soft score; all 0 where the record has no target."""
    record = example.corpus.record(example.number)
    wanted = np.zeros((1, answers), dtype=np.float32)
    target = record.get("target")
    if isinstance(target, dict):
        labels = np.array(target["labels"], dtype=np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < answers:
            raise BadInput(
                f"example {example.id!r} has answer {labels.max()}, but there are {answers} answers; were its texts built otherwise?"
            )
        wanted[0, labels] = target["scores"]
    return Sample(example.id, [_sequence(example, [record["input_ids"]], _regions(example))], {"answers": wanted})


def statement_about_each(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """NLVR2, paired: the statement with the left picture (regions of type 1), and again with the right one (type 2).

    Targets: `truth` (1,) int64, 1 where the statement holds, -100 (which cross-entropy leaves out) where unknown.
    """
    record = example.corpus.record(example.number)
    sequences = []
    for number in (0, 1):
        sequence = _sequence(example, [record["input_ids"]], _regions_of(example.corpus, example.images[number]))
        sequence.region_type = number + 1
        sequences.append(sequence)
    return Sample(example.id, sequences, {"truth": _truth(record)})


def statement_about_both(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """NLVR2, triplet: the statement, the left picture's regions (type 1) and the right one's (type 2) in one sequence."""
    record = example.corpus.record(example.number)
    left, right = (_regions_of(example.corpus, image) for image in example.images)
    text = example.corpus.text_of(example.number)
    sequence = TokenSequence(
        [text.cls_id, *record["input_ids"], text.sep_id],
        *_end_to_end([left, right]),
        region_type=np.repeat(np.array([1, 2], dtype=np.int64), [len(left[0]), len(right[0])]),
    )
    return Sample(example.id, [sequence], {"truth": _truth(record)})


def ranked_group(example: Example, rng: random.Random, masking: Masking, *, pictures: NDArray[np.int32], negatives: int = 1) -> Sample:
    """Retrieval: a text with its picture, with `negatives` other pictures, and its picture with `negatives` texts of others.

    Args:
        pictures: (M,) the distinct pictures of the corpus, at least two.

    No targets: which sequence is the right one is its place, the first of 1 + 2 * negatives.

    Source: ChenRocks/UNITER `data/itm.py`: pictures first, then texts, each drawn again while it is the positive's.
    """
    corpus, own = example.corpus, example.images[0]
    words, regions = [example.words()], _regions(example)
    sequences = [_sequence(example, words, regions)]
    for _ in range(negatives):
        picture = own
        while picture == own:
            picture = int(pictures[rng.randrange(len(pictures))])
        sequences.append(_sequence(example, words, _regions_of(corpus, picture)))
    for _ in range(negatives):
        number = example.number
        while corpus.image_rows_NK[number, 0] == own:
            number = rng.randrange(len(corpus))
        sequences.append(_sequence(example, [corpus.record(number)["input_ids"]], regions))
    return Sample(example.id, sequences)


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
    words, regions = example.words(), _regions(example)
    others = [picture for picture in rng.sample(pictures.tolist(), min(drawn + 1, len(pictures))) if picture != own]
    of_text = [_sequence(example, [words], _regions_of(corpus, picture)) for picture in (own, *others[:drawn])]
    of_own = int((corpus.image_rows_NK[:, 0] == own).sum())
    numbers = rng.sample(range(len(corpus)), min(drawn + of_own, len(corpus)))
    strangers = [number for number in numbers if corpus.image_rows_NK[number, 0] != own]
    texts = [words, *(corpus.record(number)["input_ids"] for number in strangers[:drawn])]
    of_picture = [_sequence(example, [text], regions) for text in texts]
    return Sample(example.id, of_text + of_picture, {"group_sizes": np.array([len(of_text), len(of_picture)])})


def referred_region(example: Example, rng: random.Random, masking: Masking, *, pictures: Sequence[Pictures], annotated: bool) -> Sample:
    """RefCOCO: a phrase with the regions it may mean.

    Args:
        pictures: of each text database of the corpus.
        annotated: the regions are the annotated boxes in the order of `pictures`; otherwise they were detected.

    Targets: `region` (1,) int64, the number of the region that is meant; of detected ones that which overlaps most, or -100 (which
    the losses leave out) where none overlaps by more than half. `overlaps` (R,) float32, how far each region covers the annotated
    box. `draw` (1,) int64, decides what the ranking loss compares with.
    """
    corpus, regions = example.corpus, _regions(example)
    record = corpus.record(example.number)
    picture = picture_of(pictures, corpus, example.number, record)
    _, norm_bb = regions
    boxes = candidate_boxes(norm_bb, picture.size).tolist()
    overlaps = np.array([inclusive_iou(box, record["bbox"]) for box in boxes], dtype=np.float32)
    if annotated:
        if len(boxes) != len(picture.annotations) or record["ann_id"] not in picture.annotations:
            raise BadInput(
                f"example {example.id!r}: picture {record['image_id']} has {len(boxes)} regions, but its {len(picture.annotations)} "
                f"annotations are expected (annotation {record['ann_id']} is meant); extract with --boxes from the texts' instances.json"
            )
        region = picture.annotations.index(record["ann_id"])
    else:
        best = int(overlaps.argmax())
        region = best if overlaps[best] > IOU_THRESHOLD else UNKNOWN
    draw = np.array([rng.randrange(2**62)])
    targets: dict[str, NDArray[np.generic] | Rows] = {"region": np.array([region]), "overlaps": overlaps, "draw": draw}
    return Sample(example.id, [_sequence(example, [record["input_ids"]], regions)], targets)


def multiple_choice(example: Example, rng: random.Random, masking: Masking, *, every_answer: bool = False) -> Sample:
    """VCR: the question with each answer, then with the right answer and each rationale; each is a sequence of its own.

    All sequences show the annotated regions and then the detected ones. Token types: [CLS] and question 0, answer 2, rationale 3; a
    [SEP] has the type of what follows it, the last one that of what stands before it. Differs from the published code, where Q->A and QA->R
    are separate examples: here a question's two halves are in one batch.

    Args:
        every_answer: for a submission: rationales with each answer, 4 + 16 sequences instead of 4 + 4, whichever is right.

    Targets: `correct` (4 + 4 or 4 + 16,) int64, 1 at the right choice; with `every_answer` and no label all 0.
    """
    record = example.corpus.record(example.number)
    answers, rationales = record["input_ids_as"], record["input_ids_rs"]
    right_answer, right_rationale = right_choices(record, example.id, known=not every_answer)
    text = example.corpus.text_of(example.number)
    regions = _regions(example)

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
    return Sample(example.id, sequences, {"correct": np.array(correct, dtype=np.int64)})


def right_choices(record: Mapping[str, Any], name: str, *, known: bool = True) -> tuple[int, int]:
    """The numbers of VCR's right answer and rationale; -1 where they are not known and need not be.

    Raises:
        BadInput: they are not known, the question's name in the sentence.
    """
    right = int(record.get("qa_target", -1)), int(record.get("qar_target", -1))
    if known and min(right) < 0:
        raise BadInput(f"question {name!r} has no right answer and rationale (a test part?); it can be predicted, nothing else")
    return right


def _truth(record: dict[str, Any]) -> NDArray[np.int64]:
    target = record.get("target")
    return np.array([UNKNOWN if target is None else int(target)], dtype=np.int64)


def _regions(example: Example) -> Regions:
    """The regions that an example shows, VCR's annotated ones before the detected ones."""
    return _end_to_end([_regions_of(example.corpus, image) for image in example.images])


def _regions_of(corpus: Corpus, image: int) -> Regions:
    features, norm_bb = corpus.region_arrays(image)
    return features, norm_bb


def _end_to_end(pictures: Sequence[Sequence[NDArray[Any]]]) -> Regions:
    """Features and boxes, the first two arrays of each picture, of all pictures together; of one picture without a copy."""
    if len(pictures) == 1:
        return pictures[0][0], pictures[0][1]
    return np.concatenate([picture[0] for picture in pictures]), np.concatenate([picture[1] for picture in pictures])


def _sequence(example: Example, texts: Sequence[list[int]], regions: Regions, masked: NDArray[np.bool_] | None = None) -> TokenSequence:
    """Texts, each with a [SEP] behind it, and regions.

    Token types of several texts, their [SEP]s included: the first 0, then 2, 3. That is how UNITER's second stage of VCR numbers them;
    its fine-tuning gives the [SEP] between two texts the type of the second (`multiple_choice`).
    """
    text = example.corpus.text_of(example.number)
    if len(texts) == 1:
        return TokenSequence([text.cls_id, *texts[0], text.sep_id], *regions, masked)
    words, types = [text.cls_id], [0]
    for token_type, part in zip((0, 2, 3), texts, strict=False):
        words += [*part, text.sep_id]
        types += [token_type] * (len(part) + 1)
    return TokenSequence(words, *regions, masked, text_types=types)
