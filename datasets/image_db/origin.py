"""Whose regions these are: the detector's name, the digest of its weights, and which of its regions were kept.

A model that learnt from one detector's features is lost on another's of the same width, and no shape tells. So region databases say it
in their headers, and models in their configurations. What is older, published or converted may not know: that is no difference.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from uniter.datasets.image_db.database import ImageDB
from uniter.datasets.storage.files import difference_in_words, first_phrases

_GIVEN: Final = "boxes_sha256"


@dataclass(frozen=True, slots=True)
class RegionOrigin:
    """Where regions come from.

    Attributes:
        detector: its name, which is a folder's for detectors of one's own. The same detector may have several.
        weights_sha256: the digest of its weights.
        selection: which of its regions were kept (rule, counts, threshold).
    """

    detector: str | None = None
    weights_sha256: str | None = None
    selection: Mapping[str, Any] | None = None

    @classmethod
    def of_header(cls, header: Mapping[str, Any] | None) -> Self | None:
        """As a database's header says; None where it does not tell."""
        found = header or {}
        name = found.get("detector")
        origin = cls(str(name) if name else None, found.get("weights_sha256") or None, found.get("selection") or None)
        return origin if origin.detector or origin.weights_sha256 else None

    @classmethod
    def from_dict(cls, values: object) -> Self | None:
        """The inverse of `to_dict`; None of anything else."""
        if not isinstance(values, Mapping):
            return None
        known = {name: values.get(name) for name in ("detector", "weights_sha256", "selection")}
        return cls(**known) if known["detector"] or known["weights_sha256"] else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def is_another(self, other: "RegionOrigin") -> bool:
        """Whether the two detectors are known to differ: their weights do, or, where one does not know its weights, their names."""
        if self.weights_sha256 and other.weights_sha256:
            return self.weights_sha256 != other.weights_sha256
        return bool(self.detector and other.detector and self.detector != other.detector)

    def other_selection(self, other: "RegionOrigin") -> list[str]:
        """How the other one's selection differs, in words; nothing where one is not known.

        Which boxes were given is no difference: they come in one file for each part of a data set.
        """
        if not self.selection or not other.selection:
            return []
        mine, theirs = ({name: value for name, value in one.items() if name != _GIVEN} for one in (self.selection, other.selection))
        return difference_in_words(mine, theirs)

    def other_selection_in_words(self, other: "RegionOrigin") -> str:
        """The first of these differences as messages show them; empty where there is none."""
        return first_phrases(self.other_selection(other))

    def __str__(self) -> str:
        weights = f"weights {self.weights_sha256[:12]}" if self.weights_sha256 else "weights unknown"
        return f"{self.detector or 'a detector without a name'} ({weights})"


def origins_of(images: Sequence[ImageDB]) -> list[RegionOrigin]:
    """The detectors that region databases say they are of, each once."""
    found: list[RegionOrigin] = []
    for header in (header for database in images for header in database.headers):
        origin = RegionOrigin.of_header(header)
        if origin is not None and not any(not origin.is_another(known) for known in found):
            found.append(origin)
    return found
