"""uniter-scenes: write a made-up captioned world."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from uniter.cli.common import common_options, print_summary
from uniter.datasets.made_up.files import write_world
from uniter.datasets.made_up.tasks.table import write_tasks
from uniter.datasets.made_up.world import WORLDS, load_world

log = logging.getLogger(__name__)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--images", default=1200, show_default=True, type=click.IntRange(1), help="Pictures in all, the held-out ones included.")
@click.option("--held-out", default=200, show_default=True, type=click.IntRange(0), help="The last so many form the `val` part.")
@click.option("--captions", default=5, show_default=True, type=click.IntRange(1), help="Captions for each picture.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Another seed gives other pictures of the same world.")
@click.option("--world", default="shapes", show_default=True, metavar="NAME|FILE", help=f"{', '.join(WORLDS)}, or a YAML file (below).")
@click.option("--shapes", metavar="WORD,...", help="Only these of the world's shapes.")
@click.option("--colours", metavar="WORD,...", help="Only these of the world's colours.")
@click.option("--attributes/--no-attributes", default=None, help="Annotate colours as attributes of the boxes.  [default: as the world]")
@click.option("--format", "image_format", default="jpeg", show_default=True, type=click.Choice(["jpeg", "png"]))
@click.option("--tasks", is_flag=True, help="Also write OUT/tasks: the down-stream tasks over these pictures, in their authors' formats.")
@click.option("--overwrite", is_flag=True, help="Make it anew, in the place of the world that is there.")
@common_options
def main(
    out: str,
    images: int,
    held_out: int,
    captions: int,
    seed: int,
    world: str,
    shapes: str | None,
    colours: str | None,
    attributes: bool | None,
    image_format: Any,
    tasks: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a made-up captioned world to OUT: pictures, COCO instances and captions, and the scenes themselves.

    The same command gives the same files, byte for byte.

    \b
    Example:
      uniter-scenes world/ --images 1200 --held-out 200
      uniter-train detector --images world/images --annotations world/instances_train.json --out detector/

    \b
    A world of one's own is a YAML file; what it does not name is as in `like`:
      like: shapes
      shapes: {coin: circle, gate: arch, sail: wedge}   # word: outline
      colours: {rust: "#a03c14", sky: [120, 190, 240]}
      sizes: {little: [0.18, 0.24], huge: [0.34, 0.44]} # of the shorter side
      size: [128, 160]                                  # height, width
      things: [2, 5]
      attributes: true
    """
    chosen = load_world(world)
    chosen = replace(chosen, shapes=_only(chosen.shapes, shapes, "shape"), colours=_only(chosen.colours, colours, "colour"))
    if attributes is not None:
        chosen = replace(chosen, attributes=attributes)
    had_tasks = (Path(out) / "tasks").is_dir()
    summary = write_world(
        out,
        world=chosen,
        images=images,
        held_out=held_out,
        captions=captions,
        seed=seed,
        image_format=image_format,
        overwrite=overwrite,
    )
    if tasks:
        summary["tasks"] = write_tasks(out, seed=seed, overwrite=overwrite)
    elif had_tasks and not summary["already_complete"]:
        log.warning("%s/tasks is about the pictures that were replaced; --tasks --overwrite writes it anew", out)
    title = f"{out} is already complete" if summary["already_complete"] else f"a world of {images:,} pictures in {out}"
    print_summary(summary, as_json=as_json, title=title)


def _only(words: Any, wanted: str | None, kind: str) -> Any:
    if wanted is None:
        return words
    names = [word.strip() for word in wanted.split(",") if word.strip()]
    for name in names:
        if name not in words:
            raise click.UsageError(f"{name!r} is no {kind} of this world; it has {', '.join(words)}")
    return {name: words[name] for name in names}


if __name__ == "__main__":
    main()
