"""Runs of several processes: as one process would, from any number of ranks to any other, and ended cleanly."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from mixerlab.lm.checkpoint import list_checkpoints, named_checkpoint, read, read_meta
from mixerlab.lm.checkpoint import main as checkpoint_tool
from mixerlab.lm.config import load_recipe
from mixerlab.lm.generate import main as generate
from mixerlab.lm.validate import main as validate

from benchmarks import reliability
from mixerlab.lm.run import build_decoder, load_decoder
from tests.lm.tiny_runs import ROOT, TINY, metric, run_dirs

pytestmark = pytest.mark.slow

DDP = ["strategy=ddp"]
FSDP = ["strategy=fsdp"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def options(tmp_path):
    """Packed documents, so that rows differ in their number of labels; clipping that does something."""
    documents = tmp_path / "documents.jsonl"
    text = (ROOT / "tests" / "golden" / "text.txt").read_text().split()
    pieces = [" ".join(text[i : i + 1 + i % 23]) for i in range(0, len(text), 12)]
    documents.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return [
        f"data.files=[{documents}]",
        "data.column=text",
        "data.pack=true",
        "optim.grad_clip=0.5",
        f"logging.dir={tmp_path / 'runs'}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]


def command(*arguments, launcher=(), recipe=TINY):
    return [sys.executable, *launcher, "train.py", recipe, *arguments]


def start(*arguments, env=None, start_new_session=False, **options):
    return subprocess.Popen(
        command(*arguments, **options),
        start_new_session=start_new_session,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return out, err


def layout(ranks, batch_size, accumulate=1):
    sizes = [
        f"strategy.devices={ranks}",
        f"trainer.batch_size={batch_size}",
        f"trainer.accumulate={accumulate}",
    ]
    return [*sizes, "trainer.val_every=10"]


CURVES = ("train/loss", "train/gradient_norm", "valid/loss", "train/learning_rate")


def assert_same_curves(run, other, tolerance=1e-5):
    for name in CURVES:
        assert metric(run, name) == pytest.approx(metric(other, name), abs=tolerance), name


@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one_does(tmp_path, options, strategy):
    finish(start(*options, *layout(1, 4)))
    finish(start(*options, *strategy, *layout(2, 1, accumulate=2)))
    one, two = run_dirs(tmp_path)
    assert sorted(metric(two, "train/loss")) == list(range(1, 21))
    assert_same_curves(two, one)
    names = list(read_meta(named_checkpoint(two, "last"))["files"])
    expected = ["state.ckpt"] if strategy == DDP else ["shard-0-of-2.ckpt", "shard-1-of-2.ckpt"]
    assert names == expected


def test_replicated_shards_train_as_one_process_does(tmp_path, options):
    finish(start(*options, *layout(1, 4)))
    mixed = ["strategy={name: fsdp, replicate: 2, activation_checkpointing: selective, compile: false}"]
    finish(start(*options, *mixed, *layout(4, 1)))
    one, four = run_dirs(tmp_path)
    assert_same_curves(four, one)
    assert len(read_meta(named_checkpoint(four, "last"))["files"]) == 2, "one of the two copies is written"


def test_shards_gathered_and_reduced_in_bf16_learn(tmp_path, options):
    low = [
        "strategy={name: fsdp, param_dtype: bfloat16, reduce_dtype: bfloat16}",
        "trainer.precision=bf16-mixed",
    ]
    finish(start(*options, *layout(1, 4)))
    finish(start(*options, *low, *layout(2, 2)))
    one, two = (metric(run, "train/loss")[20] for run in run_dirs(tmp_path))
    assert two == pytest.approx(one, abs=0.15)
    weights = read(named_checkpoint(run_dirs(tmp_path)[1], "last"))["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}, (
        "the weights themselves are float32"
    )


PROBE = """
import sys, torch
from mixerlab.lm.config import load_recipe
from mixerlab.lm.processes import start
from mixerlab.lm.parallel import make_mesh
from mixerlab.lm.training import make_decoder
from mixerlab.lm.checkpoint import read
from mixerlab.lm.parallel import _piece
recipe = load_recipe(sys.argv[1], sys.argv[3:])
world = start(recipe.strategy, [sys.executable, *sys.argv])
world.connect(torch.device("cpu"), recipe.strategy)
decoder = make_decoder(recipe, 257, make_mesh(recipe.strategy, world, "cpu"))
if recipe.resume:
    saved = read(recipe.resume, whole=False)["state_dict"]
    saved = {name.removeprefix("decoder."): value for name, value in saved.items()}
    decoder.load_state_dict({name: _piece(value, name, decoder) for name, value in saved.items()})
whole = {name: value.full_tensor() for name, value in decoder.state_dict().items()}
if world.rank == 0:
    torch.save({"whole": whole, "held": sum(p.to_local().numel() for p in decoder.parameters())}, sys.argv[2])
world.close(failed=False)
"""

HYBRID = "model.mixer=[sessa, attention, mamba2, mamba]"


def probe(tmp_path, *overrides):
    script, result = tmp_path / "probe.py", tmp_path / "probe.pt"
    script.write_text(PROBE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), TINY, str(result), *overrides], env=environment, check=True)
    return torch.load(result, weights_only=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_initial_values_do_not_depend_on_the_number_of_ranks(tmp_path, ranks):
    overrides = [HYBRID, "model.n_layers=4", "strategy=fsdp"]
    found = probe(tmp_path, *overrides, f"strategy.devices={ranks}")
    recipe = load_recipe(TINY, overrides)
    decoder = build_decoder(recipe, 257)
    decoder.initialize(recipe.seed)
    for name, value in decoder.state_dict().items():
        assert torch.equal(found["whole"][name], value), name
    total = sum(p.numel() for p in decoder.parameters())
    assert found["held"] < 1.2 * total / ranks, "a rank holds its part alone"


def test_what_two_ranks_save_one_and_three_load(tmp_path, options):
    both = [*options, *FSDP, "trainer.steps=12", "trainer.val_every=12", "trainer.checkpoint_every=8"]
    finish(start(*both, *layout(2, 3)[:3]))
    (whole,) = run_dirs(tmp_path)
    step8 = next(folder for folder in list_checkpoints(whole) if folder.name == "step-00000008")
    saved = read(step8)["state_dict"]

    for ranks, batch_size in ((1, 6), (3, 2)):
        found = probe(tmp_path, *FSDP, f"strategy.devices={ranks}", f"resume={step8}")["whole"]
        for name, value in found.items():
            assert torch.equal(value, saved[f"decoder.{name}"]), name
        cut = tmp_path / "runs" / "tiny" / f"cut-{ranks}"
        shutil.copytree(whole, cut)
        (cut / "result.json").unlink()
        shutil.rmtree(cut / "checkpoints" / "step-00000012")
        finish(start(*both, *layout(ranks, batch_size)[:3], f"resume={cut}"))
        assert_same_curves(cut, whole)


def test_every_tool_reads_shards_and_the_run_goes_on_in_one_process(tmp_path, options, capsys):
    finish(start(*options, *FSDP, *layout(2, 2), "trainer.checkpoint_every=5", "trainer.steps=13"))
    (run,) = run_dirs(tmp_path)
    final = json.loads((run / "result.json").read_text())
    capsys.readouterr()
    assert generate([str(run), "--prompt", "a", "--max-new-tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert validate([str(run)]) == 0
    assert f"{final['valid/loss']:.4f}" in capsys.readouterr().out
    assert checkpoint_tool([str(run), "--to", "one-file"]) == 0
    assert list(read_meta(named_checkpoint(run, "last"))["files"]) == ["state.ckpt"]
    capsys.readouterr()
    assert generate([str(run), "--prompt", "a", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == text
    finish(start(*options, *layout(1, 4), "trainer.steps=20", f"resume={run}"))  # one file, one process
    checkpoint_tool([str(run), "--to", "sharded", "--shards", "3"])
    finish(
        start(*options, *FSDP, *layout(2, 2), "trainer.steps=22", f"resume={run}")
    )  # three shards, two ranks
    assert sorted(metric(run, "train/loss")) == list(range(1, 23))


def test_another_number_of_rows_a_step_is_refused_with_what_would_fit(tmp_path, options):
    finish(start(*options, *layout(1, 4), "trainer.steps=2"))
    (run,) = run_dirs(tmp_path)
    _, err = finish(start(*options, *DDP, *layout(2, 4), "trainer.steps=4", f"resume={run}"), code=2)
    assert err.count("error") == 1
    assert "a step of that run has 4 rows, and here 8" in err
    assert "trainer.batch_size that divides 2" in err


def test_torchrun_starts_it(tmp_path, options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish(start(*options, *FSDP, *layout(2, 2)[1:], "trainer.steps=3", launcher=launcher))
    finish(start(*options, *layout(1, 4), "trainer.steps=3"))
    two, one = run_dirs(tmp_path)
    assert_same_curves(two, one)
    _, err = finish(start(*options, *layout(3, 2), launcher=launcher), code=1)
    assert "strategy.devices = 3: torchrun started 2 processes" in err


def test_slurm_starts_it_on_two_nodes(tmp_path, options):
    job = {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}
    ranks = [
        start(
            *options,
            *DDP,
            "trainer.batch_size=2",
            "trainer.steps=3",
            env=job | {"SLURM_PROCID": str(n), "SLURM_NODEID": str(n)},
        )
        for n in range(2)
    ]
    for rank in ranks:
        finish(rank)
    finish(start(*options, *layout(1, 4)[:3], "trainer.steps=3"))
    two, one = run_dirs(tmp_path)
    assert_same_curves(two, one)


# ----------------------------------------------------------------------------------------------- endings


def wait_for_step(process, step):
    for line in process.stdout:
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            return
    raise AssertionError(process.stderr.read())


LONG = [
    "trainer.steps=100000",
    "trainer.val_every=100000",
    "trainer.checkpoint_every=100000",
    "logging.sample_tokens=0",
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_and_a_code_of_its_own(tmp_path, options, ranks, signum):
    sizes = layout(ranks, 4 // ranks)[:3]
    process = start(*options, *LONG, *sizes)
    wait_for_step(process, 5)
    process.send_signal(signum)
    out, _ = finish(process, code=130 if signum == signal.SIGINT else 75)
    assert f"stopped: {signum.name}; a checkpoint is written" in out
    (run,) = run_dirs(tmp_path)
    done = read_meta(named_checkpoint(run, "last"))["global_step"]
    assert done == max(metric(run, "train/loss")) >= 5
    more = [f"trainer.steps={done + 2}" if o.startswith("trainer.steps") else o for o in LONG]
    finish(start(*options, *more, *sizes, f"resume={run}"))
    assert sorted(metric(run, "train/loss")) == list(range(1, done + 3))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_the_whole_group_spares_the_loading_processes_until_the_step_is_done(
    tmp_path, options, ranks
):
    sizes = [*layout(ranks, 4 // ranks)[:3], "trainer.num_workers=1"]
    process = start(*options, *LONG, *sizes, start_new_session=True)
    wait_for_step(process, 5)
    for _ in range(2):  # as `timeout` does: to the process, then to its group
        os.killpg(process.pid, signal.SIGTERM)
    finish(process, code=75)
    (run,) = run_dirs(tmp_path)
    assert read_meta(named_checkpoint(run, "last"))["global_step"] == max(metric(run, "train/loss"))


def test_an_interrupted_validation_is_made_up_for(tmp_path, options):
    (tmp_path / "in_validation.py").write_text(
        "import os, signal\nfrom mixerlab.lm.module import LanguageModel\nstep = LanguageModel.validation_step\n"
        "def interrupt(self, batch, i, *rest):\n"
        "    if 'STOP' in os.environ and self.trainer.global_step == 10: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, batch, i, *rest)\nLanguageModel.validation_step = interrupt\n"
    )
    arguments = [*options, *layout(1, 4), "plugins=[in_validation]", "resume=auto"]
    finish(start(*arguments, env={"PYTHONPATH": str(tmp_path)}))
    for stop, code in (({"STOP": "1"}, 75), ({}, 0)):
        finish(start(*arguments, env={"PYTHONPATH": str(tmp_path), **stop}), code=code)
    whole, stopped = run_dirs(tmp_path)
    assert sorted(metric(stopped, "valid/loss")) == [10, 20]
    assert_same_curves(stopped, whole, tolerance=0)
    with (stopped / "metrics.csv").open() as file:
        rows = [tuple(line.split(",")[:2]) for line in file]
    assert len(rows) == len(set(rows)), "nothing is logged twice"


def test_a_second_signal_ends_it_at_once(tmp_path, options):
    (tmp_path / "slow_step.py").write_text(
        "import time\nfrom mixerlab.lm.module import LanguageModel\nstep = LanguageModel.training_step\n"
        "def slow(self, batch, i):\n    if i == 3: print('step 99/', flush=True); time.sleep(600)\n"
        "    return step(self, batch, i)\nLanguageModel.training_step = slow\n"
    )
    process = start(*options, *LONG, "plugins=[slow_step]", env={"PYTHONPATH": str(tmp_path)})
    wait_for_step(process, 99)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    finish(process, code=128 + signal.SIGTERM)


def test_the_time_limit_ends_it_likewise(tmp_path, options):
    out, _ = finish(start(*options, *LONG, *layout(2, 2)[:3], "trainer.max_time=5s"), code=75)
    assert "trainer.max_time is over" in out
    (run,) = run_dirs(tmp_path)
    assert read_meta(named_checkpoint(run, "last"))["global_step"] == max(metric(run, "train/loss"))


def plugin(tmp_path, body):
    """A module that runs `body` before the step of index 5 on rank 1."""
    (tmp_path / "mishap.py").write_text(
        "import os, signal, time, torch\nfrom mixerlab.lm.module import LanguageModel\nstep = LanguageModel.training_step\n"
        "def mishap(self, batch, i):\n"
        f"    if self.world.rank == 1 and self.trainer.global_step == 5:\n        {body}\n"
        "    return step(self, batch, i)\n"
        "LanguageModel.training_step = mishap\n"
    )
    return {"env": {"PYTHONPATH": str(tmp_path)}}


def test_a_rank_that_hangs_is_named(tmp_path, options):
    mishap = plugin(tmp_path, "time.sleep(600)")
    began = time.monotonic()
    process = start(*options, *LONG, *layout(2, 2)[:3], "plugins=[mishap]", "strategy.timeout=5", **mishap)
    _, err = finish(process, code=1)
    assert "no progress for 5 s: the others wait for rank 1 (in step 6)" in err
    assert "mishap.py" in err, "the stack says where"
    assert time.monotonic() - began < 120


def test_a_rank_that_is_killed_is_named(tmp_path, options):
    mishap = plugin(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    more = ["plugins=[mishap]", "trainer.checkpoint_every=2", "trainer.num_workers=1"]
    process = start(*options, *LONG, *layout(2, 2)[:3], *more, **mishap)
    _, err = finish(process, code=1)
    assert "rank 1 was killed by signal 9" in err
    (run,) = run_dirs(tmp_path)
    assert read_meta(named_checkpoint(run, "last"))["global_step"] == 4


def test_a_number_that_is_not_finite_on_one_shard_is_named_on_its_rank(tmp_path, options):
    hook = "self.decoder.blocks[1].mixer.register_forward_hook(lambda m, i, o: o / 0)"
    mishap = plugin(tmp_path, hook)
    process = start(*options, *FSDP, *LONG, *layout(2, 2)[:3], "plugins=[mishap]", **mishap)
    _, err = finish(process, code=1)
    assert err.count("stopped: ") == 1
    assert "step 6: loss" in err
    assert "first not finite on rank 1: the output of blocks.1.mixer" in err
    (run,) = run_dirs(tmp_path)
    assert read_meta(named_checkpoint(run, "last"))["global_step"] == 5


@pytest.mark.parametrize("strategy", ["one", "fsdp"])
def test_a_run_that_is_killed_again_and_again_goes_on_as_if_nothing_had_happened(strategy):
    assert reliability.main(["--kills", "3", "--signals", "1", "--strategies", strategy, "--seed", "1"]) == 0


def test_a_dry_run_prints_the_lines_that_start_it(capsys):
    import train

    nodes = ["strategy.num_nodes=2", "strategy.devices=8", "strategy=fsdp", "trainer.batch_size=1"]
    assert train.main([TINY, "--dry-run", *nodes]) == 0
    out = capsys.readouterr().out
    assert "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d" in out
    assert f"train.py {TINY} strategy.num_nodes=2" in out
    assert "srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python train.py" in out
    assert train.main([TINY, *nodes]) == 2
    assert "torchrun or SLURM must start the processes" in capsys.readouterr().err


def test_a_run_keeps_what_load_decoder_reads(tmp_path, options):
    finish(start(*options, *FSDP, *layout(2, 2), "trainer.steps=2"))
    (run,) = run_dirs(tmp_path)
    decoder, recipe = load_decoder(run)
    assert recipe.strategy.name == "fsdp"
    assert all(torch.isfinite(p).all() for p in decoder.parameters())
