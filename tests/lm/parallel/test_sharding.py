"""What is done to the process and the decoder for speed, memory and many devices."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixerlab.lm.model.decoder import Decoder, build_decoder
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.sharding import make_decoder, make_mesh, parallelize
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.options import ConfigError
from started_runs import sharded
from tiny_runs import TINY

COUNT = """
import resource, torch
from mixerlab.lm.parallel.sharding import keep_freed_memory
{call}
def work():
    a = torch.ones(2**24)  # 64 MiB
    return float((a + 2 * a)[0])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    work()
before = faults()
for _ in range(10):
    work()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator")
def test_large_tensors_get_the_memory_of_earlier_ones():
    def faults(call):
        done = subprocess.run(
            [sys.executable, "-c", COUNT.format(call=call)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("keep_freed_memory()") < 0.3 * faults("")


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


HYBRID: list[Any] = ["sessa", "attention", "mamba2", {"name": "parallel", "mixers": ["attention", "mamba"]}]


def decoder(activation_checkpointing="none", **options):
    made = Decoder(50, d_model=32, n_layers=4, mixer=HYBRID, dropout=0.1)
    strategy = StrategyConfig(activation_checkpointing=activation_checkpointing, **options)
    parallelize(made, None, strategy, seed=0)
    return made.train()


def gradients(made):
    ids = torch.randint(50, (2, 19), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)  # of dropout
    with Calls() as calls:
        made(ids, ids)[0].sum().backward()
    return [p.grad for p in made.parameters()], calls.seen


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_changes_no_gradient_and_no_name(kind):
    plain, checkpointed = decoder(), decoder(kind)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    for a, b in zip(gradients(plain)[0], gradients(checkpointed)[0], strict=True):
        assert torch.equal(a, b)


def test_selective_checkpointing_recomputes_projections_but_not_what_mixes_over_time():
    counts = {kind: gradients(decoder(kind))[1] for kind in ("none", "full", "selective")}

    def runs(kind, *parts):
        return sum(any(part in name for part in parts) for name in counts[kind])

    for solve in ("feedback_forward", "selective_scan_forward"):
        assert runs("none", solve) == 1
        assert runs("full", solve) == 2
        assert runs("selective", solve) == 1
    attention = "scaled_dot_product"
    assert runs("selective", attention) == runs("none", attention) < runs("full", attention)
    products = ("aten::mm", "aten::addmm")
    assert runs("selective", *products) == runs("full", *products) > runs("none", *products)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_compiled_blocks_have_the_same_gradients_and_names(kind):
    plain, compiled = decoder(), decoder(kind, compile=True)
    for made in (plain, compiled):
        made.eval()  # compiled code draws dropout otherwise
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for a, b in zip(gradients(plain)[0], gradients(compiled)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_initial_values_do_not_depend_on_the_number_of_ranks(tmp_path, at_the_root, ranks):
    overrides = ["model.mixer=[sessa, attention, mamba2, mamba]", "model.n_layers=4", "strategy=fsdp"]
    found = sharded(tmp_path, *overrides, f"strategy.devices={ranks}")
    recipe = load_recipe(TINY, overrides)
    made = build_decoder(recipe, 257)
    made.initialize(recipe.seed)
    for name, value in made.state_dict().items():
        assert torch.equal(found["whole"][name], value), name
    total = sum(p.numel() for p in made.parameters())
    assert found["held"] < 1.2 * total / ranks, "a rank holds its part alone"


def test_without_a_mesh_the_decoder_is_whole_and_initialised():
    recipe = load_recipe("quickstart")
    made, expected = make_decoder(recipe, 50), build_decoder(recipe, 50)
    expected.initialize(recipe.seed)
    for name, value in made.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


def test_only_fsdp_has_a_mesh_and_its_groups_must_divide_the_devices():
    assert make_mesh(StrategyConfig(name="ddp"), World(devices=4), "cpu") is None
    with pytest.raises(
        ConfigError, match=r"strategy\.replicate = 3: it must divide the number of devices, 4"
    ):
        make_mesh(StrategyConfig(name="fsdp", replicate=3), World(devices=4), "cpu")
