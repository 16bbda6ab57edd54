"""The made-up world: the same files from the same command, boxes that fit their pixels, captions that are true."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pycocotools.coco import COCO

from uniter.cli.scenes import main
from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.made_up.files import read_scenes, write_world
from uniter.datasets.made_up.outlines import OUTLINES
from uniter.datasets.made_up.scenes import Scene, Thing, make_scene, relations_between
from uniter.datasets.made_up.tasks.table import write_tasks
from uniter.datasets.made_up.world import WORLDS, World, load_world


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(out, images=24, held_out=6, seed=3)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_command_gives_the_same_bytes(small_world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, images=24, held_out=6, seed=3)
    assert contents(tmp_path) == contents(small_world)


def test_a_larger_world_begins_with_the_smaller_one_and_another_seed_differs(small_world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "larger", images=30, held_out=0, seed=3)
    write_world(tmp_path / "other", images=24, held_out=6, seed=4)
    first = "images/scene_000001.jpg"
    assert contents(tmp_path / "larger")[first] == contents(small_world)[first]
    assert contents(tmp_path / "other")[first] != contents(small_world)[first]


def test_the_files_are_cocos(small_world: Path) -> None:
    parts: dict[str, set[int]] = {}
    for part, count in (("train", 18), ("val", 6)):
        instances, captions = COCO(small_world / f"instances_{part}.json"), COCO(small_world / f"captions_{part}.json")
        parts[part] = set(instances.getImgIds())
        assert len(parts[part]) == count == len(captions.getImgIds())
        assert all(len(captions.getAnnIds(imgIds=[image])) == 5 for image in parts[part])
        for image in instances.loadImgs(instances.getImgIds()):
            with Image.open(small_world / "images" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
        for annotation in instances.loadAnns(instances.getAnnIds()):
            assert annotation["attributes"][0] in WORLDS["shapes"].colours
            assert instances.loadCats(annotation["category_id"])[0]["name"] in WORLDS["shapes"].shapes
    assert not parts["train"] & parts["val"]


def test_boxes_are_tight_and_colours_are_as_said() -> None:
    """Two pictures that differ in one thing's paint only differ inside its box, and up to its edges."""
    world = WORLDS["shapes"]
    painted = replace(world, colours=dict.fromkeys(world.colours, (255, 0, 255)))
    for number in range(1, 8):
        scene, picture = make_scene(world, seed=1, number=number)
        _, other = make_scene(painted, seed=1, number=number)
        rows, columns = np.nonzero((picture != other).any(axis=2))
        x0, y0 = min(thing.box[0] for thing in scene.things), min(thing.box[1] for thing in scene.things)
        x1, y1 = max(thing.box[2] for thing in scene.things), max(thing.box[3] for thing in scene.things)
        assert abs(columns.min() - x0) <= 1
        assert abs(columns.max() + 1 - x1) <= 1
        assert abs(rows.min() - y0) <= 1
        assert abs(rows.max() + 1 - y1) <= 1
    scene, picture = make_scene(replace(world, shapes={"square": "square"}), seed=1, number=3)
    for thing in scene.things:
        x, y = (int(value) for value in thing.centre)
        middle = picture[y - 3 : y + 3, x - 3 : x + 3].reshape(-1, 3).mean(axis=0)
        nearest = min(world.colours, key=lambda word: float(np.abs(middle - np.array(world.colours[word])).sum()))
        assert nearest == thing.colour


def test_things_do_not_touch() -> None:
    for number in range(1, 40):
        things = make_scene(WORLDS["toys"], seed=0, number=number)[0].things
        for place, thing in enumerate(things):
            for other in things[place + 1 :]:
                apart = (
                    thing.box[2] <= other.box[0],
                    other.box[2] <= thing.box[0],
                    thing.box[3] <= other.box[1],
                    other.box[3] <= thing.box[1],
                )
                assert any(apart)


def phrase_fits(words: list[str], thing: Thing) -> bool:
    return words[-2:] == [thing.colour, thing.shape] and (len(words) == 2 or words[0] == thing.size)


def caption_is_true(caption: str, scene: Scene) -> bool:
    """Read a caption back: its phrases name things of the scene, and its relation holds between two of them."""
    text = re.sub(r"^(there is|a picture of) ", "", caption)
    parts = re.split(r" (left of|right of|above|below) ", text)
    phrases = [phrase.split()[1:] for phrase in re.split(r", | and ", parts[0])]
    fitting = [[place for place, thing in enumerate(scene.things) if phrase_fits(phrase, thing)] for phrase in phrases]
    if not all(fitting):
        return False
    if len(parts) == 1:
        return True
    objects = [place for place, thing in enumerate(scene.things) if phrase_fits(parts[2].split()[1:], thing)]
    return any(relation.name == parts[1] and relation.subject in fitting[0] and relation.object in objects for relation in scene.relations)


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_captions_are_true(name: str) -> None:
    kinds: set[str] = set()
    for number in range(1, 60):
        scene, _ = make_scene(WORLDS[name], seed=2, number=number)
        for caption in scene.captions:
            assert caption_is_true(caption, scene), (caption, scene)
            kinds |= set(re.findall(r"left of|right of|above|below| and |,|there is", caption))
    assert kinds == {"left of", "right of", "above", "below", " and ", ",", "there is"}
    wrong, _ = make_scene(WORLDS[name], seed=2, number=1)
    assert not caption_is_true(f"a {wrong.things[0].colour} nothing", wrong)


def test_relations_by_hand() -> None:
    things = [Thing("a", "b", "c", (x, y, x + 10, y + 10)) for x, y in ((0, 0), (50, 10), (0, 40), (30, 30))]
    found = {(relation.subject, relation.name, relation.object) for relation in relations_between(things)}
    assert (0, "left of", 1) in found
    assert (1, "right of", 0) in found
    assert (0, "above", 2) in found
    assert (2, "below", 0) in found
    assert not any({first, second} == {0, 3} for first, _, second in found)  # exactly diagonal: neither


def test_scenes_are_read_back(small_world: Path) -> None:
    scenes = read_scenes(small_world / "scenes_val.json")
    assert scenes == [make_scene(WORLDS["shapes"], seed=3, number=number)[0] for number in range(19, 25)]
    with pytest.raises(BadInput, match="holds no scenes"):
        read_scenes(small_world / "captions_val.json")


@pytest.mark.parametrize("name", sorted(OUTLINES))
def test_every_outline_fills_a_fair_part_of_its_square(name: str) -> None:
    mask = np.asarray(OUTLINES[name](64)) > 0
    assert mask.shape == (64, 64)
    assert 0.15 < mask.mean() < 0.95
    assert mask.any(axis=0).sum() >= 24
    assert mask.any(axis=1).sum() >= 23


def test_outlines_differ() -> None:
    masks = {name: np.asarray(draw(64)) > 0 for name, draw in OUTLINES.items()}
    for name, mask in masks.items():
        for other, second in masks.items():
            assert name == other or (mask & second).sum() / (mask | second).sum() < 0.93, (name, other)


def test_other_settings_are_refused_in_words(small_world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, images=3, held_out=1, image_format="png")
    with pytest.raises(SettingsDiffer, match=r"\(seed was 0, now 1; images was 3, now 2\).*--overwrite"):
        write_world(tmp_path, images=2, held_out=1, seed=1, image_format="png")
    write_world(tmp_path, images=2, held_out=1, seed=1, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["scene_000001.jpg", "scene_000002.jpg"]


def test_the_command_and_its_options(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "out"), "--images", "4", "--held-out", "1", "--shapes", "star,ring", "--colours", "red", "--no-attributes"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout)
    assert summary["shapes"] == ["star", "ring"]
    assert summary["train"] == 3
    instances = json.loads((tmp_path / "out" / "instances_train.json").read_text())
    assert [category["name"] for category in instances["categories"]] == ["star", "ring"]
    assert "attributes" not in instances
    assert CliRunner().invoke(main, [str(tmp_path / "no"), "--shapes", "cube"]).exit_code == 2
    assert CliRunner().invoke(main, [str(tmp_path / "no"), "--images", "5", "--held-out", "5"]).exit_code == 2


def test_a_world_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "world.yaml"
    path.write_text("shapes: {coin: circle, gate: arch}\ncolours: {rust: '#a03c14', sky: [120, 190, 240]}\nsize: [96, 128]\nlike: toys\n")
    world = load_world(str(path))
    assert world.colours == {"rust": (160, 60, 20), "sky": (120, 190, 240)}
    assert world.sizes == WORLDS["toys"].sizes
    scene, picture = make_scene(world, seed=0, number=1)
    assert picture.shape == (96, 128, 3)
    assert {thing.shape for thing in scene.things} <= {"coin", "gate"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['true']", "no YAML that can be read"),
        ("- circle", "expected a mapping"),
        ("shape: {}", "unknown entry 'shape'; did you mean 'shapes'"),
        ("shapes: {coin: cirle}", "unknown outline 'cirle'; did you mean 'circle'"),
        ("shapes: {}", "has no shapes"),
        ("colours: {red: [300, 0, 0]}", "from 0 to 255"),
        ("colours: {red: [1, 2]}", "cannot be understood"),
        ("sizes: {small: [0.5, 0.2]}", "the smaller first"),
        ("size: [1, 1]", "sides from 48"),
        ("things: [0, 99]", "1 to 12"),
        ("like: earth", "unknown world 'earth'"),
        ("colours: red", "cannot be understood"),
    ],
)
def test_worlds_that_make_no_sense_are_answered_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "world.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        load_world(str(path))


def test_an_unknown_world_names_the_known_ones() -> None:
    with pytest.raises(UniterError, match=r"unknown world 'shape'; did you mean 'shapes'\?"):
        load_world("shape")


def test_a_crowded_world_gives_what_fits() -> None:
    world = World(shapes={"disc": "circle"}, colours={"red": (255, 0, 0)}, sizes={"huge": (0.6, 0.6)}, size=(64, 64), things=(6, 6))
    scene, _ = make_scene(world, seed=0, number=1)
    assert len(scene.things) == 1
    assert scene.captions[0] == "there is a red disc" or scene.captions[0] == "there is a huge red disc"


def test_a_world_and_tasks_of_an_older_version_are_known_again(tmp_path: Path) -> None:
    """Its settings stood in world.json, which was written first."""
    out = tmp_path / "world"
    write_world(out, images=6, held_out=2)
    write_tasks(out)
    whole = contents(out)
    for name in ("settings.json", "tasks/settings.json", "tasks/tasks.json"):
        (out / name).unlink()
    assert write_world(out, images=6, held_out=2)["already_complete"]
    with pytest.raises(SettingsDiffer, match="images was 6, now 7"):
        write_world(out, images=7, held_out=2)
    assert write_tasks(out) == write_tasks(out)
    assert contents(out) == whole
    (out / "settings.json").unlink()
    (out / "scenes_val.json").unlink()  # it was stopped
    assert not write_world(out, images=6, held_out=2)["already_complete"]
    assert contents(out) == whole


def test_tasks_about_other_pictures_are_refused_or_made_anew(tmp_path: Path) -> None:
    write_world(tmp_path / "world", images=6, held_out=2)
    write_tasks(tmp_path / "world")
    (tmp_path / "world/tasks/vqa/mine.txt").write_text("my notes")
    write_world(tmp_path / "world", images=8, held_out=2, overwrite=True)
    with pytest.raises(SettingsDiffer, match="world"):
        write_tasks(tmp_path / "world")
    write_tasks(tmp_path / "world", overwrite=True)
    write_world(tmp_path / "fresh", images=8, held_out=2)
    write_tasks(tmp_path / "fresh")
    made, fresh = contents(tmp_path / "world/tasks"), contents(tmp_path / "fresh/tasks")
    assert made.pop("vqa/mine.txt") == b"my notes"
    assert {name: content for name, content in made.items() if name != "settings.json"} == {
        name: content for name, content in fresh.items() if name != "settings.json"
    }


def test_a_world_of_few_phrases_ends(tmp_path: Path) -> None:
    """Where a picture shows all but one coloured shape, there are no three wrong phrases to be found."""
    result = CliRunner().invoke(
        main, [str(tmp_path / "w"), "--images", "4", "--held-out", "1", "--shapes", "circle,square", "--colours", "red,blue", "--tasks"]
    )
    assert result.exit_code == 0, result.output
