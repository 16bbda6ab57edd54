"""uniter-train detector: train a detector on COCO's instances JSON, or on Visual Genome as it is published."""

import sys
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource

from uniter.cli.common import SKIPPED_UNDER_STRICT, common_options, print_summary
from uniter.extract.install import require_detectron2

ANNOTATED = "annotated"


@click.command("detector", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", required=True, type=click.Path(exists=True, file_okay=False), help="The folder of the photographs.")
@click.option(
    "--annotations",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="COCO's instances JSON, or Visual Genome's objects.json.",
)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="The detector's folder; the same command again continues.")
@click.option(
    "--model",
    default="lite",
    show_default=True,
    type=click.Choice(["lite", "tiny", "r101-c4"]),
    help="lite: the detector on board, for photographs, on two cores. tiny: for made-up worlds, minutes on two cores. r101-c4: "
    "Bottom-Up-Attention's size, work for a GPU.",
)
@click.option("--val-annotations", type=click.Path(exists=True, dir_okay=False), help="Held-out annotations of images in the same folder.")
@click.option("--held-out", default=0.1, show_default=True, type=float, help="Without them, this fraction of the images (at most 500).")
@click.option(
    "--attributes",
    is_flag=False,
    flag_value=ANNOTATED,
    default=ANNOTATED,
    show_default=False,
    metavar="[FILE]",
    help="Learn attributes where they are annotated (the default), or Visual Genome's attributes.json.",
)
@click.option("--no-attributes", is_flag=True, help="Learn none.")
@click.option("--vocabulary", metavar="1600-400-20|FOLDER", help="--annotations are Visual Genome's, in Bottom-Up-Attention's 1,600 "
              "objects and 400 attributes, or those of a folder with objects_vocab.txt and attributes_vocab.txt.")  # fmt: skip
@click.option("--image-data", type=click.Path(exists=True, dir_okay=False), help="Visual Genome's image_data.json: where images are.")
@click.option("--split", type=click.Path(exists=True, file_okay=False), metavar="FOLDER",
              help="Bottom-Up-Attention's train.txt and val.txt.  [default: --held-out by chance]")  # fmt: skip
@click.option(
    "--from",
    "from_weights",
    metavar="FILE|FOLDER|URL|random|imagenet|on-board",
    help="What to begin from: another detector, a folder of this command, a backbone of Detectron2's (R-50.pkl) or torchvision's; what "
    "fits is taken, classes by their names.  [default: lite: on-board's weights; else random]",
)
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="A Detectron2 YAML of plain values in the model's place.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="One of Detectron2's settings; checkpoint_every, validate_every, running_mean, soft_weight.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Updates.  [default: as many as the data need: lite 30 epochs, at least 400; tiny 10, at least 600]",
)
@click.option("--batch-size", type=click.IntRange(1), help="Images an update.  [default: lite 8, tiny 16, r101-c4 2]")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="[default: fitted to model and batch]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--device", help="cpu, cuda or cuda:N  [default: a GPU where there is one]")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode.  [default: none where all images fit into memory]")
@click.option("--overwrite", is_flag=True, help="Train anew where --out holds a training; it stays until the new one is finished.")
@click.option("--strict", is_flag=True, help="Exit with code 3 if anything of the annotations was left out.")
@common_options
def detector_command(
    images: str, annotations: str, out: str, assignments: tuple[str, ...], overwrite: bool, strict: bool, as_json: bool, **options: Any
) -> None:
    """Train a detector of one's own; its folder is a --detector of uniter-extract.

    \b
    Example:
      uniter-train detector --images photos/ --annotations instances.json --out detector/
      uniter-extract photos/ out.lmdb --detector detector/
      uniter-train detector --images vg/ --annotations objects.json --attributes attributes.json --image-data image_data.json \\
        --vocabulary 1600-400-20 --split genome/ --model r101-c4 --from imagenet --out detector/
    """
    _choose_annotations(options)
    if options["val_annotations"] and click.get_current_context().get_parameter_source("held_out") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--held-out and --val-annotations both say what is held out; leave one of the two out")
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--set {assignment!r}: expected KEY=VALUE, e.g. MODEL.RPN.NMS_THRESH=0.6")
        try:
            overrides[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise click.UsageError(f"--set {assignment!r}: {text!r} is no plain value") from error
    for name in ("checkpoint_every", "validate_every"):
        if name in overrides:
            value = overrides.pop(name)
            if type(value) is not int or value < 1:
                raise click.UsageError(f"--set {name}={value}: expected a number of updates, 1 or more")
            options[name] = value
    for name in ("running_mean", "soft_weight"):
        if name in overrides:
            value = overrides.pop(name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                raise click.UsageError(f"--set {name}={value}: expected a number, 0 or more")
            options[name] = float(value)
    require_detectron2()
    from uniter.extract.training.loop import train_detector
    from uniter.extract.training.plan import Choices

    summary = train_detector(images, annotations, out, Choices(overrides=overrides, **options), overwrite=overwrite)
    print_summary(summary, as_json=as_json, title=f"a detector in {out}")
    if strict and summary["skipped"]:
        sys.exit(SKIPPED_UNDER_STRICT)


def _choose_annotations(options: dict[str, Any]) -> None:
    """Turn what was said of attributes and of Visual Genome into `attributes` and `visual_genome`, or say what does not go together."""
    stated, none = options.pop("attributes"), options.pop("no_attributes")
    given = click.get_current_context().get_parameter_source("attributes") is ParameterSource.COMMANDLINE
    vocabulary, image_data, split = (options.pop(name) for name in ("vocabulary", "image_data", "split"))
    file = None if stated == ANNOTATED else Path(stated)
    if none and given:
        raise click.UsageError("--attributes and --no-attributes contradict each other; leave one of the two out")
    options["attributes"] = not none
    if vocabulary is None:
        for name, value in (("--attributes FILE", file), ("--image-data", image_data), ("--split", split)):
            if value is not None:
                raise click.UsageError(f"{name} is Visual Genome's; add --vocabulary 1600-400-20, or leave it out")
        return
    if file is None and given:
        raise click.UsageError("--attributes: Visual Genome's are in a file of their own; name its attributes.json")
    if file is not None and not file.is_file():
        raise click.UsageError(f"--attributes {file}: no such file; expected Visual Genome's attributes.json")
    if split is not None and click.get_current_context().get_parameter_source("held_out") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--held-out and --split both say what is held out; leave one of the two out")
    require_detectron2()
    from uniter.extract.training.visual_genome import VisualGenomeFiles

    options["visual_genome"] = VisualGenomeFiles(
        attributes=file, image_data=Path(image_data) if image_data else None, vocabulary=vocabulary, split=Path(split) if split else None
    )


if __name__ == "__main__":
    detector_command()
