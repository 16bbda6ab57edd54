"""One example as tasks see it: its texts, its regions, and the sample that is made of it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB

UNKNOWN = -100  # a target that cross-entropy leaves out

REGION_FIELDS = ("features", "norm_bb")
Regions = tuple[NDArray[np.floating], NDArray[np.floating]]  # features (N, D) and norm_bb (N, 6); may be views of the database


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


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a corpus, shown with these pictures (rows of the region database), its own ones if `matched`."""

    corpus: Corpus
    number: int
    images: tuple[int, ...]
    matched: bool = True

    @property
    def id(self) -> str:
        """Its id in the text database, for messages and submissions."""
        return self.corpus.example_id(self.number)

    def read(self, fields: tuple[str, ...] = REGION_FIELDS) -> "Shown":
        """What stands on disk of it, words and regions; `fields` are the arrays wanted of each picture, features and boxes first."""
        corpus, number = self.corpus, self.number
        return Shown(self.id, corpus.text_of(number), corpus.record(number), [corpus.region_arrays(image, fields) for image in self.images])


@dataclass(frozen=True, slots=True)
class Shown:
    """An example as it was read.

    Attributes:
        id: the example's.
        text: its text database, which knows the special word pieces.
        record: its record there.
        pictures: of each picture it is shown with the arrays that were asked for and that the picture has; may be views of the database.
    """

    id: str
    text: TextDB
    record: dict[str, Any]
    pictures: list[list[NDArray[Any]]]

    def words(self) -> list[list[int]]:
        """Its text without [CLS] and [SEP]; of VCR's three the question."""
        return [self.record["input_ids"]]

    def told(self) -> list[list[int]]:
        """What pre-training reads, without [CLS] and [SEP]: its text, or VCR's question, right answer and right rationale.

        Raises:
            BadInput: a VCR question of a test part, whose right choices nobody knows.
        """
        if "input_ids_as" not in self.record:
            return self.words()
        answer, rationale = right_choices(self.record, self.id)
        return [self.record["input_ids"], self.record["input_ids_as"][answer], self.record["input_ids_rs"][rationale]]

    def regions(self) -> Regions:
        """Features and boxes of all its pictures end to end, VCR's annotated ones first; of one picture without a copy."""
        if len(self.pictures) == 1:
            return self.pictures[0][0], self.pictures[0][1]
        return np.concatenate([picture[0] for picture in self.pictures]), np.concatenate([picture[1] for picture in self.pictures])

    def sequence(
        self, texts: Sequence[list[int]], regions: Sequence[NDArray[Any]], masked: NDArray[np.bool_] | None = None
    ) -> TokenSequence:
        """Texts, each with a [SEP] behind it, and regions (features and boxes, more is not looked at).

        Token types of several texts, their [SEP]s included: the first 0, then 2, 3. That is how UNITER's second stage of VCR numbers
        them; its fine-tuning gives the [SEP] between two texts the type of the second (`multiple_choice`).
        """
        text, features, norm_bb = self.text, regions[0], regions[1]
        if len(texts) == 1:
            return TokenSequence([text.cls_id, *texts[0], text.sep_id], features, norm_bb, masked)
        words, types = [text.cls_id], [0]
        for token_type, part in zip((0, 2, 3), texts, strict=False):
            words += [*part, text.sep_id]
            types += [token_type] * (len(part) + 1)
        return TokenSequence(words, features, norm_bb, masked, text_types=types)


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
