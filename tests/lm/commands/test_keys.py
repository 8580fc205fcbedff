"""The list of all keys on the command line."""

from mixerlab.__main__ import main
from mixerlab.lm.recipe.docs import recipes_markdown


def test_the_keys_are_printed_as_markdown(capsys):
    assert main(["keys"]) == 0
    out = capsys.readouterr().out
    assert out == recipes_markdown()
    assert "| `trainer.batch_size` | an integer ≥ 1 | `16` | rows per device and micro-batch |" in out
