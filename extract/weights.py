"""Published weight files to one layout: Detectron2's names, background last, anchors kept.

| file | told by | turned into Detectron2's layout by |
|---|---|---|
| Detectron2's and airsplay's pickles, model zoo | a pickle | nothing: it is the layout |
| Hugging Face `pytorch_model.bin` | BatchNorm counters | dropping the counters |
| MILVLG `.pth` | `attr_linear1`, or two RPN scores an anchor | renaming, background from first to last, foreground minus background |
| `.caffemodel` | protobuf | Caffe's layer names, BatchNorm's three blobs, and the same as above |

Converted files are cached as safetensors under the user's cache folder with the SHA-256 of source and result. Whether the anchors came
from the file is logged: with other anchors hardly a proposal agrees, and nothing else would show it.
"""

import hashlib
import http.client
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.weight_files import Tensors, read_tensors, sha256_of

log = logging.getLogger(__name__)
CONVERTER = 1
"""Counted up when the conversion changes, so that cached results of an older one are not taken."""
BOX_PREDICTOR, RPN_HEAD = "roi_heads.box_predictor.", "proposal_generator.rpn_head."
ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
DOWNLOAD_TIMEOUT_S, ANSWER_TIMEOUT_S = 30, 6
DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
"""What `detectron2://` stands for in Detectron2's configurations."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A detector's tensors in Detectron2's layout.

    Attributes:
        tensors: by Detectron2's names, background last.
        layout: "detectron2", "huggingface", "milvlg", "caffe" or "random".
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


def caffe_anchors() -> Tensor:
    """(12, 4) float32, Bottom-Up-Attention's anchors: ratios 0.5, 1, 2 outer, scales 4, 8, 16, 32 inner, inclusive pixels, centre 7.5.

    Source: `generate_anchors.py` of bottom-up-attention; base sizes are rounded before they are scaled.
    """
    rows = []
    for ratio in (0.5, 1.0, 2.0):
        base_width = round(math.sqrt(256 / ratio))
        base_height = round(base_width * ratio)
        for scale in (4, 8, 16, 32):
            half_width, half_height = (base_width * scale - 1) / 2, (base_height * scale - 1) / 2
            rows.append((7.5 - half_width, 7.5 - half_height, 7.5 + half_width, 7.5 + half_height))
    return torch.tensor(rows, dtype=torch.float32)


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
    return _load(spec, _silent([spec]))


def load_known_weights(sources: Sequence[str], *, detector: str) -> Weights:
    """The first of the known sources that answers.

    Raises:
        UniterError: none does; the sentence names each with its reason, and what else can be done.
    """
    reasons = []
    silent: dict[str, str] | None = None
    for source in sources:
        try:
            if silent is None and _address(source) is not None:
                silent = _silent(sources)
            return _load(source, silent or {})
        except UniterError as error:
            reasons.append(f"{source}: {error}" if source not in str(error) else str(error))
            log.info("weights: %s", reasons[-1])
    tried = "; ".join(reasons) or "none is known"
    raise UniterError(
        f"no weights for detector {detector!r} could be fetched. Tried: {tried}. What to do: pass a copy that you have with --weights FILE "
        f"(.caffemodel, Detectron2 .pkl, Hugging Face .bin, MILVLG .pth or .safetensors), take a model-zoo detector such as "
        f"--detector COCO-Detection/faster_rcnn_R_101_C4_3x, train one of your own with `uniter-train detector`, or try things out with "
        f"--weights random:1"
    )


def find_weight_file(spec: str) -> Path:
    """The local file behind a path, a URL (downloaded once; `detectron2://` as Detectron2 means it) or a hub id."""
    if is_url(spec):
        return _download(_plain_url(spec))
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UniterError(f"--weights {spec}: a folder; name the weight file in it")
    if _is_hub_id(spec):
        return _from_hub(spec)
    raise UniterError(f"--weights {spec}: no such file; expected a weight file, a URL, a hub id (`owner/name`), or random:SEED")


def _load(spec: str, silent: Mapping[str, str]) -> Weights:
    """One source; a download that turns out to be no weights is thrown away, so that the next run asks again."""
    if (reason := silent.get(_address(spec) or "")) is not None:
        raise UniterError(f"{spec}: {reason}")
    path = find_weight_file(spec)
    try:
        return load_weight_file(path, source=spec)
    except BadInput:
        if path.parent == cache_folder() / "downloads":
            path.unlink(missing_ok=True)
        raise


def is_url(spec: str) -> bool:
    """Whether weights are named by a URL."""
    return spec.startswith(("http://", "https://", "detectron2://"))


def _plain_url(spec: str) -> str:
    return DETECTRON2_URL + spec.removeprefix("detectron2://") if spec.startswith("detectron2://") else spec


def _is_hub_id(spec: str) -> bool:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", spec) or Path(spec).exists() or Path(spec).parent.is_dir():
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(spec)
    except HFValidationError:
        return False
    return True


def _address(spec: str) -> str | None:
    """The server that has to be asked for it, None where it is here already."""
    if is_url(spec):
        url = _plain_url(spec)
        parts = urllib.parse.urlsplit(url)
        return None if _download_target(url).is_file() else f"{parts.scheme}://{parts.netloc}"
    if _is_hub_id(spec):
        from huggingface_hub import constants, try_to_load_from_cache

        kept = any(isinstance(try_to_load_from_cache(spec, name), str) for name in HUB_FILES)
        return None if kept or constants.HF_HUB_OFFLINE else constants.ENDPOINT
    return None


def _silent(specs: Collection[str]) -> dict[str, str]:
    """Why servers cannot be reached, by address; all are asked at once.

    Without a network each may take its time to say so (the hub's client alone half a minute of retries), and a look-up of a name has no
    limit at all: so each is asked in a thread of its own, which nobody waits for when the time is over.
    """
    answers: dict[str, str | None] = dict.fromkeys({address for spec in specs if (address := _address(spec)) is not None}, "")

    def ask(address: str) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=ANSWER_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            answers[address] = None  # a refusal is an answer
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers[address] = f"{address} cannot be reached ({getattr(error, 'reason', None) or error})"
        else:
            answers[address] = None

    threads = [threading.Thread(target=ask, args=(address,), daemon=True) for address in answers]
    for thread in threads:
        thread.start()
    until = time.monotonic() + ANSWER_TIMEOUT_S + 1
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    late = f"did not answer within {ANSWER_TIMEOUT_S} s"
    return {address: answer or f"{address} {late}" for address, answer in dict(answers).items() if answer is not None}


def cache_folder() -> Path:
    """Where downloads and converted weights are kept: $UNITER_CACHE, else $XDG_CACHE_HOME/uniter, else ~/.cache/uniter."""
    if named := os.environ.get("UNITER_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uniter"


def _download_target(url: str) -> Path:
    base = re.sub(r"[^\w.-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1]) or "file"
    return cache_folder() / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"


def _download(url: str) -> Path:
    target = _download_target(url)
    folder = target.parent
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.info("downloading %s", url)
        with (
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer,
            tempfile.NamedTemporaryFile(dir=folder, delete=False) as file,
        ):
            try:
                expected = int(answer.headers.get("Content-Length") or -1)
                received = 0
                while block := answer.read(1 << 20):
                    received += file.write(block)
                if 0 <= expected != received:
                    raise UniterError(f"{url}: the download ended after {received:,} of {expected:,} bytes; try again")
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except urllib.error.HTTPError as error:
        raise UniterError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UniterError(f"{url}: {getattr(error, 'reason', None) or str(error) or type(error).__name__}") from error
    return target


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in HUB_FILES:
        try:
            return Path(hf_hub_download(repository, name))
        except Exception as error:  # the hub's client raises errors of half a dozen libraries
            # The error for "no network" is, of all things, a kind of "no such file".
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UniterError(f"hub id {repository}: {reason[:200]}") from error
    raise UniterError(
        f"hub id {repository}: holds neither {' nor '.join(HUB_FILES)}; name another file of it by its URL, "
        f"https://huggingface.co/{repository}/resolve/main/FILE"
    )


# Reading, converting, keeping


def load_weight_file(path: Path, *, source: str | None = None) -> Weights:
    """Read a weight file of any published layout; the converted tensors are kept in the cache folder.

    Raises:
        BadInput: see `weight_files.read_tensors`; or a value is not finite.
    """
    source = source or str(path)
    source_sha256 = sha256_of(path)
    kept = cache_folder() / "weights" / f"{source_sha256}-{CONVERTER}.safetensors"
    if (cached := _cached(kept)) is not None:
        tensors, layout = cached
    else:
        kind, found = read_tensors(path)
        tensors, layout = to_detectron2(found, path=path)
        if (kind, layout) != ("safetensors", "detectron2"):
            _keep(kept, tensors, {"source": source, "source_sha256": source_sha256, "layout": layout})
    return Weights(tensors, layout, source, source_sha256, tensors_sha256(tensors))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data if array.ndim else array.tobytes())
    return digest.hexdigest()


def _cached(kept: Path) -> tuple[Tensors, str] | None:
    """The converted tensors and their layout, if the kept file is the one that was written."""
    try:
        facts = json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["sha256"] != sha256_of(kept):
            log.warning("%s was changed since it was made; converting again", kept)
            return None
        return dict(load_file(kept)), str(facts["layout"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(kept: Path, tensors: Tensors, facts: Mapping[str, str]) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            new = Path(folder) / kept.name
            save_file(tensors, new)
            described = new.with_suffix(".json")
            described.write_text(json.dumps({**facts, "sha256": sha256_of(new), "converter": CONVERTER}, indent=1), encoding="utf-8")
            new.replace(kept)
            described.replace(kept.with_suffix(".json"))
    except OSError as error:
        log.warning("converted weights are not kept (%s): %s", kept.parent, error)


def to_detectron2(found: Tensors, *, path: Path | str = "weights") -> tuple[Tensors, str]:
    """Any published layout to Detectron2's, all values in float32.

    Returns:
        The tensors and the layout they had: "detectron2", "huggingface", "milvlg" or "caffe".

    Raises:
        BadInput: MILVLG's pre-activation ResNet-152, or a value that is not finite.
    """
    names = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    counters = [name for name in names if name.endswith(".num_batches_tracked")]
    plain = {name: tensor.to(torch.float32) for name, tensor in names.items() if name not in counters}
    objectness = plain.get(RPN_HEAD + "objectness_logits.weight")
    deltas = plain.get(RPN_HEAD + "anchor_deltas.weight")
    if "conv1[0]" in plain or any(name.startswith("res2a_branch") for name in plain):
        converted, layout = from_caffe(plain), "caffe"
    elif BOX_PREDICTOR + "attr_linear1.weight" in plain or (
        objectness is not None and deltas is not None and 2 * objectness.shape[0] == deltas.shape[0]
    ):
        converted, layout = from_milvlg(plain), "milvlg"
    else:
        converted, layout = plain, "huggingface" if counters else "detectron2"
    if layout == "milvlg" and "backbone.stem.conv1.weight" not in converted:
        raise BadInput(f"{path}: MILVLG's pre-activation ResNet-152 is of another architecture; use its r101 files")
    for name, tensor in converted.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(f"{path}: {name} holds values that are not finite; is the file damaged?")
    return {name: tensor.contiguous() for name, tensor in converted.items()}, layout


def from_milvlg(tensors: Tensors) -> Tensors:
    """MILVLG's caffe-mode layout to Detectron2's: background first, soft-max RPN, box deltas of weight 1."""
    renamed = {"attr_linear1": "fc_attr", "attr_linear2": "attr_score", "cls_embed": "cls_embedding"}
    converted = {}
    for name, tensor in tensors.items():
        head, _, kind = name.removeprefix(BOX_PREDICTOR).rpartition(".")
        if name.startswith(BOX_PREDICTOR):
            converted[f"{BOX_PREDICTOR}{renamed.get(head, head)}.{kind}"] = _predictor_rows(renamed.get(head, head), tensor)
        elif name.startswith(RPN_HEAD + "objectness_logits."):
            converted[name] = _foreground_minus_background(tensor)
        else:
            converted[name] = tensor
    return converted


# A bottleneck's convolutions: Detectron2's name by Caffe's branch.
CAFFE_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
CAFFE_HEADS = {
    "rpn_conv/3x3": RPN_HEAD + "conv",
    "rpn_cls_score": RPN_HEAD + "objectness_logits",
    "rpn_bbox_pred": RPN_HEAD + "anchor_deltas",
    **{name: BOX_PREDICTOR + name for name in ("cls_score", "bbox_pred", "cls_embedding", "fc_attr", "attr_score")},
}


def from_caffe(blobs: Tensors) -> Tensors:
    """Bottom-Up-Attention's Caffe blobs, named `layer[k]`, to Detectron2's layout.

    Layers of other heads (`rel_*`, `fc_rel*`, `heatmap_*`) are left out.
    """
    converted: Tensors = {}
    for name, blob in blobs.items():
        layer, at = name[:-3], int(name[-2])
        kind = ("weight", "bias")[at] if at < 2 else ""
        if layer in CAFFE_HEADS and kind:
            tensor = blob
            target = CAFFE_HEADS[layer]
            if target.startswith(BOX_PREDICTOR):
                tensor = tensor.reshape(tensor.shape[-2:] if kind == "weight" else (-1,))  # old files keep matrices with four dimensions
                tensor = _predictor_rows(layer, tensor)
            elif layer == "rpn_cls_score":
                tensor = _foreground_minus_background(tensor if kind == "weight" else tensor.reshape(-1))
            converted[f"{target}.{kind}"] = tensor if kind == "weight" else tensor.reshape(-1)
        elif (convolution := _caffe_convolution(layer)) and at == 0:
            converted[f"{convolution}.weight"] = blob
            tag = layer.removeprefix("res") if layer != "conv1" else "_conv1"
            converted |= _caffe_norm(f"{convolution}.norm", f"bn{tag}", f"scale{tag}", blobs)
    return converted


def _caffe_convolution(layer: str) -> str | None:
    """Detectron2's name of a convolution of Caffe's ResNet: `res4b11_branch2b` is `backbone.res4.11.conv2`."""
    if layer == "conv1":
        return "backbone.stem.conv1"
    match = re.fullmatch(r"res([2-5])([a-z])(\d*)_branch(1|2[abc])", layer)
    if match is None:
        return None
    stage, letter, number, branch = match.groups()
    block = int(number) if number else ord(letter) - ord("a")
    return f"{'roi_heads' if stage == '5' else 'backbone'}.res{stage}.{block}.{CAFFE_BRANCHES[branch]}"


def _caffe_norm(target: str, norm: str, scale: str, blobs: Tensors) -> Tensors:
    """Caffe's BatchNorm (mean, variance, divisor of both) and Scale as one BatchNorm."""
    found = {}
    if f"{norm}[0]" in blobs:
        divisor = float(blobs[f"{norm}[2]"].reshape(-1)[0]) if f"{norm}[2]" in blobs else 1.0
        factor = 0.0 if divisor == 0 else 1.0 / divisor
        found = {"running_mean": blobs[f"{norm}[0]"] * factor, "running_var": blobs[f"{norm}[1]"] * factor}
    if f"{scale}[0]" in blobs:
        found |= {"weight": blobs[f"{scale}[0]"], "bias": blobs[f"{scale}[1]"]}
    return {f"{target}.{kind}": tensor.reshape(-1) for kind, tensor in found.items()}


def _predictor_rows(head: str, tensor: Tensor) -> Tensor:
    """Rows of a box predictor's tensor with the background first to Detectron2's order."""
    if head in ("cls_score", "cls_embedding", "attr_score"):
        return torch.cat([tensor[1:], tensor[:1]])
    if head == "bbox_pred":
        kept = tensor[4:]
        weights = torch.tensor(BOX_WEIGHTS).repeat(len(kept) // 4)
        return kept * weights.reshape(-1, *[1] * (kept.ndim - 1))
    return tensor


def _foreground_minus_background(tensor: Tensor) -> Tensor:
    """The RPN's two scores an anchor (all backgrounds, then all foregrounds) as one logit."""
    half = len(tensor) // 2
    return tensor[half:] - tensor[:half]


# Random weights


def _random(spec: str, shapes: Mapping[str, Sequence[int]], input_deviation: float) -> Weights:
    seed = spec.removeprefix("random:")
    if not re.fullmatch(r"\d{1,9}", seed):
        raise BadInput(f"--weights {spec}: expected random:SEED with a whole number, such as random:1")
    log.warning("RANDOM WEIGHTS (%s): the regions will mean nothing; this is for trying things out", spec)
    tensors = random_tensors(shapes, int(seed), input_deviation=input_deviation)
    return Weights(tensors, "random", spec, None, tensors_sha256(tensors))


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int, *, input_deviation: float = 60.0) -> Tensors:
    """Random weights for a detector's tensors, tame enough for float16 and varied enough that regions differ.

    A plain He initialisation doubles the variance with every residual block (float16 overflows) and drifts towards features that are
    the same everywhere. Here the filters have zero mean, so that no common part grows, and the last convolution of each block is
    damped. Every tensor has its own generator, seeded by name and seed, so that they do not depend on each other.
    """
    tensors = {name: _draw(name, tuple(shape), seed) for name, shape in shapes.items() if name != ANCHORS}
    for name in tensors:
        if name.endswith("stem.conv1.weight"):
            tensors[name] /= input_deviation
    return tensors


# Standard deviation of the score of a unit-variance feature: a handful of regions should pass a confidence of 0.2.
RANDOM_GAINS = {"objectness_logits": 1.0, "anchor_deltas": 0.1, "cls_score": 5.5, "bbox_pred": 0.1, "attr_score": 3.0}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = np.random.RandomState((zlib.crc32(name.encode()) + 0x9E3779B1 * seed) & 0xFFFFFFFF)
    layer, _, kind = name.rpartition(".")
    if ".norm" in name or kind.startswith("running"):
        spread = generator.random_sample(shape) - 0.5
        damped = 0.35 if layer.endswith("conv3.norm") else 1.0
        values = {"weight": (1 + 0.4 * spread) * damped, "running_var": 1 + 0.4 * spread}.get(kind, 0.2 * spread)
    elif kind == "bias":
        values = 0.2 * (generator.random_sample(shape) - 0.5)
    else:
        fan_in = max(math.prod(shape[1:]), 1)
        values = generator.standard_normal(shape) * math.sqrt(2.0 / fan_in)
        if len(shape) > 1 and fan_in > 1:
            values -= values.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        values *= RANDOM_GAINS.get(layer.rsplit(".", 1)[-1], 1.0)
    return torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(shape))
