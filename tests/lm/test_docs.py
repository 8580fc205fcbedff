"""The generated page of keys is the one in the repository."""

from mixerlab.lm.docs import PATH, recipes_markdown


def test_the_page_of_keys_is_up_to_date():
    assert PATH.read_text(encoding="utf-8") == recipes_markdown(), "run: python -m lm.docs"
