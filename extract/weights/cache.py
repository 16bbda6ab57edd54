"""Downloaded and converted weights, kept on disk."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object, sha256_of, write_json
from uniter.datasets.storage.tensors import write_tensors
from uniter.extract.weights.files import Tensors

log = logging.getLogger(__name__)

CONVERTER = 2
"""Counted up when the conversion changes, so that cached results of an older one are not taken."""


def cache_folder() -> Path:
    """Where downloads and converted weights are kept: $UNITER_CACHE, else $XDG_CACHE_HOME/uniter, else ~/.cache/uniter."""
    if named := os.environ.get("UNITER_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uniter"


def cached_weights(kept: Path) -> tuple[Tensors, str] | None:
    """The converted tensors and their layout, if the kept file is the one that was written."""
    try:
        facts = read_json_object(kept.with_suffix(".json"))
        if facts["sha256"] != sha256_of(kept):
            log.warning("%s was changed since it was made; converting again", kept)
            return None
        return dict(load_file(kept)), str(facts["layout"])
    except (OSError, BadInput, SafetensorError, KeyError):
        return None


def keep(kept: Path, tensors: Tensors, facts: Mapping[str, str]) -> None:
    """Write converted weights, and beside them JSON that says what they are; a warning where the disk refuses."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(kept, tensors)
        write_json(kept.with_suffix(".json"), {**facts, "sha256": sha256_of(kept), "converter": CONVERTER})
    except OSError as error:
        log.warning("converted weights are not kept (%s): %s", kept.parent, error)
