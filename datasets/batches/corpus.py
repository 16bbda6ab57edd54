"""A corpus: the examples of one or several text databases together with the pictures they speak of.

An example here is a number 0..N-1 in the order of the databases; what is too long, empty or without a picture has no number.
Text lengths are word pieces without [CLS] and [SEP], as the databases count them; `lengths` counts what a batch holds.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import open_image_dbs
from uniter.datasets.image_db.records import DEFAULT_FIELDS
from uniter.datasets.image_db.regions import RegionFeatures, has_positions
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.annotations.table import may_lack_text
from uniter.datasets.text_db.annotations.vcr import TAG_WORDS

SPECIAL_TOKENS = 2

_ANNOTATED, _DETECTED = "visual_grounding_coco_gt_", "visual_grounding_det_coco_"


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Examples with their pictures. Picklable; opens its databases in each process by itself.

    Attributes:
        name: what the log calls it.
        texts: the text databases.
        images: the region databases, as one.
        database_N: (N,) int16, the text database of each example.
        row_N: (N,) int32, its row there.
        text_lengths_N: (N,) int32, word pieces without [CLS] and [SEP].
        image_rows_NK: (N, K) int32, the rows of its K pictures in `images` (1, or 2 for NLVR2 and VCR).
        omitted: what was left out: reason -> (M, 2) int32, the text database and the row of each.
    """

    name: str
    texts: Sequence[TextDB]
    images: ImageDB
    database_N: NDArray[np.int16]
    row_N: NDArray[np.int32]
    text_lengths_N: NDArray[np.int32]
    image_rows_NK: NDArray[np.int32]
    omitted: Mapping[str, NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def left_out(self) -> dict[str, int]:
        """How many examples were left out, by reason."""
        return {reason: len(rows) for reason, rows in self.omitted.items()}

    def left_out_ids(self) -> dict[str, list[str]]:
        """The ids of what was left out, by reason."""
        return {reason: [self.texts[one].ids[row] for one, row in rows.tolist()] for reason, rows in self.omitted.items()}

    @property
    def has_soft_labels(self) -> bool:
        """Whether regions come with the detector's distribution over its classes, which MRC and MRC-KL learn from."""
        return self.images.label_classes > 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each example with its own pictures, [CLS] and [SEP] counted."""
        return self.lengths_with(self.image_rows_NK)

    def lengths_with(self, image_rows_NK: NDArray[np.int32]) -> NDArray[np.int64]:
        """(N,) tokens of each example if it is shown the pictures `image_rows_NK`, (N, K)."""
        regions: NDArray[np.int64] = np.asarray(self.images.region_counts, dtype=np.int64)[image_rows_NK].sum(axis=1)
        return np.asarray(regions + self.text_lengths_N + SPECIAL_TOKENS, dtype=np.int64)

    def text_of(self, example: int) -> TextDB:
        """The text database that the example stands in."""
        return self.texts[0] if len(self.texts) == 1 else self.texts[int(self.database_N[example])]

    def record(self, example: int) -> dict[str, Any]:
        """The text record of an example, by its number in the corpus."""
        return self.text_of(example).record(int(self.row_N[example]))

    def example_id(self, example: int) -> str:
        """The id of an example in its text database, by its number in the corpus."""
        return self.text_of(example).ids[int(self.row_N[example])]

    def regions(self, image_row: int, *, fields: Sequence[str] = DEFAULT_FIELDS) -> RegionFeatures:
        """One picture's regions; arrays may be views of the database and must be copied before they are changed."""
        return self.images.read_row(image_row, fields=fields)

    def region_arrays(self, image_row: int, fields: tuple[str, ...] = DEFAULT_FIELDS) -> list[NDArray[Any]]:
        """`regions` as bare arrays, those of `fields` that the picture has (`ImageDB.read_arrays`): what batches are made of."""
        return self.images.read_arrays(image_row, fields)

    def take(self, examples: NDArray[np.integer]) -> "Corpus":
        """The corpus of these examples only, (M,) numbers, in their order."""
        return replace(
            self,
            database_N=self.database_N[examples],
            row_N=self.row_N[examples],
            text_lengths_N=self.text_lengths_N[examples],
            image_rows_NK=self.image_rows_NK[examples],
        )

    def without(self, wrong_N: NDArray[np.bool_], reason: str) -> "Corpus":
        """The corpus without some of its examples, which count as left out for that reason."""
        if not wrong_N.any():
            return self
        rows = np.stack([self.database_N[wrong_N].astype(np.int32), self.row_N[wrong_N]], axis=1)
        return replace(self.take(np.flatnonzero(~wrong_N)), omitted={**self.omitted, reason: rows})

    def without_positions(self, most: int) -> tuple[int, int, int]:
        """Of how many pictures it is not known where their regions are, of how many that were looked at, and how many there are.

        Args:
            most: so many are looked at, from all over the corpus: a record that is only looked at is read from the disk all the same.
        """
        rows = np.unique(self.image_rows_NK)
        chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]
        missing = sum(not has_positions(self.regions(row, fields=("norm_bb",))) for row in chosen.tolist())
        return missing, len(chosen), len(rows)

    def hold_out(self, images: int, *, seed: int) -> tuple["Corpus", "Corpus"]:
        """Split by picture, so that no held-out picture was seen with another text: (the rest, the part of `images` pictures)."""
        rows = np.unique(self.image_rows_NK)
        if not 0 < images < len(rows):
            raise BadInput(f"corpus {self.name!r} has {len(rows)} pictures, so {images} cannot be held out; give a validation database")
        keys = self.images.keys_list
        by_hash = sorted(rows.tolist(), key=lambda row: hashlib.sha256(f"{seed}/{keys[row]}".encode()).digest())
        held_out = np.isin(self.image_rows_NK, np.array(by_hash[:images])).any(axis=1)
        return self.take(np.flatnonzero(~held_out)), self.take(np.flatnonzero(held_out))

    def sample_of(self, count: int, *, seed: int) -> "Corpus":
        """At most `count` examples, drawn by `seed`, in corpus order."""
        if count >= len(self):
            return self
        return self.take(np.array(sorted(random.Random(seed).sample(range(len(self)), count)), dtype=np.int64))


def open_corpus(
    name: str,
    texts: Sequence[str | Path],
    images: Sequence[str | Path],
    *,
    max_text_length: int = 60,
    image_options: Mapping[str, Any] | None = None,
) -> Corpus:
    """Open databases and choose the examples.

    Args:
        name: what the log calls it.
        texts, images: paths of text and region databases; any text may speak of any image.
        max_text_length: longer texts (word pieces without [CLS] and [SEP]) are left out; -1 keeps all.
        image_options: which regions to take from published databases (`conf_th`, `min_bb`, `max_bb`, `num_bb`), `allow_partial`,
            `readahead`; the last two hold for the texts as well.

    Raises:
        BadInput: no example is left; the sentence says why.
    """
    if not texts or not images:
        raise BadInput(f"corpus {name!r} needs at least one text database (--text) and one region database (--images)")
    refuse_swapped(texts, images)
    options = dict(image_options or {})
    both = {name: options[name] for name in ("allow_partial", "readahead") if name in options}
    return gather([TextDB(path, **both) for path in texts], open_image_dbs(list(images), **options), name, max_text_length)


def refuse_swapped(texts: Sequence[str | Path], images: Sequence[str | Path]) -> None:
    """Raise BadInput where a region database stands among the texts, or a text database among the images."""
    wrong = [f"{path} holds regions and was given as --text" for path in texts if _kind(Path(path)) == "regions"]
    wrong += [f"{path} holds texts and was given as --images" for path in images if _kind(Path(path)) == "text"]
    if wrong:
        raise BadInput(f"{'; '.join(wrong)}: were --text and --images swapped?")


def _kind(path: Path) -> str | None:
    """What one of our databases says it is: "text" or "regions"; None of others."""
    for name in ("header.json", "settings.json"):
        if (path / name).is_file():
            found = read_json_object(path / name).get("kind")
            return found if isinstance(found, str) else None
    return None


def gather(texts: Sequence[TextDB], images: ImageDB, name: str, max_text_length: int = 60) -> Corpus:
    """The corpus of opened databases; see `open_corpus`."""
    if not len(images):
        raise BadInput(f"corpus {name!r}: its region databases hold no image; extract some, or give others (--images)")
    omitted: dict[str, list[NDArray[np.int32]]] = {"too long": [], "empty": [], "without image": [], "image without regions": []}
    database_parts: list[NDArray[np.int16]] = []
    row_parts: list[NDArray[np.int32]] = []
    length_parts: list[NDArray[np.int32]] = []
    image_parts: list[NDArray[np.int32]] = []
    counts = np.asarray(images.region_counts)
    for number, text in enumerate(texts):
        lengths = np.asarray(text.lengths, dtype=np.int32)
        # Each picture is looked up once, however many texts speak of it.
        places = _places(images, text.image_keys)
        pictures = places[text.image_numbers] if len(lengths) else np.empty((0, 1), dtype=np.int32)
        if images.has_pairs and pictures.shape[1] == 2:  # VCR's second picture is the detected regions, under whatever key
            pictures[:, 1] = _places(images, text.image_keys, detected=True)[text.image_numbers[:, 1]]
        keep = np.ones(len(lengths), dtype=np.bool_)
        for reason, wrong in (
            ("empty", (lengths < 1) & (not may_lack_text(text.meta.get("task")))),
            ("too long", (lengths > max_text_length) & (max_text_length >= 0)),
            ("without image", (pictures < 0).any(axis=1)),
            ("image without regions", (counts[pictures] < 1).any(axis=1)),
        ):
            gone = np.flatnonzero(keep & wrong).astype(np.int32)
            if len(gone):
                omitted[reason].append(np.stack([np.full(len(gone), number, dtype=np.int32), gone], axis=1))
            keep &= ~wrong
        rows = np.flatnonzero(keep).astype(np.int32)
        if not len(rows):
            continue
        database_parts.append(np.full(len(rows), number, dtype=np.int16))
        row_parts.append(rows)
        length_parts.append(lengths[rows])
        image_parts.append(pictures[rows])
    if not row_parts:
        counts_out = {reason: sum(map(len, parts)) for reason, parts in omitted.items() if parts}
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts_out.items()) or "the text databases are empty"
        raise BadInput(
            f"corpus {name!r} has no example to train on ({reasons}); were the texts built for these images (uniter-build-db --images)?"
        )
    widths = {part.shape[1] for part in image_parts}
    if len(widths) > 1:
        raise BadInput(f"corpus {name!r} mixes texts about {min(widths)} and about {max(widths)} pictures; make them two corpora")
    return Corpus(
        name=name,
        texts=tuple(texts),
        images=images,
        database_N=np.concatenate(database_parts),
        row_N=np.concatenate(row_parts),
        text_lengths_N=np.concatenate(length_parts),
        image_rows_NK=np.concatenate(image_parts),
        omitted={reason: np.concatenate(parts) for reason, parts in omitted.items() if parts},
    )


def _places(images: ImageDB, keys: Sequence[str], *, detected: bool = False) -> NDArray[np.int32]:
    """The row of each picture, -1 where it is not there."""
    rows = images.rows_of(keys, detected=detected)
    # Published RefCOCO texts name the record of annotated boxes; the same picture's detected ones have a key of their own.
    missing = [row for row in np.flatnonzero(rows < 0).tolist() if _ANNOTATED in keys[row]]
    if missing:
        rows[missing] = images.rows_of([keys[row].replace(_ANNOTATED, _DETECTED) for row in missing])
    return rows.astype(np.int32)


def tells_choices(text: TextDB) -> bool:
    """Whether these are VCR's texts."""
    return len(text) > 0 and "input_ids_as" in text.record(0)


def special_tokens(corpus: Corpus) -> int:
    """[CLS] and [SEP]s of a text that is read; VCR's question, answer and rationale have a [SEP] each."""
    return 2 * SPECIAL_TOKENS if any(map(tells_choices, corpus.texts)) else SPECIAL_TOKENS


def vocabulary_of(corpus: Corpus) -> int:
    """The word pieces that a model of these texts needs, VCR's object tags counted."""
    # Ours say which words they added; published VCR databases do not, but always have UNITER's 81.
    return max(text.v_range[1] + len(text.meta.get("added_words", TAG_WORDS if tells_choices(text) else ())) for text in corpus.texts)


def check_both_kinds(corpus: Corpus) -> None:
    """Raise BadInput unless the annotated and the detected regions of VCR's pictures are told apart by their keys."""
    same = corpus.image_rows_NK[:, 0] == corpus.image_rows_NK[:, 1]
    if bool(same.any()):
        row = int(corpus.image_rows_NK[same][0, 0])
        raise BadInput(
            f"corpus {corpus.name!r}: {corpus.images.keys_list[row]!r} is both the annotated and the detected regions of a picture; "
            "name the databases as --images 'ANNOTATED;DETECTED'"
        )
