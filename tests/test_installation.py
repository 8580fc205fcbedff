"""What is installed is one package, mixerlab, with all that it needs, beside packages of any other name."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "kernels", "lm", "mixers")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(*command, cwd, **environment):
    environment = ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source, folder):
    """The wheel of a folder or an archive of source."""
    options = ("-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the package is made of, for building leaves files behind."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", "recipes", *FOLDERS):
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=left_out)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, tmp_path_factory.mktemp("wheel"))


def contents(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_has_one_name_and_every_file_under_it(wheel):
    files = {name for name in contents(wheel) if ".dist-info/" not in name}
    here = {
        f"mixerlab/{os.path.relpath(Path(folder, name), ROOT / 'src' / 'mixerlab')}"
        for folder, _, names in os.walk(ROOT / "src" / "mixerlab", followlinks=True)
        for name in names
        if name.endswith((".py", ".yaml", "py.typed"))
    }
    assert files == here
    assert {"mixerlab/py.typed", "mixerlab/recipes/quickstart.yaml", "mixerlab/lm/training/fit.py"} <= files
    (top_level,) = [name for name in contents(wheel) if name.endswith("/top_level.txt")]
    assert zipfile.ZipFile(wheel).read(top_level) == b"mixerlab\n"


@pytest.mark.slow
def test_the_wheel_of_the_source_archive_is_the_same(tree, wheel, tmp_path):
    run(
        sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})", cwd=tree
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    assert contents(build(archive, tmp_path)) == contents(wheel)


class Scratch:
    """An environment of its own that finds the libraries of the one the tests run in, below what it has itself."""

    def __init__(self, folder):
        venv.create(folder)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        (self.site,) = (path for path in folder.rglob("site-packages"))
        libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.site / "libraries.pth").write_text("\n".join(libraries))
        self.folder = folder

    def pip(self, *arguments):
        run(sys.executable, "-m", "pip", "--python", self.python, *arguments, cwd=self.folder)

    def install(self, wheel):
        self.pip("install", "-q", "--no-deps", "--force-reinstall", wheel)

    def files(self, name):
        return {path: path.read_bytes() for path in (self.site / name).rglob("*") if path.is_file()}

    def says(self, code):
        return run(self.python, "-c", code, cwd=self.folder).strip()


@pytest.fixture(scope="module")
def wheels(wheel, tmp_path_factory):
    """mixerlab, and a package with the name and place of Hugging Face's kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("WHOSE = 'of another'\n")
    (folder / "pyproject.toml").write_text('[project]\nname = "kernels"\nversion = "1"\n')
    return {"mixerlab": wheel, "kernels": build(folder, folder)}


IMPORTS = {
    "mixerlab": "import mixerlab.kernels.feedback as f; print(f.__name__)",
    "kernels": "import kernels; print(kernels.WHOSE)",
}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("kernels", "mixerlab"), ("mixerlab", "kernels")])
def test_another_package_called_kernels_lives_beside_it(wheels, first, second, tmp_path):
    scratch = Scratch(tmp_path)
    scratch.install(wheels[first])
    scratch.install(wheels[second])
    both = scratch.says("; ".join(IMPORTS.values())).splitlines()
    assert both == ["mixerlab.kernels.feedback", "of another"]
    before = scratch.files(second)
    scratch.pip("uninstall", "-qy", first)
    assert not scratch.files(first)
    assert scratch.files(second) == before
    assert scratch.says(IMPORTS[second])


@pytest.mark.slow
def test_commands_work_in_a_folder_with_packages_of_the_same_names(wheels, tmp_path):
    scratch = Scratch(tmp_path / "scratch")
    scratch.install(wheels["mixerlab"])
    mine = tmp_path / "mine"
    for name in FOLDERS:
        (mine / name).mkdir(parents=True)
        (mine / name / "__init__.py").write_text("raise RuntimeError('not that of mixerlab')")
    command = scratch.bin / "mixerlab"
    assert run(command, "--help", cwd=mine).startswith("usage: mixerlab VERB")
    assert "d_model" in run(command, "describe", "quickstart", cwd=mine)
    offered = "from mixerlab.mixers import MIXERS as m; print('gla' in m.names(), 'gla' in m.registered())"
    assert scratch.says(offered) == "True False", "fla's layers are known and not yet imported"
    module = (scratch.python, "-P", "-m", "mixerlab")
    assert run(*module, "train", "quickstart", "--print-config", cwd=mine).startswith("name: quickstart\n")
    assert run(
        scratch.python, "-P", "-c", "import mixerlab; print(mixerlab.__path__[0])", cwd=mine
    ).startswith(str(scratch.site))


def test_train_py_offers_no_packages_but_mixerlab(tmp_path):
    """transformers looks for a package called kernels, and the repository's own folder is not one."""
    (tmp_path / "probe.py").write_text(
        "from importlib.util import find_spec\n"
        "from transformers import MambaForCausalLM\n"
        f"print('#', [spec.origin for spec in map(find_spec, {FOLDERS}) if spec])\n"
    )
    command = ("train.py", "recipes/quickstart.yaml", "--print-config", "plugins=probe")
    found, first, *_ = run(sys.executable, *command, cwd=ROOT, PYTHONPATH=str(tmp_path)).splitlines()
    assert not {str(ROOT / name / "__init__.py") for name in FOLDERS} & {*ast.literal_eval(found[2:])}
    assert first == "name: quickstart"


OPTIONAL = {"mamba_ssm", "fla", "transformers", "lm_eval", "tqdm", "wandb"}
"""What is used where it is installed, and not asked for; tqdm comes with lm_eval."""


def imported(*places):
    """Top-level name -> the files that import it."""
    found: dict[str, set[str]] = {}
    for place in places:
        for path in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for name in names:
                    found.setdefault(name.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}  # some use each other
    own = {"mixerlab", "benchmarks", "gpu", "train"} | helpers | scripts
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | own}


def declared(*extras):
    """The distributions that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {normal(re.split(r"[^\w.-]", line)[0]) for lines in lists for line in lines}


def normal(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize(
    ("places", "extras"),
    [
        pytest.param(("src", *FOLDERS), (), id="the package"),
        pytest.param(("train.py", "benchmarks", "tests"), ("dev",), id="what develops it"),
    ],
)
def test_whatever_is_imported_is_declared(places, extras):
    provided = packages_distributions()
    undeclared = {
        name: files
        for name, files in imported(*places).items()
        if name not in OPTIONAL and not {*map(normal, provided.get(name, ()))} & declared(*extras)
    }
    assert not undeclared


def test_whatever_is_declared_is_imported():
    provided = packages_distributions()
    used = {normal(dist) for name in imported("src", *FOLDERS) for dist in provided.get(name, ())}
    assert declared() - used <= {"tensorboard"}  # by way of torch.utils.tensorboard
