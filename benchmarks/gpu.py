"""All that has to be measured on a GPU, in one command: under 8 minutes on an H100, no network, nothing installed but PyTorch and NumPy.

    python benchmarks/gpu.py --out report/              # on the machine with the GPU
    python benchmarks/gpu.py --device cpu --small --out report/

The checkout need not be installed, and Python may be 3.10 or newer; databases and pictures are made here, from random numbers. What cannot
be run here is said (no Detectron2, a library absent), and the rest is done. Each section is a process of its own: what it breaks, breaks
with it, and at the end of its time it is ended. `report/gpu.md` and `report/gpu.json` are written anew with every row, so that a kill loses
none; what sections print lies in `report/gpu.log`.

Only Linux: sections are forked, so that PyTorch is read once.
"""

import argparse
import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from on_gpu.place import put_in_place
from on_gpu.rows import Place, Row, failure

GRACE = 5.0  # seconds for a section to end by itself before it is ended
TRAINING = ("ijson", "lmdb", "lz4", "msgpack", "orjson", "pydantic", "safetensors", "tokenizers", "tqdm", "yaml")


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        run: gives its rows, as they become known. Its imports are its own, so that a section that cannot be imported costs itself alone.
        seconds: it may take, on a GPU.
        needs: libraries without which it is left out.
    """

    title: str
    run: Callable[[Place], Iterator[Row]]
    seconds: float
    needs: tuple[str, ...] = ()


def rows_of(module: str, name: str = "rows") -> Callable[[Place], Iterator[Row]]:
    """A function of a module, which is imported when it is called: in the process of the section."""
    return lambda place: getattr(importlib.import_module(module), name)(place)


# In the order in which they are wanted most, should the time run out.
SECTIONS = {
    "device": Section("The machine", rows_of("on_gpu.machine"), 25),
    "correctness": Section("Correct on this device", rows_of("on_gpu.correctness"), 30),
    "pretraining": Section(
        "Pre-training from a database on disk, with the loader", rows_of("on_gpu.databases", "pretraining_rows"), 170, TRAINING
    ),
    "extraction": Section("Extraction", rows_of("on_gpu.extraction"), 100),
    "steps": Section("Updates on batches that lie on the device: eager and compiled", rows_of("on_gpu.steps"), 110),
    "retrieval": Section("Scoring pairs of texts and pictures", rows_of("on_gpu.databases", "retrieval_rows"), 35, TRAINING),
    "memory": Section("Peak memory", rows_of("on_gpu.memory_peaks"), 25),
    "resume": Section("Resumed equals unbroken", rows_of("on_gpu.databases", "resume_rows"), 20, TRAINING),
}


def in_a_process(section: Section, place: Place, told: Callable[[Row], None], *, log: Path) -> None:
    """Run a section in a forked process, what it prints going to `log`; `told` gets each row when it is known."""
    receiving, sending = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_section, args=(section, place, sending, str(log)))
    child.start()
    sending.close()
    while True:
        if not receiving.poll(max(place.left() + GRACE, 0.0)):
            told(Row("the section", f"did not end within its time, {section.seconds:.0f} s", state="failed"))
            break
        try:
            told(receiving.recv())
        except EOFError:
            break
    child.join(1.0)
    if child.exitcode not in (0, None):
        told(Row("the section", f"its process ended with {child.exitcode} (a signal, if negative)", state="failed"))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid or 0, signal.SIGKILL)  # its loaders and compilers too
    child.join()


def _section(section: Section, place: Place, sending: Any, log: str) -> None:
    os.setsid()
    # What it prints would stand between the lines of the report.
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    try:
        for row in section.run(place):
            sending.send(row)
    except BaseException as error:
        traceback.print_exc()
        sending.send(failure("the section", error))
    sending.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Report:
    """The rows so far, and the files that they are in."""

    def __init__(self, out: Path, told: dict[str, Any]) -> None:
        self.out, self.told = out, told
        self.sections: dict[str, dict[str, Any]] = {}
        out.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        """Both files, each put in its place whole."""
        found = {**self.told, "sections": self.sections}
        for name, text in (("gpu.json", json.dumps(found, indent=1, default=str)), ("gpu.md", self.table())):
            aside = self.out / f".{name}"
            aside.write_text(text + "\n", encoding="utf-8")
            aside.replace(self.out / name)

    def table(self) -> str:
        lines = [f"# {self.told['command']}, {self.told['began']}, commit {self.told['commit']}", ""]
        for section in self.sections.values():
            lines += [f"## {section['title']} ({section['seconds']:.0f} s)", "", "| what | | | wanted |", "|---|---|---|---|"]
            for row in section["rows"]:
                state = "" if row["state"] == "measured" else f"**{row['state']}** "
                cells = (row["what"], state + shown(row["value"]), row["unit"], row["wanted"])
                lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |")
            lines.append("")
        return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def commit() -> str:
    """Of the checkout, as far as it knows."""
    root = Path(__file__).resolve().parent.parent
    try:
        said = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        return said.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of gpu.md and gpu.json (default: gpu-report)")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), metavar="SECTION", help=f"repeatable: {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=7.5, help="after so many no section is begun, and the last one is ended")
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that everything runs, on a CPU too")
    parser.add_argument("--hide", action="append", default=[], metavar="LIBRARY", help="count it as absent, to try that out")
    chosen = parser.parse_args(words)
    absent = put_in_place(hide=chosen.hide)
    told = {
        "command": " ".join(["benchmarks/gpu.py", *(words if words is not None else sys.argv[1:])]),
        "began": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "absent": absent,
    }
    report = Report(chosen.out, told)
    end = time.monotonic() + 60 * chosen.minutes
    work = tempfile.mkdtemp(prefix="uniter-gpu-")
    # Asked to end, it leaves neither processes nor files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for name in chosen.only or SECTIONS:
            one_section(name, report, Place(torch.device(chosen.device), chosen.small, work, end, tuple(absent)))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"written: {chosen.out / 'gpu.md'} and gpu.json")
    return 1 if any(row["state"] in ("failed", "WRONG") for found in report.sections.values() for row in found["rows"]) else 0


def one_section(name: str, report: Report, place: Place) -> None:
    """Run a section, or say why not, and write the report after each of its rows."""
    section, began = SECTIONS[name], time.monotonic()
    found: dict[str, Any] = {"title": section.title, "seconds": 0.0, "rows": []}
    report.sections[name] = found
    print(f"\n{section.title}", flush=True)

    def told(row: Row) -> None:
        found["rows"].append(row.as_dict())
        found["seconds"] = round(time.monotonic() - began, 1)
        report.write()
        state = "" if row.state == "measured" else f"{row.state}: "
        wanted = f"   ({row.wanted})" if row.wanted else ""
        print(f"  {row.what:<58} {state}{shown(row.value)} {row.unit}{wanted}", flush=True)

    missing = [library for library in section.needs if library in place.absent]
    if missing:
        told(Row("the section", f"{', '.join(missing)} not installed here", state="left out"))
    elif place.left() < 5:
        told(Row("the section", "no time was left", state="left out"))
    else:
        in_a_process(section, replace(place, until=min(place.until, began + section.seconds)), told, log=report.out / "gpu.log")
    found["seconds"] = round(time.monotonic() - began, 1)
    report.write()


if __name__ == "__main__":
    sys.exit(main())
