"""One text about an image, as every source gives it, and the key that an image has when no region database is asked.

An image is named here as its source names it (a file name or a path); which key it has in a database is decided when the text database
is built.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from uniter.datasets.errors import BadInput


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


KEY_TEMPLATES = {"stem": "{stem}", "path": "{path}"}
KEY_FIELDS = ("stem", "name", "parent", "path", "id")


def key_maker(template: str) -> Callable[[str], str]:
    """From an image's name to its key: `stem`, `path` or a template of {stem} {name} {parent} {path} {id} {id:012d}.

    `id` is the last run of digits of the stem; `path` is the whole name without its suffix.

    Raises:
        BadInput: the template has other fields; or, when used, the name has no digits and the template wants them.
    """
    pattern = KEY_TEMPLATES.get(template, template)
    try:
        wanted = {field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None}
        unknown = wanted - set(KEY_FIELDS)
        if not unknown:
            pattern.format(stem="s", name="n", parent="p", path="p/n", id=1)
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise BadInput(f"key template {template!r} cannot be read ({error}); expected e.g. 'coco_train2014_{{id:012d}}.npz'") from None
    if unknown or not wanted:
        raise BadInput(f"key template {template!r} must be 'stem', 'path' or hold some of {{{'} {'.join(KEY_FIELDS)}}}, and no other field")
    if pattern == "{stem}":
        return lambda name: PurePosixPath(name).stem

    def key(name: str) -> str:
        path = PurePosixPath(name)
        digits = last_number(path.stem)
        if "id" in wanted and digits is None:
            raise BadInput(f"image {name!r} has no digits, which the key template {template!r} wants as {{id}}; choose another --key")
        return pattern.format(stem=path.stem, name=path.name, parent=path.parent.name, path=str(path.with_suffix("")), id=digits)

    return key


def last_number(stem: str) -> int | None:
    """The last run of ASCII digits of a name without suffix: "COCO_train2014_000000000009" -> 9; None where there is none."""
    end = len(stem)
    while end and not ("0" <= stem[end - 1] <= "9"):
        end -= 1
    start = end
    while start and "0" <= stem[start - 1] <= "9":
        start -= 1
    # Longer runs are no image ids, and int() refuses thousands of digits.
    return int(stem[start:end]) if 0 < end - start <= 18 else None
