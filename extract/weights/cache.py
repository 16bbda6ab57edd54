"""Downloaded and converted weights, kept on disk."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from uniter.datasets.storage.files import sha256_of
from uniter.extract.weights.files import Tensors

log = logging.getLogger(__name__)

CONVERTER = 1


def cache_folder() -> Path:
    """Where downloads and converted weights are kept: $UNITER_CACHE, else $XDG_CACHE_HOME/uniter, else ~/.cache/uniter."""
    if named := os.environ.get("UNITER_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uniter"


def cached_weights(kept: Path) -> tuple[Tensors, str] | None:
    """The converted tensors and their layout, if the kept file is the one that was written."""
    try:
        facts = json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["sha256"] != sha256_of(kept):
            log.warning("%s was changed since it was made; converting again", kept)
            return None
        return dict(load_file(kept)), str(facts["layout"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(kept: Path, tensors: Tensors, facts: Mapping[str, str]) -> None:
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
