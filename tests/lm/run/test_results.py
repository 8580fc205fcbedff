"""Folders for people: what is said where one cannot be written."""

import pytest

from mixerlab.lm.run.results import results_in
from mixerlab.options import ConfigError


@pytest.mark.parametrize(("options", "named"), [([], "--out"), (["--to"], "--to")])
def test_the_folder_is_named_by_its_option_with_the_reason(tmp_path, options, named):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "in"
    with pytest.raises(ConfigError) as caught, results_in(folder, *options):
        pass
    expected = f"{named} {folder}: it cannot be written: Not a directory; expected a folder that can be"
    assert str(caught.value) == expected


def test_so_is_a_file_in_it_that_cannot_be_written(tmp_path):
    (tmp_path / "page.html").mkdir()
    said = r"^--out \S*page\.html: it cannot be written: Is a directory"
    with pytest.raises(ConfigError, match=said), results_in(tmp_path):
        (tmp_path / "page.html").write_text("")
