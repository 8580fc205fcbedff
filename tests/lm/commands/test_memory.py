"""mixerlab memory: what it prints and writes for runs and recipes, and what it says to wrong input."""

import re

import pandas as pd
import torch

from mixerlab.__main__ import main
from mixerlab.mixers import MIXERS
from mixerlab.mixers.identity import Identity, IdentityConfig
from tiny_runs import TINY, places

QUICK = ["--sequences", "2", "--seeds", "1", "--projections", "2"]


def memory(*arguments):
    return main(["memory", *map(str, arguments)])


def pictures(folder):
    return sorted(path.stem for path in folder.glob("*.png"))


def test_a_run_is_measured_on_its_validation_text_into_its_folder(finished, at_the_root, capsys, tmp_path):
    run, _ = finished
    assert memory(run, *QUICK, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "its validation text" in said
    assert re.search(r"layer 1 \w+, routing held: ", said)
    assert "decoder's Jacobian: " in said
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert (curves["mean"] > 0).all()
    assert (curves["low"] <= curves["high"]).all()
    assert {"exponent", "half_life", "named"} <= set(pd.read_csv(tmp_path / "fits.csv").columns)
    assert "influence" in pictures(tmp_path)
    assert any(name.endswith("-map") for name in pictures(tmp_path))


def test_the_page_needs_nothing_beside_it(at_the_root, tmp_path, capsys):
    assert memory(TINY, *places(tmp_path), *QUICK, "--out", tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    references = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert references
    assert all(reference.startswith("data:") for reference in references)
    for name in pictures(tmp_path):
        assert f'alt="{name}"' in page
    assert 'download="curves.csv"' in page


def test_mixers_stand_side_by_side_and_without_data(at_the_root, tmp_path, capsys):
    nowhere = f"data.cache_dir={tmp_path / 'nowhere'}"
    options = [*QUICK, "--length", "32", "--out", tmp_path, "--measure", "routing"]
    assert memory(TINY, "--mixers", "sessa", "mamba2", nowhere, *options) == 0
    said = capsys.readouterr().out
    assert "tiny sessa (2 x 32 tokens: random tokens)" in said
    assert "tiny mamba2 (" in said
    assert "Jacobian" not in said
    assert not (tmp_path / "nowhere").exists()


def test_a_text_is_shown_with_its_tokens(finished, at_the_root, tmp_path, capsys):
    run, _ = finished
    text = tmp_path / "text.txt"
    text.write_text("It costs $5 or $6,\n\tif anything at all. " * 8)
    assert memory(run, "--text", text, *QUICK, "--out", tmp_path / "out") == 0
    assert "a text given" in capsys.readouterr().out
    shown = next((tmp_path / "out").glob("*attention.csv"))
    words = pd.read_csv(shown, index_col=0).index
    assert "".join(map(str, words)).startswith("It␣costs␣$5")


def test_two_tokens_are_enough_to_measure_and_too_few_to_fit(at_the_root, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("ab")
    options = [*QUICK, "--text", text, "--out", tmp_path / "out"]
    assert memory(TINY, *places(tmp_path), *options) == 0
    said = capsys.readouterr().out
    assert "(1 x 2 tokens: a text given)" in said
    assert "no law named (only 0 points on the tail" in said
    assert pd.read_csv(tmp_path / "out" / "curves.csv")["lag"].max() == 1


def test_a_mixer_without_routing_to_hold_is_measured_by_its_jacobian(
    at_the_root, tmp_path, capsys, monkeypatch
):
    class Opaque(Identity):
        def mix_fixed(self, x, values, segment_ids=None):
            return None

    monkeypatch.setitem(MIXERS._entries, "opaque", (IdentityConfig, Opaque))
    options = [TINY, "--mixers", "opaque", *QUICK, "--length", "16", "--out", tmp_path]
    assert memory(*options) == 0
    assert "no routing to hold: layer 1 opaque" in capsys.readouterr().out
    assert memory(*options, "--measure", "routing") == 2
    error = capsys.readouterr().err
    assert "--measure blocks decoder works for every mixer" in error
    assert error.count("\n") == 1


def test_wrong_input_gets_one_line_that_says_what_works(finished, at_the_root, tmp_path, capsys):
    run, _ = finished
    short, binary, empty = (tmp_path / f"{name}.txt" for name in ("short", "binary", "empty"))
    short.write_text("a")
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\xff")
    wrong = {
        "no such run folder or recipe": [run.parent / "none"],
        "it has 1 token; expected at least two": [run, "--text", short],
        "it has 0 tokens; expected at least two": [run, "--text", empty],
        "No such file": [run, "--text", tmp_path / "none.txt"],
        "it is not UTF-8": [run, "--text", binary],
        "overrides and --mixers are for recipes": [run, "--mixers", "sessa"],
        "model.mixer": [TINY, "--mixers", "mambo"],
    }
    for expected, arguments in wrong.items():
        assert memory(*arguments) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1, error


def test_the_default_folder_is_that_of_the_run(finished, at_the_root, capsys):
    run, _ = finished
    assert memory(run, *QUICK, "--measure", "routing") == 0
    assert (run / "memory" / "report.html").is_file()
    assert not torch.is_inference_mode_enabled()
