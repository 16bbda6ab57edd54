"""The picture of the regions: names, labels that do not hide each other, upright photographs, photographs found by key."""

import cv2
import numpy as np
import pytest
from PIL import Image

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.table import read_items
from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.view.drawing import _places, draw_regions, draw_weights
from uniter.datasets.view.labels import RegionLabel, class_colour, label_regions
from uniter.datasets.view.pictures import empty_canvas, read_photograph
from uniter.datasets.vocabulary import visual_genome_attributes, visual_genome_objects


def regions(boxes, *, size=(100, 200), **more):
    pixels = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    count = len(pixels)
    given = {"conf": np.linspace(0.9, 0.3, count, dtype=np.float32), "boxes": pixels, "size": size, **more}
    return RegionFeatures(features=np.zeros((count, 4), np.float32), norm_bb=normalised_boxes(pixels, size), **given)


BOX = [[10, 10, 60, 60]]


def test_classes_come_from_soft_labels_without_their_background_column():
    soft = np.array([[0.6, 0.1, 0.3]])
    (label,) = label_regions(regions(BOX, soft_labels=soft), class_names=["cat", "dog"])
    assert (label.number, label.name, round(label.confidence, 3)) == (0, "dog", 0.9)


def test_classes_come_from_ids_and_the_vocabulary_on_board():
    bed = visual_genome_objects().index("bed")
    red = visual_genome_attributes().index("red")
    made = regions(BOX, object_ids=np.array([bed]), attribute_ids=np.array([red]), attribute_conf=np.array([0.8], np.float32))
    (label,) = label_regions(made)
    assert label.words == "red bed"
    assert label.shortened() == ("0 red bed 0.90", "0 red bed", "0")


def test_an_unlikely_attribute_is_kept_off_the_label():
    assert RegionLabel(0, "bed", 0.9, "red", 0.05).words == "bed"


def test_sixteen_hundred_and_one_columns_are_visual_genome_and_others_are_numbers():
    soft = np.zeros((1, 1601), np.float16)
    soft[0, 1 + visual_genome_objects().index("ski")] = 1
    assert label_regions(regions(BOX, soft_labels=soft))[0].name == "ski"
    assert label_regions(regions(BOX, soft_labels=np.array([[0.1, 0.2, 0.7]])))[0].name == "class 1"


def test_regions_without_any_class_are_numbered():
    assert label_regions(regions(BOX))[0].shortened() == ("0: 0.90", "0")


def test_given_boxes_show_the_probability_of_their_class():
    made = regions(BOX, conf=np.zeros(1, np.float32), soft_labels=np.array([[0.25, 0.75]]))
    assert label_regions(made, class_names=["cat"])[0].confidence == pytest.approx(0.75)


def test_attribute_distribution_without_its_first_column():
    made = regions(BOX, soft_labels=np.array([[0.1, 0.9]]), attributes=np.array([[0.5, 0.1, 0.4]]))
    (label,) = label_regions(made, class_names=["cat"], attribute_names=["wet", "old"])
    assert (label.words, label.attribute_confidence) == ("old cat", pytest.approx(0.4))


def overlap(one, other):
    return bool(one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


@pytest.mark.parametrize("count", [2, 36, 100])
def test_labels_do_not_hide_each_other_and_stay_inside(count):
    spread = np.random.default_rng(count)
    corners = spread.integers(0, 300, (count, 2))
    boxes = np.concatenate([corners, corners + spread.integers(10, 300, (count, 2))], axis=1)
    boxes[: count // 2] = [20, 20, 300, 200]  # the worst case: many equal boxes
    texts = [RegionLabel(k, "long class name", 0.5).shortened() for k in range(count)]
    places = [found for found in _places(texts, boxes, (480, 640), 13) if found is not None]
    assert len(places) >= min(count, 60)
    for index, (_, one) in enumerate(places):
        assert one[0] >= 0 and one[1] >= 0 and one[2] <= 640 and one[3] <= 480
        assert not any(overlap(one, other) for _, other in places[:index])


def test_a_picture_too_small_for_a_label_gets_none():
    assert _places([("0 cat 0.90", "0")], np.array([[0, 0, 4, 4]]), (5, 5), 13) == [None]


def test_the_box_is_drawn_where_it_is_in_the_colour_of_its_class():
    made = regions([[50, 40, 150, 80]], soft_labels=np.array([[0.1, 0.9]]))
    picture = draw_regions(empty_canvas((100, 200), longest=200), made, label_regions(made, class_names=["cat"]))
    assert picture.shape == (100, 200, 3)
    edge = picture[60, 150].astype(int)  # the middle of the right edge
    assert np.abs(edge - class_colour("cat")).max() < 40
    assert (picture[95, 100] == 232).all()


def test_most_keeps_the_most_confident():
    made = regions([[5, 5, 40, 40], [150, 50, 195, 95]], conf=np.array([0.2, 0.9], np.float32))
    plain = empty_canvas((100, 200), longest=200)
    picture = draw_regions(plain, made, label_regions(made), most=1)
    assert (picture[:, :100] == plain[:, :100]).all()
    assert (picture[:, 100:] != plain[:, 100:]).any()


def test_no_region_leaves_the_picture_as_it_is():
    plain = empty_canvas(None, longest=40)
    made = regions([])
    assert (draw_regions(plain, made, label_regions(made)) == plain).all()


def test_letters_beyond_ascii_are_drawn_as_question_marks():
    made = regions(BOX)
    one = draw_regions(empty_canvas((100, 200), longest=200), made, [RegionLabel(0, "Katze", 0.9)])
    other = draw_regions(empty_canvas((100, 200), longest=200), made, [RegionLabel(0, "Bär\n", 0.9)])
    assert one.shape == other.shape


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_are_read_upright(tmp_path, orientation):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = [255, 0, 0]  # red in the left upper corner
    turned_back = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    stored = Image.fromarray(np.rot90(upright, turned_back).copy())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    image, size = read_photograph(tmp_path / "a.png")
    assert size == (40, 60) and image.shape == (40, 60, 3)
    assert image[5, 5].tolist() == [0, 0, 255] and image[35, 55].tolist() == [0, 0, 0]


def test_transparency_is_laid_on_white_and_sixteen_bits_are_brought_to_eight(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_photograph(tmp_path / "clear.png")[0][0, 0].tolist() == [255, 255, 255]
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4), 128 * 257, np.uint16))
    assert read_photograph(tmp_path / "deep.png")[0][0, 0].tolist() == [128, 128, 128]


def test_longest_shrinks_and_the_size_is_the_whole_one(tmp_path):
    Image.new("RGB", (1000, 500), "green").save(tmp_path / "a.jpg")
    image, size = read_photograph(tmp_path / "a.jpg", longest=100)
    assert image.shape == (50, 100, 3) and size == (500, 1000)


def test_what_is_no_image_is_said(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image at all")
    with pytest.raises(BadInput, match=r"a\.jpg: not a readable image"):
        read_photograph(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("COCO_train2014_000000000009", "COCO_train2014_000000000009.jpg"),
        ("coco_train2014_000000000009.npz", "COCO_train2014_000000000009.jpg"),
        ("nlvr2_dev-850-0-img0.npz", "dev-850-0-img0.png"),
        ("flickr30k_000000012345.npz", "12345.jpg"),
        ("below/deep", "below/deep.webp"),
        ("deep.webp", "below/deep.webp"),
        ("twice", "twice.png"),
        ("many", None),
        ("below/twice", "below/twice.jpg"),
        ("absent", None),
        ("", None),
    ],
)
def test_photographs_are_found_by_the_keys_of_databases(tmp_path, key, name):
    for folder in ("below", "one", "two"):
        (tmp_path / folder).mkdir()
    names = (
        "COCO_train2014_000000000009.jpg",
        "dev-850-0-img0.png",
        "12345.jpg",
        "below/deep.webp",
        "twice.png",
        "below/twice.jpg",
        "one/many.png",
        "two/many.png",
    )
    for each in names:
        (tmp_path / each).touch()
    expected = None if name is None else tmp_path / name
    assert Photographs(tmp_path).find(key) == expected


def test_a_folder_without_photographs_is_said(tmp_path):
    with pytest.raises(BadInput, match="no image in"):
        Photographs(tmp_path)
    with pytest.raises(BadInput, match="is no folder"):
        Photographs(tmp_path / "absent")


def test_colours_depend_on_the_name_alone():
    assert class_colour("bed") == class_colour("bed") != class_colour("ski")
    assert all(0 <= part <= 255 for part in class_colour(""))
    for number in range(300):
        blue, green, red = class_colour(f"class {number}")
        assert 0.299 * red + 0.587 * green + 0.114 * blue > 130, "black letters on it can be read, and it shows on dark photographs"


def test_the_real_photographs_show_beds_skis_and_trucks(shared):
    found = Photographs(shared / "data/coco10")
    records = dict(read_items(shared / "data/coco10/train2014_obj36.tsv"))
    words = {key: [label.words for label in label_regions(record)] for key, record in records.items()}
    assert all(found.find(key) is not None for key in records)
    assert "bed" in words["COCO_train2014_000000084002"]
    assert "red ski" in words["COCO_train2014_000000131486"]
    assert "red truck" in words["COCO_train2014_000000387267"]


def test_weights_light_up_their_regions():
    made = regions([[10, 10, 60, 60], [120, 20, 180, 90]], soft_labels=np.array([[0.1, 0.9], [0.1, 0.9]]))
    bright = np.full((100, 200, 3), 200, np.uint8)
    picture = draw_weights(bright, made, label_regions(made, class_names=["cat"]), np.array([0.1, 0.9]))
    outside, light, heavy = (int(picture[y, x].mean()) for y, x in ((95, 80), (50, 35), (60, 150)))
    assert (outside, heavy) == (50, 200) and outside < light < heavy
    assert (bright == 200).all(), "the picture that was given is as it was"
    assert draw_weights(bright, regions([]), [], np.zeros(0)).mean() == 50
