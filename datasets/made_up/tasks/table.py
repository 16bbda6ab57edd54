"""The down-stream tasks over a made-up world: annotation files in exactly their authors' formats, from what is known of the scenes.

    vqa/       v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json
    snli_ve/   snli_ve_{train,dev}.jsonl
    nlvr2/     {train,dev}.json, and images/ with the pictures under NLVR2's names (links to the world's)
    retrieval/ dataset_scenes.json (Karpathy's)
    refcoco/   refs(unc).p, instances.json: short phrases, by looks or by place
    refcoco+/  refs(unc).p, instances.json: by looks only
    refcocog/  refs(umd).p, instances.json: long ones, with a size and another thing
    vcr/       {train,val}.jsonl, vcr1images/scenes/*.json (metadata)
    gqa/       {train,val}_balanced_questions.json
    flickr30k_entities/  {train,val}.txt, Annotations/*.xml, Sentences/*.txt
    own_labels/          {train,val}_{one,several,score}.csv: tables as somebody has them, for `classify`

What a reader would get wrong: VQA names a picture by its number only, as COCO's photographs, so its text database is built with
`--key 'scene_{id:06d}'`; NLVR2 names pictures by statement, so its region database is made from nlvr2/images.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from uniter.datasets.errors import BadInput
from uniter.datasets.made_up.files import IMAGES, WORLD, read_scenes, read_world
from uniter.datasets.made_up.tasks.entailment import write_entailment
from uniter.datasets.made_up.tasks.entities import write_entities
from uniter.datasets.made_up.tasks.gqa import write_gqa
from uniter.datasets.made_up.tasks.nlvr2 import write_nlvr2
from uniter.datasets.made_up.tasks.own_labels import write_own_labels
from uniter.datasets.made_up.tasks.referring import long_phrases, phrases_by_looks, short_phrases, write_referring
from uniter.datasets.made_up.tasks.retrieval import write_retrieval
from uniter.datasets.made_up.tasks.telling import PARTS, Parts
from uniter.datasets.made_up.tasks.vcr import write_vcr
from uniter.datasets.made_up.tasks.vqa import write_vqa
from uniter.datasets.made_up.world import World
from uniter.datasets.storage.claims import SETTINGS, Maker, claim
from uniter.datasets.storage.files import keep_others, read_json_object, remove, write_json


def write_tasks(world_folder: str | Path, out: str | Path | None = None, *, seed: int = 0, overwrite: bool = False) -> dict[str, int]:
    """Write all tasks' annotation files for a world that `write_world` wrote.

    Args:
        world_folder: the world; its scenes_train.json and scenes_val.json are read.
        out: the folder of the tasks; `tasks/` in the world by default.
        seed: another seed asks other questions about the same pictures.
        overwrite: write them anew where they are about another world, or asked with another seed.

    Returns:
        How many examples each task has.

    Raises:
        SettingsDiffer: they are there, and about another world or of another seed.
        BadInput: the folder holds no world.
    """
    folder = Path(world_folder)
    target = Path(out) if out is not None else folder / "tasks"
    scenes: Parts = {}
    world, suffix = read_world(folder)
    for part in PARTS:
        path = folder / f"scenes_{part}.json"
        if not path.is_file():
            raise BadInput(f"{folder} holds no made-up world ({path.name} is missing); make one with uniter-scenes")
        scenes[part] = read_scenes(path)
    if older := _of_an_older_version(target):
        write_json(target / SETTINGS, {"kind": TASKS.kind})
    claimed = claim(target, {"seed": seed}, maker=TASKS, sources={"world": folder / WORLD.complete}, overwrite=overwrite or older)
    with claimed.alone("writing"):
        if not claimed.complete:
            claimed.clear_half_written()
            counts = {}
            for name, write in _WRITERS.items():
                remove(claimed.folder / name)  # what a killed command began
                (claimed.folder / name).mkdir(parents=True)
                counts[name] = write(claimed.folder / name, world, scenes, suffix, folder / IMAGES, seed)
            write_json(claimed.folder / TASKS.complete, {"examples": counts})
            if claimed.folder != target:
                for name in _WRITERS:
                    keep_others(target / name, claimed.folder / name, ours=_names(claimed.folder / name).__contains__)
        claimed.publish()
    examples: dict[str, int] = read_json_object(target / TASKS.complete)["examples"]
    return examples


def _of_an_older_version(folder: Path) -> bool:
    """Whether an earlier version wrote these tasks, which did not say so."""
    return SETTINGS not in _names(folder) and _names(folder) >= _FIRST


def _names(folder: Path) -> set[str]:
    """What lies in a folder; nothing where there is none."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


_WRITERS: Final[dict[str, Callable[[Path, World, Parts, str, Path, int], int]]] = {
    "vqa": write_vqa,
    "snli_ve": write_entailment,
    "nlvr2": write_nlvr2,
    "retrieval": write_retrieval,
    "refcoco": partial(write_referring, describe=short_phrases, by="unc", held_out=("val", "testA", "testB")),
    "refcoco+": partial(write_referring, describe=phrases_by_looks, by="unc", held_out=("val", "testA", "testB")),
    "refcocog": partial(write_referring, describe=long_phrases, by="umd", held_out=("val", "test")),
    "vcr": write_vcr,
    "gqa": write_gqa,
    "flickr30k_entities": write_entities,
    "own_labels": write_own_labels,
}

_FIRST: Final = {"vqa", "snli_ve", "nlvr2", "retrieval", "refcoco", "refcoco+", "refcocog", "vcr"}  # of the first version

TASKS: Final = Maker("tasks of a made-up world", complete="tasks.json", writes=tuple(_WRITERS))
