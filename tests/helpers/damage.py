"""Run folders with a bit flipped: what the commands say of them, and whether that is all that a user needs."""

import random
import shutil
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

from mixerlab.__main__ import main
from mixerlab.data.tokenizers import train_bpe
from mixerlab.lm.model.decoder import build_decoder
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import save
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.start import Start
from mixerlab.lm.training.loggers import CSVMetrics, TensorBoard
from mixerlab.options import UserError, plain
from tiny_runs import GOLDEN, TINY

FINGERPRINT = "0123abcd"


def a_run(options, is_finished=False):
    """A run folder with every kind of file, as if trained, or for a part of its steps."""
    step = 20 if is_finished else 5
    recipe = load_recipe(TINY, options)
    run = Run.create(recipe)
    tokenizer = train_bpe([(GOLDEN / "text.txt").read_text()[:2000]], 280)
    tokenizer.save(run.path)
    run.save_data_fingerprint(FINGERPRINT)
    decoder = build_decoder(recipe, tokenizer.vocab_size)
    decoder.initialize(0)
    weights = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    metrics = {"valid/loss": 3.0}
    state = {"global_step": step, "state_dict": weights, "recipe": plain(recipe), "rows_per_step": 4}
    save({**state, "valid_loss": 3.0, "metrics": metrics}, run.checkpoints.at(step))
    for logger in (CSVMetrics(run.path / "metrics.csv"), TensorBoard(run.path, 0)):
        for n in range(1, step + 1):
            logger.log_metrics({"train/loss": 5 - n / 3, "valid/loss": 3.0}, n)
        logger.finalize("success")
    if is_finished:
        run.finish(step, metrics)
    return run.path


def files_of(run):
    """The files of a run folder, by their names in it."""
    return sorted(
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    )


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def outcomes(run, options):
    """What each command makes of a run: its exit code and what it prints. Anything but a message is raised."""
    return {
        "generate": _command("generate", run, "--max-new-tokens", 4, "--temperature", 0, "--prompt", "The"),
        "checkpoints": _command("checkpoints", run),
        "result": _asked(lambda: Run(run).result),
        "metrics": _asked(lambda: len(Run(run).metrics()) > 0),
        "resume=auto": _asked(lambda: _resumed(options, "auto")),
        f"resume={run.name}": _asked(lambda: _resumed(options, run)),
    }


def _command(*arguments):
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(list(map(str, arguments)))
    return code, said.getvalue()


def _asked(question):
    try:
        return 0, str(question())
    except UserError as error:
        return 2, str(error)


def _resumed(options, resume):
    """Goes on with the run as training does, up to the first step."""
    recipe = load_recipe(TINY, [*options, f"resume={resume}"])
    start = Start.find(recipe)
    is_over = start.run is not None and start.run.is_finished and resume == "auto"
    if is_over or start.finish(20):
        return "finished"
    data: Any = SimpleNamespace(fingerprint=FINGERPRINT, tokenizer=None, save_tokenizer=lambda folder: None)
    run = start.open(recipe, data, steps=20, devices=1, say=lambda text: None)
    try:
        CSVMetrics(run.path / "metrics.csv", start)
        return f"from step {start.step} of {run.path.name}"
    finally:
        run.release()


def survey(run, options, flips, names=None, has_checksums=True, seed=0):
    """File -> how many of `flips` random bits, flipped one at a time, were "found", and how many are "harmless".

    Found: a command refuses, in one line, what it does not do as before. Harmless: all commands do as before. Raises
    AssertionError for a flip that is neither, but for files whose checksums are not noted, where it is "silent"; and
    whatever a command raises.
    """
    shutil.copytree(run, whole := run.parents[2] / "whole")  # where no command looks
    expected = outcomes(run, options)
    counts: dict[str, Counter[str]] = {}
    for name in names or files_of(whole):
        bits, counts[name] = random.Random(f"{seed} {name}"), Counter()
        for _ in range(flips):
            shutil.rmtree(run)
            shutil.copytree(whole, run)
            bit = bits.randrange(8 * (whole / name).stat().st_size)
            flip(run / name, bit)
            counts[name][_kind(outcomes(run, options), expected)] += 1
            assert not (has_checksums and counts[name]["silent"]), (name, bit)
    return counts


def _kind(found, expected):
    refused = {what for what, (code, _) in found.items() if code and found[what] != expected[what]}
    for what in refused - {"checkpoints"}:  # which has a line for each file
        assert found[what][1].count("\n") <= 1, found[what]
    changed = {what for what in found if found[what] != expected[what]}
    return "silent" if changed - refused else "found" if refused else "harmless"
