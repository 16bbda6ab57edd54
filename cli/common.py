"""What all commands share: errors as one line, exit codes, `--json`, `--traceback`, `--version`.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 finished, but inputs were skipped and `--strict` was given; 128 + N stopped by signal N
with a checkpoint written, or (141) because whoever read the output left before its end, as in `| head`. Logs go to stderr; stdout holds the
summary only (one JSON object under `--json`).

What a reader would get wrong: other libraries' logs are shown from warnings on, ours from information on.
"""

import functools
import importlib.metadata
import json
import logging
import os
import select
import sys
import traceback
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click

from uniter.datasets.errors import UniterError, WrongUsage
from uniter.datasets.stopping import Stopped

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
FAILED, WRONG_USAGE, SKIPPED_UNDER_STRICT, READER_LEFT = 1, 2, 3, 141


def version() -> str:
    """The installed version of the toolkit."""
    return importlib.metadata.version("uniter-toolkit")


def common_options(function: Callable[P, R]) -> Callable[..., R]:
    """Add `--json`, `--traceback` and `--version` to a click command and turn expected errors into one line.

    The decorated function receives `as_json: bool`; put it directly under `@click.command(...)` and its own options.
    """

    @functools.wraps(function)
    def run(*args: Any, show_traceback: bool, **kwargs: Any) -> R:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_is_shown)
        try:
            return function(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Stopped as stopped:
            click.echo(str(stopped), err=True)
            sys.exit(128 + stopped.signal_number)
        except UniterError as error:
            _fail(str(error), show_traceback, code=WRONG_USAGE if isinstance(error, WrongUsage) else FAILED)
        except KeyboardInterrupt:
            _fail("interrupted; the same command continues where it stopped", show_traceback)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _reader_left():
                sys.exit(READER_LEFT)
            _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", show_traceback)

    with_version = click.version_option(version(), "--version", prog_name="uniter-toolkit")(run)
    with_traceback = click.option("--traceback", "show_traceback", is_flag=True, help="On failure show the whole traceback.")(with_version)
    return click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on stdout.")(with_traceback)


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("uniter", "__main__")


def _reader_left() -> bool:
    """Whether nobody reads stdout or stderr any more; then what is still written there goes nowhere, and the interpreter ends in peace."""
    poll = select.poll()
    streams = (1, 2)
    for stream in streams:
        poll.register(stream, 0)
    left = [stream for stream, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for stream in left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(left)


def open_in_browser(page: str | Path) -> None:
    """Show a page, an address or a file, in the user's browser, or say where it is; it is there either way."""
    page = page if isinstance(page, str) else page.resolve()
    try:
        opened = webbrowser.open(page if isinstance(page, str) else page.as_uri())
    except webbrowser.Error:
        opened = False
    if not opened:
        log.warning("no browser could be opened here; the page is %s", page)


def _fail(sentence: str, show_traceback: bool, *, code: int = FAILED) -> NoReturn:
    if show_traceback:
        traceback.print_exc(file=sys.stderr)
    click.echo(f"error: {' '.join(sentence.split())}", err=True)
    sys.exit(code)


def print_summary(summary: Mapping[str, Any], *, as_json: bool, title: str) -> None:
    """Print what was done: one JSON object on stdout, or the title and an aligned two-column table (nested names joined by dots)."""
    if as_json:
        click.echo(json.dumps(summary))
        return
    rows = list(_flat(summary))
    width = max((len(name) for name, _ in rows), default=0)
    click.echo(title)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {_shown(value)}")


def _flat(summary: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in summary.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
