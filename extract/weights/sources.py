"""Where weights come from: files, URLs, the hub; asked in order, each answer in words."""

import http.client
import logging
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from pathlib import Path

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.storage.files import sha256_of
from uniter.extract.weights.fetching import fetch, fetched_path, is_protected

log = logging.getLogger(__name__)

# Bottom-Up-Attention's weights, in the order in which they are tried: the original files, then ports of the same weights.
UNC = "https://nlp.cs.unc.edu/models"


BUTD_SOURCES = (
    "https://storage.googleapis.com/up-down-attention/resnet101_faster_rcnn_final.caffemodel",
    "https://www.dropbox.com/s/5xethd2nxa8qrnq/resnet101_faster_rcnn_final.caffemodel?dl=1",
    f"{UNC}/faster_rcnn_from_caffe_attr_original.pkl",
)


BUTD_36_SOURCES = (
    "https://storage.googleapis.com/bottom-up-attention/resnet101_faster_rcnn_final_iter_320000.caffemodel",
    "https://www.dropbox.com/s/2h4hmgcvpaewizu/resnet101_faster_rcnn_final_iter_320000.caffemodel?dl=1",
    f"{UNC}/faster_rcnn_from_caffe_attr.pkl",
    "unc-nlp/frcnn-vg-finetuned",
)


VINVL_SOURCES = (
    "https://penzhanwu2.blob.core.windows.net/sgg/sgg_benchmark/vinvl_model_zoo/vinvl_vg_x152c4.pth",
    "https://huggingface.co/michelecafagna26/vinvl_vg_x152c4/resolve/main/vinvl_vg_x152c4.pth",
    "https://drive.usercontent.google.com/download?id=1nvu8y4zZFbJqSqLdQClvMyzsbBeX-oaQ&export=download&confirm=t",
)
"""As its authors and users named them; none of them could be tried from here."""


HUB_FILES = ("model.safetensors", "pytorch_model.bin")


ANSWER_TIMEOUT_S = 6


DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
"""What `detectron2://` stands for in Detectron2's configurations."""


def find_weight_file(spec: str) -> Path:
    """The local file behind a path, an https URL (fetched once; `detectron2://` as Detectron2 means it) or a hub id."""
    if is_url(spec):
        return fetch(_plain_url(spec))
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UniterError(f"--weights {spec}: a folder; name the weight file in it")
    if _is_hub_id(spec):
        return _from_hub(spec)
    raise UniterError(f"--weights {spec}: no such file; expected a weight file, a URL, a hub id (`owner/name`), or random:SEED")


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


def address_of(spec: str) -> str | None:
    """The server that has to be asked for it, None where it is here already."""
    if is_url(spec):
        url = _plain_url(spec)
        parts = urllib.parse.urlsplit(url)
        return None if fetched_path(url).is_file() else f"{parts.scheme}://{parts.netloc}"
    if _is_hub_id(spec):
        from huggingface_hub import constants, try_to_load_from_cache

        kept = any(isinstance(try_to_load_from_cache(spec, name), str) for name in HUB_FILES)
        return None if kept or constants.HF_HUB_OFFLINE else constants.ENDPOINT
    return None


def silent_sources(specs: Collection[str]) -> dict[str, str]:
    """Why servers cannot be reached, by address; all are asked at once.

    Without a network each may take its time to say so (the hub's client alone half a minute of retries), and a look-up of a name has no
    limit at all: so each is asked in a thread of its own, which nobody waits for when the time is over. Who does not speak https is not
    asked at all; `fetch` says so.
    """
    addresses = {address for spec in specs if (address := address_of(spec)) is not None and is_protected(address)}
    answers: dict[str, str | None] = dict.fromkeys(addresses, "")

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


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in HUB_FILES:
        try:
            return _as_published(Path(hf_hub_download(repository, name)), repository)
        except BadInput:
            raise
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


def _as_published(path: Path, repository: str) -> Path:
    """The file itself, once it has the SHA-256 that the hub publishes of large files: its cache names them so."""
    named = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", named) and (got := sha256_of(path)) != named:
        raise BadInput(
            f"hub id {repository}: {path} has the SHA-256 {got}, not the published {named}; delete it, so that it is fetched again"
        )
    return path
