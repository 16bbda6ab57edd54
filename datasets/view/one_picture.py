"""One picture with its regions as HTML that stands by itself, for notebooks.

What a reader would get wrong: the picture is read again when it is shown. If another one lies under its name by then, the boxes stand on an
empty canvas, and a line says why.
"""

import base64
from collections.abc import Sequence
from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.photographs import let_pillow_read_heif
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.drawing import draw_regions
from uniter.datasets.view.labels import label_regions
from uniter.datasets.view.page import render
from uniter.datasets.view.photographs import same_shape
from uniter.datasets.view.pictures import empty_canvas, jpeg, read_photograph, resized

_LONGEST: Final = 900
_LISTED: Final = 10


def regions_as_html(
    regions: RegionFeatures,
    photograph: str | NDArray[np.uint8] | None,
    *,
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
) -> str:
    """The picture with numbered, named boxes, and a table of the most confident ones.

    Args:
        photograph: the file, or the upright picture as (H, W, 3) uint8 BGR; None draws on an empty canvas.
        class_names, attribute_names: as for `label_regions`; none: Visual Genome's where they fit.
    """
    image, sentence = _picture(regions, photograph)
    labels = label_regions(regions, class_names=class_names or None, attribute_names=attribute_names or None)
    order = sorted(labels, key=lambda label: -label.confidence)[:_LISTED]
    return str(
        render(
            "one_picture.html",
            picture=base64.b64encode(jpeg(draw_regions(image, regions, labels))).decode(),
            name=photograph if isinstance(photograph, str) else "a picture",
            regions=len(regions),
            width=regions.features.shape[1],
            size=regions.size,
            sentence=sentence,
            labels=order,
        )
    )


def answer_as_html(
    text: str, answer: str, regions: RegionFeatures, photograph: str | NDArray[np.uint8], *, class_names: Sequence[str] = ()
) -> str:
    """What a model answers to a text, above the photograph that `regions_as_html` shows."""
    picture = Markup(regions_as_html(regions, photograph, class_names=class_names))
    return str(render("answer.html", text=text, answer=answer, picture=picture))


def _picture(regions: RegionFeatures, photograph: str | NDArray[np.uint8] | None) -> tuple[NDArray[np.uint8], str | None]:
    """The picture to draw on, and what is to be said where it is not the photograph."""
    sentence = "no photograph is known"
    if photograph is not None:
        let_pillow_read_heif()
        try:
            if isinstance(photograph, np.ndarray):
                image, size = photograph, photograph.shape[:2]
            else:
                image, size = read_photograph(photograph, longest=_LONGEST)
        except BadInput as error:
            sentence = str(error)
        else:
            if regions.size is None or same_shape(size, regions.size):
                return resized(image, min(_LONGEST, max(image.shape[:2]))), None
            sentence = f"the photograph is {size[1]} × {size[0]} now, the regions are of one of {regions.size[1]} × {regions.size[0]}"
    return empty_canvas(regions.size, longest=_LONGEST), sentence
