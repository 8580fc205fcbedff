"""Who may import whom: the layers of the package, the rooms of lm, and no circle anywhere."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tiny_runs import ROOT

PACKAGE = {
    **{folder: ROOT / folder for folder in ("kernels", "data", "mixers", "lm")},
    "": ROOT / "src" / "mixerlab",
}

ROOMS = {
    "recipe": (),
    "model": ("recipe",),
    "run": ("recipe", "model"),
    "memory": ("recipe", "model", "run"),
    "attribution": ("model", "memory"),
    "parallel": ("recipe", "model", "run"),
    "exchange": ("recipe", "model", "run"),
    "training": ("recipe", "model", "run", "memory", "parallel"),
    "evaluation": ("recipe", "model", "run", "parallel"),
    "sweep": ("recipe", "model", "run", "parallel", "training"),
    "commands": (
        *("recipe", "model", "run", "memory", "attribution", "parallel", "exchange", "training"),
        *("evaluation", "sweep"),
    ),
}
"""Of lm, in order: what each may import beside itself."""

MAY_IMPORT = {
    "options": (),
    "sealed": (),
    "kernels": ("kernels",),
    "data": ("data", "options", "sealed"),
    "mixers": ("mixers", "kernels", "options"),
    "lm": ("lm", "data", "mixers", "kernels", "options", "sealed"),
}
"""Of the package: the parts of it that each may import."""

LONGEST = 350


def modules():
    """Name -> source file of every module of the package."""
    found = {}
    for folder, path in PACKAGE.items():
        for file in sorted(path.rglob("*.py") if folder else path.glob("*.py")):
            parts = [folder, *file.relative_to(path).with_suffix("").parts]
            found[".".join(["mixerlab", *(part for part in parts if part and part != "__init__")])] = file
    return found


MODULES = modules()


def imports(name, inside_functions=True):
    """The modules that a module takes something from; what is for the type checker alone does not count."""
    is_package = MODULES[name].name == "__init__.py"
    waiting = list(ast.parse(MODULES[name].read_text(encoding="utf-8")).body)
    found = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -(node.level - is_package) or None] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            modules_inside = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= modules_inside if len(modules_inside) == len(node.names) else {source, *modules_inside}
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return found - {name}


def part(name):
    """The part of the package that a module belongs to; "" for its root."""
    return name.split(".")[1] if "." in name else ""


def test_the_imports_are_read():
    assert len(MODULES) > 60
    assert "mixerlab.options" in imports("mixerlab.lm.recipe.load")
    assert "mixerlab.lm.training.fit" in imports("mixerlab.lm.commands.train")
    assert "mixerlab.lm.training.fit" not in imports("mixerlab.lm.commands.train", inside_functions=False)
    assert "mixerlab.lm.recipe.load" not in imports("mixerlab"), "for the type checker alone"


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_parts_import_only_what_lies_below_them(layer):
    wrong = {
        (name, imported)
        for name in MODULES
        if part(name) == layer
        for imported in imports(name)
        if imported.split(".")[0] == "mixerlab" and part(imported) not in ("", *MAY_IMPORT[layer])
    }
    assert wrong == set()


def test_nobody_takes_what_the_root_of_the_package_offers():
    assert {name for name in MODULES if "mixerlab" in imports(name)} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_lm_are_imported_one_way(room):
    def room_of(name):
        parts = name.split(".")
        return parts[2] if parts[:2] == ["mixerlab", "lm"] and len(parts) > 2 else None

    assert set(ROOMS) == {
        path.name for path in (ROOT / "lm").iterdir() if path.is_dir() and path.name[0] != "_"
    }
    wrong = {
        (name, imported)
        for name in MODULES
        if room_of(name) == room
        for imported in imports(name)
        if room_of(imported) not in (None, room, *ROOMS[room])
    }
    assert wrong == set()


def test_no_module_imports_itself_by_way_of_others():
    def counts_functions(name):
        """Commands import what they need when they run, and so does the root."""
        return part(name) not in ("", "__main__") and not name.startswith("mixerlab.lm.commands")

    graph = {name: imports(name, counts_functions(name)) & MODULES.keys() for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_nothing_imports_the_folders_by_their_bare_names_or_what_is_not_installed():
    strangers = {"lm", "data", "mixers", "kernels", "recipes", "tests", "benchmarks", "train", "src"}
    wrong = {(name, i) for name in MODULES for i in imports(name) if i.split(".")[0] in strangers}
    assert wrong == set()


def test_no_file_of_lm_is_long():
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "lm").rglob("*.py")
    }
    assert {path.name: length for path, length in lengths.items() if length > LONGEST} == {}
