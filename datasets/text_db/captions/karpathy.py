"""Karpathy's dataset_coco.json and dataset_flickr30k.json: images with their sentences and split (train, restval, val, test)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.storage.streams import id_of, json_items, object_of, text_of
from uniter.datasets.text_db.caption import Caption


def read_karpathy(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """The sentences of one part, or of all; several parts with commas between them ("train,restval").

    `counts` receives `images_without_caption` and `images_of_other_parts`.
    """
    if join:
        raise BadInput(f"{path} names its images itself; leave --join away")
    wanted = set(split.split(",")) if split is not None else None
    seen: set[str] = set()
    sentence_row = 0
    for row, value in enumerate(json_items(path, "images.item")):
        where = f"image {row} of {path}"
        image = object_of(value, where)
        part, name, sentences = image.get("split"), image.get("filename"), image.get("sentences")
        if not isinstance(part, str) or not isinstance(name, str) or not isinstance(sentences, list):
            raise BadInput(f"{where} lacks filename, split or sentences; expected Karpathy's dataset_*.json")
        seen.add(part)
        if wanted is not None and part not in wanted:
            counts["images_of_other_parts"] += 1
            sentence_row += len(sentences)
            continue
        if not sentences:
            counts["images_without_caption"] += 1
        coco = image.get("cocoid")
        origins = (("coco", id_of(coco, 0)),) if coco is not None else (("flickr", name.split("_")[0].split(".")[0]),)
        folder = image.get("filepath")
        image_name = f"{folder}/{name}" if isinstance(folder, str) and folder else name
        for sentence in sentences:
            item = object_of(sentence, f"a sentence of {where}")
            text = item.get("raw")
            if text is None and isinstance(item.get("tokens"), list):
                text = " ".join(map(str, item["tokens"]))
            yield Caption(id_of(item.get("sentid"), sentence_row, row_prefix), image_name, text_of(text, f"a sentence of {where}"), origins)
            sentence_row += 1
    for part in sorted((wanted or set()) - seen):
        raise WrongUsage(f"{path}: {unknown_name('split', part, seen)}")
