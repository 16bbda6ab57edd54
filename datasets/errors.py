"""The errors that a user is meant to read: one sentence saying what was got, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class UniterError(Exception):
    """Anything the user can mend. Commands print its text as one line and end with exit code 1."""


class BadInput(UniterError):
    """A file or record that is not what it should be (damaged, of another format, hostile)."""


class WrongUsage(BadInput):
    """Something was asked for that no input could give, such as a name that nothing has. Commands end with exit code 2."""


class SettingsDiffer(UniterError):
    """An unfinished or finished output was made with other settings than the ones now asked for."""


def shown(value: object) -> str:
    """A value from somebody's file as a sentence shows it: not longer than 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a table: what was got, the nearest known one, all known ones."""
    names = sorted(name if len(name) <= 60 else f"{name[:57]}..." for name in known)
    more = f" and {len(names) - 40:,} more" if len(names) > 40 else ""
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {shown(name)}{hint} (known: {', '.join(names[:40])}{more})"
