"""Published weight files to one layout: Detectron2's names, background last, anchors kept.

| file | told by | turned into Detectron2's layout by |
|---|---|---|
| Detectron2's and airsplay's pickles, model zoo | a pickle | nothing: it is the layout |
| Hugging Face `pytorch_model.bin` | BatchNorm counters | dropping the counters |
| MILVLG `.pth` | `attr_linear1`, or two RPN scores an anchor | renaming, background from first to last, foreground minus background |
| VinVL's `.pth` | `backbone.body.stem.*` | renaming, background from first to last |
| `.caffemodel` | protobuf | Caffe's layer names, BatchNorm's three blobs, and the same as above |

Converted files are cached as safetensors under the user's cache folder with the SHA-256 of source and result. Whether the anchors came
from the file is logged: with other anchors hardly a proposal agrees, and nothing else would show it.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.storage.files import sha256_of
from uniter.extract.weights.cache import CONVERTER, cache_folder, cached_weights, keep
from uniter.extract.weights.fetching import discard
from uniter.extract.weights.files import Tensors, read_tensors
from uniter.extract.weights.layouts import to_detectron2
from uniter.extract.weights.random import random_tensors
from uniter.extract.weights.sources import address_of, find_weight_file, silent_sources

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A detector's tensors in Detectron2's layout.

    Attributes:
        tensors: by Detectron2's names, background last.
        layout: "detectron2", "huggingface", "milvlg", "vinvl", "caffe" or "random".
        source: where they came from, as the user would say it.
        source_sha256: of the file they came from; None for random ones.
        sha256: of the tensors themselves (names, shapes, values): the same for the same weights in any layout's file.
    """

    tensors: Tensors
    layout: str
    source: str
    source_sha256: str | None
    sha256: str

    def settings(self) -> dict[str, Any]:
        """What goes into a database's settings."""
        known = {"layout": self.layout, "sha256": self.sha256}
        if self.layout == "random":
            return {**known, "source": self.source, "note": "RANDOM weights, for trying things out: the regions mean nothing"}
        return {**known, "source_sha256": self.source_sha256}


# Where weights come from


def load_weights(spec: str, *, shapes: Mapping[str, Sequence[int]], input_deviation: float = 60.0) -> Weights:
    """Weights from a file, a URL, a hub id, or `random:SEED`.

    Args:
        spec: what the user passed as `--weights`.
        shapes: the detector's own tensors by name; random weights are made for them.
        input_deviation: of the network's input, about 60 where pixels are not divided by theirs; random weights allow for it.

    Raises:
        BadInput: the file is damaged, hostile or of no known kind, or the seed is no number.
        UniterError: there is no such file, or the download failed.
    """
    if spec.startswith("random:"):
        return _random(spec, shapes, input_deviation)
    return _load(spec, silent_sources([spec]))


def load_known_weights(sources: Sequence[str], *, detector: str) -> Weights:
    """The first of the known sources that answers.

    Raises:
        UniterError: none does; the sentence names each with its reason, and what else can be done.
    """
    reasons = []
    silent: dict[str, str] | None = None
    for source in sources:
        try:
            if silent is None and address_of(source) is not None:
                silent = silent_sources(sources)
            return _load(source, silent or {})
        except UniterError as error:
            reasons.append(f"{source}: {error}" if source not in str(error) else str(error))
            log.info("weights: %s", reasons[-1])
    tried = "; ".join(reasons) or "none is known"
    features = "Visual Genome's" if detector.startswith(("butd", "vinvl")) else f"those of {detector}"
    raise UniterError(
        f"no weights for detector {detector!r} could be fetched. Tried: {tried}. What works now, without a download: --detector on-board "
        f"(COCO's 80 classes, features of 512 numbers, small and quick; not {features}: no model that was trained on those takes them). "
        f"Or pass a copy that you have with --weights FILE (.caffemodel, Detectron2 .pkl, Hugging Face .bin, MILVLG .pth or .safetensors), "
        f"take a model-zoo detector such as --detector COCO-Detection/faster_rcnn_R_101_C4_3x, or train one of your own with "
        f"`uniter-train detector`"
    )


def _load(spec: str, silent: Mapping[str, str]) -> Weights:
    """One source; a download that turns out to be no weights is thrown away, so that the next run asks again."""
    if (reason := silent.get(address_of(spec) or "")) is not None:
        raise UniterError(f"{spec}: {reason}")
    path = find_weight_file(spec)
    try:
        return load_weight_file(path, source=spec)
    except BadInput:
        if path.parent == cache_folder() / "downloads":
            discard(path)
        raise


# Reading, converting, keeping


def load_weight_file(path: Path, *, source: str | None = None) -> Weights:
    """Read a weight file of any published layout; the converted tensors are kept in the cache folder.

    Raises:
        BadInput: see `files.read_tensors`; or a value is not finite.
    """
    source = source or str(path)
    source_sha256 = sha256_of(path)
    kept = cache_folder() / "weights" / f"{source_sha256}-{CONVERTER}.safetensors"
    if (cached := cached_weights(kept)) is not None:
        tensors, layout = cached
    else:
        kind, found = read_tensors(path)
        tensors, layout = to_detectron2(found, path=path)
        if (kind, layout) != ("safetensors", "detectron2"):
            keep(kept, tensors, {"source": source, "source_sha256": source_sha256, "layout": layout})
    return Weights(tensors, layout, source, source_sha256, tensors_sha256(tensors))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data if array.ndim else array.tobytes())
    return digest.hexdigest()


# Random weights


def _random(spec: str, shapes: Mapping[str, Sequence[int]], input_deviation: float) -> Weights:
    seed = spec.removeprefix("random:")
    if not re.fullmatch(r"\d{1,9}", seed):
        raise BadInput(f"--weights {spec}: expected random:SEED with a whole number, such as random:1")
    log.warning("RANDOM WEIGHTS (%s): the regions will mean nothing; this is for trying things out", spec)
    tensors = random_tensors(shapes, int(seed), input_deviation=input_deviation)
    return Weights(tensors, "random", spec, None, tensors_sha256(tensors))
