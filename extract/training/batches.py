"""Labelled images become the network's inputs, decoded once where memory allows."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.images.decoding import decode_image
from uniter.extract.training.crops import jittered, random_crop
from uniter.extract.training.labelled_images import LabelledImage
from uniter.extract.training.predictor import THUMBNAIL

CACHE_BYTES = 1 << 30


Item = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------------- batches


class Batches(Dataset[list[Item] | UniterError]):
    """Item `step` is the batch of that update: which images, which of them mirrored, follows from (seed, step) alone.

    An image that cannot be decoded after all is replaced by the next one; its number stands in `broken` of the item that met it. An error
    comes in the batch's place: raised in a worker process, it would arrive as that process's whole traceback.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        preparation: ShortestEdgePreparation,
        *,
        batch_size: int,
        attributes: int,
        seed: int,
        cache: bool,
        crop: int | None = None,
    ) -> None:
        self.crop = crop
        """Pixels a side of random crops; None: whole photographs."""
        self.soft = next((image.soft.shape[1] for image in images if image.soft is not None), 0)
        """How many classes boxes have distributions over; 0 where none has one."""
        self.images, self.preparation, self.batch_size, self.attributes, self.seed = images, preparation, batch_size, attributes, seed
        self._cache: dict[int, tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]] | None = {} if cache else None
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, step: int) -> list[Item] | UniterError:
        try:
            return self.batch(step)
        except UniterError as error:
            return error

    def batch(self, step: int) -> list[Item]:
        """The batch of that update, counted from 0."""
        flips = np.random.default_rng([self.seed, 1, step]).random(self.batch_size) < 0.5
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._item(self._number(position), bool(flip), position) for position, flip in zip(positions, flips, strict=True)]

    def _number(self, position: int) -> int:
        """Which image stands at this place of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.images))
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))}
        return int(self._orders[epoch][place])

    def _item(self, number: int, flip: bool, position: int = 0) -> Item:
        broken = []
        for attempt in range(len(self.images)):
            tried = (number + attempt) % len(self.images)
            try:
                pixels, boxes, thumbnails = self._load(tried)
                break
            except (BadInput, OSError):
                broken.append(tried)
        else:
            raise BadInput("none of the training images can be decoded; are the files damaged?")
        image = self.images[tried]
        if self.crop is None:
            rows, ignored = np.flatnonzero(~image.crowd), boxes[image.crowd]
            boxes, thumbnails = boxes[rows], thumbnails[rows]
        else:
            rng = np.random.default_rng([self.seed, 3, position])
            cut = random_crop(pixels, boxes, image.crowd, size=self.crop, rng=rng)
            pixels, boxes, rows, ignored = jittered(cut.pixels, rng), cut.boxes, cut.rows, cut.hidden
            thumbnails = np.stack([thumbnail(pixels, box) for box in boxes])
        if flip:
            pixels, boxes, ignored = pixels[:, ::-1], _mirrored(boxes, pixels.shape[1]), _mirrored(ignored, pixels.shape[1])
            thumbnails = thumbnails[:, :, :, ::-1]
        instances = Instances(pixels.shape[:2])
        instances.gt_boxes = Boxes(torch.from_numpy(boxes))
        instances.gt_classes = torch.from_numpy(image.classes[rows])
        instances.gt_thumbnails = torch.from_numpy(np.ascontiguousarray(thumbnails)).flatten(start_dim=1)
        if self.attributes:
            targets = torch.zeros((len(image.boxes), self.attributes + 1))
            for row, numbers in enumerate(image.attributes):
                targets[row, list(numbers)] = 1 / max(len(numbers), 1)
            instances.gt_attributes = targets[rows]
        if self.soft:
            instances.gt_soft = torch.zeros((len(rows), self.soft)) if image.soft is None else torch.from_numpy(image.soft[rows])
        item = {"image": channels_first(pixels), "height": image.size[0], "width": image.size[1], "instances": instances}
        return {**item, "ignored": torch.from_numpy(np.ascontiguousarray(ignored)), "broken": broken}

    def _load(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        """Network input (h, w, 3) uint8, boxes in its pixels (N, 4), and thumbnails of the boxes (N, 3, THUMBNAIL, THUMBNAIL)."""
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        image = self.images[number]
        pixels, scale = network_input(image, self.preparation)
        boxes = image.boxes * np.array([*scale, *scale], dtype=np.float32)
        thumbnails = (
            np.stack([thumbnail(pixels, box) for box in boxes]) if len(boxes) else np.zeros((0, 3, THUMBNAIL, THUMBNAIL), np.float32)
        )
        loaded = pixels, boxes, thumbnails
        if self._cache is not None:
            self._cache[number] = loaded
        return loaded


def _mirrored(boxes: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1))


def thumbnail(pixels: NDArray[np.uint8], box: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a region looks like, coarsely: (3, THUMBNAIL, THUMBNAIL) float32, grey 0, black and white at -1 and 1."""
    height, width = pixels.shape[:2]
    x0, y0 = (int(np.clip(math.floor(value), 0, limit - 1)) for value, limit in zip(box[:2], (width, height), strict=True))
    x1, y1 = max(math.ceil(box[2]), x0 + 1), max(math.ceil(box[3]), y0 + 1)
    region = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    small = cv2.resize(region, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)


def network_input(image: LabelledImage, preparation: ShortestEdgePreparation) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """A photograph as the network takes it: (H, W, 3) uint8 BGR, and the scale (x, y) from its own pixels to these.

    Raises:
        BadInput: it has other sides than its header says.
    """
    decoded = decode_image(image.path.read_bytes())
    if decoded.shape[:2] != image.size:
        raise BadInput(f"{image.path}: {decoded.shape[:2]} pixels where its header says {image.size}")
    prepared = preparation(decoded)
    return prepared.pixels.astype(np.uint8, copy=False), prepared.scale


def channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 to a tensor (3, H, W) uint8 of its own memory."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def input_bytes(image: LabelledImage, preparation: ShortestEdgePreparation) -> int:
    """Bytes that `network_input` of an image takes, from its size alone."""
    height, width = preparation.network_size(*image.size)
    return 3 * height * width
