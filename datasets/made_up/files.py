"""A made-up world as files: pictures, COCO-style boxes, captions, and the scenes themselves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.made_up.scenes import Relation, Scene, Thing, make_scene
from uniter.datasets.made_up.world import WORLDS, World
from uniter.datasets.progress import Progress
from uniter.datasets.storage.files import write_json

FORMAT_VERSION = 1


JPEG_QUALITY = 90


# ------------------------------------------------------------------------------------------------------------------------ files


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
        overwrite: replace a world that was made with other settings.

    Returns:
        The summary: counts of pictures, things and captions, and the paths.

    Raises:
        SettingsDiffer: the folder holds a world made with other settings.
        BadInput: the numbers contradict each other.
    """
    world = world or WORLDS["shapes"]
    if not 0 <= held_out < images:
        raise BadInput(f"{held_out} of {images} pictures are to be held out, expected fewer held out than there are")
    if captions < 1:
        raise BadInput(f"{captions} captions a picture were asked for, expected at least 1")
    out = Path(out)
    settings = json.loads(
        json.dumps(
            {
                **{"format": FORMAT_VERSION, "seed": seed, "images": images, "held_out": held_out, "captions": captions},
                **{"image_format": image_format, "world": asdict(world)},
            }
        )
    )
    _claim(out, settings, overwrite=overwrite)
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = []
    wanted: set[str] = set()
    suffix = {"jpeg": ".jpg", "png": ".png"}[image_format]
    with Progress(images, unit="pictures", label="drawing") as progress:
        for number in range(1, images + 1):
            scene, picture = make_scene(world, seed=seed, number=number, captions=captions)
            # 4:4:4: halved colour would smear small things.
            options: dict[str, Any] = {"quality": JPEG_QUALITY, "subsampling": 0} if image_format == "jpeg" else {"compress_level": 6}
            Image.fromarray(picture).save(folder / f"{scene.key}{suffix}", format=image_format.upper(), **options)
            wanted.add(f"{scene.key}{suffix}")
            scenes.append(scene)
            progress.update()
    for path in folder.glob("scene_*"):  # what a world with other settings left
        if path.name not in wanted:
            path.unlink()
    parts = {"train": scenes[: images - held_out], "val": scenes[images - held_out :]}
    for part, members in parts.items():
        write_json(out / f"instances_{part}.json", coco_instances(members, world, suffix=suffix))
        write_json(out / f"captions_{part}.json", coco_captions(members, suffix=suffix))
        write_json(out / f"scenes_{part}.json", {"format": FORMAT_VERSION, "scenes": [asdict(scene) for scene in members]})
    return {
        "out": str(out),
        "images": images,
        "train": len(parts["train"]),
        "held_out": len(parts["val"]),
        "things": sum(len(scene.things) for scene in scenes),
        "captions": sum(len(scene.captions) for scene in scenes),
        "shapes": list(world.shapes),
        "colours": list(world.colours),
        "sizes": list(world.sizes),
    }


def _claim(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write `world.json`, or check that the one that is there says the same."""
    path = out / "world.json"
    if path.exists() and not overwrite:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{path} is damaged ({error}); pass --overwrite to make the world anew") from error
        if found != settings:
            known = found if isinstance(found, dict) else {}
            differing = [name for name in settings if known.get(name) != settings[name]]
            raise SettingsDiffer(
                f"{out} holds a world made with other settings ({', '.join(differing)} differ); choose another folder or pass --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


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
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
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
