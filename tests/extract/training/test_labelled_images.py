"""COCO's instances as people have them: what cannot be used is left out, counted and said; the rest is exact."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from uniter.datasets.errors import BadInput
from uniter.extract.training.labelled_images import coco_ground_truth, read_labelled_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for name, size in (("a.jpg", (60, 40)), ("sub/b.png", (30, 50))):
        Image.new("RGB", size, (10, 200, 30)).save(photos / name)
    return photos


def instances(**changes: Any) -> dict[str, Any]:
    """Two images, three categories with holes in their ids and out of order."""
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 40, "width": 60}, {"id": 3, "file_name": "sub/b.png"}],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 4, "name": "cat"}, {"id": 17, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 5, 20, 30], "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 4, "bbox": [0.5, 1.5, 10.25, 20], "iscrowd": 1},
        ],
        **changes,
    }


def write(folder: Path, content: Any) -> Path:
    path = folder.parent / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def with_annotation(**annotation: Any) -> dict[str, Any]:
    content = instances()
    content["annotations"].append({"id": 3, "image_id": 7, "category_id": 4, "bbox": [1, 1, 5, 5], **annotation})
    return content


def test_boxes_classes_and_crowds(folder: Path) -> None:
    found = read_labelled_images(folder, write(folder, instances()))
    assert found.class_names == ("cat", "dog", "zebra")
    assert found.category_ids == (4, 17, 90)
    first, second = found.images
    assert (first.id, first.size, second.size) == (7, (40, 60), (50, 30))
    np.testing.assert_array_equal(first.boxes, [[10, 5, 30, 35]])
    np.testing.assert_array_equal(second.boxes, [[0.5, 1.5, 10.75, 21.5]])
    assert (first.classes.tolist(), second.classes.tolist()) == ([2], [0])
    assert (first.crowd.tolist(), second.crowd.tolist()) == ([False], [True])
    assert found.skipped == {}
    truth = COCO()
    truth.dataset = coco_ground_truth(found)
    truth.createIndex()
    assert [annotation["bbox"] for annotation in truth.loadAnns(truth.getAnnIds(imgIds=[7]))] == [[10, 5, 20, 30]]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"category_id": 5}, "a box of an unknown category"),
        ({"category_id": [4]}, "a box of an unknown category"),
        ({"category_id": None}, "a box of an unknown category"),
        ({"image_id": 1234}, "a box of an image that is not listed"),
        ({"image_id": {}}, "a box of an image that is not listed"),
        ({"bbox": [1, 1, 0, 5]}, "an empty box"),
        ({"bbox": [10, 10, -5, 5]}, "an empty box"),
        ({"bbox": [70, 10, 5, 5]}, "a box outside its image"),
        ({"bbox": [-20, -20, 10, 10]}, "a box outside its image"),
        ({"bbox": [1, 1, 0.4, 9]}, "a box narrower than a pixel"),
        ({"bbox": [1, 1, 5]}, "a box that is not four numbers"),
        ({"bbox": None}, "a box that is not four numbers"),
        ({"bbox": ["1", 1, 5, 5]}, "a box that is not four numbers"),
        ({"bbox": [1, 1, 1e30, 5]}, "a box that is not four numbers"),
        ({"bbox": [True, 1, 5, 5]}, "a box that is not four numbers"),
    ],
)
def test_unusable_boxes_are_counted(folder: Path, annotation: dict[str, Any], reason: str) -> None:
    found = read_labelled_images(folder, write(folder, with_annotation(**annotation)))
    assert found.skipped == {reason: 1}
    assert [len(image.boxes) for image in found.images] == [1, 1]


def test_a_box_that_hangs_over_is_cut(folder: Path) -> None:
    found = read_labelled_images(folder, write(folder, with_annotation(bbox=[-5, 30, 20, 100])))
    np.testing.assert_array_equal(found.images[0].boxes[1], [0, 30, 15, 40])
    assert found.skipped == {}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"id": 8, "file_name": "gone.jpg"}, "an image whose file is missing"),
        ({"id": 8, "file_name": "text.jpg"}, "an image that cannot be read"),
        ({"id": 8, "file_name": "../secret.jpg"}, "an image whose file_name leads out of the folder"),
        ({"id": 8, "file_name": "/etc/passwd"}, "an image whose file_name leads out of the folder"),
        ({"id": 7, "file_name": "sub/b.png"}, "an image id that was there before"),
        ({"id": 8, "file_name": "a.jpg", "height": 60, "width": 40}, "an image of another size than annotated"),
        ({"id": "8", "file_name": "a.jpg"}, "an image entry without id or file_name"),
        ({"id": 8}, "an image entry without id or file_name"),
        ("a.jpg", "an image entry without id or file_name"),
    ],
)
def test_unusable_images_are_counted(folder: Path, image: Any, reason: str) -> None:
    (folder / "text.jpg").write_text("no image")
    (folder.parent / "secret.jpg").write_bytes((folder / "a.jpg").read_bytes())
    content = instances()
    content["images"].append(image)
    found = read_labelled_images(folder, write(folder, content))
    assert found.skipped == {reason: 1}
    assert [image.id for image in found.images] == [7, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(instances())[:-30], "was it cut off"),
        ("[1, 2]", "no list images or annotations or categories"),
        (instances(annotations={}), "no list annotations"),
        (instances(categories=[]), "lists no categories"),
        (instances(categories=[{"id": "1", "name": "cat"}]), "a number and a text"),
        (instances(categories=[{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]), "two categories have the id 1"),
        (instances(images=[{"id": 1, "file_name": "gone.jpg"}]), r"none of its images can be used \(an image whose file is missing: 1"),
    ],
)
def test_files_that_are_no_instances_are_refused(folder: Path, content: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_labelled_images(folder, write(folder, content))


@pytest.mark.parametrize(
    ("stated", "listed", "expected"),
    [
        ({"attributes": ["red", "big"]}, None, ("red", "big")),
        ({"attributes": ["red"]}, [{"id": 5, "name": "big"}, {"id": 9, "name": "red"}], ("red",)),
        ({"attributes": [9, 5, 9]}, [{"id": 9, "name": "red"}, {"id": 5, "name": "big"}], ("red", "big")),
        ({"attribute_ids": [9, -1, -1]}, [{"id": 9, "name": "red"}], ("red",)),
        ({"attributes": {"occluded": False, "paint": "red"}}, None, ("red",)),
        ({}, None, ()),
    ],
)
def test_attributes_in_the_ways_people_write_them(folder: Path, stated: Any, listed: Any, expected: tuple[str, ...]) -> None:
    content = with_annotation(**stated)
    if listed:
        content["attributes"] = listed
    found = read_labelled_images(folder, write(folder, content))
    assert tuple(found.attribute_names[number] for number in found.images[0].attributes[1]) == expected
    assert found.images[0].attributes[0] == ()
    assert found.skipped == {}


def test_an_attribute_that_is_not_listed_is_counted(folder: Path) -> None:
    content = with_annotation(attributes=["red", "blue", 77]) | {"attributes": [{"id": 9, "name": "red"}]}
    found = read_labelled_images(folder, write(folder, content))
    assert found.images[0].attributes[1] == (0,)
    assert found.skipped == {"an attribute that is not listed": 2}


def test_turned_photographs_are_measured_upright(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(folder / "a.jpg", exif=exif)
    found = read_labelled_images(folder, write(folder, instances(images=[{"id": 7, "file_name": "a.jpg", "height": 60, "width": 40}])))
    assert found.images[0].size == (60, 40)
