"""What a trained model says about a photograph, as values and in words."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.one_picture import answer_as_html

Photograph = str | os.PathLike[str] | NDArray[np.uint8]


@dataclass(frozen=True, eq=False, repr=False)
class Seen:
    """What all results hold: the question and what the model saw. A notebook shows it with the photograph.

    Attributes:
        image: the photograph as it was given.
        text: the text as it was given.
        regions: R regions of the photograph.
        source: the checkpoint that said so.
        class_names: of the detector, for what is shown; None where they are not known.
    """

    image: Photograph
    text: str
    regions: RegionFeatures
    source: str
    class_names: Sequence[str] | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return f"<{type(self).__name__} of {name_of(self.image)}, {text!r}: {in_words(self)}>"

    def _repr_html_(self) -> str:
        shown = self.regions.rows(np.array([self.region])) if isinstance(self, Grounding) else self.regions
        image = self.image if isinstance(self.image, np.ndarray) else os.fspath(self.image)
        return answer_as_html(self.text, in_words(self), shown, image, class_names=self.class_names or ())


@dataclass(frozen=True, eq=False, repr=False)
class Match(Seen):
    """Whether a text is about a photograph.

    Attributes:
        probability: from 0 to 1, by the head of image-text matching or of retrieval.
    """

    probability: float


@dataclass(frozen=True, eq=False, repr=False)
class Answer(Seen):
    """The answer to a question about a photograph.

    Attributes:
        answer: the best one.
        probability: its score from 0 to 1; answers are scored one by one, so scores do not sum to 1.
        best: the five best answers and their scores, best first.
    """

    answer: str
    probability: float
    best: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Classification(Seen):
    """The labels of a photograph and its text, or its score.

    Attributes:
        labels: those that apply: the likeliest one, or of a model of several labels all that are as likely as not; none of a score.
        probabilities: of every label by its name, likeliest first; of one label they sum to 1.
        score: the number, None where it predicts labels.
    """

    labels: tuple[str, ...]
    probabilities: dict[str, float]
    score: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Grounding(Seen):
    """Where in a photograph a phrase points.

    Attributes:
        region: row number of the region.
        box: (4,) float32 x0 y0 x1 y1, pixels of the upright photograph; of the unit square where its size is unknown.
        probabilities: (R,) float32 of all regions, summing to 1.
        zero_shot: nobody trained the model to point; it was asked how well the phrase matches each region alone.
    """

    region: int
    box: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    zero_shot: bool


@dataclass(frozen=True, eq=False, repr=False)
class Embedding(Seen):
    """A text and a photograph as vectors, each in the light of the other.

    Attributes:
        joint: (H,) float32, the pooled view of both together.
        words: (T, H) float32, of the word pieces, [CLS] first and [SEP] last.
        region_vectors: (R, H) float32, of the regions, in their order.
    """

    joint: NDArray[np.float32]
    words: NDArray[np.float32]
    region_vectors: NDArray[np.float32]


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Seen):
    """Which of several photographs a text is about; `image` and `regions` are the best one's.

    Attributes:
        images: the photographs as they were given.
        probabilities: (P,) float32, as `Match.probability`, in the order of `images`.
        order: (P,) int64, places in `images`, best first.
    """

    images: tuple[Photograph, ...]
    probabilities: NDArray[np.float32]
    order: NDArray[np.int64]


def in_words(result: Seen) -> str:
    """A result as one line."""
    match result:
        case Match():
            return f"match {result.probability:.3f}"
        case Answer():
            return ", ".join(f"{answer} {probability:.2f}" for answer, probability in result.best)
        case Classification(score=float() as score):
            return f"score {score:.4g}"
        case Classification():
            return ", ".join(f"{label} {result.probabilities[label]:.2f}" for label in result.labels) or "no label"
        case Grounding():
            way = " (each region matched alone: no model was trained to point)" if result.zero_shot else ""
            corners = ", ".join(f"{value:.6g}" for value in np.round(result.box, 1).tolist())
            return f"region {result.region} at {corners}, {result.probabilities[result.region]:.2f} of 1{way}"
        case Embedding():
            return f"{len(result.words)} words and {len(result.region_vectors)} regions, {len(result.joint)} numbers each"
        case Ranking():
            best = int(result.order[0])
            return f"best of {len(result.images)}: {name_of(result.image, best)} {result.probabilities[best]:.3f}"
    raise TypeError(f"{type(result).__name__} is no result of Understanding")


def name_of(image: Photograph, place: int = 0) -> str:
    """The file's name, or the place where there is no file."""
    return f"photograph {place}" if isinstance(image, np.ndarray) else Path(image).name
