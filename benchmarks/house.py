"""The house in numbers: folders, arrows, circles, long functions and files, lines of code. Nothing is imported or run.

    python benchmarks/house.py                      # this tree
    python benchmarks/house.py --against d45295f    # and a commit, side by side

Lines of code are counted without blank lines, comments and docstrings. A folder's `__init__` is a door that hands on names, so its
imports are no arrows; everywhere else an import inside a function counts like any other.

About the host alone: takes no --device.
"""

import argparse
import ast
import io
import subprocess
import tarfile
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "datasets", "model", "cli")
LONG_FUNCTION, LONGEST_FUNCTION, LONGEST_FILE, MOST_FILES = 60, 80, 450, 14
Graph = dict[str, set[str]]


def sources(root: Path = ROOT) -> list[Path]:
    return [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]


def module_name(path: Path, root: Path = ROOT) -> str:
    """The name that the file is imported by."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(("uniter", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def import_graph(root: Path = ROOT) -> Graph:
    """Of every module of the project those of the project that it imports anywhere, functions included."""
    modules = {module_name(path, root): path for path in sources(root)}
    graph: Graph = {}
    for module, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {
                    f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module for alias in node.names
                }
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[module] = (found & modules.keys()) - {module}
    return graph


def folder_arrows(root: Path = ROOT) -> Graph:
    """Of every folder the other folders whose files its files import."""
    folders = {module_name(path, root): path.parent.relative_to(root).as_posix() for path in sources(root)}
    doors = {module_name(path, root) for path in sources(root) if path.name == "__init__.py"}
    arrows: Graph = defaultdict(set)
    for module, imported in import_graph(root).items():
        if module not in doors:
            arrows[folders[module]] |= {folders[other] for other in imported} - {folders[module]}
    return dict(arrows)


def circles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that reach each other (strongly connected components of two or more), sorted."""
    reached = {node: _reached_from(graph, node) for node in graph}
    groups = {tuple(sorted({node} | {other for other in reached[node] if node in reached.get(other, set())})) for node in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def _reached_from(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in graph.get(waiting.pop(), set()) - seen:
            seen.add(node)
            waiting.append(node)
    return seen


def functions(root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """(lines from `def` to the end, "file:name") of every function, methods and inner functions included."""
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(root).as_posix()}:{node.name}"


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    told = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            told |= set(range(node.lineno, node.end_lineno + 1))
    lines = set()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - told)


def figures(root: Path) -> dict[str, int]:
    files = sources(root)
    lengths = [length for length, _ in functions(root)]
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    by_folder: dict[Path, int] = defaultdict(int)
    for path in files:
        by_folder[path.parent] += path.name != "__init__.py"
    arrows = folder_arrows(root)
    return {
        "files": len(files),
        "folders": len(by_folder),
        f"folders of more than {MOST_FILES} files": sum(count > MOST_FILES for count in by_folder.values()),
        "files of the fullest folder": max(by_folder.values()),
        "arrows between folders": sum(map(len, arrows.values())),
        "import circles between files": len(circles(import_graph(root))),
        f"functions over {LONGEST_FUNCTION} lines": sum(length > LONGEST_FUNCTION for length in lengths),
        f"functions over {LONG_FUNCTION} lines": sum(length > LONG_FUNCTION for length in lengths),
        "lines of the longest function": max(lengths),
        f"files over {LONGEST_FILE} lines": sum(size > LONGEST_FILE for size in sizes),
        "lines of the longest file": max(sizes),
        "lines of code": sum(map(code_lines, files)),
    }


def at_commit(commit: str, folder: Path) -> Path:
    """The tree of a commit, unpacked into `folder`."""
    packed = subprocess.run(["git", "archive", commit, *ROOMS], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="a commit to show beside this tree")
    parser.add_argument(
        "--long", action="store_true", help=f"list the functions over {LONG_FUNCTION} lines and the files over {LONGEST_FILE}"
    )
    options = parser.parse_args()
    now = figures(ROOT)
    before: dict[str, int] = {}
    if options.against:
        with tempfile.TemporaryDirectory() as folder:
            before = figures(at_commit(options.against, Path(folder)))
        print(f"{'':40}{options.against[:10]:>12}{'now':>12}")
    for name, value in now.items():
        print(f"{name:40}" + (f"{before[name]:12,}" if before else "") + f"{value:12,}")
    if options.long:
        for length, name in sorted(functions(), reverse=True):
            if length > LONG_FUNCTION:
                print(f"{length:5} {name}")
        for path in sources():
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE:
                print(f"{lines:5} {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
