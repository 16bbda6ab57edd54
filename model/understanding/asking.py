"""Asking trained models about photographs: do they match, what is the answer, where is it, which one.

The regions of a photograph come from a function that is handed in (`uniter.extract.RegionExtractor`, or any other), so that
nothing here knows of a detector.

What a reader would get wrong: a checkpoint can do what its head was trained for, and no more. A pre-trained run says whether text
and picture match (and so ranks), a retrieval run does that better, a VQA run answers, a RefCOCO run points. Only pointing has a
makeshift: without a RefCOCO run, a pre-trained model is shown each region alone and asked whether the phrase matches it, and the
result says so. It cannot compare regions, so "the left one" is beyond it. (On a made-up world a model whose matching had been learnt
found 98 % of "a red star" so, and 45 % by its transport plan between words and regions, where chance was 31 %.)
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch, collate
from uniter.datasets.batches.example import Sample, TokenSequence
from uniter.datasets.devices import computing_in, fitting_precision, usable_device
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.regions import RegionFeatures, pixel_boxes
from uniter.datasets.progress import Progress
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.view.contact_sheet import contact_sheet
from uniter.datasets.view.drawing import draw_regions, draw_weights
from uniter.datasets.view.labels import label_regions
from uniter.datasets.view.pictures import ByteImage, resized
from uniter.model.checkpoints.load import Checkpoint, load
from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.downstream import UniterForReferring, UniterForRetrieval
from uniter.model.tasks.own_labels import SCORE, given_labels, predictions_of
from uniter.model.tasks.table import made_by
from uniter.model.understanding.askable import ASKED_FOR, check_askable, check_detector, tokenizer_of
from uniter.model.understanding.looking import attention_to_regions
from uniter.model.understanding.pictures import SHOWN_PHOTOGRAPHS, SHOWN_REGIONS, SHOWN_WORDS, pixels
from uniter.model.understanding.results import (
    Answer,
    Classification,
    Embedding,
    Grounding,
    Match,
    Photograph,
    Ranking,
    Seen,
    in_words,
    name_of,
)

log = logging.getLogger(__name__)

RegionSource = Callable[[Sequence[Any]], list[RegionFeatures]]


BATCH_TOKENS = 8192  # word pieces and regions that go through a model together


PHOTOGRAPHS_AT_ONCE = 64  # whose regions are held in memory while many are ranked


BEST_ANSWERS = 5


class Understanding:
    """Trained models and a source of regions, ready to be asked.

    Args:
        regions: from photographs to their regions, in order; made with the detector that the models were trained on.
        checkpoints: runs, files or hub ids; what each can do follows from its head. A later one takes precedence.
        tokenizer: the models' vocabulary, where a checkpoint does not tell; otherwise that of the texts of its run, the vocabulary
            beside it, or `bert-base-cased` where its size fits.
        answers: the answers by number, or an `ans2label.json`, where a VQA checkpoint does not tell.
        device: "cpu", "cuda", "cuda:1" ...; None: a GPU where there is one. On a GPU that computes in bf16 it does.
        class_names: the detector's classes, for pictures; None: what `regions` says of itself.
        other_detector: regions of another detector than a model learnt from are meant; otherwise they are refused, where both are known.

    Raises:
        BadInput: a checkpoint cannot be read, has none of the heads, its tokenizer or answers are not known, or it learnt from another
            detector's regions.
    """

    def __init__(
        self,
        regions: RegionSource,
        *checkpoints: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        answers: str | os.PathLike[str] | Sequence[str] | None = None,
        device: str | None = None,
        class_names: Sequence[str] | None = None,
        other_detector: bool = False,
    ) -> None:
        self.regions = regions
        self.device = usable_device(device)
        self.precision = fitting_precision(self.device)
        self.class_names: Sequence[str] | None = class_names if class_names is not None else getattr(regions, "class_names", None)
        given = tokenizer if tokenizer is None or isinstance(tokenizer, Tokenizer) else Tokenizer.load(os.fspath(tokenizer))
        self._by_kind: dict[type, Checkpoint] = {}
        for path in checkpoints:
            found = load(os.fspath(path), tokenizer=given, answers=answers)
            check_askable(found)
            check_detector(found, getattr(regions, "origin", None), meant=other_detector)
            found.model.to(self.device)
            self._by_kind[type(found.model)] = found

    def source_of(self, result: type[Seen]) -> str:
        """The checkpoint that such results come from: `Match`, `Ranking`, `Answer`, `Grounding` or `Classification`.

        Raises:
            BadInput: none of those that were given can; the sentence says which could.
        """
        return self._model(result).source

    @property
    def _names(self) -> dict[str, Any]:
        return {"class_names": self.class_names}

    def __repr__(self) -> str:
        known = ", ".join(f"{one.source} ({kind.__name__})" for kind, one in self._by_kind.items()) or "no checkpoint"
        return f"<Understanding of {known} on {self.device}>"

    # --- asking ------------------------------------------------------------------------------------------------------------------

    def match(self, image: Photograph, text: str) -> Match:
        """How likely the text is about the photograph. Needs a pre-trained or a retrieval run.

        Raises:
            BadInput: no model can say, the photograph is not usable, it shows no regions, or the text is empty or too long.
        """
        return self.match_all([image], [text])[0]

    def answer(self, image: Photograph, question: str) -> Answer:
        """The answer to a question about the photograph. Needs a VQA run. Errors as for `match`."""
        return self.answer_all([image], [question])[0]

    def ground(self, image: Photograph, phrase: str) -> Grounding:
        """Where the phrase points. Needs a RefCOCO run, or makes do with a pre-trained one. Errors as for `match`."""
        return self.ground_all([image], [phrase])[0]

    def classify(self, image: Photograph, text: str = "") -> Classification:
        """The labels of the photograph and its text, or its score. Needs a run of own labels. Errors as for `match`, but for no text."""
        return self.classify_all([image], [text])[0]

    @torch.no_grad()
    def rank(self, images: Sequence[Photograph], text: str) -> Ranking:
        """The photographs by how well the text fits. Needs a pre-trained or a retrieval run. Errors as for `match`."""
        if not len(images):
            raise BadInput("there are no photographs to rank; give at least one")
        model = self._model(Ranking)
        scores: list[float] = []
        best: tuple[float, RegionFeatures | None] = (-math.inf, None)
        with Progress(len(images), unit="photographs", label="ranking", brief=True) as progress:
            for first in range(0, len(images), PHOTOGRAPHS_AT_ONCE):
                some = images[first : first + PHOTOGRAPHS_AT_ONCE]
                regions = self.regions(some)
                of_some = self._scores(model, some, [text] * len(some), regions)
                scores += of_some
                place = int(np.argmax(of_some))
                if best[1] is None or of_some[place] > best[0]:
                    best = of_some[place], regions[place]
                progress.update(len(some))
        assert best[1] is not None
        order = np.argsort(-np.array(scores), kind="stable")
        probabilities = np.array([_sigmoid(score) for score in scores], dtype=np.float32)
        return Ranking(images[int(order[0])], text, best[1], model.source, tuple(images), probabilities, order, **self._names)

    @torch.no_grad()
    def match_all(self, images: Sequence[Photograph], texts: Sequence[str]) -> list[Match]:
        """`match` of each photograph with the text of the same place, in batches."""
        model = self._model(Match)
        regions = self._regions(images, texts)
        scores = self._scores(model, images, texts, regions)
        return [
            Match(image, text, found, model.source, _sigmoid(score), **self._names)
            for image, text, found, score in zip(images, texts, regions, scores, strict=True)
        ]

    @torch.no_grad()
    def answer_all(self, images: Sequence[Photograph], questions: Sequence[str]) -> list[Answer]:
        """`answer` of each photograph with the question of the same place, in batches."""
        model = self._model(Answer)
        assert model.answers is not None
        regions = self._regions(images, questions)
        results: list[Answer] = []
        for batch in self._batches(model, images, questions, regions):
            with self._computing():
                scores = model.model.answers(batch)["scores"]
            scores_BA = torch.sigmoid(scores.float())
            best = scores_BA.topk(min(BEST_ANSWERS, scores_BA.shape[1]), dim=1)
            for values, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                named = tuple((model.answers[number], value) for number, value in zip(numbers, values, strict=True))
                place = len(results)
                seen = (images[place], questions[place], regions[place], model.source)
                results.append(Answer(*seen, *named[0], named, **self._names))
        return results

    @torch.no_grad()
    def classify_all(self, images: Sequence[Photograph], texts: Sequence[str] | None = None) -> list[Classification]:
        """`classify` of each photograph with the text of the same place (none: photographs alone), in batches."""
        model = self._model(Classification)
        told = [""] * len(images) if texts is None else texts
        regions = self._regions(images, told)
        kind, results = model.model.kind, list[Classification]()
        for batch in self._batches(model, images, told, regions):
            with self._computing():
                outputs = model.model.labels(batch)
            for values in predictions_of(kind, outputs):
                seen = images[len(results)], told[len(results)], regions[len(results)], model.source
                if kind == SCORE:
                    results.append(Classification(*seen, (), {}, values[0], **self._names))
                    continue
                assert model.answers is not None
                named = dict(sorted(zip(model.answers, values, strict=True), key=lambda pair: -pair[1]))
                given = {model.answers[number] for number in given_labels(values, kind)}
                results.append(Classification(*seen, tuple(name for name in named if name in given), named, None, **self._names))
        return results

    @torch.no_grad()
    def ground_all(self, images: Sequence[Photograph], phrases: Sequence[str]) -> list[Grounding]:
        """`ground` of each photograph with the phrase of the same place, in batches."""
        model = self._model(Grounding)
        regions = self._regions(images, phrases)
        trained = isinstance(model.model, UniterForReferring)
        scores = self._referring_scores(model, images, phrases, regions) if trained else self._scores_alone(model, images, phrases, regions)
        results: list[Grounding] = []
        for image, phrase, found, scores_R in zip(images, phrases, regions, scores, strict=True):
            region = int(scores_R.argmax())
            probabilities = torch.softmax(scores_R, dim=0).numpy()
            seen = (image, phrase, found, model.source)
            results.append(Grounding(*seen, region, _box(found, region), probabilities, not trained, **self._names))
        return results

    @torch.no_grad()
    def embed(self, images: Sequence[Photograph], texts: Sequence[str]) -> list[Embedding]:
        """The vectors of each photograph with the text of the same place, in batches: of both together, of each word, of each region.

        Any of the models will do; the one that was given last is asked. Texts without a photograph, or photographs without a text, are
        nothing that these models learnt. Errors as for `match`.
        """
        if not self._by_kind:
            raise BadInput("to give vectors takes a model, but no checkpoint was given; give a run, a file or a hub id")
        model = list(self._by_kind.values())[-1]
        regions = self._regions(images, texts)
        results: list[Embedding] = []
        for batch in self._batches(model, images, texts, regions):
            with self._computing():
                encoded = model.body(batch)
                joint_BH = model.body.pooled(encoded).float().cpu().numpy()
            words = encoded.text_TH.float().cpu().split(batch.text_lengths_B.tolist())
            found = encoded.regions_RH.float().cpu().split(batch.region_counts_B.tolist())
            for joint_H, words_TH, regions_RH in zip(joint_BH, words, found, strict=True):
                place = len(results)
                seen = (images[place], texts[place], regions[place], model.source)
                results.append(Embedding(*seen, joint_H, words_TH.numpy(), regions_RH.numpy(), **self._names))
        return results

    # --- pictures ----------------------------------------------------------------------------------------------------------------

    def picture(self, result: Seen, *, longest: int = 900) -> ByteImage:
        """A page to look at: text and answer, the photograph with its regions, and for each word the regions that it attends to.

        For `Grounding` the region alone is drawn; for `Ranking` the best photograph, and small ones of the others in their order.

        Args:
            result: of one of this object's calls.
            longest: pixels of the longer side of the photograph.

        Returns:
            (H, W, 3) uint8 BGR; `datasets.drawing.write_picture` writes it.
        """
        image = pixels(result.image, longest)
        labels = label_regions(result.regions, class_names=self.class_names)
        if isinstance(result, Grounding):
            chosen = [result.region]
            large = draw_regions(image, result.regions.rows(np.array(chosen)), [labels[result.region]])
        else:
            large = draw_regions(image, result.regions, labels, most=SHOWN_REGIONS)
        others: list[tuple[str, ByteImage]] = []
        if isinstance(result, Ranking):
            for place in result.order[1 : 1 + SHOWN_PHOTOGRAPHS].tolist():
                others.append(
                    (f"{name_of(result.images[place], place)} {result.probabilities[place]:.3f}", pixels(result.images[place], 300))
                )
        small = resized(image, 300)
        words = [(word, draw_weights(small, result.regions, labels, weights)) for word, weights in self.attention(result)[:SHOWN_WORDS]]
        return contact_sheet([result.text, in_words(result)], large, [("after it", others), ("what each word attends to", words)])

    def attention(self, result: Seen) -> list[tuple[str, NDArray[np.float32]]]:
        """Each word of the text and how much it attends to each region: (R,) float32 summing to 1, the last layer's heads averaged.

        Words that were split into pieces are put together again, their pieces averaged.
        """
        model = next((known for known in self._by_kind.values() if known.source == result.source), None)
        if model is None:
            raise ValueError(f"the result is of {result.source}, which was not given to this object")
        sequence = self._sequence(model, result.image, result.text, result.regions)
        attention_TR = attention_to_regions(model.body, collate([Sample(result.text, [sequence])]).to(self.device))
        words: list[tuple[str, list[NDArray[np.float32]]]] = []
        for piece, row in zip(tokenizer_of(model).tokens(sequence.input_ids[1:-1]), attention_TR[1:-1], strict=True):
            if piece.startswith("##") and words:
                words[-1] = (words[-1][0] + piece.removeprefix("##"), [*words[-1][1], row])
            else:
                words.append((piece, [row]))
        return [(word, np.mean(rows, axis=0, dtype=np.float32)) for word, rows in words]

    # --- batches -----------------------------------------------------------------------------------------------------------------

    def _computing(self) -> torch.autocast:
        return computing_in(self.precision, self.device)

    def _model(self, result: type[Seen]) -> Checkpoint:
        """The first of the kinds that give such a result which was given."""
        kinds, able = ASKED_FOR[result]
        for kind in kinds:
            if kind in self._by_kind:
                return self._by_kind[kind]
        given = ", ".join(known.source for known in self._by_kind.values()) or "no checkpoint"
        ways = " or ".join(made_by(kind) for kind in kinds)
        raise BadInput(f"to {able} takes a model that was trained for it, but {given} was given; make one with {ways}")

    def _regions(self, images: Sequence[Photograph], texts: Sequence[str]) -> list[RegionFeatures]:
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} photographs and {len(texts)} texts; expected one text a photograph")
        return self.regions(images)

    def _scores(
        self, model: Checkpoint, images: Sequence[Photograph], texts: Sequence[str], regions: Sequence[RegionFeatures]
    ) -> list[float]:
        """How well each text matches its photograph, as log-odds."""
        found: list[float] = []
        for batch in self._batches(model, images, texts, regions):
            ranked = isinstance(model.model, UniterForRetrieval)
            with self._computing():
                scores = (model.model.ranks if ranked else model.model.pairs)(batch)["scores"].float()
            found += (scores.squeeze(1) if ranked else scores[:, 1] - scores[:, 0]).tolist()
        return found

    def _scores_alone(
        self, model: Checkpoint, images: Sequence[Photograph], phrases: Sequence[str], regions: Sequence[RegionFeatures]
    ) -> list[Tensor]:
        """For each pair (R,) float32, how well the phrase matches each region, shown alone at its place."""
        results = []
        with Progress(len(images), unit="photographs", label="pointing", brief=True) as progress:
            for image, phrase, found in zip(images, phrases, regions, strict=True):
                self._sequence(model, image, phrase, found)  # what is wrong with the whole is said of the whole
                alone = [found.rows(slice(row, row + 1)) for row in range(len(found))]
                results.append(torch.tensor(self._scores(model, [image] * len(found), [phrase] * len(found), alone)))
                progress.update()
        return results

    def _referring_scores(
        self, model: Checkpoint, images: Sequence[Photograph], phrases: Sequence[str], regions: Sequence[RegionFeatures]
    ) -> list[Tensor]:
        """For each pair (R,) float32, the referring head's scores of its regions."""
        results: list[Tensor] = []
        for batch in self._batches(model, images, phrases, regions):
            with self._computing():
                scores = model.model.regions(batch)["scores"].cpu()
            results += [row[:count] for row, count in zip(scores, batch.region_counts_B.tolist(), strict=True)]
        return results

    def _batches(
        self, model: Checkpoint, images: Sequence[Photograph], texts: Sequence[str], regions: Sequence[RegionFeatures]
    ) -> Iterator[PackedBatch]:
        """Pairs in their order, as many together as `BATCH_TOKENS` allow."""
        samples: list[Sample] = []
        tokens = 0
        with Progress(len(images), unit="pairs", label="asking", brief=True) as progress:
            for place, (image, text, found) in enumerate(zip(images, texts, regions, strict=True)):
                sequence = self._sequence(model, image, text, found)
                length = len(sequence.input_ids) + len(found)
                if samples and tokens + length > BATCH_TOKENS:
                    yield collate(samples).to(self.device)
                    progress.update(len(samples))
                    samples, tokens = [], 0
                samples.append(Sample(str(place), [sequence]))
                tokens += length
            if samples:
                yield collate(samples).to(self.device)
                progress.update(len(samples))

    def _sequence(self, model: Checkpoint, image: Photograph, text: str, regions: RegionFeatures) -> TokenSequence:
        config, tokenizer = model.config, tokenizer_of(model)
        pieces = tokenizer.encode(text)
        if not pieces and not isinstance(model.model, UniterForClassification):
            raise BadInput(f"the text {text!r} holds no words; expected a caption, a question or a phrase")
        if pieces and all(piece == tokenizer.unk_id for piece in pieces):
            raise BadInput(f"the vocabulary of {model.source} knows no word of {text[:40]!r}; ask in the language that it was trained in")
        if len(pieces) + 2 > config.max_position_embeddings:
            raise BadInput(
                f"the text {text[:40]!r}... has {len(pieces)} word pieces, but {model.source} reads {config.max_position_embeddings - 2} "
                "at most; shorten it"
            )
        name = "the photograph" if isinstance(image, np.ndarray) else os.fspath(image)
        if not len(regions):
            raise BadInput(f"{name}: the detector found no regions, of which a model needs at least one; lower the detector's threshold")
        if regions.features.shape[1] != config.image_feature_size:
            raise BadInput(
                f"{name}: its regions' features are {regions.features.shape[1]} wide, but {model.source} was trained on "
                f"{config.image_feature_size}; use its detector"
            )
        ids = [tokenizer.cls_id, *pieces, tokenizer.sep_id]
        return TokenSequence(ids, np.asarray(regions.features), np.asarray(regions.norm_bb))


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def _box(regions: RegionFeatures, region: int) -> NDArray[np.float32]:
    if regions.boxes is not None:
        return np.asarray(regions.boxes[region], dtype=np.float32)
    corners: NDArray[np.float32] = pixel_boxes(np.asarray(regions.norm_bb[region : region + 1]), regions.size or (1, 1))[0]
    return corners
