"""The README and the pages say only what the commands can do, and the tutorial runs."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of the toolkit in the page's code blocks, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for block in (text for language, text in blocks if language in {"", "sh"}):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith(("uniter-", "torchrun ")):
                continue
            words = shlex.split(line, comments=True)
            if words[0] == "torchrun":
                words = words[words.index("--no-python") + 1 :]
            assert words[0] in SCRIPTS, line
            yield words


def click_command(words: list[str]) -> tuple[click.Command, list[str]]:
    begins_in, name = SCRIPTS[words[0]].split(":")
    assert begins_in == "uniter.cli.start" and hasattr(import_module(begins_in), name)
    command, rest = import_module(f"uniter.cli.{name}").main, words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_have_the_options_they_are_given(page: Path) -> None:
    for words in commands(page):
        command, rest = click_command(words)
        # A group that is given no sub-command (`uniter-train predict vqa`) falls back on one of its own.
        candidates: list[click.Command | None] = [command]
        if isinstance(command, click.Group):
            context = click.Context(command)
            candidates += [command.get_command(context, name) for name in command.list_commands(context)]
        parameters = [parameter for candidate in candidates if candidate is not None for parameter in candidate.params]
        known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{page.name}: {shlex.join(words)}: {word} is no option (known: {sorted(known)})"


def test_the_page_of_settings_lists_every_setting() -> None:
    from uniter.model.settings.files import shipped_configs
    from uniter.model.settings.settings import explain_settings

    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert f"```yaml\n{explain_settings()}\n```" in page, "copy what `uniter-train pretrain --explain` prints into docs/settings.md"
    assert all(name in page for name in shipped_configs())


def test_pages_link_to_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def paths_named_in(text: str) -> Iterator[str]:
    """What is written as code and looks like a file or folder of this repository, `<name>` and `...` standing for something new."""
    for name in re.findall(r"`([\w./<>*{},-]+)`", text):
        if name.split("/")[0] in {"extract", "datasets", "model", "cli", "tests", "benchmarks", "demo", "docs"} and "/" in name:
            yield name


@pytest.mark.parametrize(("page", "at_least"), [("CONTRIBUTING.md", 40), ("README.md", 3)])
def test_files_that_a_contributor_is_sent_to_exist(page: str, at_least: int) -> None:
    named = list(paths_named_in((ROOT / page).read_text(encoding="utf-8")))
    assert len(named) >= at_least
    for name in named:
        path = ROOT / name
        there = path.parent.is_dir() if "<" in path.name else any(ROOT.glob(name)) if "*" in name else path.exists()
        assert there, f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    """Also from the README, which `make docs` does not see: the file, and the heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page.name} links to {target}, known are {sorted(known)}"


def test_what_is_cited_is_the_toolkit_and_the_paper_is_its_reference() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["cff-version"], cited["type"], cited["version"], cited["license"]) == ("1.2.0", "software", project["version"], "MIT")
    assert cited["authors"] == [{"name": "The UNITER toolkit authors"}]
    (paper,) = cited["references"]
    assert paper["type"] == "conference-paper" and paper["title"].startswith("UNITER")


def test_the_changelog_is_kept() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_command_is_a_call_that_exists() -> None:
    rows = re.findall(r"^\| `(uniter-[^`]+)` \| (.+) \|$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), flags=re.MULTILINE)

    def leaves(command: click.Command, words: list[str]) -> Iterator[str]:
        inner = getattr(command, "commands", {})
        if not inner:
            yield " ".join(words)
        for name, below in inner.items():
            yield from leaves(below, [*words, name])

    # The page that is asked in the browser is `Understanding` again.
    scripts = {script: begin.split(":")[1] for script, begin in SCRIPTS.items() if script != "uniter-app"}
    wanted = {leaf for script, name in scripts.items() for leaf in leaves(import_module(f"uniter.cli.{name}").main, [script])}
    assert {command.partition(" --")[0] for command, _ in rows} >= wanted
    for command, calls in rows:
        named = [call for call in re.findall(r"`([^`]+)`", calls) if call.startswith("uniter.")]
        assert named, command
        for call in named:
            found: Any = uniter_object(call)
            assert callable(found) and found.__doc__, call


def uniter_object(name: str) -> Any:
    """What a dotted name stands for: an attribute of a module, or of a class in it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def section(page: Path, heading: str) -> Iterator[tuple[str, str]]:
    """The code blocks below a heading of a page, with their language."""
    text = page.read_text(encoding="utf-8")
    below = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert below, f"{page.name} has no section {heading!r}"
    yield from re.findall(r"^```(\w*)\n(.*?)^```", below, flags=re.MULTILINE | re.DOTALL)


def test_the_first_hour_of_the_readme_runs(tmp_path: Path) -> None:
    """What a newcomer types in an empty home without a network, line by line; `make demo` has a test of its own (tests/test_demo.py)."""
    data = pytest.importorskip("skimage.data", reason="scikit-image ships the photographs: pip install '.[demo]'")
    pytest.importorskip("detectron2", reason="run `uniter-extract --install-detectron2`")
    home, photos = tmp_path / "home", tmp_path / "photos"
    home.mkdir()
    photos.mkdir()
    for name, photograph in (("dog.jpg", data.chelsea()), ("coffee.png", data.coffee())):
        Image.fromarray(photograph).save(photos / name)
    here = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "LANG") if name in os.environ}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    ran = 0
    for language, block in section(ROOT / "README.md", "No weights? Begin here"):
        lines = [block] if language == "python" else [line for line in block.splitlines() if line.startswith("uniter-")]
        for line in lines:
            if "demo-output" in line:
                continue
            words = [sys.executable, "-c", line] if language == "python" else shlex.split(line)
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**kept, **nowhere, **here})
            assert done.returncode == 0, f"{line}:\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 3, "an extraction, a page, and the regions in Python"
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "on-board" in page and "cat" in page
    assert {path.name for path in home.rglob("*") if path.is_file()} <= {"settings.json"}, "nothing is left in the home"


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Each command as it stands, on a smaller world and with fewer steps, in one folder, in order."""
    fewer = {"uniter-scenes": ["--images", "48", "--held-out", "12"], "detector": ["--steps", "20"], "pretrain": ["--steps", "20"]}
    for words in commands(ROOT / "docs" / "index.md"):
        added = [word for name in words[:2] for word in fewer.get(name, [])]
        done = subprocess.run(
            [str(Path(sys.executable).parent / words[0]), *words[1:], *added], cwd=tmp_path, capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "report" / "index.html").exists()
    assert (tmp_path / "shared" / "model.safetensors").exists()


def test_every_public_function_class_and_method_has_a_docstring() -> None:
    """The reference is made from them. Names with an underscore are private, and so are modules."""

    def without(nodes: list[ast.stmt], of: str) -> Iterator[str]:
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if any("overload" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            told = (ast.get_docstring(node) or "").split()
            if len(told) < 2 or told[:2] == ["Return", "the"]:
                yield f"{of}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from without(node.body, f"{of}{node.name}.")

    files = [file for room in ("extract", "datasets", "model", "cli") for file in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 200
    assert [
        name for file in files for name in without(ast.parse(file.read_text(encoding="utf-8")).body, f"{file.relative_to(ROOT)}: ")
    ] == []
