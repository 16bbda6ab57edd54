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
    ) -> None:
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
        return [self._item(self._number(step * self.batch_size + place), bool(flips[place])) for place in range(self.batch_size)]

    def _number(self, position: int) -> int:
        """Which image stands at this place of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.images))
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))}
        return int(self._orders[epoch][place])

    def _item(self, number: int, flip: bool) -> Item:
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
        if flip:
            pixels, boxes = pixels[:, ::-1], boxes.copy()
            boxes[:, [0, 2]] = pixels.shape[1] - boxes[:, [2, 0]]
            thumbnails = thumbnails[:, :, :, ::-1]
        instances = Instances(pixels.shape[:2])
        trained = ~image.crowd
        instances.gt_boxes = Boxes(torch.from_numpy(boxes[trained]))
        instances.gt_classes = torch.from_numpy(image.classes[trained])
        instances.gt_thumbnails = torch.from_numpy(np.ascontiguousarray(thumbnails[trained])).flatten(start_dim=1)
        if self.attributes:
            targets = torch.zeros((len(image.boxes), self.attributes + 1))
            for row, numbers in enumerate(image.attributes):
                targets[row, list(numbers)] = 1 / max(len(numbers), 1)
            instances.gt_attributes = targets[torch.from_numpy(trained)]
        return {"image": channels_first(pixels), "height": image.size[0], "width": image.size[1], "instances": instances, "broken": broken}

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


def thumbnail(pixels: NDArray[np.uint8], box: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a region looks like, coarsely: (3, THUMBNAIL, THUMBNAIL) float32, grey 0, black and white at -1 and 1."""
    height, width = pixels.shape[:2]
    x0, y0 = (int(np.clip(math.floor(value), 0, limit - 1)) for value, limit in zip(box[:2], (width, height), strict=True))
    x1, y1 = max(math.ceil(box[2]), x0 + 1), max(math.ceil(box[3]), y0 + 1)
    region = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    small = cv2.resize(region, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)


def network_input(image: LabelledImage, preparation: ShortestEdgePreparation) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    decoded = decode_image(image.path.read_bytes())
    if decoded.shape[:2] != image.size:
        raise BadInput(f"{image.path}: {decoded.shape[:2]} pixels where its header says {image.size}")
    prepared = preparation(decoded)
    return prepared.pixels.astype(np.uint8, copy=False), prepared.scale


def channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def input_bytes(image: LabelledImage, preparation: ShortestEdgePreparation) -> int:
    height, width = preparation.network_size(*image.size)
    return 3 * height * width
