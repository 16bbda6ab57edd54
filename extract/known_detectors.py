"""What `uniter-extract --list-detectors` prints, and `--fetch NAME`: every detector by name, and whether its weights are here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.errors import UniterError
from uniter.extract.weights.load import Weights, load_known_weights
from uniter.extract.weights.sources import address_of

ZOO_LICENCE = "CC BY-SA 3.0"

LICENCES = {
    "butd": "MIT",
    "butd-36": "MIT",
    "vinvl": "MIT",
    "on-board": "MIT; its backbone's start Apache-2.0",
}
"""What their authors say: of the code that the weights were published with. Model-zoo weights have one of their own."""


@dataclass(frozen=True)
class KnownDetector:
    """One detector that `--detector` knows by name.

    Attributes:
        name: what `--detector` takes.
        classes, attributes: how many it knows, background and "no attribute" not counted.
        width: columns of a feature.
        licence: of its weights, as their authors say it.
        sources: where its weights come from, in the order in which they are tried; a file where they ship with the package.
        here: the source that is on this machine, None where none is.
    """

    name: str
    classes: int
    attributes: int
    width: int
    licence: str
    sources: tuple[str, ...]
    here: str | None

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {**asdict(self), "sources": list(self.sources)}

    def lines(self) -> list[str]:
        """As a person reads it."""
        attributes = f", {self.attributes} attributes" if self.attributes else ""
        first = f"{self.name}: {self.classes:,} classes{attributes}, {self.width:,} features, weights {self.licence}"
        where = "on this machine" if self.here else f"not here: uniter-extract --fetch {self.name}"
        return [first, f"    {where}", *(f"    from {source}" for source in self.sources)]


def known_detectors() -> list[KnownDetector]:
    """Every detector that has a name: Bottom-Up-Attention's, VinVL's, the one on board, Detectron2's model zoo.

    Raises:
        UniterError: Detectron2 is not installed.
    """
    from uniter.extract.install import require_detectron2

    require_detectron2()
    from uniter.extract.detector.recipes import known_names

    return [_known(name) for name in known_names()]


def fetch_detector(name: str) -> Weights:
    """Get a detector's weights onto this machine, converted, so that later runs need no network.

    Raises:
        UniterError: the name is unknown, none of its sources can be had, or it has none.
    """
    from uniter.extract.install import require_detectron2

    require_detectron2()
    from uniter.extract.detector.recipes import find_recipe

    recipe = find_recipe(name)
    sources = (recipe.weights,) if recipe.weights is not None else recipe.known_sources
    if not sources:
        raise UniterError(f"--fetch {name}: no weights are known for this detector; name them with --weights when it is used")
    return load_known_weights(sources, detector=recipe.name)


def _known(name: str) -> KnownDetector:
    from uniter.extract.detector.recipes import find_recipe

    recipe = find_recipe(name)
    sources: Sequence[str] = (recipe.weights,) if recipe.weights is not None else recipe.known_sources
    model = recipe.config.MODEL
    convolutional = model.ROI_HEADS.NAME in ("StandardROIHeads", "UniterSecondLookROIHeads")
    return KnownDetector(
        name=name,
        classes=len(recipe.class_names),
        attributes=len(recipe.attribute_names),
        width=model.ROI_BOX_HEAD.FC_DIM if convolutional else 8 * model.RESNETS.RES2_OUT_CHANNELS,
        licence=LICENCES.get(name, LICENCES["vinvl"] if name.startswith("vinvl") else ZOO_LICENCE),
        sources=tuple(sources),
        here=next((source for source in sources if Path(source).is_file() or address_of(source) is None), None),
    )
