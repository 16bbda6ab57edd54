"""The down-stream tasks over a made-up world: annotation files in exactly their authors' formats, from what is known of the scenes.

    vqa/       v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json
    snli_ve/   snli_ve_{train,dev}.jsonl
    nlvr2/     {train,dev}.json, and images/ with the pictures under NLVR2's names (links to the world's)
    retrieval/ dataset_scenes.json (Karpathy's)
    refcoco/   refs(unc).p, instances.json: short phrases, by looks or by place
    refcoco+/  refs(unc).p, instances.json: by looks only
    refcocog/  refs(umd).p, instances.json: long ones, with a size and another thing
    vcr/       {train,val}.jsonl, vcr1images/scenes/*.json (metadata)

What a reader would get wrong: VQA names a picture by its number only, as COCO's photographs, so its text database is built with
`--key 'scene_{id:06d}'`; NLVR2 names pictures by statement, so its region database is made from nlvr2/images.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput
from uniter.datasets.made_up.scenes import Relation, Scene, Thing
from uniter.datasets.made_up.tasks.entailment import write_entailment
from uniter.datasets.made_up.tasks.nlvr2 import write_nlvr2
from uniter.datasets.made_up.tasks.referring import long_phrases, phrases_by_looks, short_phrases, write_referring
from uniter.datasets.made_up.tasks.retrieval import write_retrieval
from uniter.datasets.made_up.tasks.telling import PARTS, Parts
from uniter.datasets.made_up.tasks.vcr import write_vcr
from uniter.datasets.made_up.tasks.vqa import write_vqa
from uniter.datasets.made_up.world import World
from uniter.datasets.storage.files import read_json


def write_tasks(world_folder: str | Path, out: str | Path | None = None, *, seed: int = 0) -> dict[str, int]:
    """Write all tasks' annotation files for a world that `write_world` wrote.

    Args:
        world_folder: the world; its scenes_train.json and scenes_val.json are read.
        out: the folder of the tasks; `tasks/` in the world by default. What an earlier call left there is replaced.
        seed: another seed asks other questions about the same pictures.

    Returns:
        How many examples each task has.

    Raises:
        BadInput: the folder holds no world.
    """
    folder = Path(world_folder)
    target = Path(out) if out is not None else folder / "tasks"
    world, suffix, scenes = _read_world(folder)
    counts = {}
    for name, write in _WRITERS.items():
        shutil.rmtree(target / name, ignore_errors=True)
        (target / name).mkdir(parents=True)
        counts[name] = write(target / name, world, scenes, suffix, folder / "images", seed)
    return counts


def _read_world(folder: Path) -> tuple[World, str, Parts]:
    scenes: Parts = {}
    for part in PARTS:
        path = folder / f"scenes_{part}.json"
        if not path.is_file() or not (folder / "world.json").is_file():
            raise BadInput(f"{folder} holds no made-up world ({path.name} and world.json are wanted); make one with uniter-scenes")
        scenes[part] = [_scene(entry) for entry in read_json(path)["scenes"]]
    settings = read_json(folder / "world.json")
    given = settings["world"]
    world = World(
        shapes=given["shapes"],
        colours={word: tuple(colour) for word, colour in given["colours"].items()},
        sizes={word: tuple(sides) for word, sides in given["sizes"].items()},
        size=tuple(given["size"]),
        things=tuple(given["things"]),
        attributes=given["attributes"],
    )
    return world, {"jpeg": ".jpg", "png": ".png"}[settings["image_format"]], scenes


def _scene(entry: dict[str, Any]) -> Scene:
    things = tuple(Thing(thing["shape"], thing["colour"], thing["size"], tuple(thing["box"])) for thing in entry["things"])
    relations = tuple(Relation(relation["subject"], relation["name"], relation["object"]) for relation in entry["relations"])
    return Scene(entry["key"], entry["number"], tuple(entry["size"]), things, relations, tuple(entry["captions"]))


_WRITERS: Final[dict[str, Callable[[Path, World, Parts, str, Path, int], int]]] = {
    "vqa": write_vqa,
    "snli_ve": write_entailment,
    "nlvr2": write_nlvr2,
    "retrieval": write_retrieval,
    "refcoco": partial(write_referring, describe=short_phrases, by="unc", held_out=("val", "testA", "testB")),
    "refcoco+": partial(write_referring, describe=phrases_by_looks, by="unc", held_out=("val", "testA", "testB")),
    "refcocog": partial(write_referring, describe=long_phrases, by="umd", held_out=("val", "test")),
    "vcr": write_vcr,
}
