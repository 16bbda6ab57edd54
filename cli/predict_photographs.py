"""`uniter-train predict match|answer|ground|rank`: trained models asked about photographs.

`with_photographs` puts them beside `uniter-train predict TASK`, which writes the submission of a whole database.
"""

import copy
import difflib
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uniter.cli.common import common_options, print_summary
from uniter.datasets.errors import BadInput, WrongUsage
from uniter.datasets.progress import Progress

if TYPE_CHECKING:
    from uniter.model.understanding.asking import Understanding
    from uniter.model.understanding.results import Seen

log = logging.getLogger(__name__)

MARK = b"page of uniter-train predict"  # in the JPEG, so that the same command again writes over its own pages only
LISTED = 10  # photographs of a ranking that are printed; --json has them all
Command = Callable[..., Any]


class Predict(click.Group):
    """`predict`: a command of its own for each question about photographs; any other word is a task's."""

    def __init__(self, of_task: click.Command, of_photographs: Sequence[click.Command], tasks: Callable[[], Mapping[str, str]]) -> None:
        super().__init__(
            "predict",
            commands={command.name or "": command for command in of_photographs},
            help="Ask a trained model: about photographs (match, answer, ground, rank), or write a TASK's official submission.",
            # `predict --from vqa/ vqa ...` is the task's command, too.
            context_settings={"ignore_unknown_options": True},
        )
        self._of_task, self._tasks = of_task, tasks

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The questions, then the down-stream tasks, for the help."""
        return [*self.commands, *self._tasks()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The question's command, or that of a task."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        return self._of(cmd_name, told=True)

    def _of(self, task: str, *, told: bool) -> click.Command:
        """The command of one task: with its own usage and, where it is to be `told`, what it writes."""
        command = copy.copy(self._of_task)
        command.name = task
        command.params = [parameter for parameter in command.params if parameter.name != "task"]
        assert command.callback is not None
        command.callback = functools.partial(command.callback, task=task)
        if told and (writes := self._tasks().get(task)) is not None:
            command.short_help = writes
            example = f"uniter-train predict {task} --from run/ --text test.db --images test.lmdb --out submission"
            command.help = f"{writes}\n\n\b\nExample:\n  {example}"
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names, without asking for the tasks, whose table takes seconds to load."""
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        # The tasks are not asked, which would take seconds: none has a name like these.
        if close := difflib.get_close_matches(args[0], self.commands, n=1):
            raise click.UsageError(f"no question and no task is called {args[0]!r}; did you mean {close[0]!r}?", ctx)
        if args[0].startswith("-"):
            return None, self._of_task, args
        return args[0], self._of(args[0], told=not {"-h", "--help"}.isdisjoint(args)), args[1:]


def with_photographs(of_task: click.Command, tasks: Callable[[], Mapping[str, str]]) -> Predict:
    """The `predict` command of `uniter-train`.

    Args:
        of_task: what does `predict TASK`.
        tasks: gives the tasks' names and what is written of each, for the help.
    """
    return Predict(of_task, [match, answer, ground, rank], tasks)


def photograph_options(function: Command) -> Command:
    """What the four commands share."""
    for option in reversed(
        (
            click.option("--from", "checkpoints", required=True, multiple=True, metavar="RUN|FILE|ID", help="The run to ask."),
            click.option("--image", "images", required=True, multiple=True, metavar="FILE|FOLDER", help="A photograph, or a folder."),
            click.option("--text", "texts", required=True, multiple=True, metavar="TEXT", help="What is asked; of each photograph."),
            click.option("--detector", default="butd", show_default=True, metavar="NAME", help="As for uniter-extract (butd, on-board, "
                         "a folder ...): the one whose regions the model was trained on."),
            click.option("--weights", metavar="FILE|URL", help="The detector's weights.  [default: its known sources, in order]"),
            click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Where regions are kept; each detector has a "
                         "folder of its own there.  [default: regions/ in the toolkit's cache folder]"),
            click.option("--no-cache", is_flag=True, help="Keep no regions."),
            click.option("--other-detector", is_flag=True, help="Another detector than that of the run is meant."),
            click.option("--tokenizer", metavar="NAME|PATH", help="The model's vocabulary, where its run does not tell."),
            click.option("--out", type=click.Path(path_type=Path), help="A picture of the answer; of several, a folder."),
            click.option("--device", help="cpu, cuda or cuda:N [default: a GPU where there is one]."),
        )
    ):  # fmt: skip
        function = option(function)
    return function


@click.command("match")
@photograph_options
@common_options
def match(**chosen: Any) -> None:
    """Say how likely the text is about the photograph. Takes a pre-trained or a retrieval run.

    \b
    Example:
      uniter-train predict match --from run/ --detector detector/ --image photo.jpg --text "a red star" --out page.jpg
    """
    _ask("match", **chosen)


@click.command("answer")
@photograph_options
@click.option("--answers", metavar="FILE", help="ans2label.json, where the run does not know the names of its answers.")
@common_options
def answer(**chosen: Any) -> None:
    """Answer a question about the photograph. Takes a VQA run.

    \b
    Example:
      uniter-train predict answer --from vqa/ --detector detector/ --image photo.jpg --text "what color is the star?"
    """
    _ask("answer", **chosen)


@click.command("ground")
@photograph_options
@common_options
def ground(**chosen: Any) -> None:
    """Point at what a phrase means. Takes a RefCOCO run, or makes do with a pre-trained one and says so.

    \b
    Example:
      uniter-train predict ground --from refcoco/ --detector detector/ --image photo.jpg --text "the left star" --out page.jpg
    """
    _ask("ground", **chosen)


@click.command("rank")
@photograph_options
@common_options
def rank(**chosen: Any) -> None:
    """Order photographs by how well the text fits. Takes a pre-trained or a retrieval run.

    \b
    Example:
      uniter-train predict rank --from run/ --detector detector/ --image photos/ --text "a red star above a blue ring"
    """
    _ask("rank", **chosen)


def _ask(
    question: str,
    *,
    checkpoints: tuple[str, ...],
    images: tuple[str, ...],
    texts: tuple[str, ...],
    detector: str,
    weights: str | None,
    cache: Path | None,
    no_cache: bool,
    other_detector: bool,
    tokenizer: str | None,
    out: Path | None,
    device: str | None,
    as_json: bool,
    answers: str | None = None,
) -> None:
    if cache is not None and no_cache:
        raise click.UsageError("--cache and --no-cache contradict each other")
    photographs = _photographs(images)
    several = len(texts) > 1 or (question != "rank" and len(photographs) > 1)
    if out is not None:
        _check_out(out, photographs, several=several)
    # Only here: what loads the libraries takes seconds, in which a slip of the pen could have been said.
    from uniter.extract.install import require_detectron2
    from uniter.extract.on_demand import RegionExtractor, default_cache
    from uniter.model.checkpoints.read import find_weights
    from uniter.model.understanding.asking import Understanding

    for checkpoint in checkpoints:
        find_weights(checkpoint)
    require_detectron2()
    if weights is not None and weights.startswith("random:"):
        log.warning("WARNING: random weights. These regions mean NOTHING, and so do the answers; this is for trying things out only.")
    extractor = RegionExtractor(detector, weights=weights, cache=None if no_cache else cache or default_cache(), device=device)
    asked = Understanding(extractor, *checkpoints, tokenizer=tokenizer, answers=answers, device=device, other_detector=other_detector)
    results: list[Seen] = []
    if question == "rank":
        results += [asked.rank(photographs, text) for text in texts]
    else:
        pairs = list(itertools.product(photographs, texts))
        results += getattr(asked, f"{question}_all")([image for image, _ in pairs], [text for _, text in pairs])
    pages = _draw(asked, results, question, out, several=several) if out is not None else []
    _report(question, results, pages, out, as_json=as_json)


def _photographs(images: Sequence[str]) -> list[str]:
    """Files as they are named, folders with all of their images."""
    from uniter.extract.images.listing import list_images

    found: list[str] = []
    for name in images:
        if Path(name).is_dir():
            listed = list_images(name, key="path")
            found += [item.file for number in range(listed.units) for item in listed.unit(number)]
        elif not Path(name).exists():
            raise BadInput(f"--image {name}: No such file or folder")
        else:
            found.append(name)
    return found


def _check_out(out: Path, photographs: Sequence[str], *, several: bool) -> None:
    """Said before the work."""
    for photograph in photographs:
        asked = Path(photograph).resolve()
        if asked == out.resolve() or (several and asked.parent == out.resolve()):
            raise BadInput(f"--out {out} is or holds the photograph {photograph}, and would be written over; choose another one")
    if several and out.exists() and not out.is_dir():
        raise WrongUsage(f"--out {out} is a file, but there are several answers; give a folder for their pictures")
    if not several and (out.is_dir() or out.suffix.lower() not in (".jpg", ".jpeg", ".png")):
        raise WrongUsage(f"--out {out}: expected the name of a picture that ends with .jpg or .png")


def _draw(asked: "Understanding", results: Sequence["Seen"], question: str, out: Path, *, several: bool) -> list[Path]:
    """A page for each result; of several, each is called after its photograph. Where they are."""
    from PIL import Image

    if several:
        out.mkdir(parents=True, exist_ok=True)
    pages: list[Path] = []
    with Progress(len(results), unit="pictures", label="drawing", brief=True) as progress:
        for result in results:
            page = _page_name(out, str(result.image), question, pages) if several else out
            Image.fromarray(asked.picture(result)[:, :, ::-1]).save(page, comment=MARK)
            pages.append(page)
            progress.update()
    return pages


def _page_name(out: Path, photograph: str, question: str, taken: Sequence[Path]) -> Path:
    """`dog.match.jpg` for dog.png, `dog.match-2.jpg` for the second one; never the name of a picture of somebody else's.

    What a reader would get wrong: Dog.png and dog.png are two photographs, but on many disks one page.
    """
    from uniter.datasets.view.pictures import safe_name

    stem = f"{safe_name(Path(photograph).stem) or 'photograph'}.{question}"
    names = {page.name.casefold() for page in taken}
    for number in itertools.count(1):
        page = out / (f"{stem}.jpg" if number == 1 else f"{stem}-{number}.jpg")
        if page.name.casefold() not in names and (not page.exists() or _is_a_page(page)):
            return page
    raise AssertionError("numbers do not end")


def _is_a_page(path: Path) -> bool:
    """Whether an earlier run drew it."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.info.get("comment") == MARK
    except OSError:
        return False


def _report(question: str, results: Sequence["Seen"], pages: Sequence[Path], out: Path | None, *, as_json: bool) -> None:
    from uniter.model.understanding.results import Ranking, in_words

    if as_json:
        shown = [{"page": str(page)} for page in pages] or [{}] * len(results)
        answers = [_described(result) | page for result, page in zip(results, shown, strict=True)]
        summary: dict[str, Any] = {"question": question, "answers": answers}
        print_summary({**summary, "out": None if out is None else str(out)}, as_json=True, title="")
        return
    for result in results:
        if isinstance(result, Ranking):
            rows = {str(result.images[place]): float(result.probabilities[place]) for place in result.order[:LISTED].tolist()}
            print_summary(rows, as_json=False, title=result.text)
        else:
            click.echo(f"{result.image}: {result.text}: {in_words(result)}")
    if out is not None:
        click.echo(f"pictures: {out}")


def _described(result: "Seen") -> dict[str, Any]:
    """A result as JSON."""
    from uniter.model.understanding.results import Answer, Grounding, Match, Ranking

    described: dict[str, Any] = {"image": str(result.image), "text": result.text, "from": result.source}
    match result:
        case Match():
            return {**described, "probability": result.probability}
        case Answer():
            best = [{"answer": name, "probability": probability} for name, probability in result.best]
            return {**described, "answer": result.answer, "probability": result.probability, "best": best}
        case Grounding():
            probability = float(result.probabilities[result.region])
            box = [round(float(value), 2) for value in result.box]
            return {**described, "region": result.region, "box": box, "probability": probability, "zero_shot": result.zero_shot}
        case Ranking():
            order = [
                {"image": str(result.images[place]), "probability": float(result.probabilities[place])} for place in result.order.tolist()
            ]
            return {**described, "ranking": order}
    raise TypeError(f"{type(result).__name__} is no result of Understanding")


if __name__ == "__main__":
    click.Group("predict", commands=[match, answer, ground, rank])()
