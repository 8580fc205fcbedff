"""fla's layers as mixers. What needs fla runs in processes of its own, without a GPU in Triton's interpreter."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from mixerlab.mixers import MIXERS, build_mixer
from mixerlab.options import ConfigError

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
NAMES = re.findall(r'@register_mixer\("(\w+)"', (ROOT / "mixers" / "fla.py").read_text(encoding="utf-8"))


def run(*command, interpreted=True):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "helpers"), *sys.path])}
    if interpreted:
        environment["TRITON_F32_DEFAULT"] = "ieee"  # for the tolerance of the contract
        if not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_layer_is_found_by_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(NAMES) >= 10
    assert project["entry-points"]["mixerlab.mixers"] == dict.fromkeys(sorted(NAMES), "mixerlab.mixers.fla")


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    info = tmp_path / "layers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: layers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mixerlab.mixers]\ngla = mixerlab.mixers.fla\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.delitem(sys.modules, "mixerlab.mixers.fla", raising=False)
    assert "gla" in MIXERS.names()
    with pytest.raises(ConfigError) as caught:
        build_mixer({"name": "parallel", "mixers": ["gla", "identity"]}, 32)
    reason = "flash-linear-attention is not installed; expected it: pip install 'mixerlab[fla]'"
    assert str(caught.value) == f"mixer.mixers[0] = 'gla': {reason}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_keeps_the_contract_that_it_declares(name):
    run(HERE / "fla_contract.py", name)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "interpreted"), [("fla_layers.py", False), ("fla_recipes.py", True)])
def test_the_rest_of_them(file, interpreted):
    run("-m", "pytest", "-q", "-x", HERE / file, interpreted=interpreted)
