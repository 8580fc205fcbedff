"""mixerlab attribute: what it prints and writes, and what it says to wrong input."""

import math
import re

import pandas as pd
import pytest
import torch

from mixerlab.__main__ import main
from mixerlab.lm.model.decoder import build_decoder
from tiny_runs import TINY, run_dirs, train
from untrained_runs import ATTENTION, MAMBA, MAMBA2, untrained


def attribute(*arguments):
    return main(["attribute", *map(str, arguments)])


@pytest.fixture
def mamba(tmp_path, options):
    """A run of Mamba, of two steps."""
    assert train(TINY, "model.mixer=mamba", "trainer.steps=2", "logging.sample_tokens=0", *options) == 0
    return run_dirs(tmp_path)[0]


def test_a_text_is_explained_by_all_methods_that_fit(finished, capsys, tmp_path):
    run, _ = finished
    assert attribute(run, "--text", "some text", "--steps", "8", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert re.match(r"What counted for .*, the likeliest after token 8\n", said)
    assert "\ngradient times input\n" in said
    assert "\nintegrated gradients\n" in said
    assert "\nlayer 2 sessa, influence on the last position, routing held\n" in said
    assert "MambaLRP" not in said
    assert said.count("\nsome text\n") == 4, "once for each passage"
    assert said.count("red: for the token; blue: against it") == 2
    assert said.count("the redder, the more of it reaches the last position") == 2
    assert "\x1b" not in said, "no colours where there is no terminal"
    table = pd.read_csv(tmp_path / "attribution.csv", keep_default_na=False)
    assert set(table.groupby("passage").size()) == {9}
    assert "layer 1 sessa, hops: 1" in set(table["passage"])
    assert "<h2>layer 1 sessa, hops: 1</h2>" in (tmp_path / "attribution.html").read_text()


def test_relevance_of_mamba_adds_up_to_the_score(mamba, capsys, tmp_path):
    assert attribute(mamba, "--text", "some text", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    found = re.search(
        r"relevance by MambaLRP\nscore (\S+): tokens (\S+), the biases (\S+), missing (\S+)\n", said
    )
    score, tokens, biases, missing = map(float, found.groups())
    assert tokens + biases == pytest.approx(score, abs=2e-3 * max(abs(tokens), abs(biases)))
    assert abs(missing) < 1e-10
    assert "sessa" not in said


def test_the_token_explained_is_chosen_by_its_place_or_its_text(finished, capsys, tmp_path):
    run, _ = finished
    options = [run, "--text", "some text", "--method", "gradient", "--out", tmp_path]
    assert attribute(*options, "--at", "3") == 0
    assert "What counted for ' ', in the text after token 3\n" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "attribution.csv", keep_default_na=False)) == 4
    assert attribute(*options, "--target", "s") == 0
    assert "What counted for 's', asked for after token 8\n" in capsys.readouterr().out


def test_the_default_folder_is_in_the_run(mamba, capsys):
    assert attribute(mamba, "--text", "ab", "--method", "gradient") == 0
    assert (mamba / "attribution" / "attribution.html").is_file()


def test_faithfulness_is_told_of_every_method_that_gives_relevance(mamba, at_the_root, capsys):
    assert attribute(mamba, "--faithfulness", "8", "--steps", "2") == 0
    said = capsys.readouterr().out
    assert "(8 x 64 tokens: its validation text)" in said
    for name in ("gradient times input", "integrated gradients", "relevance by MambaLRP"):
        assert re.search(rf"\n  {name}: \S+ for the most relevant, \S+ for random ones; difference ", said)


def test_wrong_input_gets_one_line_that_says_what_works(finished, at_the_root, tmp_path, capsys):
    run, _ = finished
    text = ["--text", "some text"]
    wrong = {
        "no such folder": [run.parent / "none", *text],
        "it has 1 token; expected 2 to 2048": [run, "--text", "a"],
        "it has 0 tokens; expected 2 to 2048": [run, "--text", ""],
        "it has 3000 tokens; expected 2 to 2048": [run, "--text", "a" * 3000],
        "--at 9: the text has 9 tokens; expected 0 to 8": [run, *text, "--at", "9"],
        "--at -1: ": [run, *text, "--at", "-1"],
        "--target 'ab': it is 2 tokens ('a', 'b'); expected one": [run, *text, "--target", "ab"],
        "its rules are Mamba's, and the run has sessa; expected": [run, *text, "--method", "lrp"],
        "--at: it is for --text": [run, "--faithfulness", "--at", "3"],
        "with --faithfulness expected gradient, integrated or lrp": [
            *(run, "--faithfulness", "--method", "paths"),
        ],
    }
    for expected, arguments in wrong.items():
        assert attribute(*arguments) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1, error


def refusal(capsys, *arguments):
    """What is said, which is one line."""
    assert attribute(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_paths_need_feedback(mamba, capsys):
    error = refusal(capsys, mamba, "--text", "some text", "--method", "paths")
    assert "no layer of Sessa with feedback" in error


def test_bytes_that_are_no_text_are_refused(finished, capsys):
    run, _ = finished
    assert "--text 'a\\udcff': it is not UTF-8; expected text" in refusal(capsys, run, "--text", "a\udcff")
    options = ["--text", "ab", "--target", "\udcff"]
    assert "--target '\\udcff': it is not UTF-8; expected text" in refusal(capsys, run, *options)


def test_more_steps_than_memory_has_room_for_are_refused(capsys):
    with pytest.raises(SystemExit):
        attribute("run", "--text", "ab", "--steps", "2000000")
    assert "--steps: 2000000: expected at least 2 and at most 4096" in capsys.readouterr().err


def test_decoders_that_nothing_can_be_said_of_are_refused(tmp_path, capsys):
    small = untrained(tmp_path / "small", {"mixer": ATTENTION}, rows=200)
    worst = untrained(
        tmp_path / "nan", {"mixer": ATTENTION}, change=lambda d: d.norm.weight[3].fill_(math.nan)
    )
    for asked in (["--text", "ab"], ["--faithfulness"]):
        error = refusal(capsys, small.path, *asked)
        assert "its tokenizer has 257 tokens, and its decoder 200; they are of different runs" in error
        error = refusal(capsys, worst.path, *asked)
        assert f"--checkpoint last: not all weights of {worst.path} are finite there" in error


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(finished, capsys, tmp_path):
    run, _ = finished
    (tmp_path / "file").write_text("")
    for folder, reason in {"file": "File exists", "file/in": "Not a directory"}.items():
        error = refusal(capsys, run, "--text", "ab", "--out", tmp_path / folder)
        assert f"--out {tmp_path / folder}: it cannot be written: {reason}; expected a folder" in error


@pytest.mark.parametrize(
    "mixer",
    [
        {**MAMBA, "backend": "triton"},
        {"name": "parallel", "mixers": [ATTENTION, {**MAMBA2, "backend": "mamba_ssm"}]},
    ],
    ids=lambda mixer: mixer["name"],
)
def test_a_run_trained_by_kernels_of_a_gpu_is_explained_without_one(mixer, tmp_path, capsys):
    run = untrained(tmp_path, {"mixer": mixer, "mlp": "none"})
    with pytest.raises(ValueError, match="cannot take this input"):
        build_decoder(run.recipe, 257)(torch.tensor([[1, 2]]))
    assert attribute(run.path, "--text", "ab", "--method", "gradient", "--device", "cpu") == 0


def test_integrated_gradients_that_lack_much_come_with_a_warning(tmp_path, capsys):
    def sharp(decoder):
        decoder.embedding.weight.mul_(20)

    run = untrained(tmp_path, {"mixer": ATTENTION}, change=sharp)
    options = [run.path, "--text", "some text", "--method", "integrated"]
    asked = "warning: what is missing is more than 1% of what the tokens should add up to"
    assert attribute(*options, "--steps", "2") == 0
    assert f"{asked}, so do not trust them; expected a larger --steps than 2\n" in capsys.readouterr().out
    html = run.path / "attribution" / "attribution.html"
    assert "Warning: what is missing" in html.read_text(encoding="utf-8")
    assert attribute(*options, "--steps", "512") == 0
    assert "warning" not in capsys.readouterr().out
    assert "Warning" not in html.read_text(encoding="utf-8")


def test_a_character_of_several_tokens_is_shown_whole_but_in_the_table(tmp_path, capsys):
    run = untrained(tmp_path, {"mixer": ATTENTION})
    assert attribute(run.path, "--text", "hé!", "--method", "gradient", "--at", "2") == 0
    said = capsys.readouterr().out
    assert "What counted for '!', in the text after token 2\n" in said
    assert "\nhé\n" in said
    assert "'é' at 1: " in said
    table = pd.read_csv(run.path / "attribution" / "attribution.csv", keep_default_na=False)
    assert list(table["token"]) == ["h", "\\xc3", "\\xa9"]
    assert attribute(run.path, "--text", "hé!", "--method", "gradient", "--at", "0") == 0
    assert "What counted for '\\xc3', in the text after token 0\n" in capsys.readouterr().out
    error = refusal(capsys, run.path, "--text", "hé!", "--target", "é")
    assert "--target 'é': it is 2 tokens ('\\xc3', '\\xa9'); expected one\n" in error


def test_mixers_are_named_as_in_the_recipe(tmp_path, capsys):
    run = untrained(tmp_path, {"mixer": [MAMBA, "gated_deltanet"], "block": "gated"})
    error = refusal(capsys, run.path, "--text", "ab", "--method", "lrp")
    assert "and the run has gated_deltanet; expected" in error


def test_too_few_rows_for_an_interval_are_refused(capsys):
    with pytest.raises(SystemExit):
        attribute("run", "--faithfulness", "7")
    assert "7: expected at least 8" in capsys.readouterr().err
