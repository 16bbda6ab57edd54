"""Driving a Detectron2 Faster R-CNN in stages: feature maps, proposals, region features, class and attribute scores.

Detectron2's own `inference` regresses, suppresses and cuts; here each stage stands alone, so that the features of *all* proposals come
out together with the boxes they were pooled from, nothing unneeded is computed, and images of different sizes share a batch exactly.
Class scores keep Detectron2's order (background last) inside this file; `probabilities` brings the background to column 0.

Imports Detectron2: load this module only where a detector is built.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import RoIPool, batched_nms

from uniter.extract.detector.cpu import keep_freed_memory, max_pooled
from uniter.extract.detector.extents import PaddingGuard, Size, pad_together, supports_padding
from uniter.extract.detector.lite import UniterSecondLookROIHeads

FeatureMaps = dict[str, Tensor]


ROIS_AT_ONCE = {"cpu": 20, "cuda": 512}


"""RoIs that go through the head together: on a CPU few enough for its caches, on a GPU enough to fill it."""


SECOND_LOOK_NMS = 0.5
"""Regressed boxes of one class with a higher intersection over union are one region: it is looked at again once, and kept once."""


PROPOSAL, REGRESSED = "proposal", "regressed"
"""Which boxes features are pooled from: as they were proposed, or, by detectors that look twice, regressed; goes into the header."""


HEAD_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Found(NamedTuple):
    """What a network says of one image, on its device; see `RawRegions`.

    Attributes:
        boxes: (P, 4) pixels of the image.
        features: (P, D).
        classes, attributes: distributions, (P, C + 1) and (P, A + 1), background and "no attribute" first.
        confidence: (P,), where the detector has a rule of its own by which regions stay.
    """

    boxes: Tensor
    features: Tensor
    classes: Tensor
    attributes: Tensor | None = None
    confidence: Tensor | None = None


class Places(NamedTuple):
    """Boxes of one image that features are wanted of.

    Attributes:
        in_network, in_image: (P, 4), in pixels of the network's input and of the image.
        factors: (4,), network pixels per image pixel.
        size: (height, width) of the network's input, without padding.
        given: they are the caller's, not proposals.
    """

    in_network: Tensor
    in_image: Tensor
    factors: Tensor
    size: Size
    given: bool


class RegionNetwork:
    """One Faster R-CNN (C4, DC5 or FPN heads), its BatchNorm folded, weights in channels-last order.

    Not safe for several threads at once. With `bf16` or `fp16` only the RoI head runs in that precision: it is most of the work of a C4
    detector and keeps the features' cosine above .9999, while half-precision feature maps move the proposals.
    """

    def __init__(self, model: Any, *, device: str = "cpu", precision: str = "fp32") -> None:
        self.device = torch.device(device)
        self.model: Any = fold_batch_norm(model.eval()).to(self.device).to(memory_format=torch.channels_last)
        self.model.requires_grad_(False)
        self.backbone: Any = self.model.backbone
        self.rpn: Any = self.model.proposal_generator
        self.heads: Any = self.model.roi_heads
        self.is_c4 = hasattr(self.heads, "res5")
        self.looks_twice = isinstance(self.heads, UniterSecondLookROIHeads)
        self.box_kind = REGRESSED if self.looks_twice else PROPOSAL
        self.head: Any = self.heads.res5 if self.is_c4 else self.heads.box_head
        self.pooler: Any = self.heads.pooler if self.is_c4 else self.heads.box_pooler
        self.predictor: Any = self.heads.box_predictor
        self.precision = precision
        self.head_type = HEAD_TYPES[precision]
        self.head.to(self.head_type)
        self._max_pooler: RoIPool | None = None
        if self.device.type == "cpu":
            keep_freed_memory()
            poolers = self.pooler.level_poolers
            if len(poolers) == 1 and isinstance(poolers[0], RoIPool):
                self._max_pooler = poolers[0]
        self.feature_width: int = self.predictor.cls_score.in_features
        self._mean, self._deviation = self.model.pixel_mean.to(self.device), self.model.pixel_std.to(self.device)
        self._cores = ThreadPoolExecutor(torch.get_num_threads())
        self._takes_scales = "scales" in inspect.signature(self.rpn.predict_proposals).parameters
        self._guard = PaddingGuard(self.backbone, self.rpn.rpn_head)
        self.mixes_sizes = supports_padding(self.backbone, self.rpn.rpn_head)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """No gradients; on a GPU no TF32 in `fp32`, which reproduces the reference."""
        reduced = self.precision != "fp32"
        matmul = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = reduced
        try:
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=reduced):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul

    def normalised(self, pixels: Tensor) -> Tensor:
        """(h, w, 3) pixels to a (3, h, w) float32 network input; float pixels were normalised when they were prepared."""
        moved = pixels.to(self.device, non_blocking=True).permute(2, 0, 1)
        return moved if moved.is_floating_point() else (moved.float() - self._mean) / self._deviation

    def regions(
        self, images: Sequence[Tensor], scales: Sequence[tuple[float, float]], boxes: Sequence[Tensor] | None, *, attributes: bool
    ) -> list[Found]:
        """What the network says of each image of a batch: feature maps, proposals, their features and scores. Within `exact`.

        Args:
            images: as prepared, (h, w, 3); on the host, in pinned memory if this device is a GPU.
            scales: network pixels per image pixel along x and y.
            boxes: (P, 4) pixels of each upright image, on this device, instead of proposals.
            attributes: also the distribution over attributes.

        Returns:
            What it found in each image, on this device.
        """
        inputs = [self.normalised(pixels) for pixels in images]
        # A copy out of pageable memory would wait for the network.
        factors = torch.tensor([scale * 2 for scale in scales], pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        levels = self.feature_maps(inputs)
        # All proposals first, whose number the host has to know: the heads then run on a GPU one after the other without waiting.
        found = []
        for index, (maps, answers) in enumerate(levels):
            size = (images[index].shape[0], images[index].shape[1])
            if boxes is None:
                in_network, _ = self.proposals(maps, answers, size, scales[index][0])
                if self.looks_twice:
                    in_network = self.regressed(maps, in_network, size)
                in_image = in_network / factors[index]
            else:
                in_network, in_image = boxes[index] * factors[index], boxes[index]
            found.append(Places(in_network, in_image, factors[index], size, boxes is not None))
        return [self.described(maps, places, attributes=attributes) for (maps, _), places in zip(levels, found, strict=True)]

    def described(self, maps: FeatureMaps, places: Places, *, attributes: bool) -> Found:
        """Features and scores of the boxes of the image that the maps are of; `attributes`: also the distribution over attributes."""
        features = self.region_features(maps, places.in_network)
        return Found(places.in_image, features, *self.scores(features, attributes=attributes))

    def feature_maps(self, images: Sequence[Tensor]) -> list[tuple[FeatureMaps, FeatureMaps]]:
        """What the backbone and the RPN head see in each image.

        Args:
            images: (3, h, w) float32 each, normalised.

        Returns:
            For each image its feature maps by name, (1, C, H, W), and the RPN's answers {"logits0": (1, A, H, W), "deltas0": (1, 4A, H, W),
            "logits1": ...}, cut to the extent that the image alone would have.
        """
        divisor = max(int(getattr(self.backbone, "size_divisibility", 0) or 0), 1)
        batch, sizes = pad_together(images, divisor)
        total = (batch.shape[2], batch.shape[3])
        if any(size != total for size in sizes) and not self.mixes_sizes:
            return [self.feature_maps([image])[0] for image in images]
        with self._guard.batch(sizes, total) as extents:
            maps = self.backbone(batch)
            logits, deltas = self.rpn.rpn_head([maps[name] for name in self.rpn.in_features])
            answers = {f"logits{level}": map_ for level, map_ in enumerate(logits)} | {
                f"deltas{level}": map_ for level, map_ in enumerate(deltas)
            }

            def of_image(index: int, whole: Mapping[str, Tensor]) -> FeatureMaps:
                cut = {}
                for name, map_ in whole.items():
                    height, width = extents.of(map_)[index]
                    cut[name] = map_[index : index + 1, :, :height, :width]
                return cut

            return [(of_image(index, maps), of_image(index, answers)) for index in range(len(images))]

    def proposals(self, maps: FeatureMaps, answers: FeatureMaps, size: Size, scale: float) -> tuple[Tensor, Tensor]:
        """Proposals of one image by the detector's own rule.

        Args:
            maps, answers: one pair of `feature_maps`.
            size: (height, width) of the network's input, without padding.
            scale: network pixels per image pixel.

        Returns:
            Boxes (P, 4) in network pixels and their logits (P,), best first.
        """
        anchors = self.rpn.anchor_generator([maps[name] for name in self.rpn.in_features])
        levels = range(len(anchors))
        # (1, A, H, W) -> (1, H * W * A) and (1, 4A, H, W) -> (1, H * W * A, 4): the anchors' order.
        logits = [answers[f"logits{level}"].permute(0, 2, 3, 1).flatten(1) for level in levels]
        deltas = [answers[f"deltas{level}"].permute(0, 2, 3, 1).reshape(1, -1, 4) for level in levels]
        arguments: dict[str, Any] = {"scales": [scale]} if self._takes_scales else {}
        found = self.rpn.predict_proposals(anchors, logits, deltas, [size], **arguments)[0]
        return found.proposal_boxes.tensor, found.objectness_logits

    def regressed(self, maps: FeatureMaps, boxes: Tensor, size: Size) -> Tensor:
        """Where a first look moves boxes to, each for its best class; of those that then lie on each other in a class, the best.

        Args:
            maps: of one image.
            boxes: (P, 4) in network pixels.
            size: (height, width) of the network's input, without padding.

        Returns:
            At most P boxes inside the image, in network pixels, best first.
        """
        features = self.region_features(maps, boxes)
        best, classes = self.class_logits(features).softmax(dim=1)[:, :-1].max(dim=1)
        deltas = self.predictor.bbox_pred(features).view(len(boxes), -1, 4)
        for_class = classes if deltas.shape[1] > 1 else torch.zeros_like(classes)
        chosen = deltas[torch.arange(len(boxes), device=boxes.device), for_class]
        moved = Boxes(self.predictor.box2box_transform.apply_deltas(chosen, boxes))
        moved.clip(size)
        # A box that was moved out of the image stays where it was proposed.
        found = torch.where(moved.nonempty(threshold=1.0)[:, None], moved.tensor, boxes)
        return found[batched_nms(found, best, classes, SECOND_LOOK_NMS)]

    def pooled(self, maps: FeatureMaps, boxes: Tensor) -> Tensor:
        """What the pooler cuts out for each box, (P, C, h, w); boxes (P, 4) in network pixels."""
        names = self.heads.in_features if self.is_c4 else self.heads.box_in_features
        if self._max_pooler is not None:
            return max_pooled(maps[names[0]], boxes, scale=self._max_pooler.spatial_scale, side=self.pooler.output_size[0])
        levels = [maps[name].contiguous() for name in names]
        poolers = self.pooler.level_poolers

        def pool(part: Tensor) -> Tensor:
            pooled: Tensor
            with torch.inference_mode():
                if len(poolers) == 1:  # Detectron2's way to the one pooler waits for the GPU twice
                    pooled = poolers[0](levels[0], torch.cat([part.new_zeros((len(part), 1)), part], dim=1))
                else:
                    pooled = self.pooler(levels, [Boxes(part)])
            return pooled

        # torchvision pools on one core and without Python's lock, so each core takes a share of the boxes.
        share = -(-len(boxes) // torch.get_num_threads())
        if self.device.type != "cpu" or share == len(boxes):
            return pool(boxes)
        return torch.cat(list(self._cores.map(pool, torch.split(boxes, share))))

    def region_features(self, maps: FeatureMaps, boxes: Tensor) -> Tensor:
        """What the box predictor sees of each box, (P, D) float32; boxes (P, 4) in network pixels."""
        parts = [torch.zeros((0, self.feature_width), device=self.device)]
        if self._max_pooler is not None:  # rounding keeps the order: the maximum of rounded values is the rounded maximum
            maps = {name: map_.to(self.head_type) for name, map_ in maps.items()}
        for chunk in torch.split(boxes, ROIS_AT_ONCE[self.device.type]) if len(boxes) else ():
            pooled = self.pooled(maps, chunk).to(self.head_type)
            if self.is_c4:
                parts.append(self.head(pooled.contiguous(memory_format=torch.channels_last)).float().mean(dim=(2, 3)))
            else:
                parts.append(self.head(pooled).float())
        return torch.cat(parts)

    def class_logits(self, features: Tensor) -> Tensor:
        """(P, C + 1), background last."""
        scores: Tensor = self.predictor.cls_score(features)
        return scores

    def attribute_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """(P, A + 1), "no attribute" last, of features (P, D) and the classes (P,) that are embedded with them."""
        embedded = self.predictor.cls_embedding(classes)
        scores: Tensor = self.predictor.attr_score(torch.relu(self.predictor.fc_attr(torch.cat([features, embedded], dim=1))))
        return scores

    def scores(self, features: Tensor, *, attributes: bool = False) -> tuple[Tensor, Tensor | None]:
        """Distributions over classes (P, C + 1), background first, and over attributes (P, A + 1), "no attribute" first, if asked for.

        The class that is embedded for the attributes is the best of all, background included.
        """
        logits = self.class_logits(features)
        return probabilities(logits), probabilities(self.attribute_logits(features, logits.argmax(dim=1))) if attributes else None


def probabilities(logits: Tensor) -> Tensor:
    """Soft-max with the last column, the background, moved to the front."""
    shares = logits.softmax(dim=1)
    return torch.cat([shares[:, -1:], shares[:, :-1]], dim=1)


def fold_batch_norm(model: Any) -> Any:
    """Multiply the frozen BatchNorm of each of Detectron2's convolutions into its weights; in place, exact up to rounding (2e-6)."""
    for layer in model.modules():
        norm: Any = getattr(layer, "norm", None)
        if not isinstance(layer, nn.Conv2d) or type(norm).__name__ not in (
            "FrozenBatchNorm2d",
            "BatchNorm2d",
            "NaiveSyncBatchNorm",
            "SyncBatchNorm",
        ):
            continue
        with torch.no_grad():
            weight, bias, mean, variance = (tensor.double() for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
            factor = weight / (variance + norm.eps).sqrt()
            shift = bias - mean * factor
            if layer.bias is not None:
                shift = shift + layer.bias.double() * factor
            layer.weight.copy_(layer.weight.double() * factor[:, None, None, None])
            layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=False)
        setattr(layer, "norm", None)  # noqa: B010 - mypy takes any attribute of a module for a tensor or a module
    return model
