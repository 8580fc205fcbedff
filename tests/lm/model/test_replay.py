"""Steps of fixed shapes, which a CUDA graph can replay: the same tokens, the same launches, and no host that waits."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mixerlab.kernels import backend
from mixerlab.kernels.feedback import feedback_attention
from mixerlab.lm.model import replay
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.model.generation import generate
from mixerlab.lm.model.replay import FixedStep, ReplayedStep
from mixerlab.mixers import State

MIXERS = {
    "attention": "attention",
    "window": {"name": "attention", "window": 4, "n_kv_heads": 1, "n_heads": 2, "qk_norm": True},
    "sessa": "sessa",
    "sessa on CUDA": {"name": "sessa", "backend": "reference"},
    "sessa without feedback": {"name": "sessa", "feedback": False},
    "mamba": "mamba",
    "mamba2": "mamba2",
    "gated_deltanet": "gated_deltanet",
    "identity": "identity",
    "parallel": {"name": "parallel", "mixers": ["attention", "mamba2"]},
    "selective_attention": {"name": "selective_attention", "window": 4},
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6]]
NEW = 9


@pytest.fixture(params=MIXERS)
def decoder(request, monkeypatch):
    """Of two layers."""
    decoder = Decoder(30, d_model=16, n_layers=2, mixer=MIXERS[request.param]).eval()
    decoder.initialize(0)
    for parameter in decoder.parameters():
        parameter.data *= 8  # far from uniform, so that the likeliest token is clear
    if "CUDA" in request.param:
        pytest.importorskip("triton")
        from mixerlab.kernels.feedback.triton import decode

        def computed(q, k_past, f, gamma, s_past, length, scale):
            past = {"past": (k_past, s_past), "past_length": length, "scale": scale}
            return feedback_attention(q, q, f, gamma, **past, return_lse=True, backend="reference")

        monkeypatch.setattr(backend, "INTERPRETED", True)
        monkeypatch.setattr(decode, "feedback_decode", computed)
        monkeypatch.setattr(decoder, "steps_on_cuda", True, raising=False)
    return decoder


def last(decoder):
    def extend(ids, states):
        logits, states = decoder.extend(ids, states)
        return logits[:, -1], states

    return extend


def prefilled(decoder, kind=FixedStep):
    """A step behind the prompts, and their logits (B, V)."""
    max_len = max(map(len, PROMPTS)) + NEW
    with torch.inference_mode():
        read = [last(decoder)(torch.tensor([p]), decoder.init_state(1, max_len)) for p in PROMPTS]
    states = [type(layer[0]).cat(layer) for layer in zip(*(states for _, states in read), strict=True)]
    if hasattr(decoder, "steps_on_cuda"):  # Sessa's step goes the way that it goes there
        for block in decoder.layers:
            block.mixer.sessa.backend = "triton"
    return kind(last(decoder), states, max_len), torch.cat([logits for logits, _ in read])


def test_steps_of_fixed_shapes_give_the_tokens_of_growing_ones(decoder):
    expected = torch.stack(list(generate(decoder, PROMPTS, NEW, temperature=0)))
    step, logits = prefilled(decoder)
    for i, tokens in enumerate(expected):
        assert torch.equal(logits.argmax(-1), tokens), i
        logits = step(tokens).clone()
    with pytest.raises(ValueError, match="full"):
        step(expected[-1])


class Recorder(TorchDispatchMode):
    """What is called, with which shapes and numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        flat, structure = tree_flatten((args, kwargs))
        seen = [
            (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in flat
        ]
        self.calls.append((str(function), seen, str(structure)))
        return function(*args, **(kwargs or {}))


READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "unique")
"""What makes the host wait for numbers from the device."""


def recorded(step, tokens):
    with Recorder() as recorder:
        step(tokens)
    return recorder.calls


def test_every_step_launches_the_same_and_reads_nothing(decoder):
    step, _ = prefilled(decoder)
    places = [x.data_ptr() for state in step.states for x in tensors(state)]
    first, *others = [recorded(step, torch.tensor([i, 7, 9])) for i in range(NEW)]
    assert len(first) > 10
    for calls in others:
        assert calls == first
    assert not [name for name, *_ in first if any(read in name for read in READS)]
    assert [x.data_ptr() for state in step.states for x in tensors(state)] == places


def tensors(state):
    values = vars(state).values()
    return [x for x in values if isinstance(x, torch.Tensor)] + [
        x for value in values if isinstance(value, State) for x in tensors(value)
    ]


def test_growing_steps_would_not_be_seen_as_the_same():
    decoder = Decoder(30, d_model=16, n_layers=1, mixer="attention").eval()
    states = decoder.init_state(3, 10)

    def step(tokens):
        nonlocal states
        _, states = decoder.extend(tokens[:, None], states)

    with torch.inference_mode():
        assert recorded(step, torch.zeros(3).long()) != recorded(step, torch.zeros(3).long())


class FakeGraph:
    """Stands for CUDA on a machine without: capturing notes what ran, replaying runs it."""

    def replay(self):
        with torch.inference_mode():
            self.logits.copy_(FixedStep.run(self.step))


@pytest.mark.parametrize("fails", [False, True], ids=["captured", "refused"])
def test_the_second_step_is_captured_and_where_that_fails_the_log_says_so(fails, monkeypatch, caplog):
    decoder = Decoder(30, d_model=16, n_layers=2, mixer=["sessa", "mamba2"]).eval()
    decoder.initialize(0)
    expected = list(generate(decoder, PROMPTS, NEW, temperature=0))
    captures = []

    def capture(self):
        captures.append(self)
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graph, self.logits = FakeGraph(), torch.empty(3, 30)
        self.graph.step, self.graph.logits = self, self.logits

    monkeypatch.setattr(ReplayedStep, "_run_aside", FixedStep.run)
    monkeypatch.setattr(ReplayedStep, "_capture", capture)
    step, logits = prefilled(decoder, ReplayedStep)
    with caplog.at_level(logging.WARNING, logger=replay.logger.name):
        for tokens in expected:
            assert torch.equal(logits.argmax(-1), tokens)
            logits = step(tokens)
    assert len(captures) == 1
    assert ("not permitted when stream is capturing" in caplog.text) == fails


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_tokens_of_growing_steps(decoder):
    decoder = decoder.cuda()
    tokens = [t.cuda() for t in generate(decoder, PROMPTS, NEW, temperature=0)]
    ids = [torch.tensor([p]) for p in PROMPTS]
    for i, prompt in enumerate(ids):
        whole = torch.cat([prompt[0].cuda(), torch.stack(tokens)[:, i]])
        logits = decoder(whole[None])[0, prompt.shape[1] - 1 : -1]
        assert torch.equal(logits.argmax(-1), torch.stack(tokens)[:, i])
