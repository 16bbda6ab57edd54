"""`uniter-db cache list|clear`: what the toolkit keeps between runs, how big it is, and how to be rid of it."""

from collections.abc import Sequence

import click

from uniter.cli.common import common_options, print_summary
from uniter.datasets.progress import human_bytes

HELP = {"help_option_names": ["-h", "--help"]}


@click.group("cache", context_settings=HELP)
def cache_command() -> None:
    """What is kept between runs: fetched and converted weights, and regions of photographs that were asked about.

    \b
    Example:
      uniter-db cache list
      uniter-db cache clear regions --yes
    """


@cache_command.command("list", context_settings=HELP)
@common_options
def list_command(as_json: bool) -> None:
    """List the caches: where each lies, how big it is, what uses it, what is in it. $UNITER_CACHE moves them.

    \b
    Example:
      uniter-db cache list
    """
    from uniter.extract.caches import USED_BY, caches, others
    from uniter.extract.weights.cache import cache_folder

    found, folder = caches(), cache_folder()
    if as_json:
        told = {
            name: {
                "folder": str(folder / name),
                "bytes": sum(one.size for one in kept),
                "used_by": USED_BY[name],
                "kept": [{"name": one.name, "bytes": one.size} for one in kept],
            }
            for name, kept in found.items()
        }
        print_summary({"folder": str(folder), "caches": told, "others": [str(file) for file in others()]}, as_json=True, title="")
        return
    click.echo(f"{folder}: {human_bytes(sum(one.size for kept in found.values() for one in kept))}")
    for name, kept in found.items():
        click.echo(f"  {name}: {human_bytes(sum(one.size for one in kept))}, for {USED_BY[name]}")
        for one in kept:
            click.echo(f"    {human_bytes(one.size):>9}  {one.name}")
    if strangers := others():
        click.echo(f"  {len(strangers):,} files there are not the toolkit's (such as {strangers[0]}); they are never deleted")
    click.echo("Vocabularies and weights from the hub lie in Hugging Face's own cache: `hf cache scan`.")


@cache_command.command("clear", context_settings=HELP)
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--yes", is_flag=True, help="Delete. Without it nothing is deleted, and what would be is said.")
@common_options
def clear_command(names: Sequence[str], yes: bool, as_json: bool) -> None:
    """Delete caches: those named (downloads, weights, regions), or all. They are made or fetched again when needed.

    What the toolkit did not make stays, and so does what another process is fetching.

    \b
    Example:
      uniter-db cache clear --yes
    """
    from uniter.extract.caches import clear, kept_in

    if not yes:
        kept = kept_in(names)
        size = human_bytes(sum(one.size for one in kept))
        raise click.UsageError(f"{len(kept):,} things of {size} would be deleted (uniter-db cache list shows them); say so with --yes")
    deleted, left = clear(names)
    freed = sum(one.size for one in deleted)
    summary = {"deleted": len(deleted), "bytes": freed, "left_in_use": [one.name for one in left]}
    print_summary(summary, as_json=as_json, title=f"{human_bytes(freed)} deleted")


if __name__ == "__main__":
    cache_command()
