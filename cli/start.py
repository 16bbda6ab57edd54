"""Where the commands begin: the script `uniter-extract` calls `extract`, and so on.

What a reader would get wrong: nothing is imported here but what Python has at hand anyway. Importing a command takes up to half a second,
and whoever presses Ctrl-C in it is to read one line and not a traceback. Once a command runs, `common.common_options` sees to that.
"""

import os
import signal
import sys
from functools import partial
from importlib import import_module
from types import FrameType


def _begin(module: str) -> None:
    """Import `uniter.cli.<module>` and run its `main`."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where Ctrl-C is somebody else's business, as under `nohup`
        signal.signal(signal.SIGINT, _leave)
    main = import_module(f"uniter.cli.{module}").main
    signal.signal(signal.SIGINT, before)
    main()


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: nothing was begun, and an exception would be swallowed or turned into another one inside half-made imports."""
    sys.stderr.write("error: interrupted\n")
    sys.stderr.flush()
    os._exit(1)


app = partial(_begin, "app")
build_db = partial(_begin, "build_db")
db = partial(_begin, "db")
extract = partial(_begin, "extract")
scenes = partial(_begin, "scenes")
train = partial(_begin, "train")
view = partial(_begin, "view")
