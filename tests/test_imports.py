"""Imports point one way, and everything below Detectron2 imports without it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mfuser_d2"

# Bottom first. A module may import its own room and the rooms of earlier lines, nothing else of the package. Rooms that
# are not listed are built on the segmenter: they may import all of these, and none of these may import them.
CORE_ORDER = [
    {"ops", "attention", "position_encoding", "key_map", "checkpoint_file", "optim"},
    {"encoders", "adapters"},
    {"dual_encoder", "feature_pyramid", "mt_enhancer"},
    {"single_encoder"},
    {"probe"},
    {"backbone"},
    {"pixel_decoder", "transformer_decoder"},
    {"new_classes"},
    {"text_query_head"},
    {"criterion", "inference"},
    {"strips"},
    {"segmenter"},
    {"export"},
    {"factory", "checkpoint", "official"},
    {"ema", "analysis"},
]
RANK = {room: rank for rank, rooms in enumerate(CORE_ORDER) for room in rooms}
TOP = len(CORE_ORDER)

# Rooms outside core: what each may import of the package besides itself.
MAY_IMPORT = {
    "data": {"visualization"},
    "evaluation": {"data", "visualization"},
    "visualization": {"data"},
    "d2": {"core", "data", "evaluation", "visualization"},
}

IMPORT_ALL = '''
import importlib, pkgutil, sys

class Without:
    """A finder that knows nothing of Detectron2, as on a machine where it is not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {"detectron2", "fvcore", "iopath"}
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

def no_network(event, args):
    if event in {"socket.connect", "socket.getaddrinfo"}:
        raise RuntimeError(f"network access at import: {event} {args[1:]}")

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.addaudithook(no_network)
for root in sys.argv[1:]:
    package = importlib.import_module(root)
    inside = getattr(package, "__path__", []) if "." in root else []
    for module in pkgutil.walk_packages(inside, root + "."):
        # The compiled scan lies among them; it is a library of operators, not a module.
        if module.module_finder.find_spec(module.name).origin.endswith(".py"):
            importlib.import_module(module.name)
    print(root)
'''


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import of a file, wherever in the file it stands."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def core_room(name: str) -> str | None:
    """ "ops" of "mfuser_d2.core.ops.grid"; None outside core and for core itself."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["mfuser_d2", "core"] and len(parts) > 2 else None


def package_room(name: str) -> str | None:
    """ "data" of "mfuser_d2.data.labels"; None for other packages and for mfuser_d2 itself."""
    parts = name.split(".")
    is_room = parts[0] == "mfuser_d2" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
    return parts[1] if is_room else None


def core_files() -> list[Path]:
    return sorted((PACKAGE / "core").rglob("*.py"))


def test_imports_within_core_point_one_way() -> None:
    wrong = []
    for path in core_files():
        room = core_room(module_name(path))
        highest = RANK[room] - 1 if room in RANK else TOP
        for line, name in imported_names(path):
            other = core_room(name)
            if room and other and other != room and RANK.get(other, TOP) > highest:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_core_imports_no_other_room_and_nothing_of_detectron2() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in core_files()
        for line, name in imported_names(path)
        if package_room(name) not in (None, "core") or name.split(".")[0] in {"detectron2", "fvcore", "iopath"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_other_rooms_import_only_what_they_may(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for line, name in imported_names(path)
        if package_room(name) not in {None, room} | MAY_IMPORT[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_imports_neither_tools_nor_tests() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"tools", "tests"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name in imported_names(path)
        if name.split(".")[0] in tools
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "names",
    [
        ["mfuser_d2"],
        ["mfuser_d2.core"],
        ["mfuser_d2.data.labels", "mfuser_d2.data.streets"],
        ["mfuser_d2.evaluation.table", "mfuser_d2.visualization"],
    ],
    ids=lambda names: names[0],
)
def test_imports_without_detectron2_and_without_network(names: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names


def test_importing_the_package_brings_no_torch() -> None:
    code = "import sys, mfuser_d2; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
