"""Who may import whom: rooms in one order, no circles between files."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"sd_perf": ROOT / "sd_perf", "sd_kernels": ROOT / "kernels/sd_kernels"}
ORDER = (
    "cpu_settings",
    "errors",
    "visible",
    "commands",
    "stopping",
    "children",
    "console",
    "memory",
    "drafts",
    "files",
    "torch_files",
    "optional",
    "config",
    "presets",
    "fetch",
    "diffusion",
    "reference",
    "fast",
    "distributed",
    "runs",
    "sinks",
    "models",
    "data",
    "mlperf",
    "evaluation",
    "training",
    "cluster",
    "tools",
    "cli",
    "__main__",
)
"""rooms of sd_perf and the files beside them; each imports only from those before it"""


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Modules of these packages that a file imports, wherever in it, for types alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module or "" for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {
    name: {other for other in imports(path) if other in MODULES and other != name}
    for name, path in MODULES.items()
}


def room(module: str) -> str:
    """`fast` of sd_perf.fast.unet; `config` of sd_perf.config."""
    return module.split(".")[1] if "." in module else ""


def test_what_is_imported_is_there() -> None:
    """mypy passes over a module that is missing, and a command imports its own when it runs."""
    for name, path in MODULES.items():
        for other in imports(path):
            if other.partition(".")[0] in FOLDERS:
                assert other in MODULES, f"{name} imports {other}"


@pytest.mark.parametrize("module", sorted(name for name in GRAPH if name.startswith("sd_perf.")))
def test_a_room_imports_those_before_it(module: str) -> None:
    place = ORDER.index(room(module))
    for other in GRAPH[module]:
        if other.startswith("sd_perf.") and room(other) != room(module):
            assert ORDER.index(room(other)) < place, f"{module} imports {other}"


def test_only_the_command_line_imports_tools() -> None:
    users = {
        room(name) for name, others in GRAPH.items() if any(room(o) == "tools" for o in others)
    }
    assert users <= {"cli", "tools"}


def test_tools_do_not_import_each_other() -> None:
    """What two tools share lies beside them, in sd_perf/tools itself."""

    def tool(module: str) -> str:
        parts = module.split(".")
        return parts[2] if parts[:2] == ["sd_perf", "tools"] and len(parts) > 3 else ""

    for module, others in GRAPH.items():
        for other in others:
            assert not tool(module) or tool(other) in ("", tool(module)), f"{module}: {other}"


def test_kernels_know_nothing_of_the_trainer() -> None:
    for module, others in GRAPH.items():
        if module.startswith("sd_kernels"):
            assert not any(other.startswith("sd_perf") for other in others), module


def test_no_files_import_each_other_in_a_circle() -> None:
    # A package's __init__ counts only where it is imported by name: sd_kernels' op folders hold
    # their spec there, and their kernels do not import it.
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # CycleError names the circle
