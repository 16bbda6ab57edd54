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
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import RoIPool, batched_nms

from uniter.datasets.devices import float32_products
from uniter.extract.detector.cpu import keep_freed_memory, max_pooled
from uniter.extract.detector.extents import PaddingGuard, Size, pad_together, supports_padding
from uniter.extract.detector.fixed_size import Candidates, FixedBoxes, clip, detectron2_candidates, first_standing
from uniter.extract.detector.lite import UniterSecondLookROIHeads

FeatureMaps = dict[str, Tensor]


ROIS_AT_ONCE = {"cpu": 20, "cuda": 512}


"""RoIs that go through the head together: on a CPU few enough for its caches, on a GPU enough to fill it."""


ANCHORS_KEPT = 64
"""Sizes of maps whose anchors are kept: on a GPU making them takes as many small kernels as a stage of the backbone."""


SECOND_LOOK_NMS = 0.5
"""Regressed boxes of one class with a higher intersection over union are one region: it is looked at again once, and kept once."""


PROPOSAL, REGRESSED = "proposal", "regressed"
"""Which boxes features are pooled from: as they were proposed, or, by detectors that look twice, regressed; goes into the header."""


HEAD_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Found(NamedTuple):
    """What a network says of one image, on its device; see `RawRegions`.

    Attributes:
        boxes: (P, 4) pixels of the image.
        features: (P, D).
        classes, attributes: distributions, (P, C + 1) and (P, A + 1), background and "no attribute" first.
        confidence: (P,), where the detector has a rule of its own by which regions stay.
        kept: () int64, the rows behind so many are fillers; None: there are none. settled: () bool; if not true, all is void.
    """

    boxes: Tensor
    features: Tensor
    classes: Tensor
    attributes: Tensor | None = None
    confidence: Tensor | None = None
    kept: Tensor | None = None
    settled: Tensor | None = None


class Places(NamedTuple):
    """Boxes of one image that features are wanted of.

    Attributes:
        in_network, in_image: (P, 4), in pixels of the network's input and of the image.
        factors: (4,), network pixels per image pixel.
        size: (height, width) of the network's input, without padding.
        given: they are the caller's, not proposals.
        kept, settled: see `Found`.
    """

    in_network: Tensor
    in_image: Tensor
    factors: Tensor
    size: Size
    given: bool
    kept: Tensor | None = None
    settled: Tensor | None = None


class RegionNetwork:
    """One Faster R-CNN (C4, DC5 or FPN heads), its BatchNorm folded, weights in channels-last order.

    Not safe for several threads at once. With `bf16` or `fp16` only the RoI head runs in that precision: it is most of the work of a C4
    detector and keeps the features' cosine above .9999, while half-precision feature maps move the proposals, as those of `tf32` do.
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
        # Where numbers are at hand, fillers would be computed for nothing.
        self.fixed = self.device.type != "cpu" and self.can_be_fixed
        self._anchors: dict[tuple[Size, ...], list[Any]] = {}

    @property
    def can_be_fixed(self) -> bool:
        """Whether its proposals can be had in tensors of one size (fixed_size.py); VinVL's choice of classes asks for numbers."""
        return type(self).described is RegionNetwork.described and (hasattr(self.rpn, "candidates") or type(self.rpn) is RPN)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """No gradients; products of float32 in float32, whatever the program around has set, or in TF32 where that is the precision."""
        with torch.inference_mode(), float32_products(tf32=self.precision == "tf32"):
            yield

    def normalised(self, pixels: Tensor) -> Tensor:
        """(h, w, 3) pixels to a (3, h, w) float32 network input; float pixels were normalised when they were prepared."""
        moved = pixels.to(self.device, non_blocking=True).permute(2, 0, 1)
        return moved if moved.is_floating_point() else (moved.float() - self._mean) / self._deviation

    def regions(
        self,
        images: Sequence[Tensor],
        scales: Sequence[tuple[float, float]],
        boxes: Sequence[Tensor] | None,
        *,
        attributes: bool,
        fixed: bool = False,
    ) -> list[Found]:
        """What the network says of each image of a batch: feature maps, proposals, their features and scores. Within `exact`.

        Args:
            images: as prepared, (h, w, 3); on the host, in pinned memory if this device is a GPU.
            scales: network pixels per image pixel along x and y.
            boxes: (P, 4) pixels of each upright image, on this device, instead of proposals.
            attributes: also the distribution over attributes.
            fixed: in tensors of one size, so that nothing here waits for the device; see `Found.kept` and `Found.settled`.

        Returns:
            What it found in each image, on this device.
        """
        inputs = [self.normalised(pixels) for pixels in images]
        # A copy out of pageable memory would wait for the network.
        factors = torch.tensor([scale * 2 for scale in scales], pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        levels = self.feature_maps(inputs)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        # All proposals first, whose number the host has to know: the heads then run on a GPU one after the other without waiting.
        if boxes is None and fixed:
            proposed = self.fixed_proposals(levels, sizes, [scale[0] for scale in scales])
            found = [
                Places(one.boxes, one.boxes / factor, factor, size, False, one.kept, one.settled)
                for one, factor, size in zip(proposed, factors, sizes, strict=True)
            ]
        else:
            found = []
            for index, (maps, answers) in enumerate(levels):
                if boxes is None:
                    in_network, _ = self.proposals(maps, answers, sizes[index], scales[index][0])
                    if self.looks_twice:
                        in_network = self.regressed(maps, in_network, sizes[index])
                    in_image = in_network / factors[index]
                else:
                    in_network, in_image = boxes[index] * factors[index], boxes[index]
                found.append(Places(in_network, in_image, factors[index], sizes[index], boxes is not None))
        return [self.described(maps, places, attributes=attributes) for (maps, _), places in zip(levels, found, strict=True)]

    def described(self, maps: FeatureMaps, places: Places, *, attributes: bool) -> Found:
        """Features and scores of the boxes of the image that the maps are of; `attributes`: also the distribution over attributes."""
        features = self.region_features(maps, places.in_network)
        classes, found = self.scores(features, attributes=attributes)
        return Found(places.in_image, features, classes, found, kept=places.kept, settled=places.settled)

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
        logits, deltas = in_the_anchors_order(answers, len(anchors))
        arguments: dict[str, Any] = {"scales": [scale]} if self._takes_scales else {}
        found = self.rpn.predict_proposals(anchors, logits, deltas, [size], **arguments)[0]
        return found.proposal_boxes.tensor, found.objectness_logits

    def fixed_proposals(
        self, levels: Sequence[tuple[FeatureMaps, FeatureMaps]], sizes: Sequence[Size], scales: Sequence[float]
    ) -> list[FixedBoxes]:
        """As `proposals` of all images of a batch, regressed where the detector looks twice, without a wait; boxes in network pixels."""
        candidates = []
        for (maps, answers), size, scale in zip(levels, sizes, scales, strict=True):
            anchors = self._anchors_of([maps[name] for name in self.rpn.in_features])
            logits, deltas = ([level[0] for level in part] for part in in_the_anchors_order(answers, len(anchors)))
            if hasattr(self.rpn, "candidates"):
                candidates.append(self.rpn.candidates(anchors, logits, deltas, size, scale))
            else:
                candidates.append(detectron2_candidates(self.rpn, anchors, logits, deltas, size))
        proposed = first_standing(candidates)
        if not self.looks_twice:
            return proposed
        moved = []
        for (maps, _), size, first in zip(levels, sizes, proposed, strict=True):
            boxes, best, classes = self.moved(maps, first.boxes, size)
            there = torch.arange(len(boxes), device=self.device) < first.kept
            moved.append(Candidates(boxes, best, there, boxes, classes, len(boxes), len(boxes), SECOND_LOOK_NMS))
        return [again._replace(settled=first.settled & again.settled) for first, again in zip(proposed, first_standing(moved), strict=True)]

    def _anchors_of(self, maps: list[Tensor]) -> list[Any]:
        """Detectron2's anchors of these levels, kept for maps of the same sizes."""
        shapes = tuple((map_.shape[2], map_.shape[3]) for map_ in maps)
        if shapes not in self._anchors:
            if len(self._anchors) >= ANCHORS_KEPT:
                self._anchors.clear()
            self._anchors[shapes] = self.rpn.anchor_generator(maps)
        return self._anchors[shapes]

    def regressed(self, maps: FeatureMaps, boxes: Tensor, size: Size) -> Tensor:
        """Where a first look moves boxes to, each for its best class; of those that then lie on each other in a class, the best.

        Args:
            maps: of one image.
            boxes: (P, 4) in network pixels.
            size: (height, width) of the network's input, without padding.

        Returns:
            At most P boxes inside the image, in network pixels, best first.
        """
        found, best, classes = self.moved(maps, boxes, size)
        return found[batched_nms(found, best, classes, SECOND_LOOK_NMS)]

    def moved(self, maps: FeatureMaps, boxes: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (P, 4) where the best class of each moves it, and the probability (P,) and number (P,) of that class."""
        features = self.region_features(maps, boxes)
        best, classes = self.class_logits(features).softmax(dim=1)[:, :-1].max(dim=1)
        deltas = self.predictor.bbox_pred(features).view(len(boxes), -1, 4)
        for_class = classes if deltas.shape[1] > 1 else torch.zeros_like(classes)
        chosen = deltas[torch.arange(len(boxes), device=boxes.device), for_class]
        moved = clip(self.predictor.box2box_transform.apply_deltas(chosen, boxes), size)
        # A box that was moved out of the image stays where it was proposed.
        there = ((moved[:, 2:] - moved[:, :2]) > 1.0).all(dim=1, keepdim=True)
        return torch.where(there, moved, boxes), best, classes

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
                if len(poolers) == 1 or self.fixed:  # Detectron2's way to the one pooler waits for the GPU twice, to several once for each
                    rows = torch.cat([part.new_zeros((len(part), 1)), part], dim=1)
                    pooled = poolers[0](levels[0], rows)
                    own = self._levels_of(part) if len(poolers) > 1 else None
                    for number in range(1, len(poolers)):
                        assert own is not None
                        pooled = torch.where((own == number)[:, None, None, None], poolers[number](levels[number], rows), pooled)
                else:
                    pooled = self.pooler(levels, [Boxes(part)])
            return pooled

        # torchvision pools on one core and without Python's lock, so each core takes a share of the boxes.
        share = -(-len(boxes) // torch.get_num_threads())
        if self.device.type != "cpu" or share == len(boxes):
            return pool(boxes)
        return torch.cat(list(self._cores.map(pool, torch.split(boxes, share))))

    def _levels_of(self, boxes: Tensor) -> Tensor:
        """(P,) int64: the number of the level that each box (P, 4) is pooled from."""
        pooler = self.pooler
        levels: Tensor = assign_boxes_to_levels(
            [Boxes(boxes)], pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
        )
        return levels

    def region_features(self, maps: FeatureMaps, boxes: Tensor) -> Tensor:
        """What the box predictor sees of each box, (P, D) float32; boxes (P, 4) in network pixels."""
        parts = [torch.zeros((0, self.feature_width), device=self.device)]
        if self._max_pooler is not None:  # rounding keeps the order: the maximum of rounded values is the rounded maximum
            maps = {name: map_.to(self.head_type) for name, map_ in maps.items()}
        for chunk in torch.split(boxes, ROIS_AT_ONCE.get(self.device.type, ROIS_AT_ONCE["cuda"])) if len(boxes) else ():
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


def in_the_anchors_order(answers: FeatureMaps, levels: int) -> tuple[list[Tensor], list[Tensor]]:
    """The RPN's answers of each level, logits (1, H * W * A) of (1, A, H, W), and deltas (1, H * W * A, 4) of (1, 4A, H, W)."""
    logits = [answers[f"logits{level}"].permute(0, 2, 3, 1).flatten(1) for level in range(levels)]
    deltas = [answers[f"deltas{level}"].permute(0, 2, 3, 1).reshape(1, -1, 4) for level in range(levels)]
    return logits, deltas


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
