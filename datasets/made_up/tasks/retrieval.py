"""Captions of made-up scenes, as Karpathy's splits publish them.

What a reader would get wrong: the held-out scenes become both "val" and "test", every second one each.
"""

from pathlib import Path
from typing import Any

from uniter.datasets.made_up.tasks.telling import Parts
from uniter.datasets.made_up.world import World
from uniter.datasets.storage.files import write_json


def write_retrieval(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """Karpathy's layout, `dataset_scenes.json`: held-out pictures by turns in `val` and `test`; returns how many sentences there are."""
    entries: list[dict[str, Any]] = []
    sentence = 0
    for part, members in scenes.items():
        for place, scene in enumerate(members):
            split = part if part == "train" else ("val", "test")[place % 2]
            ids = list(range(sentence, sentence + len(scene.captions)))
            sentence += len(ids)
            entries.append(
                {
                    "filepath": "images",
                    "sentids": ids,
                    "filename": f"{scene.key}{suffix}",
                    "imgid": len(entries),
                    "split": split,
                    "sentences": [
                        {"tokens": text.replace(",", "").split(), "raw": text, "imgid": len(entries), "sentid": number}
                        for number, text in zip(ids, scene.captions, strict=True)
                    ],
                    "cocoid": scene.number,
                }
            )
    write_json(folder / "dataset_scenes.json", {"images": entries, "dataset": "scenes"})
    return sentence
