"""A made-up world as files: pictures, COCO-style boxes, captions, and the scenes themselves.

    OUT/settings.json   first: what the world was asked to be
    OUT/images/, OUT/{instances,captions,scenes}_{train,val}.json
    OUT/world.json      last: the same again, with the vocabulary; complete

What a reader would get wrong: COCO's boxes are x, y, width, height, a scene's are x0, y0, x1, y1. A killed command draws everything again:
scenes are a pure function of the settings, so nothing can be half of one world and half of another.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from uniter.datasets.errors import BadInput, WrongUsage
from uniter.datasets.made_up.scenes import Relation, Scene, Thing, make_scene, scene_key
from uniter.datasets.made_up.world import WORLDS, World
from uniter.datasets.progress import Progress
from uniter.datasets.storage.claims import SETTINGS, Maker, claim
from uniter.datasets.storage.files import keep_others, read_json, read_json_object, write_json

FORMAT_VERSION = 1
JPEG_QUALITY = 90
IMAGES: Final = "images"
SUFFIXES: Final = {"jpeg": ".jpg", "png": ".png"}
WORLD: Final = Maker("a made-up world", complete="world.json", writes=(IMAGES, "instances_*.json", "captions_*.json", "scenes_*.json"))


def write_world(
    out: str | Path,
    *,
    world: World | None = None,
    images: int = 1200,
    held_out: int = 200,
    captions: int = 5,
    seed: int = 0,
    image_format: Literal["jpeg", "png"] = "jpeg",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a world: `images/`, and for `train` and `val` each `instances_*.json`, `captions_*.json` (COCO) and `scenes_*.json`.

    Args:
        out: the folder; `world.json` in it says what it was made with.
        world: the vocabulary; WORLDS["shapes"] by default.
        images: pictures in all, the last `held_out` of them being the `val` part.
        captions: sentences for each picture.
        seed: another seed gives other pictures of the same world.
        overwrite: make the world anew, beside what is there, which it then replaces; files of others in the folder stay.

    Returns:
        The summary: counts of pictures, things and captions, the path, and whether the world was there already.

    Raises:
        SettingsDiffer: the folder holds a world made with other settings.
        BadInput: the numbers contradict each other, or the folder holds something else.
    """
    world = world or WORLDS["shapes"]
    if not 0 <= held_out < images:
        raise WrongUsage(f"{held_out} of {images} pictures are to be held out, expected fewer held out than there are")
    if captions < 1:
        raise BadInput(f"{captions} captions a picture were asked for, expected at least 1")
    out = Path(out)
    settings = {
        **{"format": FORMAT_VERSION, "seed": seed, "images": images, "held_out": held_out, "captions": captions},
        **{"image_format": image_format, "world": asdict(world)},
    }
    _stamp_an_older_world(out)
    claimed = claim(out, settings, maker=WORLD, overwrite=overwrite)
    with claimed.alone("drawing"):
        already = claimed.complete
        if not already:
            claimed.clear_half_written()
            _draw(claimed.folder, world, settings)
            if claimed.folder != out:
                keep_others(out / IMAGES, claimed.folder / IMAGES, ours=_drawn_by(read_json_object(out / SETTINGS)).__contains__)
        claimed.publish()
    return {"out": str(out), "already_complete": already, **_counted(out, world)}


def _counted(out: Path, world: World) -> dict[str, Any]:
    """What a world that is whole holds."""
    parts = {part: read_scenes(out / f"scenes_{part}.json") for part in ("train", "val")}
    scenes = [scene for members in parts.values() for scene in members]
    return {
        "images": len(scenes),
        "train": len(parts["train"]),
        "held_out": len(parts["val"]),
        "things": sum(len(scene.things) for scene in scenes),
        "captions": sum(len(scene.captions) for scene in scenes),
        "shapes": list(world.shapes),
        "colours": list(world.colours),
        "sizes": list(world.sizes),
    }


def _draw(folder: Path, world: World, settings: dict[str, Any]) -> None:
    """All files of the world, `world.json` last."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = []
    images, jpeg = settings["images"], settings["image_format"] == "jpeg"
    suffix = SUFFIXES[settings["image_format"]]
    # 4:4:4: halved colour would smear small things.
    options: dict[str, Any] = {"quality": JPEG_QUALITY, "subsampling": 0} if jpeg else {"compress_level": 6}
    with Progress(images, unit="pictures", label="drawing") as progress:
        for number in range(1, images + 1):
            scene, picture = make_scene(world, seed=settings["seed"], number=number, captions=settings["captions"])
            Image.fromarray(picture).save(folder / IMAGES / f"{scene.key}{suffix}", **options)
            scenes.append(scene)
            progress.update()
    train = images - settings["held_out"]
    for part, members in {"train": scenes[:train], "val": scenes[train:]}.items():
        write_json(folder / f"instances_{part}.json", coco_instances(members, world, suffix=suffix))
        write_json(folder / f"captions_{part}.json", coco_captions(members, suffix=suffix))
        write_json(folder / f"scenes_{part}.json", {"format": FORMAT_VERSION, "scenes": [asdict(scene) for scene in members]})
    write_json(folder / WORLD.complete, settings)


def _drawn_by(settings: dict[str, Any]) -> set[str]:
    """The names of the pictures of a world; what else lies in `images/` is somebody's own."""
    suffix = SUFFIXES[settings["image_format"]]
    return {f"{scene_key(number)}{suffix}" for number in range(1, settings["images"] + 1)}


def _stamp_an_older_world(out: Path) -> None:
    """A world of an earlier version has its settings in `world.json` only, written first: say so in today's words."""
    if (out / SETTINGS).exists() or not (out / WORLD.complete).is_file():
        return
    settings = read_json_object(out / WORLD.complete)
    if "world" not in settings or settings.get("image_format") not in SUFFIXES or not isinstance(settings.get("images"), int):
        raise BadInput(f"{out / WORLD.complete} is no world's that uniter-scenes wrote; choose another OUT")
    write_json(out / SETTINGS, {"kind": WORLD.kind, **settings})
    if not (out / "scenes_val.json").is_file():  # its last file: the command was stopped
        (out / WORLD.complete).unlink()


def _coco_images(scenes: Sequence[Scene], suffix: str) -> list[dict[str, Any]]:
    return [{"id": scene.number, "file_name": f"{scene.key}{suffix}", "height": scene.size[0], "width": scene.size[1]} for scene in scenes]


def coco_instances(scenes: Sequence[Scene], world: World, *, suffix: str = ".jpg") -> dict[str, Any]:
    """COCO's instances of these scenes: categories are the world's shapes; colours are `attributes` where the world annotates them."""
    categories = {word: number for number, word in enumerate(world.shapes, start=1)}
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        for place, thing in enumerate(scene.things):
            x0, y0, x1, y1 = thing.box
            annotation: dict[str, Any] = {
                **{"id": scene.number * 100 + place, "image_id": scene.number, "category_id": categories[thing.shape]},
                **{"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0},
            }
            if world.attributes:
                annotation["attributes"] = [thing.colour]
            annotations.append(annotation)
    found: dict[str, Any] = {"images": _coco_images(scenes, suffix), "annotations": annotations}
    found["categories"] = [{"id": number, "name": word, "supercategory": "thing"} for word, number in categories.items()]
    if world.attributes:
        found["attributes"] = [{"id": number, "name": word} for number, word in enumerate(world.colours, start=1)]
    return found


def coco_captions(scenes: Sequence[Scene], *, suffix: str = ".jpg") -> dict[str, Any]:
    """COCO's captions of these scenes."""
    annotations = [
        {"id": scene.number * 100 + place, "image_id": scene.number, "caption": caption}
        for scene in scenes
        for place, caption in enumerate(scene.captions)
    ]
    return {"images": _coco_images(scenes, suffix), "annotations": annotations}


def read_scenes(path: str | Path) -> list[Scene]:
    """The scenes of a `scenes_*.json`; BadInput with the path where it is something else."""
    stored = read_json(Path(path))
    try:
        if stored["format"] != FORMAT_VERSION:
            raise ValueError(f"format {stored['format']}, expected {FORMAT_VERSION}")
        return [
            Scene(
                key=scene["key"],
                number=scene["number"],
                size=(scene["size"][0], scene["size"][1]),
                things=tuple(Thing(**{**thing, "box": tuple(thing["box"])}) for thing in scene["things"]),
                relations=tuple(Relation(**relation) for relation in scene["relations"]),
                captions=tuple(scene["captions"]),
            )
            for scene in stored["scenes"]
        ]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"{path} holds no scenes ({error}); was it written by `uniter-scenes`?") from error


def read_world(folder: Path) -> tuple[World, str]:
    """The vocabulary of a world that `write_world` wrote, and the suffix of its pictures; BadInput where there is none."""
    try:
        settings = read_json_object(folder / WORLD.complete)
        given = settings["world"]
        world = World(
            shapes=given["shapes"],
            colours={word: tuple(colour) for word, colour in given["colours"].items()},
            sizes={word: tuple(sides) for word, sides in given["sizes"].items()},
            size=tuple(given["size"]),
            things=tuple(given["things"]),
            attributes=given["attributes"],
        )
        return world, SUFFIXES[settings["image_format"]]
    except (BadInput, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder} holds no made-up world ({error}); make one with uniter-scenes") from error
