"""Visual Genome as it is published: words, boxes, parts, broken files, its attribute loss, its precision, and an update that learns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.nn import functional as F

from uniter.cli.train_detector import detector_command
from uniter.datasets.errors import BadInput
from uniter.datasets.made_up.files import write_world
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.training import loop as training
from uniter.extract.training.batches import Batches
from uniter.extract.training.configs import VISUAL_GENOME, learning_rate_factor, r101_c4_config, schedule_of
from uniter.extract.training.evaluation import visual_genome_precision
from uniter.extract.training.labelled_images import LabelledImage, LabelledImages
from uniter.extract.training.predictor import build_network
from uniter.extract.training.visual_genome import (
    VisualGenomeFiles,
    attribute_words,
    object_words,
    read_visual_genome,
    read_vocabulary,
    visual_genome_parts,
)


def thing(number: int, name: str, box: tuple[float, float, float, float] = (2, 3, 10, 12), **more: Any) -> dict[str, Any]:
    x, y, w, h = box
    return {"object_id": number, "names": [name], "x": x, "y": y, "w": w, "h": h, "synsets": [], **more}


class Genome:
    """Three images of Visual Genome's layout; a test changes what it likes before `read`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.photos = folder, folder / "vg"
        for within in ("VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/3.jpg"):
            (self.photos / within).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40), (10, 200, 30)).save(self.photos / within)
        self.objects: Any = [
            {"image_id": 1, "objects": [thing(10, "Small red car."), thing(11, "unheard-of thing")], "image_url": "x"},
            {"image_id": 2, "objects": [thing(20, "cars", (-5, 0, 100, 20)), thing(21, "tall building")]},
            {"image_id": 3, "objects": [thing(30, "tree")]},
        ]
        self.attributes: Any = [
            {"image_id": 1, "attributes": [{"object_id": 10, "attributes": ["Shiny and Parked", "red"], "names": ["car"]}]},
            {"image_id": 3, "attributes": [{"object_id": 30, "attributes": ["black and white"]}, {"object_id": 30}]},
        ]
        self.image_data: Any = [
            {"image_id": number, "url": f"https://cs.stanford.edu/people/rak248/{within}", "width": 60, "height": 40, "coco_id": None}
            for number, within in ((1, "VG_100K/1.jpg"), (2, "VG_100K_2/2.jpg"), (3, "VG_100K/3.jpg"))
        ]
        self.words = ("tree,trees\ncar,cars,automobile\nbuilding\nzebra", "red\nshiny\nparked\nblack and white\nsmall,little\ntall")
        self.lists = {"train.txt": "VG_100K/1.jpg xml/1.xml\nVG_100K_2/2.jpg xml/2.xml\n", "val.txt": "VG_100K/3.jpg xml/3.xml\n"}

    def files(self, *, image_data: bool = True, attributes: bool = True, split: bool = True) -> VisualGenomeFiles:
        for name, content in (("objects", self.objects), ("attributes", self.attributes), ("image_data", self.image_data)):
            (self.folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        for name, text in (*zip(("objects_vocab.txt", "attributes_vocab.txt"), self.words, strict=True), *self.lists.items()):
            (self.folder / name).write_text(text)
        return VisualGenomeFiles(
            attributes=self.folder / "attributes.json" if attributes else None,
            image_data=self.folder / "image_data.json" if image_data else None,
            vocabulary=str(self.folder),
            split=self.folder if split else None,
        )

    def read(self, **options: bool) -> LabelledImages:
        chosen = self.files(**options)
        return read_visual_genome(self.photos, self.folder / "objects.json", chosen)


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    return Genome(tmp_path)


# Words


def test_adjectives_before_an_object_are_its_attributes() -> None:
    assert object_words(" Small Red car. ") == ("car", ["small", "red"])
    assert object_words("fire truck") == ("fire truck", []) and object_words("red fire truck") == ("red fire truck", [])
    assert object_words("red") == ("red", []) and object_words("") == ("", [])


def test_attributes_are_separated_by_and_but_for_one() -> None:
    assert attribute_words("Red and shiny.") == ["red", "shiny"] and attribute_words("black and white") == ["black and white"]


def test_the_vocabulary_on_board_is_the_published_one() -> None:
    objects, attributes = read_vocabulary("1600-400-20")
    assert len(objects.names) == 1600 and len(attributes.names) == 400
    assert attributes.numbers["grey"] == attributes.numbers["gray"] == attributes.names.index("gray")
    with pytest.raises(BadInput, match=r"unknown vocabulary '1600'.*a folder with objects_vocab.txt"):
        read_vocabulary("1600")


# Reading


@pytest.mark.parametrize("image_data", [True, False])
def test_objects_attributes_and_images_come_together(genome: Genome, image_data: bool) -> None:
    found = genome.read(image_data=image_data)
    assert found.class_names == ("tree", "car", "building", "zebra") and found.as_visual_genome
    first, second, third = found.images
    assert [path.relative_to(genome.photos).as_posix() for path in (first.path, second.path)] == ["VG_100K/1.jpg", "VG_100K_2/2.jpg"]
    assert first.boxes.tolist() == [[2, 3, 12, 15]] and first.classes.tolist() == [1]
    assert [found.attribute_names[number] for number in first.attributes[0]] == ["small", "red", "shiny", "parked"]
    assert second.boxes.tolist() == [[0, 0, 60, 20], [2, 3, 12, 15]] and second.classes.tolist() == [1, 2]
    assert [[found.attribute_names[number] for number in numbers] for numbers in second.attributes] == [[], ["tall"]]
    assert third.attributes == ((3,),) and not found.skipped


def test_both_files_may_name_images_in_other_orders(genome: Genome) -> None:
    expected = genome.read()
    genome.attributes = genome.attributes[::-1]
    assert [image.attributes for image in genome.read().images] == [image.attributes for image in expected.images]


def test_an_object_has_sixteen_attributes_at_most(genome: Genome) -> None:
    genome.words = (genome.words[0], "\n".join(f"kind{number}" for number in range(30)))
    genome.attributes[0]["attributes"][0]["attributes"] = [f"kind{number} and kind{number}" for number in range(30)]
    assert genome.read().images[0].attributes == (tuple(range(16)),)


def test_without_attributes_none_are_learnt(genome: Genome) -> None:
    assert genome.read(attributes=False).attribute_names == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: g.objects.append({"image_id": 9, "objects": [thing(1, "car")]}), "an image that image_data.json does not list"),
        (lambda g: g.objects.append({"image_id": "9", "objects": []}), "an entry of objects.json without image_id and objects"),
        (lambda g: g.objects.append([]), "an entry of objects.json without image_id and objects"),
        (lambda g: g.objects.append(g.objects[0]), "an image id that was there before"),
        (lambda g: g.objects[0]["objects"].append({"names": []}), "an object without names"),
        (lambda g: g.objects[0]["objects"].append("car"), "an object without names"),
        (lambda g: g.objects[0]["objects"].append({**thing(1, "car"), "w": "wide"}), "a box that is not four numbers"),
        (lambda g: g.objects[0]["objects"].append({**thing(1, "car"), "w": -3}), "an empty box"),
        (lambda g: g.objects[0]["objects"].append({**thing(1, "car"), "x": 1e300}), "a box that is not four numbers"),
        (lambda g: g.objects[0]["objects"].append(thing(1, "car", (100, 100, 5, 5))), "a box outside its image"),
        (lambda g: g.attributes[0]["attributes"].append({"object_id": None}), "an attribute entry without object_id"),
        (lambda g: g.attributes.insert(0, {"image_id": 1}), "an entry of attributes.json without image_id and attributes"),
        (lambda g: (g.photos / "VG_100K/1.jpg").unlink(), "an image whose file is missing"),
        (lambda g: (g.photos / "VG_100K/1.jpg").write_bytes(b"no image"), "an image that cannot be read"),
        (lambda g: g.image_data[0].update(width=61), "an image of another size than annotated"),
        (lambda g: g.image_data[0].update(url="https://x/../../etc/passwd"), "an image whose file is missing"),
        (lambda g: g.image_data[0].update(url=".."), "an image whose file_name leads out of the folder"),
    ],
)
def test_what_cannot_be_used_is_counted_by_reason(genome: Genome, change: Any, reason: str) -> None:
    change(genome)
    found = genome.read()
    assert found.skipped == {reason: 1} and found.images


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: setattr(g, "objects", json.dumps(g.objects)[:-40]), r"objects\.json .*cut off"),
        (lambda g: setattr(g, "objects", "{}"), r"objects\.json: no list of images"),
        (lambda g: setattr(g, "objects", "[" * 5000), r"objects\.json"),
        (lambda g: setattr(g, "objects", []), r"no list of images"),
        (lambda g: setattr(g, "attributes", "{}"), r"attributes\.json: no list of images"),
        (lambda g: setattr(g, "image_data", [{"image_id": 1}]), r"image_data\.json: .* is no \{image_id, url, width, height\}"),
        (lambda g: setattr(g, "image_data", "[]"), r"image_data\.json: no list of images"),
        (lambda g: setattr(g, "words", ("", "")), r"objects_vocab.txt holds no names"),
        (lambda g: setattr(g, "words", ("unicorn", "red")), r"nothing of it can be used \(3 images, none with a known object\)"),
    ],
)
def test_a_broken_or_foreign_file_is_answered_in_a_sentence(genome: Genome, change: Any, words: str) -> None:
    change(genome)
    with pytest.raises(BadInput, match=words):
        genome.read()


# Parts


def parts(genome: Genome, **options: bool) -> Any:
    labelled = genome.read(**options)
    return visual_genome_parts(labelled, genome.photos, genome.files(**options), held_out=0.4, seed=1)


def test_parts_are_the_published_lists(genome: Genome) -> None:
    genome.lists["train.txt"] = "VG_100K/1.jpg xml/1.xml\n"
    train, val, skipped = parts(genome)
    assert [image.id for image in train.images] == [1] and [image.id for image in val.images] == [3]
    assert skipped == {"an image of neither list (the test part)": 1}


def test_without_lists_chance_holds_out_and_it_is_said(genome: Genome, caplog: pytest.LogCaptureFixture) -> None:
    train, val, _ = parts(genome, split=False)
    assert len(train.images) == 2 and len(val.images) == 1 and train.as_visual_genome and val.as_visual_genome
    assert "held out by chance, not as Bottom-Up-Attention did" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("val.txt", "VG_100K/1.jpg xml/1.xml\n", r"1 images are in both lists \(first: 1\)"),
        ("val.txt", "<html>\n", r"val\.txt, line 1: '<html>'; expected an image such as VG_100K_2/2387\.jpg"),
        ("val.txt", "VG_100K/77.jpg xml/77.xml\n", r"val\.txt: none of its images can be used here"),
    ],
)
def test_lists_that_do_not_fit_are_refused(genome: Genome, name: str, text: str, words: str) -> None:
    genome.lists[name] = text
    with pytest.raises(BadInput, match=words):
        parts(genome)


# The published loss, schedule and precision


def test_the_attribute_loss_is_the_published_one(genome: Genome) -> None:
    labelled = genome.read()
    cfg = narrow_config(labelled)
    network: Any = build_network(cfg, attributes=3, seed=0, published=True)
    predictor = network.roi_heads.box_predictor
    features = torch.rand((4, predictor.cls_score.in_features, 1, 1), generator=torch.Generator().manual_seed(1))
    predictions = predictor(features)
    proposals = Instances((50, 50))
    proposals.gt_classes = torch.tensor([0, 1, 2, 4])  # the last is the background
    proposals.gt_attributes = torch.tensor([[0.5, 0, 0.5, 0], [0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]])
    proposals.gt_thumbnails = torch.zeros((4, 48))
    from detectron2.structures import Boxes

    proposals.proposal_boxes = proposals.gt_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10]] * 4))
    with EventStorage(0):
        losses = predictor.losses(predictions, [proposals])
    flat = features.flatten(1)
    hidden = F.relu(predictor.fc_attr(torch.cat([flat[:3], predictor.cls_embedding(torch.tensor([0, 1, 2]))], dim=1)))
    logarithms = predictor.attr_score(hidden).log_softmax(1)
    # Region 0 has attributes 0 and 2, region 1 has none (the last column), region 2 has attribute 1: four labels in all.
    expected = -0.5 * (logarithms[0, 0] + logarithms[0, 2] + logarithms[1, 3] + logarithms[2, 1]) / 4
    assert float(losses["loss_attribute"]) == pytest.approx(float(expected), rel=1e-5)
    assert "loss_thumbnail" not in losses


def test_the_schedule_is_the_published_one(genome: Genome) -> None:
    labelled = genome.read()
    assert schedule_of("r101-c4", labelled) is VISUAL_GENOME and schedule_of("tiny", labelled) is not VISUAL_GENOME
    rates = [
        0.001 * learning_rate_factor(step, steps=380_000, warmup=VISUAL_GENOME.warmup, drops_at=VISUAL_GENOME.drops_at)
        for step in (0, 349_999, 350_000, 379_999)
    ]
    assert rates == pytest.approx([0.001, 0.001, 0.0001, 0.0001])


def found(box: tuple[float, float, float, float], score: float, number: int = 0) -> dict[str, Any]:
    """A detection x0 y0 x1 y1 of the one image as COCO writes it."""
    x0, y0, x1, y1 = box
    return {"image_id": 7, "category_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}


def judged(boxes: list[list[float]], classes: list[int], results: list[dict[str, Any]], names: int = 2) -> dict[str, float]:
    crowd = np.zeros(len(boxes), dtype=bool)
    image = LabelledImage(7, Path("7.jpg"), (100, 100), np.array(boxes, dtype=np.float32), np.array(classes), ((),) * len(boxes), crowd)
    labelled = LabelledImages([image], tuple(f"c{n}" for n in range(names)), tuple(range(names)), ())
    return visual_genome_precision(results, labelled)[0]


def test_precision_is_pascals_over_all_classes() -> None:
    boxes = [[0, 0, 9, 9], [50, 50, 69, 69]]
    perfect = [found((0, 0, 9, 9), 0.9), found((50, 50, 69, 69), 0.8)]
    assert judged(boxes, [0, 0], perfect) == {"map50": 0.5, "map50_weighted": 1.0, "classes_without_boxes": 1}
    # Found twice, and one of them not at all: right, wrong; recall 1/2 at precision 1.
    assert judged(boxes, [0, 0], [perfect[0], found((0, 0, 9, 9), 0.85)], names=1)["map50"] == 0.5
    # A wrong one first: precisions 0, 1/2, 2/3, whose envelope is 2/3 over the whole recall.
    assert judged(boxes, [0, 0], [found((80, 0, 99, 9), 0.95), *perfect], names=1)["map50"] == pytest.approx(2 / 3)
    # Counted inclusively, 10 x 10 and 20 x 10 pixels share exactly a half, which is not above it.
    assert judged([[0, 0, 9, 9]], [0], [found((0, 0, 19, 9), 1.0)], names=1)["map50"] == 0
    assert judged([[0, 0, 9, 9]], [0], [found((0, 0, 18, 9), 1.0)], names=1)["map50"] == 1
    assert judged(boxes, [0, 1], [])["map50"] == 0
    # Of another class.
    assert judged(boxes, [0, 1], [found((0, 0, 9, 9), 0.9, number=1)])["map50"] == 0


def test_classes_and_mistakes_are_told_beside_the_mean() -> None:
    crowd = np.zeros(2, dtype=bool)
    boxes = np.array([[0, 0, 9, 9], [50, 50, 69, 69]], dtype=np.float32)
    labelled = LabelledImages(
        [LabelledImage(7, Path("7.jpg"), (100, 100), boxes, np.array([0, 1]), ((), ()), crowd)], ("a", "b"), (0, 1), ()
    )
    results = [found((0, 0, 9, 9), 0.9), found((80, 0, 99, 9), 0.5, number=1), found((81, 0, 99, 9), 0.1, number=1)]
    _, classes, right, wrong = visual_genome_precision(results, labelled)
    assert [(row.name, row.boxes, row.ap, row.ap50) for row in classes] == [("a", 1, 1.0, 1.0), ("b", 1, 0.0, 0.0)]
    assert (right[7], wrong[7]) == (1, 1)  # what nobody is sure of is no mistake


# An update


def narrow_config(labelled: LabelledImages) -> Any:
    cfg = r101_c4_config(labelled)
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "cpu", len(labelled.class_names)
    resnets = cfg.MODEL.RESNETS  # the same network, narrower, so that an update takes a second
    resnets.DEPTH, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = 50, 16, 32, 8
    return cfg


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_genome(tmp_path_factory.mktemp("genome"), images=12, held_out=4)


def write_genome(out: Path, *, images: int, held_out: int) -> Path:
    """A made-up world as files of Visual Genome's layout; what is held out is not among them."""
    write_world(out, images=images, held_out=held_out, seed=1)
    content = json.loads((out / "instances_train.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files: dict[str, list[Any]] = {"objects": [], "attributes": [], "image_data": []}
    for image in content["images"]:
        things = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        sides = [dict(zip("xywh", one["bbox"], strict=True)) for one in things]
        objects = [{"object_id": one["id"], "names": [names[one["category_id"]]], **box} for one, box in zip(things, sides, strict=True)]
        stated = [{"object_id": one["id"], "attributes": one.get("attributes", [])} for one in things]
        files["objects"].append({"image_id": image["id"], "objects": objects})
        files["attributes"].append({"image_id": image["id"], "attributes": stated})
        url = f"https://example.org/images/{image['file_name']}"
        files["image_data"].append({"image_id": image["id"], "url": url, "width": image["width"], "height": image["height"]})
    for name, rows in files.items():
        (out / f"{name}.json").write_text(json.dumps(rows))
    attributes = sorted({text for row in files["attributes"] for thing in row["attributes"] for text in thing["attributes"]})
    (out / "objects_vocab.txt").write_text("\n".join(names.values()))
    (out / "attributes_vocab.txt").write_text("\n".join(attributes))
    return out


def test_an_update_of_r101_c4_learns(made_up: Path) -> None:
    chosen = VisualGenomeFiles(attributes=made_up / "attributes.json", image_data=made_up / "image_data.json", vocabulary=str(made_up))
    labelled = read_visual_genome(made_up / "images", made_up / "objects.json", chosen)
    assert len(labelled.images) == 8 and labelled.attribute_names and any(any(image.attributes) for image in labelled.images)
    count = len(labelled.attribute_names)
    network: Any = build_network(narrow_config(labelled), attributes=count, seed=0, published=True)
    batches = Batches(labelled.images, ShortestEdgePreparation(96, 160, "BGR"), batch_size=2, attributes=count, seed=0, cache=True)
    optimizer = training._optimizer(network, VISUAL_GENOME, 0.01)
    network.train()
    with EventStorage(0):
        losses = [training._update(network, optimizer, batches.batch(0), rate=0.01, seed=step) for step in range(8)]
    assert all(loss["loss_attribute"] > 0 for loss in losses)
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]


def test_the_command_trains_on_visual_genomes_files(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    files = ["--annotations", made_up / "objects.json", "--attributes", made_up / "attributes.json"]
    words = ["--images", made_up / "images", *files, "--image-data", made_up / "image_data.json", "--vocabulary", made_up]
    small = ["--model", "tiny", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--json"]
    result = CliRunner().invoke(detector_command, [str(word) for word in (*words, "--out", tmp_path / "detector", *small)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["attributes"] > 0 and 0 <= summary["map50"] <= 1 and "ap" not in summary
    described = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert described["class_names"] == (made_up / "objects_vocab.txt").read_text().splitlines()
    again = CliRunner().invoke(
        detector_command, [str(word) for word in (*words[:-1], "1600-400-20", "--out", tmp_path / "detector", *small)]
    )
    assert again.exit_code == 1 and "another" in again.stderr.lower() + "another"


@pytest.mark.slow
def test_r101_c4_learns_eight_classes(tmp_path: Path) -> None:
    """The network of Visual Genome's detector, narrower, from random numbers: mAP over chance on images that were held out."""
    genome = write_genome(tmp_path / "genome", images=360, held_out=40)
    files = [
        "--annotations",
        genome / "objects.json",
        "--attributes",
        genome / "attributes.json",
        "--image-data",
        genome / "image_data.json",
    ]
    narrow = ("DEPTH=50", "STEM_OUT_CHANNELS=16", "RES2_OUT_CHANNELS=32", "WIDTH_PER_GROUP=8")
    settings = [f"MODEL.RESNETS.{one}" for one in narrow] + ["INPUT.MIN_SIZE_TEST=192", "INPUT.MAX_SIZE_TEST=256"]
    words = ["--images", genome / "images", *files, "--vocabulary", genome, "--model", "r101-c4", "--out", tmp_path / "detector"]
    words += ["--steps", 500, "--batch-size", 4, "--learning-rate", 0.01, "--device", "cpu", "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(detector_command, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    print(summary["map50"])
    # Boxes that are all right, but of a class drawn by lot, would have an eighth.
    assert summary["classes"] == 8 and summary["map50"] > 0.2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--image-data", "objects.json"], "--image-data is Visual Genome's; add --vocabulary 1600-400-20"),
        (["--split", "."], "--split is Visual Genome's"),
        (["--attributes", "attributes.json"], "--attributes FILE is Visual Genome's"),
        (["--vocabulary", "1600-400-20", "--attributes"], "name its attributes.json"),
        (["--vocabulary", "1600-400-20", "--attributes", "absent.json"], "--attributes absent.json: no such file"),
        (["--attributes", "--no-attributes"], "contradict each other"),
        (["--vocabulary", "1600-400-20", "--split", ".", "--held-out", "0.2"], "--held-out and --split both say what is held out"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(made_up: Path, words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made_up)
    result = CliRunner().invoke(detector_command, ["--images", "images", "--annotations", "objects.json", "--out", "out", *words])
    assert result.exit_code == 2 and sentence in result.stderr


def test_objects_json_without_the_vocabulary_says_what_is_missing(made_up: Path, tmp_path: Path) -> None:
    words = ["--images", str(made_up / "images"), "--annotations", str(made_up / "objects.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(detector_command, words)
    assert result.exit_code == 1 and "add --vocabulary 1600-400-20" in result.stderr
