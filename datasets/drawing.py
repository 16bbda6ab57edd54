"""Regions drawn on their photograph: numbered boxes with class names and confidences.

Number k on a picture is row k of the arrays, counted from 0. Boxes speak pixels of the *upright* image, so a photograph is turned
by its EXIF orientation before anything is drawn on it. Images are BGR, as OpenCV wants them.
"""

import colorsys
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from uniter.datasets.errors import BadInput
from uniter.datasets.regions import RegionFeatures, pixel_boxes
from uniter.datasets.vocabulary import visual_genome_attributes, visual_genome_objects

ByteImage = NDArray[np.uint8]
Colour = tuple[int, int, int]

PHOTOGRAPH_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# An attribute is named before the class from this probability on; Bottom-Up-Attention's own demonstration draws it so.
ATTRIBUTE_SHOWN_FROM = 0.1
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_LEAST_LUMINANCE = 0.55
_PADDING = 3  # pixels between a label's text and its edge


@dataclass(frozen=True, slots=True)
class RegionLabel:
    """What is known of one region: its row number, class, confidence and attribute (None where unknown)."""

    number: int
    name: str | None
    confidence: float
    attribute: str | None = None
    attribute_confidence: float = 0.0

    @property
    def words(self) -> str:
        """The class with its attribute in front of it where that is likely, "" where no class is known."""
        if self.name is None:
            return ""
        if self.attribute is not None and self.attribute_confidence > ATTRIBUTE_SHOWN_FROM:
            return f"{self.attribute} {self.name}"
        return self.name

    def shortened(self) -> tuple[str, ...]:
        """The label's text, longest first: number, words and confidence; number and words; the number alone."""
        if not self.words:
            return (f"{self.number}: {self.confidence:.2f}", str(self.number))
        return (f"{self.number} {self.words} {self.confidence:.2f}", f"{self.number} {self.words}", str(self.number))


def label_regions(
    regions: RegionFeatures, *, class_names: Sequence[str] | None = None, attribute_names: Sequence[str] | None = None
) -> list[RegionLabel]:
    """Name each region's best class, and its best attribute where the record has attributes.

    Args:
        regions: N regions.
        class_names: names by class, counted from 0 without the background; None: Visual Genome's 1,600 where the record fits them.
        attribute_names: the same for attributes; None: Visual Genome's 400 where the record fits them.

    Returns:
        N labels, in row order. A class without a name is called "class 17"; where regions were given and not detected (all
        confidences 0), the class's probability stands for the confidence.
    """
    confidences = np.asarray(regions.conf, dtype=np.float32).reshape(-1)
    names: list[str | None] = [None] * len(regions)
    best = regions.best_objects()
    if best is not None:
        width = regions.soft_labels.shape[1] - 1 if regions.soft_labels is not None else None
        known = _fitting(class_names, visual_genome_objects(), width)
        names = [_name(int(index), known, "class") for index in best[0]]
        if not confidences.any():
            confidences = np.asarray(best[1], dtype=np.float32)
    attributes: list[tuple[str | None, float]] = [(None, 0.0)] * len(regions)
    if regions.attributes is not None and regions.attributes.shape[1] > 1:
        foreground = np.asarray(regions.attributes[:, 1:], dtype=np.float32)
        known = _fitting(attribute_names, visual_genome_attributes(), foreground.shape[1])
        attributes = [(_name(int(row.argmax()), known, "attribute"), float(row.max())) for row in foreground]
    elif regions.attribute_ids is not None:
        known = _fitting(attribute_names, visual_genome_attributes(), None)
        probabilities = regions.attribute_conf if regions.attribute_conf is not None else np.ones(len(regions), dtype=np.float32)
        attributes = [(_name(int(i), known, "attribute"), float(p)) for i, p in zip(regions.attribute_ids, probabilities, strict=True)]
    return [
        RegionLabel(number, name, float(confidence), *attribute)
        for number, (name, confidence, attribute) in enumerate(zip(names, confidences, attributes, strict=True))
    ]


def _fitting(given: Sequence[str] | None, visual_genome: Sequence[str], width: int | None) -> Sequence[str]:
    if given:
        return given
    return visual_genome if width in (None, len(visual_genome)) else ()


def _name(index: int, names: Sequence[str], kind: str) -> str:
    return names[index] if 0 <= index < len(names) else f"{kind} {index}"


def class_colour(name: str) -> Colour:
    """A bright BGR colour that depends on the name alone: one class has one colour on every picture of every run."""
    spread = zlib.crc32(name.encode("utf-8"))
    red, green, blue = colorsys.hsv_to_rgb((spread % 360) / 360, 0.65 + (spread >> 10) % 4 * 0.1, 0.85 + (spread >> 20) % 3 * 0.07)
    # Pure blue is nearly as dark as black: mixed with white until it stands out from shadows, and black letters from it.
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    white = max(0.0, (_LEAST_LUMINANCE - luminance) / (1 - luminance))
    red, green, blue = (part + white * (1 - part) for part in (red, green, blue))
    return round(blue * 255), round(green * 255), round(red * 255)


def read_photograph(path: str | Path, *, longest: int | None = None) -> tuple[ByteImage, tuple[int, int]]:
    """Read a photograph upright, in BGR.

    Args:
        path: any image that Pillow reads; EXIF orientation is applied, transparency laid on white, 16 bit brought to 8.
        longest: shrink so that neither side is longer, in pixels; None keeps the size.

    Returns:
        The image, (H, W, 3) uint8 BGR, and the upright size (height, width) that the file has in full.

    Raises:
        BadInput: the file is no image, is damaged, or has more pixels than Pillow believes (its limit against decompression bombs).
    """
    try:
        with Image.open(path) as opened:
            turned = (opened.getexif().get(0x0112) or 1) >= 5
            size = (opened.width, opened.height) if turned else (opened.height, opened.width)
            if longest is not None:
                opened.draft("RGB" if opened.mode in ("RGB", "YCbCr") else None, (longest, longest))
            image = _eight_bit_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise BadInput(f"{path}: not a readable image ({error}); leave it out or export it again") from error
    if longest is not None:
        image.thumbnail((longest, longest), Image.Resampling.BOX if max(image.size) > 4 * longest else Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), size


def _eight_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def resized(image: ByteImage, longest: int) -> ByteImage:
    """The image with its longer side brought to `longest` pixels."""
    scale = longest / max(image.shape[:2])
    if scale == 1:
        return image
    shape = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC), dtype=np.uint8)


def empty_canvas(size: tuple[int, int] | None, *, longest: int) -> ByteImage:
    """A grey picture to draw boxes on where the photograph is missing: of the image's shape, or square where that is unknown."""
    height, width = size or (3, 4)
    scale = longest / max(height, width)
    return np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 232, dtype=np.uint8)


def draw_regions(
    image: ByteImage, regions: RegionFeatures, labels: Sequence[RegionLabel], *, most: int | None = None, text_height: int = 13
) -> ByteImage:
    """Draw numbered, named boxes; no label hides another.

    Args:
        image: (H, W, 3) uint8 BGR, upright, of any scale. Not modified.
        regions: N regions; their fractions of the image are drawn.
        labels: N labels, as `label_regions` makes them.
        most: draw only so many, the most confident ones; None draws all.
        text_height: pixels of a label's capital letters and their surroundings; 13 is readable on a screen.

    Returns:
        A new image of the same shape. A label that finds no room beside its box is shortened (without the confidence, then the
        number alone), then put at the nearest free place with a line to its box; on a picture full of labels it is left out.
    """
    height, width = image.shape[:2]
    picture = image.copy()
    order = np.argsort([-label.confidence for label in labels], kind="stable")[:most]
    boxes = pixel_boxes(np.asarray(regions.norm_bb, dtype=np.float32), (height, width))
    corners = np.clip(np.rint(boxes), 0, [width - 1, height - 1, width - 1, height - 1]).astype(int)
    colours = {int(k): class_colour(labels[k].name or "") for k in order}
    for k in order[::-1]:  # the most confident ones last, on top
        x0, y0, x1, y1 = (int(value) for value in corners[k])
        cv2.rectangle(picture, (x0, y0), (x1, y1), (0, 0, 0), 3, cv2.LINE_AA)
        cv2.rectangle(picture, (x0, y0), (x1, y1), colours[int(k)], 2, cv2.LINE_AA)
    placed = np.zeros((0, 4), dtype=int)
    for k in order:
        found = _find_room(labels[k].shortened(), corners[k], (height, width), placed, text_height)
        if found is None:
            continue
        text, place = found
        placed = np.concatenate([placed, place[None]])
        _draw_label(picture, text, place, corners[k], colours[int(k)], text_height)
    return picture


def draw_weights(image: ByteImage, regions: RegionFeatures, labels: Sequence[RegionLabel], weights: NDArray[np.floating]) -> ByteImage:
    """Light up the regions by their weights (attention, a row of a transport plan); the heaviest are outlined and named: three at
    most, and none that weighs less than a tenth of the first.

    Args:
        image: (H, W, 3) uint8 BGR, upright, of any scale. Not modified.
        regions, labels: N of each, as for `draw_regions`.
        weights: (N,) not negative; the greatest is shown as full light, whatever it is.
    """
    height, width = image.shape[:2]
    light = np.zeros((height, width), dtype=np.float32)
    boxes = np.rint(pixel_boxes(np.asarray(regions.norm_bb, dtype=np.float32), (height, width))).astype(int)
    corners = np.clip(boxes, 0, [width - 1, height - 1, width - 1, height - 1])
    most = max(float(np.max(weights, initial=0.0)), 1e-12)
    for (x0, y0, x1, y1), weight in zip(corners.tolist(), weights.tolist(), strict=True):
        inside = light[y0 : y1 + 1, x0 : x1 + 1]
        np.maximum(inside, weight / most, out=inside)
    picture = np.rint(image * (0.25 + 0.75 * light)[:, :, None]).astype(np.uint8)
    heaviest = np.argsort(-np.asarray(weights), kind="stable")[:3]
    heaviest = heaviest[np.asarray(weights)[heaviest] >= 0.1 * most]
    named = [replace(labels[k], confidence=float(weights[k])) for k in heaviest]
    return draw_regions(picture, regions.rows(heaviest), named, text_height=16)


def place_labels(
    texts: Sequence[Sequence[str]], boxes: NDArray[np.integer], size: tuple[int, int], *, text_height: int = 13
) -> list[tuple[str, NDArray[np.integer]] | None]:
    """Where the labels go: for each box the text that found room and its rectangle (4,) x0 y0 x1 y1 in pixels, exclusive at the end.

    Args:
        texts: for each box its label, longest wording first.
        boxes: (N, 4) pixels, x0 y0 x1 y1; the first ones choose first.
        size: (height, width) of the picture.
        text_height: as in `draw_regions`.
    """
    placed = np.zeros((0, 4), dtype=int)
    places: list[tuple[str, NDArray[np.integer]] | None] = []
    for wordings, box in zip(texts, boxes, strict=True):
        found = _find_room(wordings, box, size, placed, text_height)
        places.append(found)
        if found is not None:
            placed = np.concatenate([placed, found[1][None]])
    return places


def _scale(text_height: int) -> float:
    return text_height / 30.0  # Hershey's simplex capitals are about 21 pixels high at scale 1; the rest is air


def _find_room(
    wordings: Sequence[str], box: NDArray[np.integer], size: tuple[int, int], placed: NDArray[np.integer], text_height: int
) -> tuple[str, NDArray[np.integer]] | None:
    height, width = size
    for near in (True, False):
        for text in wordings:
            (text_width, _), _ = cv2.getTextSize(_drawable(text), _FONT, _scale(text_height), 1)
            label_width, label_height = text_width + 2 * _PADDING, text_height + 2
            if label_width > width or label_height > height:
                continue
            tops = _beside(box, label_width, label_height) if near else _anywhere(box, label_width, label_height, size)
            tops = np.clip(tops, 0, [width - label_width, height - label_height])
            places = np.concatenate([tops, tops + np.array([label_width, label_height])], axis=1)
            hidden = (
                (places[:, None, 0] < placed[None, :, 2])
                & (placed[None, :, 0] < places[:, None, 2])
                & (places[:, None, 1] < placed[None, :, 3])
                & (placed[None, :, 1] < places[:, None, 3])
            ).any(axis=1)
            if not hidden.all():
                return text, places[int(np.argmin(hidden))]
    return None


def _beside(box: NDArray[np.integer], label_width: int, label_height: int) -> NDArray[np.integer]:
    """Left upper corners of places at the box's edges, best first: its corners, then along its upper, left, right, lower edge."""
    x0, y0, x1, y1 = (int(value) for value in box)
    right, bottom = max(x0, x1 - label_width), max(y0, y1 - label_height)
    corners = [
        (x0, y0 - label_height),
        (x0, y0),
        (x0, bottom),
        (x0, y1),
        (right, y0),
        (right, y0 - label_height),
        (right, bottom),
        (right, y1),
    ]
    step = max(4, label_height // 2)
    across, down = range(x0, right + 1, step), range(y0, bottom + 1, step)
    edges = [(x, y0 - label_height) for x in across] + [(x, y0) for x in across] + [(x0, y) for y in down] + [(right, y) for y in down]
    edges += [(x, bottom) for x in across] + [(x, y1) for x in across]
    return np.array(corners + edges, dtype=int)


def _anywhere(box: NDArray[np.integer], label_width: int, label_height: int, size: tuple[int, int]) -> NDArray[np.integer]:
    height, width = size
    grid_x, grid_y = np.meshgrid(
        np.arange(0, max(1, width - label_width + 1), 6), np.arange(0, max(1, height - label_height + 1), max(4, label_height // 2))
    )
    tops = np.stack([grid_x.ravel(), grid_y.ravel()], axis=1)
    middle = tops + np.array([label_width // 2, label_height // 2])
    nearest = np.clip(middle, box[:2], box[2:])
    ordered: NDArray[np.integer] = tops[np.argsort(((middle - nearest) ** 2).sum(axis=1), kind="stable")]
    return ordered


def _draw_label(
    picture: ByteImage, text: str, place: NDArray[np.integer], box: NDArray[np.integer], colour: Colour, text_height: int
) -> None:
    x0, y0, x1, y1 = (int(value) for value in place)
    touches = x0 <= box[2] + 1 and box[0] - 1 <= x1 and y0 <= box[3] + 1 and box[1] - 1 <= y1
    if not touches:
        middle = ((x0 + x1) // 2, (y0 + y1) // 2)
        edge = (int(np.clip(middle[0], box[0], box[2])), int(np.clip(middle[1], box[1], box[3])))
        cv2.line(picture, middle, edge, colour, 1, cv2.LINE_AA)
    cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), colour, cv2.FILLED)
    blue, green, red = colour
    ink = (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 120 else (255, 255, 255)
    baseline = y1 - max(2, round(text_height * 0.3))
    cv2.putText(picture, _drawable(text), (x0 + _PADDING, baseline), _FONT, _scale(text_height), ink, 1, cv2.LINE_AA)


def _drawable(text: str) -> str:
    """OpenCV's font holds ASCII only; other letters become a question mark (the page beside the picture has them all)."""
    return re.sub(r"[^ -~]", "?", text)


class Photographs:
    """The photographs of a folder, found again by the keys of a database.

    A key is looked up as the path below the folder (with and without suffix), the file name and the stem; without `.npz`; in any
    case of letters; and without the prefixes and zeros that UNITER's published keys have (`nlvr2_dev-850-0-img0.npz` is
    `dev-850-0-img0.png`, `flickr30k_000000012345.npz` is `12345.jpg`). A stem that several files bear finds none of them,
    unless it is the path of one.
    """

    def __init__(self, folder: str | Path) -> None:
        """List the folder and all below it. Raises BadInput where there is no such folder, or no image in it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder} is no folder; --images wants the folder of the photographs that the regions were taken from")
        paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in PHOTOGRAPH_SUFFIXES and p.is_file())
        if not paths:
            raise BadInput(f"no image in {self.folder}; --images wants the folder of the photographs that the regions were taken from")
        self._count = len(paths)
        self._paths: dict[str, Path | None] = {}
        self._exact: dict[str, Path | None] = {}
        self._folded: dict[str, Path | None] = {}
        for path in paths:
            relative = path.relative_to(self.folder)
            names = {relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem}
            _enter(self._paths, {relative.as_posix(), relative.with_suffix("").as_posix()}, path)
            _enter(self._exact, names, path)
            folded = {name.casefold() for name in names}
            _enter(self._folded, folded | ({path.stem.lstrip("0") or "0"} if path.stem.isdecimal() else set()), path)

    def __len__(self) -> int:
        return self._count

    def find(self, key: str) -> Path | None:
        """The photograph of a key, None where there is none or where it is not clear which."""
        bare = key.removesuffix(".npz")
        for name in (key, bare):
            if (path := self._paths.get(name) or self._exact.get(name)) is not None:
                return path
        rest = bare.casefold()
        for _ in range(5):
            for name in (rest, rest.lstrip("0") or "0") if rest.isdecimal() else (rest,):
                if (path := self._folded.get(name)) is not None:
                    return path
            _, underscore, rest = rest.partition("_")
            if not underscore:
                break
        return None


def _enter(table: dict[str, Path | None], names: Iterable[str], path: Path) -> None:
    for name in names:
        table[name] = path if table.get(name, path) == path else None


def write_picture(path: Path, image: ByteImage, *, quality: int = 88) -> None:
    """Write a BGR image as JPEG. Raises OSError where it cannot be written."""
    encoded, content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert encoded
    path.write_bytes(content.tobytes())
