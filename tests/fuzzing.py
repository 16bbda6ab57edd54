"""Damage for generated tests: a file's bytes changed here and there, or one value of a document replaced by another.

Loaded by the fixture `fuzzing` of tests/conftest.py. `HYPOTHESIS_PROFILE=many pytest -k fuzz` looks for faults; the default run repeats
few and the same examples.
"""

import json
from typing import Any

from hypothesis import strategies as st

_PIECES = [b"null", b'"', b"[", b"{}", b"\t", b"\r\n", b"\0", b"1e999", b"-", b"\xef\xbb\xbf", b"\xff", b'"\\ud83d"', b"\xf0\x9f\x98\x80"]
_TEXTS = ["", " ", "0", "-1", "\ud83d", "\0", "a/b", "../x", "😀", "שלום", "[MASK]", "x" * 600, "9" * 5000, "http://x.org/a.jpg"]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(_TEXTS),
)
VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=10
)


def damaged(data: Any, content: bytes, *, near: int | None = None) -> bytes:
    """The bytes with one to six of them cut, changed, inserted or repeated.

    Args:
        near: change nothing beyond so many bytes from the start, every other time.
    """
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6), label="changes")):
        end = len(changed) if near is None or data.draw(st.booleans()) else min(near, len(changed))
        place = data.draw(st.integers(0, end), label="place")
        what = data.draw(st.sampled_from(["cut", "change", "insert", "repeat"]), label="what")
        if what == "cut":
            del changed[place : place + data.draw(st.integers(1, 400))]
        elif what == "change" and place < len(changed):
            changed[place] ^= data.draw(st.integers(1, 255))
        elif what == "insert":
            changed[place:place] = data.draw(st.binary(max_size=8) | st.sampled_from(_PIECES))
        else:
            changed[place:place] = changed[place : place + 60]
    return bytes(changed)


def with_another_value(data: Any, document: Any) -> Any:
    """A copy of a JSON document in which one or two values are others, are gone, or come twice."""
    document = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, 2), label="values")):
        holder = document
        while holder:
            places = list(holder) if isinstance(holder, dict) else range(len(holder))
            place = data.draw(st.sampled_from(places), label="place")
            if isinstance(holder[place], dict | list) and holder[place] and data.draw(st.integers(0, 3)):
                holder = holder[place]
                continue
            what = data.draw(st.sampled_from(["other", "other", "gone", "twice"]), label="what")
            if what == "gone":
                del holder[place]
            elif what == "twice" and isinstance(holder, list):
                holder.append(holder[place])
            else:
                holder[place] = data.draw(VALUES, label="value")
            break
    return document


def as_json(document: Any) -> bytes:
    """JSON as Python writes it, halves of surrogate pairs, NaN and all."""
    return json.dumps(document).encode()
