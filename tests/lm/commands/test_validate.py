"""Validating a run after it was trained."""

import json

from mixerlab.__main__ import main


def test_the_loss_of_the_end_is_found_again(finished, at_the_root, capsys):
    run, _ = finished
    result = json.loads((run / "result.json").read_text())
    assert main(["validate", str(run)]) == 0
    line = capsys.readouterr().out
    assert line.startswith("valid: ")
    for rate in ("loss", "perplexity", "accuracy", "bits_per_byte"):
        assert f"{rate.replace('_', ' ')} {result[f'valid/{rate}']:.4f}" in line


def test_fewer_batches_give_another_loss(finished, at_the_root, capsys):
    run, _ = finished
    outputs = []
    for arguments in ([], ["--batches", "1"], ["--batches", "1"]):
        assert main(["validate", str(run), *arguments]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1] == outputs[2]


def test_a_run_that_is_not_there_is_named(capsys):
    assert main(["validate", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "error: run folder nowhere: no such folder; expected runs/<recipe name>/<run>\n"
    )
