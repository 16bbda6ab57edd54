"""VCR: `{train,val,test}.jsonl` and the metadata beside the pictures; a question, four answers, four rationales.

Texts are lists of words in which a list of numbers stands for objects of the picture. Here an object becomes the *tag* of its class, one
new word piece for each: [[person]] ... [[toothbrush]] for COCO's 80 classes in the order of their numbers, and [[object]] for any
other, 81 in all. They are the last 81 lines of the text database's vocab.txt, so tag k has the id (size of the vocabulary) + k.
Which tag UNITER's own 81 rows stand for was never published, so published VCR checkpoints need published VCR text databases.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.streams import json_lines, object_of, whole_json
from uniter.datasets.text_db.annotations.fields import list_field, no_split, text_field
from uniter.datasets.text_db.caption import Caption

CHOICES: Final = 4


COCO_CLASSES: Final = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant"),
    *("stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat"),
    *("baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave"),
    *("oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)


OTHER: Final = "object"


_SPELLINGS: Final = {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant"} | {
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def _tag_word(name: str) -> str:
    return f"[[{name.replace(' ', '_')}]]"


TAG_WORDS: Final = tuple(map(_tag_word, (*COCO_CLASSES, OTHER)))


_KNOWN: Final = frozenset(COCO_CLASSES)


def read_vcr(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str]) -> Iterator[Caption]:
    """The questions: input_ids (question), input_ids_as, input_ids_rs (four each), qa_target, qar_target (-1 where there is no label).

    The images are (annotated boxes, detected boxes): "vcr_gt_train/NAME.jpg" and "vcr_train/NAME.jpg" for one picture, so that the
    published keys `{parent}_{stem}.npz` differ while the stem is the picture's own.

    Raises:
        BadInput: a line is no VCR question, or a number in a text has no object.
    """
    no_split(path, split, "VCR")
    for where, entry in json_lines(path):
        example = text_field(entry, "annot_id", where)
        part = example.partition("-")[0]
        stem = PurePosixPath(text_field(entry, "img_fn", where)).stem
        objects = list_field(entry, "objects", where)
        answers = _choices(entry, "answer_choices", objects, where)
        rationales = _choices(entry, "rationale_choices", objects, where)
        fields = {
            "qa_target": _label(entry, "answer_label", where),
            "qar_target": _label(entry, "rationale_label", where),
            "objects": objects,
        }
        question = _words(entry.get("question"), objects, f"the question of {where}")
        images = (f"vcr_gt_{part}/{stem}.jpg", f"vcr_{part}/{stem}.jpg")
        yield Caption(example, images, question, (), fields, {"input_ids_as": answers, "input_ids_rs": rationales})


def side_files(paths: Sequence[Path], *, split: str | None, join: Sequence[Path]) -> dict[str, Any]:
    """With the folder of images joined: `boxes.json`, COCO-style, the annotated boxes of these pictures for `uniter-extract --boxes`."""
    if not join:
        return {}
    if len(join) > 1 or not join[0].is_dir():
        raise BadInput(
            f"{join[0]} was given with --join; --task vcr takes the folder of VCR's images and metadata (vcr1images/), or nothing"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    seen: set[str] = set()
    for path in paths:
        for where, entry in json_lines(path):
            name = text_field(entry, "img_fn", where)
            if name in seen:
                continue
            seen.add(name)
            metadata = _metadata(join[0], text_field(entry, "metadata_fn", where), where)
            boxes = list_field(metadata, "boxes", f"the metadata of {name}")
            if len(boxes) != len(list_field(entry, "objects", where)):
                raise BadInput(
                    f"{where} names {len(entry['objects'])} objects, the metadata of {name} have {len(boxes)} boxes; of one set?"
                )
            images.append({"id": len(images), "file_name": name, "height": metadata.get("height"), "width": metadata.get("width")})
            for place, box in enumerate(boxes):
                if not isinstance(box, list) or len(box) < 4 or not all(isinstance(value, int | float) for value in box[:4]):
                    raise BadInput(f"box {place} in the metadata of {name} is {str(box)[:60]}; expected x0, y0, x1, y1 and a score")
                x0, y0, x1, y1 = box[:4]
                annotations.append({"id": len(annotations), "image_id": len(images) - 1, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    return {"boxes.json": {"images": images, "annotations": annotations}}


def question_and_answer(record: Mapping[str, Any]) -> int:
    """Word pieces of the question and the longest answer (UNITER's id2len_qa)."""
    return len(record["input_ids"]) + max(map(len, record["input_ids_as"]))


def question_answer_and_rationale(record: Mapping[str, Any]) -> int:
    """Word pieces of the question, the longest answer and the longest rationale (UNITER's id2len_qar)."""
    return question_and_answer(record) + max(map(len, record["input_ids_rs"]))


def tag_of(name: str) -> str:
    """The word that stands for an object of this class."""
    bare = _SPELLINGS.get(name, name)
    return _tag_word(bare if bare in _KNOWN else OTHER)


def _choices(entry: dict[str, Any], name: str, objects: list[Any], where: str) -> list[str]:
    choices = list_field(entry, name, where)
    if len(choices) != CHOICES:
        raise BadInput(f"{where} has {len(choices)} {name}; expected {CHOICES}")
    return [_words(choice, objects, f"choice {place} of {name} of {where}") for place, choice in enumerate(choices)]


def _words(tokens: Any, objects: list[Any], where: str) -> str:
    if not isinstance(tokens, list) or not tokens:
        raise BadInput(f"{where} is {str(tokens)[:40]!r}; expected a list of words and lists of object numbers")
    words = []
    for token in tokens:
        if isinstance(token, str):
            words.append(token)
            continue
        if not isinstance(token, list) or not all(type(number) is int and 0 <= number < len(objects) for number in token):
            raise BadInput(f"{where} refers to {str(token)[:40]} where the picture has {len(objects)} objects")
        words.append(" and ".join(tag_of(str(objects[number])) for number in token))
    return " ".join(words)


def _label(entry: dict[str, Any], name: str, where: str) -> int:
    label = entry.get(name)
    if label is None:
        return -1
    if type(label) is not int or not 0 <= label < CHOICES:
        raise BadInput(f"{where} has the {name} {shown(label)}; expected 0 to {CHOICES - 1}")
    return label


def _metadata(folder: Path, name: str, where: str) -> dict[str, Any]:
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise BadInput(f"{where} has the metadata_fn {name[:60]!r}; expected a name below the folder of images")
    return object_of(whole_json(path, "VCR's metadata", most_bytes=16 << 20), str(path))
