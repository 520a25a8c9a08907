"""Each room of `fastvkd/` stands on its floor and imports only from floors below, late imports included."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. Rooms of one floor may import one another, but for those of `APART`.
FLOORS = (
    {"errors", "progress", "environment", "bounds"},
    {"methods", "settings", "options", "files", "devices", "paths", "records", "photos", "models"},
    {"data", "engines"},
    APART := {"unlearning", "evaluation", "reporting", "planning"},
    {"attacks"},
    {"demo"},
    {"cli", "train"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(source: str) -> set[str]:
    """The rooms of fastvkd that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fastvkd.")}
    return found & set(FLOOR_OF)


def refused(room: str, other: str) -> bool:
    return FLOOR_OF[other] > FLOOR_OF[room] or (room != other and {room, other} <= APART)


def modules() -> list[tuple[str, Path]]:
    package = ROOT / "fastvkd"
    files = [path for path in sorted(package.rglob("*.py")) if path != package / "__init__.py"]
    return [(path.relative_to(package).parts[0].removesuffix(".py"), path) for path in files]


def test_no_room_imports_from_a_floor_above_and_four_rooms_stand_apart() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for room, path in modules()
        for other in sorted(imports(path.read_text()))
        if refused(room, other)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_floor() -> None:
    assert {room for room, _ in modules()} == set(FLOOR_OF)


def test_the_rule_sees_what_it_forbids() -> None:
    """Each kind of import is read, so that the first test can fail."""
    late = "def f():\n    from fastvkd.unlearning.loop import unlearn\n"
    assert imports(late) == imports("import fastvkd.unlearning.loop") == imports("from fastvkd import unlearning")
    assert imports(late) == {"unlearning"}
    assert refused("evaluation", "unlearning") and refused("data", "attacks")
    assert not refused("attacks", "unlearning") and not refused("unlearning", "unlearning")


def test_kernels_import_nothing_of_ours() -> None:
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        assert not imports(path.read_text()), path
