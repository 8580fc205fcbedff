"""What is done to the process and the decoder for speed and memory, on one process."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from mixerlab.lm.config import StrategyConfig
from mixerlab.lm.decoder import Decoder
from torch.utils._python_dispatch import TorchDispatchMode

from mixerlab.lm.parallel import parallelize

COUNT = """
import resource, torch
from mixerlab.lm.parallel import keep_freed_memory
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
