"""`uniter-train`: pre-training and what follows it. Each command parses, calls one function, and prints one summary."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from uniter.cli.common import common_options, print_summary, version
from uniter.cli.predict_photographs import with_photographs
from uniter.cli.train_detector import detector_command
from uniter.datasets.errors import WrongUsage, unknown_name

Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version(), "--version", prog_name="uniter-toolkit")
def main() -> None:
    """Train and use UNITER on region and text databases.

    \b
    Example, the whole way:
      uniter-extract photos/ out.lmdb
      uniter-build-db captions.json --images out.lmdb
      uniter-train pretrain --text captions.db --images out.lmdb --out run/
      uniter-train evaluate pretrain --from run/ --text val.db --images val.lmdb
    """


class TaskCommand(click.Command):
    """A command whose help lists tasks. They are looked up when it is printed: their table takes PyTorch, which takes seconds."""

    def __init__(self, *arguments: Any, kind: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._kind = kind

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the list of tasks below the options."""
        from uniter.model.tasks.table import DEFAULT_PRETRAINING, PRETRAINING

        with formatter.section("Tasks"):
            if self._kind == "pretraining":
                defaults = ", ".join(f"{name}:{PRETRAINING[name].ratio:g}" for name in DEFAULT_PRETRAINING)
                formatter.write_text(f"{', '.join(PRETRAINING)}. By default, as far as the data allow, {defaults}.")
            else:
                formatter.write_text(", ".join(downstream_tasks()))


def downstream_tasks() -> list[str]:
    """The names of the down-stream tasks."""
    from uniter.model.tasks.table import DOWNSTREAM

    return list(DOWNSTREAM)


def submissions() -> dict[str, str]:
    """What `predict` writes of each down-stream task, by its name."""
    from uniter.model.tasks.own_labels import write_labels
    from uniter.model.tasks.table import DOWNSTREAM
    from uniter.model.tasks.task import extras

    written: dict[str, str] = {}
    for name, row in DOWNSTREAM.items():
        writer = extras(row).write or write_labels  # how own labels are written is known only of the data
        told = (writer.__doc__ or "").partition("\n")[0]
        written[name] = told if extras(row).pairs is None else "JSON: the ten best pictures of each text, and texts of each picture."
    return written


def data_options(function: Command) -> Command:
    """--text and --images, several times each."""
    function = click.option("--images", multiple=True, metavar="DB", help="A region database; give several as one corpus.")(function)
    return click.option("--text", multiple=True, metavar="DB", help="A text database; give several as one corpus.")(function)


def run_options(function: Command) -> Command:
    """What all training commands share."""
    for option in reversed(
        (
            click.option(
                "--config", metavar="NAME|FILE", help="Shipped settings (`recipes` lists them), a YAML file, or a published JSON file."
            ),
            click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Overrule one setting, e.g. optimizer.clip=2."),
            click.option("--model", "size", type=click.Choice(["tiny", "base", "large"]), help="Size of a model that starts from nothing."),
            click.option("--from", "start", metavar="RUN|FILE|ID", help="Start from a run of ours, BERT, or a published .pt."),
            click.option("--steps", type=click.IntRange(min=1), help="Updates of the weights [default: chosen by the amount of data]."),
            click.option("--patience", type=click.IntRange(min=1), help="Stop after so many validations without a better one."),
            click.option("--seed", type=click.IntRange(min=0), help="Decides everything random [default: 42]."),
            click.option("--device", help="cpu, cuda or cuda:N [default: a GPU where there is one]."),
            click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16"]), help="[default: bf16 on a GPU, else fp32]"),
            click.option("--other-detector", is_flag=True, default=None, help="Regions of another detector than that of --from are meant."),
            click.option(
                "--root",
                "roots",
                multiple=True,
                metavar="/img=FOLDER",
                help="Where a container path of a recipe or published JSON file is here; repeat for /txt, /pretrain ...",
            ),
        )
    ):
        function = option(function)
    return function


@main.command(cls=TaskCommand, kind="pretraining")
@data_options
@click.option("--val-text", "validation_text", multiple=True, metavar="DB", help="Validate on these texts [default: held-out pictures].")
@click.option("--val-images", "validation_images", multiple=True, metavar="DB", help="Their region databases [default: --images].")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The run directory; the same command again resumes.")
@click.option("--tasks", metavar="TASK[:RATIO],...", help="How often each is drawn; see below.")
@run_options
@click.option("--explain", is_flag=True, help="Print every setting with its default and meaning, and stop.")
@common_options
def pretrain(
    text: tuple[str, ...],
    images: tuple[str, ...],
    validation_text: tuple[str, ...],
    validation_images: tuple[str, ...],
    out: Path | None,
    tasks: str | None,
    config: str | None,
    assignments: tuple[str, ...],
    size: str | None,
    start: str | None,
    steps: int | None,
    patience: int | None,
    seed: int | None,
    device: str | None,
    precision: str | None,
    other_detector: bool | None,
    roots: tuple[str, ...],
    explain: bool,
    as_json: bool,
) -> None:
    """Pre-train UNITER on texts and the regions of their pictures.

    Without --config, sizes, steps and rates are chosen by the data and the device, and all tasks that the data allow are trained
    in UNITER's ratios. The same command again resumes; in front of it, `torchrun --nproc-per-node gpu --no-python` uses all GPUs.

    \b
    Examples:
      uniter-train pretrain --text captions.db --images out.lmdb --out run/
      uniter-train pretrain --config pretrain-alldata-base-8gpu.json --root /txt=txt --root /img=img --out run/
    """
    from uniter.model.settings.gather import gather_settings
    from uniter.model.settings.settings import explain_settings

    if explain:
        click.echo(explain_settings())
        return
    settings = gather_settings(
        config,
        roots=roots,
        assignments=assignments,
        options=_given(
            {
                "model.size": size, "from": start, "steps": steps, "seed": seed, "device": device, "precision": precision,
                "other_detector": other_detector, "patience": patience,
            }
        ),
        text=list(text),
        images=list(images),
        validation_text=list(validation_text),
        validation_images=list(validation_images),
        tasks=tasks,
    )  # fmt: skip
    if out is None:
        raise click.UsageError("Missing option '--out': where shall the run's checkpoints and log go?")
    from uniter.model.train.pretraining import pretrain as run_pretraining

    print_from_first(run_pretraining(settings, out), as_json=as_json, title="pre-training")


@main.command(cls=TaskCommand, kind="downstream")
@click.argument("task")
@data_options
@click.option("--val-text", "validation_text", multiple=True, metavar="DB", help="Validate on these texts [default: held-out pictures].")
@click.option("--val-images", "validation_images", multiple=True, metavar="DB", help="Their region databases [default: --images].")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="The run directory; the same command resumes.")
@run_options
@common_options
def finetune(
    task: str,
    text: tuple[str, ...],
    images: tuple[str, ...],
    validation_text: tuple[str, ...],
    validation_images: tuple[str, ...],
    out: Path,
    config: str | None,
    assignments: tuple[str, ...],
    size: str | None,
    start: str | None,
    steps: int | None,
    patience: int | None,
    seed: int | None,
    device: str | None,
    precision: str | None,
    other_detector: bool | None,
    roots: tuple[str, ...],
    as_json: bool,
) -> None:
    """Fine-tune a pre-trained model on a down-stream TASK, one of those below.

    \b
    Example:
      uniter-build-db v2_OpenEnded_train_questions.json vqa_train.db --task vqa --join v2_train_annotations.json --images out.lmdb
      uniter-train finetune vqa --from run/ --text vqa_train.db --images out.lmdb --out vqa/
    """
    from uniter.model.settings.gather import gather_settings
    from uniter.model.tasks.table import DOWNSTREAM, task_name
    from uniter.model.train.finetuning import finetune as run_finetuning

    name = task_name(task, DOWNSTREAM)
    settings = gather_settings(
        config,
        roots=roots,
        assignments=assignments,
        options=_given(
            {
                "task": name, "model.size": size, "from": start, "steps": steps, "seed": seed, "device": device, "precision": precision,
                "other_detector": other_detector, "patience": patience,
            }
        ),
        text=list(text),
        images=list(images),
        validation_text=list(validation_text),
        validation_images=list(validation_images),
    )  # fmt: skip
    print_from_first(run_finetuning(settings, out), as_json=as_json, title=f"fine-tuning {name}")


def scoring_options(function: Command) -> Command:
    """How a trained model is put through its data; the same for `evaluate` and `predict`."""
    function = click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[default: bf16 on a GPU, else fp32]")(function)
    function = click.option("--device", help="cpu, cuda or cuda:N [default: a GPU where there is one].")(function)
    function = click.option("--other-detector", is_flag=True, help="Regions of another detector than that of the model are meant.")(
        function
    )
    function = click.option("--strict", is_flag=True, help="Refuse where an example would be left out, e.g. for want of its image.")(
        function
    )
    function = click.option(
        "--scores", type=click.Path(path_type=Path, file_okay=False), help="Keep retrieval's scores there; the same command resumes."
    )(function)
    function = click.option(
        "--workers", type=click.IntRange(min=0), help="Processes that make batches [default: fitted to the machine on a GPU, else 0]."
    )(function)
    function = click.option(
        "--batch-tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="Word pieces and regions of a batch."
    )(function)
    return function


@main.command(cls=TaskCommand, kind="downstream")
@click.argument("task")
@click.option("--from", "start", required=True, metavar="RUN|FILE|ID", help="The run or checkpoint to evaluate.")
@data_options
@click.option("--candidates", type=click.IntRange(min=2), help="Of `pretrain`: pairs that compete in retrieval [default: 50].")
@click.option("--words", metavar="WORD,WORD", help="Of `pretrain`: also the accuracy on these words, e.g. red,blue,square.")
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Decides masks, pairs and candidates.")
@click.option("--max-text-length", type=click.IntRange(min=-1), default=-1, show_default=True, help="Leave longer texts out; -1 keeps all.")
@scoring_options
@common_options
def evaluate(
    task: str,
    start: str,
    text: tuple[str, ...],
    images: tuple[str, ...],
    candidates: int | None,
    words: str | None,
    seed: int,
    batch_tokens: int,
    max_text_length: int,
    workers: int | None,
    scores: Path | None,
    other_detector: bool,
    strict: bool,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> None:
    """Measure a model on held-out texts and pictures: `evaluate pretrain` the pre-training tasks and zero-shot retrieval, a
    down-stream task's name what was fine-tuned (`retrieval` also zero-shot, from a pre-trained model).

    The same seed gives the same figures. `mlm.accuracy_other_picture` masks the same words beside another picture: what is
    between the two is what the picture tells.

    \b
    Example:
      uniter-train evaluate pretrain --from run/ --text val.db --images val.lmdb --json
    """
    measuring: dict[str, Any] = {
        "text": list(text),
        "images": list(images),
        "seed": seed,
        "batch_tokens": batch_tokens,
        "max_text_length": max_text_length,
        "workers": workers,
        "device": device,
        "precision": precision,
        "other_detector": other_detector,
        "strict": strict,
    }
    if task == "pretrain":
        from uniter.model.evaluation.pretrained import evaluate_run

        if scores is not None:
            raise click.UsageError("--scores keeps the pairs of `evaluate retrieval`; leave it out here")
        chosen = [word.strip() for word in (words or "").split(",") if word.strip()]
        figures = evaluate_run(start, candidates=candidates or 50, words=chosen, **measuring)
    else:
        from uniter.model.evaluation.finetuned import evaluate_finetuned
        from uniter.model.tasks.table import DOWNSTREAM, SYNONYMS

        task = SYNONYMS.get(task, task)
        if task not in DOWNSTREAM:
            raise WrongUsage(unknown_name("task", task, ["pretrain", *DOWNSTREAM]))
        for option, given in (("--candidates", candidates), ("--words", words)):
            if given is not None:
                raise click.UsageError(f"{option} is of `evaluate pretrain`; evaluating {task} does nothing with it, leave it out")
        figures = evaluate_finetuned(task, start, scores=scores, **measuring)
    print_from_first(figures, as_json=as_json, title=f"{task} of {start}")


@main.command(cls=TaskCommand, kind="downstream")
@click.argument("task")
@click.option("--from", "start", required=True, metavar="RUN|FILE", help="The fine-tuned run or checkpoint.")
@data_options
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write.")
@click.option("--answers", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="ans2label.json, where nobody else has it.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --out.")
@scoring_options
@common_options
def predict(
    task: str,
    start: str,
    text: tuple[str, ...],
    images: tuple[str, ...],
    out: Path,
    answers: Path | None,
    overwrite: bool,
    batch_tokens: int,
    workers: int | None,
    scores: Path | None,
    other_detector: bool,
    strict: bool,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> None:
    """Write a TASK's official submission: VQA's result JSON, NLVR2's and VCR's CSV, SNLI-VE's labels, RefCOCO's
    boxes, retrieval's ranks.

    \b
    Example:
      uniter-train predict vqa --from vqa/ --text vqa_test.db --images test.lmdb --out submission.json
    """
    from uniter.model.evaluation.finetuned import predict as run_prediction
    from uniter.model.tasks.table import DOWNSTREAM, task_name

    summary = run_prediction(
        task_name(task, DOWNSTREAM),
        start,
        out,
        text=list(text),
        images=list(images),
        answers=answers,
        batch_tokens=batch_tokens,
        workers=workers,
        scores=scores,
        device=device,
        precision=precision,
        other_detector=other_detector,
        strict=strict,
        overwrite=overwrite,
    )
    print_from_first(summary, as_json=as_json, title=f"predictions of {start}")


@main.command()
@click.option("--from", "start", required=True, metavar="RUN|FILE|ID", help="The run or checkpoint to export.")
@click.option("--to", "layout", required=True, type=click.Choice(["published", "hub"]), help="A flat .pt, or a folder to share.")
@click.option("--license", "licence", metavar="ID", help="For the card of `hub`, such as mit or cc-by-4.0 [default: not stated].")
@click.argument("out", type=click.Path(path_type=Path))
@common_options
def export(start: str, layout: str, licence: str | None, out: Path, as_json: bool) -> None:
    """Write a model for others: `published` is UNITER's flat state dict, `hub` a folder with safetensors, config and model card.

    \b
    Examples:
      uniter-train export --from run/ --to published uniter.pt
      uniter-train export --from run/ --to hub my-uniter/
    """
    from uniter.model.checkpoints.export import export_run

    print_summary(export_run(start, layout, out, licence=licence), as_json=as_json, title=f"exported to {out}")


@main.command()
@click.option("--show", metavar="NAME", help="Print the settings of one instead, as YAML: to read, or to copy and change.")
@common_options
def recipes(show: str | None, as_json: bool) -> None:
    """List the published recipes of UNITER and VILLA that ship, and what each takes: data, examples an update, memory, hours.

    Memory and hours are arithmetic for bf16 on a GPU like an H100, if the data keep up; docs/reproducing.md has the commands.

    \b
    Example:
      uniter-train finetune vqa --config vqa-base --root /txt=txt --root /img=img --root /pretrain=pretrain --out vqa/
    """
    from uniter.model.settings.files import shipped_text
    from uniter.model.settings.recipes import recipes as all_recipes

    if show is not None and as_json:
        raise click.UsageError("--show prints YAML; leave --json out")
    if show is not None:
        click.echo(shipped_text(show), nl=False)
        return
    found = all_recipes()
    if as_json:
        print_summary({"recipes": [asdict(recipe) for recipe in found]}, as_json=True, title="recipes")
        return
    for recipe in found:
        click.echo(
            f"{recipe.name}: {recipe.task}, {recipe.steps:,} updates of {recipe.examples:,} examples, {recipe.memory:.0f} GiB, "
            f"{recipe.hours:.2g} H100 hours by arithmetic, at 40 % of its peak (published: {recipe.processes} GPUs); from {recipe.start}; "
            f"{' '.join(recipe.data)}"
        )


def print_from_first(summary: Mapping[str, Any], *, as_json: bool, title: str) -> None:
    """Print a summary, from the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print_summary(summary, as_json=as_json, title=title)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


main.add_command(detector_command)
main.add_command(with_photographs(predict, submissions))


if __name__ == "__main__":
    main()
