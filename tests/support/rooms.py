"""The rooms of the house and which way their imports may point."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Which rooms each room may import from, itself included. One direction: train.py -> bridge -> optimizer -> kernels.
# The method (surgery, dual, retention, config) stands below the optimizer and imports nothing of ours but itself.
ROOMS = {
    "train": {"bridge"},
    "bridge": {"bridge", "package", "optimizer", "method"},
    "package": {"optimizer", "method"},
    "optimizer": {"optimizer", "kernels", "method"},
    "method": {"method"},
    "kernels": {"kernels"},
}
METHOD = {"surgery", "dual", "retention", "config", "scalars"}

# Installed packages that a room may use besides the standard library; None: whatever it likes.
LIBRARIES: dict[str, set[str] | None] = {
    "train": set(),
    "bridge": None,
    "package": {"torch"},
    "optimizer": {"torch", "jaxtyping", "numpy"},
    "method": {"torch", "jaxtyping"},
    "kernels": {"torch", "triton", "numba", "llvmlite", "numpy"},
}


def module_name(path: str) -> str:
    """``craft_opt/surgery.py`` -> ``craft_opt.surgery``; the folder kernels/ is installed as craft_opt.kernels."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "craft_opt")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def room_of(module: str) -> str | None:
    """The room of one of our modules; None for everybody else's."""
    parts = module.split(".")
    if parts == ["train"]:
        return "train"
    if parts[0] != "craft_opt":
        return None
    if len(parts) == 1:
        return "package"
    if parts[1] in ("bridge", "optimizer", "kernels"):
        return parts[1]
    if parts[1] in METHOD:
        return "method"
    raise AssertionError(f"{module} stands in no room: give it one in tests/support/rooms.py")


def source_files() -> list[str]:
    """Every Python file of the house, relative to the root."""
    folders = [p for folder in ("craft_opt", "kernels") for p in (ROOT / folder).rglob("*.py")]
    return sorted(str(p.relative_to(ROOT)) for p in [*folders, ROOT / "train.py"] if "__pycache__" not in p.parts)


def _is_ours(module: str) -> bool:
    """Whether a dotted name is a module of craft_opt rather than a name inside one."""
    path = ROOT.joinpath(*module.split("."))
    return module == "craft_opt.kernels" or path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports: at the top, in functions, under TYPE_CHECKING, by string."""
    package = module_name(path).split(".")
    if Path(path).name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from craft_opt import surgery` takes a module, `from craft_opt import CraftConfig` a name.
                yield node.lineno, full if base.startswith("craft_opt") and _is_ours(full) else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def wrong_arrows(path: str, source: str) -> list[str]:
    """What a file imports against the rules; each entry names file, line, import and rule."""
    room = room_of(module_name(path))
    assert room is not None, f"{path} is not part of the house"
    found = []
    for line, name in imports(path, source):
        top = name.split(".")[0]
        target = room_of(name)
        where = f"{path}:{line} imports {name}"
        if top == "kernels":
            found.append(f"{where}: the folder kernels/ is imported as craft_opt.kernels only")
        elif target is not None:
            if target not in ROOMS[room]:
                found.append(f"{where}: {room} may import from {', '.join(sorted(ROOMS[room]))}, not from {target}")
        elif top not in sys.stdlib_module_names:
            allowed = LIBRARIES[room]
            if allowed is not None and top not in allowed:
                found.append(f"{where}: {room} may use {', '.join(sorted(allowed)) or 'the standard library only'}")
    return found
