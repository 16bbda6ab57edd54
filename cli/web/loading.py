"""All that the page asks, loaded: the detector and the models, which takes seconds."""

import logging
from collections.abc import Sequence

from uniter.cli.web.application import Application
from uniter.cli.web.photographs import Album, KeptRegions
from uniter.cli.web.questions import abilities
from uniter.extract.install import require_detectron2
from uniter.extract.on_demand import RegionExtractor
from uniter.model.understanding.asking import Understanding

log = logging.getLogger(__name__)


def load_application(
    runs: Sequence[str],
    *,
    detector: str,
    weights: str | None,
    other_detector: bool,
    tokenizer: str | None,
    answers: str | None,
    device: str | None,
    alone: bool,
) -> Application:
    """The page of these runs; arguments as for `RegionExtractor` and `Understanding`, `alone` as for `Application`.

    Raises:
        UniterError: Detectron2 is not installed, the detector is unknown, or a run cannot be asked, or not with this detector.
    """
    require_detectron2()
    if weights is not None and weights.startswith("random:"):
        log.warning("WARNING: random weights. These regions mean NOTHING, and so do the answers; this is for trying things out only.")
    extractor = RegionExtractor(detector, weights=weights, device=device)
    regions = KeptRegions(extractor.class_names, extractor.origin)
    asked = Understanding(regions, *runs, tokenizer=tokenizer, answers=answers, device=device, other_detector=other_detector)
    answering = {question["by"] for question in abilities(asked).values()}
    for run in runs:
        if run not in answering:
            log.warning("WARNING: %s is asked nothing: of all that it could answer, another run was trained to, or was given after it", run)
    return Application(
        asked,
        Album(lambda pixels: extractor(pixels)[0]),
        class_names=extractor.class_names,
        attribute_names=extractor.detector.attribute_names,
        detector=extractor.detector.name,
        alone=alone,
    )
