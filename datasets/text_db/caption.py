"""One text about an image, as every source gives it.

An image is named here as its source names it (a file name or a path); which key it has in a database is decided when the text database
is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Caption(NamedTuple):
    """One example of a text database to be.

    Attributes:
        id: unique among the examples; its UTF-8 is the key of the record.
        image: the name of its image, or the names of its images in order.
        text: what becomes `input_ids`; None where `fields` holds them already.
        origins: what the image is elsewhere, as (kind, id) pairs of `leakage.KINDS`, for the lists of images that must not be seen.
        fields: stored in the record as they are (JSON values).
        texts: further texts by the field that their ids are stored in (VCR's answers); a list of texts becomes a list of lists.
    """

    id: str
    image: str | tuple[str, ...]
    text: str | None
    origins: tuple[tuple[str, str], ...] = ()
    fields: Mapping[str, Any] | None = None
    texts: Mapping[str, str | Sequence[str]] | None = None
