"""docs/sweeps.md: its command and its recipe are right ones."""

import shlex

from mixerlab.lm.sweep.plan import plan
from pages import Page

PAGE = Page("sweeps.md")


def test_the_command_shown_makes_the_runs_it_says():
    command, report = PAGE.all_shown("bash")[0].splitlines()
    _, _, source, *overrides = shlex.split(command)
    planned = plan(source, overrides)
    assert f"here {' x '.join(('3', '3', '2'))} runs" in PAGE.text
    assert len(planned) == 18
    assert report == f"mixerlab report runs/{planned[0][1].name}"


def test_the_recipe_shown_makes_the_runs_it_says(tmp_path):
    recipe = tmp_path / "compare.yaml"
    recipe.write_text(PAGE.shown("yaml"))
    planned = plan(str(recipe), [])
    assert len(planned) == 18
    assert all(0.97e6 < point.parameters < 1.03e6 for point, _ in planned)
    assert {point.values["seed"] for point, _ in plan(str(recipe), ["seed=0"])} == {"0"}
