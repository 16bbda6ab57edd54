"""`uniter-extract IMAGES OUT`: photographs to a region database."""

import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from uniter.cli.common import FAILED, SKIPPED_UNDER_STRICT, common_options, print_summary

if TYPE_CHECKING:
    from uniter.extract import Detector, ExtractSummary
    from uniter.extract.images import ImageList
    from uniter.extract.run.options import Options

log = logging.getLogger(__name__)

EXAMPLES = """\b
Examples:
  uniter-extract photos/ out.lmdb
  uniter-extract photos/ out.lmdb --detector on-board
  uniter-extract photos/ out.lmdb --weights faster_rcnn_from_caffe_attr_original.pkl
  uniter-extract 'cc3m/{00000..00331}.tar' cc3m.lmdb
  uniter-extract train2014/ coco.lmdb --key 'coco_train2014_{id:012d}.npz'
  uniter-extract photos/ coarse.lmdb --detector COCO-Detection/faster_rcnn_R_101_C4_3x
  uniter-extract photos/ boxes.lmdb --boxes instances.json
  uniter-extract photos/ out.lmdb --devices all
  torchrun --nproc-per-node 8 --no-python uniter-extract photos/ out.lmdb

Exit codes: 0 done; 1 failed or stopped (the same command continues); 2 wrong usage; 3 done, but images failed and --strict was given.
"""


def _share(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise click.BadParameter(f"{value!r}; expected I/N with I from 0 to N - 1, for instance 0/8")
    return int(index), int(count)


def _install(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from uniter.extract import install

    context.exit(install.main([]))


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("images", required=False, metavar="IMAGES")
@click.argument("out", required=False, metavar="OUT", type=click.Path(path_type=Path))
@click.option("--detector", "detector_name", default="butd", show_default=True, metavar="NAME",
              help="butd (Visual Genome, 1600 classes), butd-36, vinvl, on-board (COCO's 80 classes; needs no download), a Detectron2 "
                   "model-zoo name, a Detectron2 YAML, or the folder that `uniter-train detector` made.")  # fmt: skip
@click.option("--weights", metavar="FILE|URL|random:SEED",
              help="The detector's weights: a file of any known layout, a URL, or random:SEED for trying things out.  "
                   "[default: the detector's known sources, in order]")  # fmt: skip
@click.option("--label-map", metavar="FILE",
              help="Names of vinvl's classes and attributes.  "
                   "[default: VG-SGG-dicts-vgoi6-clipped.json beside --weights, else numbers]")  # fmt: skip
@click.option("--boxes", type=click.Path(path_type=Path), metavar="FILE",
              help='Regions are given: COCO-style JSON, or JSONL {"image": ..., "boxes": [[x0, y0, x1, y1], ...], "ids": [...]}, pixels of '
                   "the upright image; kept in this order, never cut; ids go to box_ids.jsonl.")  # fmt: skip
@click.option("--min-boxes", type=click.IntRange(0), help="Regions that stay at least.  [default: 10; butd-36: 36]")
@click.option("--max-boxes", type=click.IntRange(1), help="Regions that stay at most.  [default: 100; butd-36: 36]")
@click.option("--conf-threshold", type=click.FloatRange(0, 1, max_open=True), default=0.2, show_default=True,
              help="Regions strictly above it stay, within these bounds.")  # fmt: skip
@click.option("--key", metavar="RULE",
              help="stem, path (relative, no suffix), or a template of {stem} {name} {parent} {path} {id} {id:012d}, where id is the last "
                   "run of digits of the stem.  [default: stem; tars: path, which is WebDataset's __key__]")  # fmt: skip
@click.option("--attributes", is_flag=True, help="Also keep the attribute distribution.")
@click.option("--batch-size", type=click.IntRange(1), help="Images that run together.  [default: fitted to the machine]")
@click.option("--workers", type=click.IntRange(1), help="Threads that read and decode.  [default: fitted to the machine]")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ...  [default: cuda where there is one]")
@click.option("--devices", "device_names", metavar="LIST",
              help="all, or cuda:0,cuda:1 ...: a process for each; units are shared, and those of one that dies taken over.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", show_default=True,
              help="fp32 reproduces the reference; bf16 and fp16 run the RoI head alone in half precision; tf32 multiplies in TF32 "
                   "throughout, which moves proposals. tf32 and fp16 need a GPU.")  # fmt: skip
@click.option("--max-pixels", type=click.IntRange(1), default=178_956_970, show_default=True,
              help="Images that claim more pixels are refused as decompression bombs.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Begin anew; what OUT holds stays until that is whole.")
@click.option("--retry-failed", is_flag=True, help="Try the images again that failed before.")
@click.option("--strict", is_flag=True, help="Exit with 3 where images failed.")
@click.option("--shard", metavar="I/N", callback=_share,
              help="This process's share, I from 0.  [default: what torchrun or Slurm says, else all]")  # fmt: skip
@click.option("--ray", "ray_address", is_flag=False, flag_value="auto", metavar="[ADDRESS]",
              help="Do the work on a Ray cluster; without an address, on the one this machine belongs to, or a local one.")  # fmt: skip
@click.option("--ignore-disk-space", is_flag=True, help="Begin even where the disk has less room than estimated.")
@click.option("--install-detectron2", is_flag=True, is_eager=True, expose_value=False, callback=_install,
              help="Install Detectron2 from the package index where none is, and exit.")  # fmt: skip
@click.option("--list-detectors", is_flag=True,
              help="Print all detectors: classes, width, licence, where weights are, and whether here; without IMAGES.")  # fmt: skip
@click.option("--fetch", "fetched", metavar="NAME", help="Get a detector's weights onto this machine; without IMAGES.")
@common_options
@click.pass_context
def main(
    context: click.Context,
    /,
    images: str | None,
    out: Path | None,
    detector_name: str,
    weights: str | None,
    label_map: str | None,
    boxes: Path | None,
    attributes: bool,
    device: str | None,
    device_names: str | None,
    precision: str,
    strict: bool,
    shard: tuple[int, int] | None,
    ray_address: str | None,
    ignore_disk_space: bool,
    list_detectors: bool,
    fetched: str | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Extract region features of IMAGES into the database OUT.

    IMAGES is a folder (searched recursively), one image, a .txt or .jsonl list, tar shards as img2dataset and WebDataset write them
    ('cc3m/{00000..00331}.tar'), or tables that hold the images (parquet, what Hugging Face's `datasets` saved to disk). The same command
    again continues where it stopped, and does what is new where IMAGES has grown. Every image ends up in OUT or in OUT/failures.jsonl.

    Transparent pixels are laid on white; colour profiles are left alone, as cv2.imread does; images are turned as EXIF says.
    """
    from uniter.datasets.image_db.writing.units import LISTING
    from uniter.extract.detector.detectron import GPU_PRECISIONS, build_detector
    from uniter.extract.images.given_boxes import GivenBoxes
    from uniter.extract.images.listing import list_images
    from uniter.extract.install import require_detectron2
    from uniter.extract.run.options import Options
    from uniter.extract.run.processes import devices_of
    from uniter.extract.run.shares import Share, local_index, processes_here, share_from_environment

    if list_detectors or fetched is not None:
        return _about_detectors(context, fetched, as_json=as_json)
    if images is None or out is None:
        raise click.MissingParameter(ctx=context, param=context.command.params[0 if images is None else 1])
    _refuse_useless(context)
    require_detectron2()
    share = share_from_environment(os.environ) if shard is None else Share(*shard, local_index(os.environ))
    if share.source and ray_address is None:
        log.info("share %d of %d (from %s; --shard 0/1 does everything here)", share.index, share.count, share.source)
    if device_names is not None and (processes := processes_here(os.environ)) > 1:
        raise click.UsageError(
            f"--devices starts a process for each device, and {processes} run here ({share.source}); leave one of the two out"
        )
    devices = None if device_names is None else devices_of(device_names)
    options = Options(
        given=GivenBoxes(boxes) if boxes is not None else None, shard=(0, 1) if ray_address else (share.index, share.count),
        check_space=not ignore_disk_space, show_progress=True, **chosen,
    )  # fmt: skip
    # What can be wrong without the detector is said before its weights are read.
    listed = list_images(images, key=options.key, notes=out / LISTING)
    if options.given is not None and len(options.given) > listed.images:
        log.info("%s names %d images, of which IMAGES holds at most %d", boxes, len(options.given), listed.images)
    log.info("%s images in %s units of work", f"{listed.images:,}", f"{listed.units:,}")
    if weights is not None and weights.startswith("random:"):
        log.warning("WARNING: random weights. These regions, classes and confidences mean NOTHING; they are for trying things out only.")
    named = {} if label_map is None else {"label_map": label_map}
    build = functools.partial(build_detector, detector_name, weights=weights, precision=precision, attributes=attributes, **named)
    if ray_address is None and devices is None:
        device = device or default_device(share.local_index)
        _say_idle_gpus(device, share.count)
    needs_gpu = f"--precision {precision}" if precision in GPU_PRECISIONS else ""
    summary = _extracted(listed, out, options, build, device=device, devices=devices, ray_address=ray_address, needs_gpu=needs_gpu)
    _say(summary, out, alone=options.shard[1] == 1, strict=strict, as_json=as_json)


def _extracted(
    listed: "ImageList", out: Path, options: "Options", build: Callable[..., "Detector"], *,
    device: str | None, devices: list[str] | None, ray_address: str | None, needs_gpu: str,
) -> "ExtractSummary":  # fmt: skip
    if ray_address is not None:
        from uniter.extract.run.cluster import extract_on_ray

        with stop_on_signals() as stop:
            return extract_on_ray(listed, out, options, build=build, address=ray_address, needs_gpu=needs_gpu, stop=stop)
    if devices is not None:
        from uniter.extract.run.processes import extract_on_devices

        with stop_on_signals() as stop:
            return extract_on_devices(listed, out, options, build=build, devices=devices, stop=stop)
    from uniter.extract.run.extraction import extract_listed

    detector = build(device=device)  # an interruption while it loads ends the command at once
    with stop_on_signals() as stop:
        return extract_listed(listed, out, options, detector=detector, stop=stop)


def _about_detectors(context: click.Context, fetched: str | None, *, as_json: bool) -> None:
    """Print the known detectors, or get the weights of one."""
    from uniter.extract.known_detectors import fetch_detector, known_detectors

    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if others := given - {"as_json", "show_traceback", "list_detectors" if fetched is None else "fetched"}:
        named = ", ".join(sorted(others))
        raise click.UsageError(f"--list-detectors and --fetch NAME stand alone; leave the others out ({named})")
    if fetched is None:
        known = known_detectors()
        click.echo(json.dumps([one.as_dict() for one in known]) if as_json else "\n".join(line for one in known for line in one.lines()))
        return
    weights = fetch_detector(fetched)
    print_summary({"source": weights.source, **weights.settings()}, as_json=as_json, title=f"{fetched}: its weights are on this machine")


def _refuse_useless(context: click.Context) -> None:
    """UsageError for options that would do nothing beside the others."""
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    low, high = context.params["min_boxes"], context.params["max_boxes"]
    if low is not None and high is not None and low > high:
        raise click.UsageError(f"--min-boxes {low} is above --max-boxes {high}")
    if "ray_address" in given and given & {"shard", "device", "device_names"}:
        raise click.UsageError("--ray divides the work and chooses the devices itself; leave --shard, --device and --devices out")
    if "device_names" in given and "device" in given:
        raise click.UsageError("--devices names all devices; leave --device out")
    for name in ("min_boxes", "max_boxes", "conf_threshold"):
        if "boxes" in given and name in given:
            raise click.UsageError(f"--{name.replace('_', '-')} says which detected regions stay; given --boxes all stay, so leave it out")


def _say(summary: "ExtractSummary", out: Path, *, alone: bool, strict: bool, as_json: bool) -> None:
    """Print what was done; exit where it is not all, or not all of it good."""
    if not summary.complete:
        state = "not complete yet"
    else:
        state = "complete" if summary.extracted or summary.failed else "already complete"
    print_summary(summary.as_dict() if as_json else summary.as_table(), as_json=as_json, title=f"{out}: {state}")
    if summary.failures:
        where = f"see {out / 'failures.jsonl'}" if summary.complete else "failures.jsonl is written when all units are done"
        log.warning("%s images failed: %s", f"{summary.failures:,}", where)
        for reason in summary.first_failures:
            log.warning("  %s", reason)
    if alone and not summary.complete:
        units = "a unit" if summary.units_left == 1 else f"{summary.units_left:,} units"
        log.error("error: %s of %s were left to another process, which has them; once it has ended, run the same command again", units, out)
        sys.exit(FAILED)
    if summary.failures and strict:
        sys.exit(SKIPPED_UNDER_STRICT)


def _say_idle_gpus(device: str, processes: int) -> None:
    """Say that a machine has more GPUs than are used."""
    import torch

    if device.startswith("cuda") and processes == 1 and (count := torch.cuda.device_count()) > 1:
        log.info("this machine has %d GPUs, and one is used: %s; --devices all uses all of them", count, device)


def default_device(local_index: int = 0) -> str:
    """`cuda:N` for this process's N on its machine, or `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{local_index % torch.cuda.device_count()}"


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM (Slurm's warning) and Ctrl-C set, so that the batch at hand is finished; a second signal ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[number])
        log.warning("%s: the batch at hand is finished first", signal.Signals(number).name)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
