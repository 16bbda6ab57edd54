"""`uniter-app RUN`: a page on this machine on which trained models are asked about photographs."""

import logging
import sys
from typing import Any

import click

from uniter.cli.common import common_options, open_in_browser, print_summary

log = logging.getLogger(__name__)


@click.command("uniter-app", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, metavar="[RUN|FILE|ID]...")
@click.option("--from", "more_runs", multiple=True, metavar="RUN|FILE|ID", help="A RUN, as the other commands name it.")
@click.option("--detector", default="on-board", show_default=True, metavar="NAME", help="As for uniter-extract (butd, on-board, "
              "a folder ...): the one whose regions the models were trained on.")  # fmt: skip
@click.option("--weights", metavar="FILE|URL", help="The detector's weights.  [default: its known sources, in order]")
@click.option("--other-detector", is_flag=True, help="Another detector than that of the runs is meant.")
@click.option("--tokenizer", metavar="NAME|PATH", help="The models' vocabulary, where their runs do not tell.")
@click.option("--answers", metavar="FILE", help="ans2label.json, where a VQA run does not know the names of its answers.")
@click.option("--device", help="cpu, cuda or cuda:N [default: a GPU where there is one].")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address to answer on; 0.0.0.0: all, so that other machines can ask."
)
@click.option("--port", default=8420, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser.")
@common_options
def main(runs: tuple[str, ...], more_runs: tuple[str, ...], host: str, port: int, open_browser: bool, as_json: bool, **chosen: Any) -> None:
    """Serve a page on which photographs are dropped and asked about.

    Each RUN is asked what it was trained for: a pre-trained one whether a sentence matches, which photograph fits, and where a phrase
    is; one fine-tuned for vqa answers questions, for refcoco points, for retrieval matches better. Without a RUN the page shows regions
    only. Nothing leaves this machine and nothing is kept on disk. Ctrl-C ends it.

    \b
    Example:
      uniter-app run/ vqa/ --detector detector/ --open
    """
    from uniter.cli.web.serving import address_of, bound_socket, server_on, serves_this_machine_alone

    with bound_socket(host, port) as bound:
        # Only here: what loads the libraries takes seconds, in which a slip of the pen could have been said.
        from uniter.model.checkpoints.read import find_weights

        runs += more_runs
        for run in runs:
            find_weights(run)
        from uniter.cli.web.loading import load_application

        alone = serves_this_machine_alone(bound)
        server, address = server_on(bound, load_application(runs, **chosen, alone=alone)), address_of(bound)
    if not alone:
        log.warning("WARNING: with --host %s whoever reaches this machine can ask, without a password", host)
    print_summary({"address": address, "runs": list(runs), "detector": chosen["detector"]}, as_json=as_json, title="ready; Ctrl-C ends it")
    sys.stdout.flush()
    if open_browser:
        open_in_browser(address)
    server.serve_forever()


if __name__ == "__main__":
    main()
