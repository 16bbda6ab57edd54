"""Made-up region and text databases whose captions name what the regions hold, so that learning can be seen in seconds.

A region's feature is the sum of a vector of its shape, one of its colour and noise; no pixel is involved. Loaded by the fixture
`made_up` of tests/conftest.py.
"""

import random
from pathlib import Path

import numpy as np

from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.text_db.annotations.table import ANNOTATIONS
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
TAGS = tuple(f"[[{shape}]]" for shape in SHAPES)

VE_LABELS = {"contradiction": 0, "entailment": 1, "neutral": 2}


class World:
    """The looks of a world: the same seed gives the same ones, so that parts made separately belong together.

    Args:
        width: columns of a feature.
        seed: of the looks.
        noise: deviation of a feature's noise, beside looks of deviation 1.
    """

    def __init__(self, *, width: int = 32, seed: int = 0, noise: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        self.width, self.noise = width, noise
        self.shape_looks = rng.normal(size=(len(SHAPES), width))
        self.colour_looks = rng.normal(size=(len(COLOURS), width))
        self.ground_look = rng.normal(size=width)
        self.things: dict[str, list[tuple[int, int]]] = {}

    def write(
        self,
        folder: Path,
        *,
        pictures: int = 40,
        captions: int = 2,
        seed: int = 1,
        soft_labels: bool = True,
        regions: int = 6,
        tokenizer: Tokenizer | None = None,
        prefix: str = "scene",
    ) -> tuple[Path, Path]:
        """Write `folder/texts.db` and `folder/regions.lmdb`; return their paths.

        Args:
            pictures, captions: how many pictures, and captions of each.
            seed: of what is on the pictures.
            soft_labels: whether the detector's distributions are kept.
            regions: of each picture; some show nothing.
            tokenizer: WordPiece vocabulary; learned from the captions' words by default.
        """
        texts, images = folder / "texts.db", folder / "regions.lmdb"
        rng, numbers = random.Random(seed), np.random.default_rng(seed)
        found: list[Caption] = []
        store = UnitStore(images, settings={"made_up": True, "seed": seed})
        writer = store.unit(0)
        assert writer is not None
        with writer:
            for picture in range(pictures):
                key = f"{prefix}_{seed}_{picture:05d}"
                things = [(rng.randrange(len(SHAPES)), rng.randrange(len(COLOURS))) for _ in range(rng.choice((1, 2, 2, 3)))]
                self.things[key] = things
                record = self._regions(things, numbers, count=regions, soft_labels=soft_labels)
                writer.put(key, encode_record(record, key=key), regions=len(record))
                for number in range(captions):
                    found.append(Caption(f"{key}#{number}", key, _caption(things, rng)))
            writer.commit()
            writer.complete()
        header = {"feature_width": self.width, "label_classes": len(SHAPES) + 1 if soft_labels else 0, "class_names": list(SHAPES)}
        assert store.finish(units=1, header=header)
        build_text_db(found, texts, tokenizer=tokenizer or vocabulary(), settings={"made_up": True, "seed": seed})
        return texts, images

    def write_task(self, folder: Path, task: str, *, seed: int = 1, count: int = 200) -> Path:
        """Write `folder/TASK.db`, examples of a down-stream task over the pictures written before; return its path."""
        rng, keys = random.Random(seed), sorted(key for key in self.things if not key.startswith("found"))
        regions = ImageDB(folder / "regions.lmdb")
        examples = []
        for number in range(count):
            image: str | tuple[str, ...] = rng.choice(keys)
            texts = None
            shape, colour = rng.choice(self.things[str(image)])
            fields: dict[str, object] = {}
            if task in ("vqa", "gqa", "classify"):
                text = f"what is with the {SHAPES[shape]}"
                fields["target"] = {"labels": [colour], "scores": [1.0]}
            elif task == "ve":
                named = rng.randrange(3)
                text = f"there is a {COLOURS[(colour + named) % len(COLOURS)]} {SHAPES[shape]}"
                fields["target"] = {"labels": [0 if named else 1], "scores": [1.0]}
            elif task == "nlvr2":
                image = (str(image), rng.choice(keys))
                holds = any(there == shape for there, _ in self.things[image[1]])
                text = f"there is a {SHAPES[shape]}"
                fields["target"] = int(holds)
            elif task == "refcoco":
                boxes, region = regions[str(image)].boxes, self._region_of(regions[str(image)], shape, colour)
                text = f"the {COLOURS[colour]} {SHAPES[shape]}"
                place = keys.index(str(image))
                fields = {
                    "sent_id": number,
                    "ref_id": number,
                    "image_id": place,
                    "ann_id": 100 * place + region,
                    "bbox": _xywh(boxes[region]),
                }
            elif task == "flickr30k-entities":
                boxes, region = regions[str(image)].boxes, self._region_of(regions[str(image)], shape, colour)
                text = f"the {COLOURS[colour]} {SHAPES[shape]}"
                fields = {"image_id": str(image), "entity": str(number), "boxes": [_xywh(boxes[region])], "size": [440, 440]}
            elif task == "vcr":
                image = (str(image), f"found_{image}")
                text = f"what is with the {SHAPES[shape]}"
                others = rng.sample([place for place in range(len(COLOURS)) if place != colour], 3)
                answer, reason = rng.randrange(4), rng.randrange(4)
                fields = {"qa_target": answer, "qar_target": reason}
                named = [[*others[:right], colour, *others[right:]] for right in (answer, reason)]
                texts = {
                    "input_ids_as": [f"[[{SHAPES[shape]}]] {COLOURS[place]}" for place in named[0]],
                    "input_ids_rs": [f"there is {COLOURS[place]} with the [[{SHAPES[shape]}]]" for place in named[1]],
                }
            else:
                text = _caption(self.things[str(image)], rng)
            name = str(number) if task != "nlvr2" else f"dev-{number // 4}-{number % 4}-{number % 2}"
            examples.append(Caption(name, image, text, (), fields, texts))
        listed = [
            {"id": place, "file_name": key, "height": 440, "width": 440, "ann_ids": [100 * place + row for row in range(len(regions[key]))]}
            for place, key in enumerate(keys if task == "refcoco" else ())
        ]
        colours = {colour: place for place, colour in enumerate(COLOURS)}
        answers = {"vqa": colours, "gqa": colours, "classify": colours, "ve": VE_LABELS}.get(task)
        kind = {"labels.json": {"kind": "one"}} if task == "classify" else {}
        build_text_db(
            examples,
            folder / f"{task}.db",
            tokenizer=vocabulary().with_words(TAGS) if task == "vcr" else vocabulary(),
            settings={"made_up": True, "task": task, "seed": seed},
            lengths=ANNOTATIONS[task].lengths if task == "vcr" else None,
            side_files=lambda: {"images.json": listed} if listed else {} if answers is None else {"ans2label.json": answers} | kind,
        )
        return folder / f"{task}.db"

    def _region_of(self, regions: RegionFeatures, shape: int, colour: int) -> int:
        """The first row that looks like this."""
        away = np.abs(regions.features - (self.shape_looks[shape] + self.colour_looks[colour]).clip(-1)).sum(axis=1)
        return int((away < 1.5 * away.min()).argmax())

    def _regions(self, things: list[tuple[int, int]], rng: np.random.Generator, *, count: int, soft_labels: bool) -> RegionFeatures:
        features, boxes, labels = [], [], []
        for number in range(count):
            x, y = rng.uniform(0, 300, size=2)
            boxes.append([x, y, x + rng.uniform(20, 120), y + rng.uniform(20, 120)])
            label = np.full(len(SHAPES) + 1, 0.02)
            if number < len(things) or rng.random() < 0.5:
                shape, colour = things[number % len(things)]
                look = self.shape_looks[shape] + self.colour_looks[colour]
                label[shape + 1] = 1
            else:
                look = self.ground_look
                label[0] = 1
            features.append(look + self.noise * rng.normal(size=self.width))
            labels.append(label / label.sum())
        pixels = np.array(boxes, dtype=np.float32)
        order = rng.permutation(count)
        return RegionFeatures(
            features=np.maximum(np.array(features, dtype=np.float32), -1)[order],
            norm_bb=normalised_boxes(pixels, (440, 440))[order],
            conf=np.linspace(0.9, 0.3, count, dtype=np.float32),
            boxes=pixels[order],
            soft_labels=np.array(labels, dtype=np.float32)[order] if soft_labels else None,
            size=(440, 440),
        )


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def vocabulary() -> Tokenizer:
    """WordPiece of this world's words."""
    return Tokenizer.learn([" ".join(COLOURS + SHAPES), "a and the there is with picture what ."], size=200)


def _caption(things: list[tuple[int, int]], rng: random.Random) -> str:
    named = [f"a {COLOURS[colour]} {SHAPES[shape]}" for shape, colour in things]
    rng.shuffle(named)
    opening = rng.choice(("", "there is ", "the picture with "))
    return f"{opening}{' and '.join(named)}"
