"""Generating text from a run on the command line."""

import shutil

import pytest

from mixerlab.lm.run.folder import Run
from tiny_runs import generate


def test_text_is_generated_from_the_run_folder(finished, capsys):
    run, _ = finished
    arguments = [run, "--prompt", "License", "--prompt", "a", "--max-new-tokens", "12", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert generate(*arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "--- prompt 1 of 2\nLicense" in texts[0]
    assert "--- prompt 2 of 2\na" in texts[0]
    assert generate(run, "--checkpoint", "best", "--max-new-tokens", "3") == 0


def test_generating_from_a_checkpoint_that_was_never_written_says_so(finished, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000020")  # the other one was not validated
    assert generate(run, "--checkpoint", "best") == 2
    assert "none was validated; that run has checkpoints of steps 15\n" in capsys.readouterr().err
    assert generate(run, "--checkpoint", "7") == 2
    assert "no such checkpoint; that run has checkpoints of steps 15\n" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated", "no folder"])
def test_generating_from_a_broken_run_says_what_is_wrong(finished, tmp_path, capsys, damage):
    run = tmp_path / "run"
    if damage != "no folder":
        (run / "checkpoints").mkdir(parents=True)
        (run / "recipe.yaml").write_text((finished[0] / "recipe.yaml").read_text())
    if damage == "truncated":
        folder = shutil.copytree(
            Run(finished[0]).checkpoints.named("last"),
            run / "checkpoints" / "step-00000020",
            dirs_exist_ok=True,
        )
        whole = (folder / "state.ckpt").read_bytes()
        (folder / "state.ckpt").write_bytes(whole[: len(whole) // 2])
    assert generate(run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    expected = {
        "missing": "no checkpoints/step-",
        "truncated": "state.ckpt has",
        "no folder": "no such folder",
    }
    assert expected[damage] in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "-1: expected at least 0"),
        (["--top-p", "0"], "0: expected above 0 and at most 1"),
        (["--max-new-tokens", "0"], "0: expected at least 1"),
        (["--seed", "-1"], "-1: expected at least 0 and at most 9223372036854775807"),
        (["--seed", str(2**63)], "expected at least 0 and at most 9223372036854775807"),
        (["--device", "abacus"], "abacus: expected cpu or cuda"),
    ],
)
def test_options_out_of_range_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        generate("runs/x", *arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_prompt_a_new_document_begins(finished, capsys):
    assert generate(finished[0], "--max-new-tokens", "4", "--temperature", "0") == 0
    assert "---" not in capsys.readouterr().out
