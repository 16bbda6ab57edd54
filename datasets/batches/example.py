"""One example as tasks see it: its texts, its regions, and the sample that is made of it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.errors import BadInput

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


def right_choices(record: Mapping[str, Any], name: str, *, known: bool = True) -> tuple[int, int]:
    """The numbers of VCR's right answer and rationale; -1 where they are not known and need not be.

    Raises:
        BadInput: they are not known, the question's name in the sentence.
    """
    right = int(record.get("qa_target", -1)), int(record.get("qar_target", -1))
    if known and min(right) < 0:
        raise BadInput(f"question {name!r} has no right answer and rationale (a test part?); it can be predicted, nothing else")
    return right


def regions_read(example: Example) -> Regions:
    """The regions that an example shows, VCR's annotated ones before the detected ones."""
    return end_to_end([regions_of(example.corpus, image) for image in example.images])


def regions_of(corpus: Corpus, image: int) -> Regions:
    features, norm_bb = corpus.region_arrays(image)
    return features, norm_bb


def end_to_end(pictures: Sequence[Sequence[NDArray[Any]]]) -> Regions:
    """Features and boxes, the first two arrays of each picture, of all pictures together; of one picture without a copy."""
    if len(pictures) == 1:
        return pictures[0][0], pictures[0][1]
    return np.concatenate([picture[0] for picture in pictures]), np.concatenate([picture[1] for picture in pictures])


def sequence_of(example: Example, texts: Sequence[list[int]], regions: Regions, masked: NDArray[np.bool_] | None = None) -> TokenSequence:
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
