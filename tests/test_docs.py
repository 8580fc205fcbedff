"""The mixer that docs/architecture.md shows keeps the contract and trains."""

import re
import sys
from pathlib import Path

import train
from mixers import build_mixer, registry
from mixers.testing import check_mixer

ROOT = Path(__file__).parents[1]


def test_the_mixer_shown_is_one(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(from dataclasses.*?)```", text, re.DOTALL)
    assert shown is not None
    (tmp_path / "mean_mixer.py").write_text(shown[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.chdir(ROOT)
    arguments = [
        "plugins=mean_mixer",
        "model.mixer=mean",
        "trainer.steps=2",
        f"logging.dir={tmp_path / 'runs'}",
    ]
    assert train.main(["tests/golden/tiny.yaml", *arguments, f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    check_mixer(lambda d_model: build_mixer("mean", d_model))
    sys.modules.pop("mean_mixer")
