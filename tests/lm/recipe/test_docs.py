"""The generated page of keys is the one in the repository."""

from mixerlab.data import DATA
from mixerlab.lm.recipe.docs import recipes_markdown
from mixerlab.mixers import MIXERS
from tiny_runs import ROOT


def test_the_page_of_keys_is_up_to_date():
    page = ROOT / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == recipes_markdown(), "run: mixerlab keys > docs/recipes.md"


def test_every_mixer_and_data_module_has_a_section():
    text = recipes_markdown()
    for name in MIXERS.registered():
        assert f"## Mixer `{name}`\n" in text
    for name in DATA.registered():
        assert f"## Data `{name}`\n" in text
