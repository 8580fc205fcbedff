"""A layer of fla keeps the contract that it declares: `python fla_contract.py NAME`, where TRITON_INTERPRET is 1."""

import sys

import torch

import fla_on_cpu  # noqa: F401  (before fla)
import mixerlab.mixers.fla  # registers them, installed or not
from mixerlab.mixers import build_mixer
from mixerlab.mixers.testing import assert_agree, check_mixer, empty_state, inputs_of, prepared

OPTIONS = {"hgrn": {}, "gsa": {"n_heads": 2, "n_slots": 4}}


def check_long_rows(factory):
    """Past 64 positions most layers change from a recurrence to chunks."""
    mixer = prepared(factory)
    x = inputs_of(mixer, batch=1, time=80).requires_grad_()
    wanted = (x, *mixer.parameters())
    whole = mixer(x)
    with torch.no_grad():
        state = empty_state(mixer, x, 1, 80)
        first, state = mixer.extend(x[:, :40], state)
        second, state = mixer.extend(x[:, 40:], state)
    assert_agree(mixer, whole, torch.cat((first, second), dim=1))

    cotangent = inputs_of(mixer, batch=1, time=80, seed=1)
    # float16, for in the interpreter bf16 is not right everywhere.
    with torch.autocast(x.device.type, torch.float16):
        low = mixer(x)
    for y, z in (
        (low, whole),
        *zip(*(torch.autograd.grad(y, x, cotangent.to(y)) for y in (low, whole)), strict=True),
    ):
        assert (y - z).norm() < 0.05 * z.norm()

    ids = (torch.arange(80, device=x.device) >= 40).long()[None]
    results = []
    for y in (mixer(x, ids), torch.cat((mixer(x[:, :40]), mixer(x[:, 40:])), dim=1)):
        results.append([y, *torch.autograd.grad(y, wanted, cotangent)])
    for packed, apart in zip(*results, strict=True):
        assert_agree(mixer, packed, apart)


def check_positions(factory):
    """RetNet's, which are ours, rotate as fla's do."""
    mixer = prepared(factory)
    if isinstance(mixer, mixerlab.mixers.fla.Retention):
        theirs = mixer.layer_class(hidden_size=mixer.d_model, layer_idx=0, **mixer.arguments())
        theirs.load_state_dict(mixer.layer.state_dict())
        x = inputs_of(mixer)
        assert_agree(mixer, mixer(x), theirs.to(x.device)(x)[0])


if __name__ == "__main__":
    name = sys.argv[1]
    spec = {"name": name, **OPTIONS.get(name, {"n_heads": 2})}
    for check in (check_mixer, check_long_rows, check_positions):
        check(lambda d_model: build_mixer(spec, d_model))
