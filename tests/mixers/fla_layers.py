"""What fla's layers are without running them: initial values, what is spared, sizes, FLOPs. Run by test_fla.py.

In a process of its own, for importing fla changes which classes transformers makes of "mamba" and "mamba2".
"""

import re

import pytest
import torch
from torch import nn

from mixerlab.__main__ import main
from mixerlab.lm.model.decoder import Decoder, spared_parameters
from mixerlab.mixers import MIXERS, build_mixer
from mixerlab.mixers.fla import FlaMixer
from mixerlab.options import UserError
from tiny_runs import TINY

D = 64
EACH = pytest.mark.parametrize(
    "name", sorted(n for n in MIXERS.registered() if issubclass(MIXERS.implementation(n), FlaMixer))
)


def decoder(name):
    return Decoder(5, d_model=D, n_layers=2, mixer=name, block="transformer")


@EACH
def test_initial_values_depend_on_the_seed_alone(name):
    first, second, other = decoder(name), decoder(name), decoder(name)
    first.initialize(0)
    with torch.device("meta"):
        sharded = decoder(name)
    for module in sharded.modules():  # as sharding does, module by module
        assert not list(module.buffers(recurse=False)), "its values would be lost"
        module.to_empty(device="cpu", recurse=False)
    for made, seed in ((second, 0), (sharded, 0), (other, 1)):
        made.initialize(seed)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
        assert torch.equal(sharded.state_dict()[key], value), key
    assert any(not torch.equal(other.state_dict()[key], value) for key, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parameter", "low", "high"),
    [("kda", "A_log", 1, 16), ("fla_gated_deltanet", "A_log", 0, 16), ("kda", "dt_bias", 0, 0.2)],
)
def test_gains_are_drawn_as_the_layer_draws_them(name, parameter, low, high):
    made = decoder(name)
    for block in made.layers:
        block.mixer.get_parameter(f"layer.{parameter}").data.fill_(float("nan"))
    made.initialize(0)
    drawn = [block.mixer.get_parameter(f"layer.{parameter}").detach() for block in made.layers]
    values = [x.exp() if parameter == "A_log" else nn.functional.softplus(x) for x in drawn]
    assert all(((low <= x) & (x <= high)).all() for x in values)
    assert not torch.equal(*drawn), "each layer has its own"


@EACH
def test_decay_spares_all_but_linear_maps_and_convolutions(name):
    mixer = build_mixer(name, D)
    decayed = {f"{path}.weight" for path, m in mixer.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
    for spared in ("no_decay", "keep_float32"):
        assert spared_parameters(mixer, spared) == {key for key, _ in mixer.named_parameters()} - decayed
    assert isinstance(mixer.get_submodule(mixer.output_projection), nn.Linear)


# Multiplications at each position: of linear maps, then of 2 heads with their memory, written and read; in delta rules
# what a key finds is read too.
MULTIPLICATIONS = {
    "deltanet": 4 * D**2 + 2 * D + 2 * 3 * 32 * 32,
    "fla_gated_deltanet": 2 * D * 48 + 3 * D * 96 + 2 * 2 * D + 2 * 3 * 24 * 48,
    "kda": 4 * D**2 + 2 * D + 2 * (D * 32 + 32 * D) + 2 * 3 * 32 * 32,
    "gla": 2 * D * 32 + 3 * D**2 + (16 * D + 16 * 32) + 2 * 2 * 16 * 32,
    "hgrn2": 4 * D**2 + 2 * 2 * 32 * 32,
    "hgrn": 4 * D**2,
    "gsa": 4 * D**2 + D * 2 * 7 + 2 * 2 * (32 * 7 + 7 * 32),
    "retnet": 2 * D**2 + 3 * D * 128 + 2 * 2 * 32 * 64,
    "linear_attention": 4 * D**2 + 2 * 2 * 32 * 32,
    "rwkv6": (D * 160 + 160 * D)  # shares of the position before
    + (2 * D * 32 + D * 64 + 64 * 32 + 2 * D**2 + D**2)  # r and k, w, v and g, output
    + 2 * 2 * 16 * 32,
}
NUMBERS = {  # kept for a row, of the memory and of what convolutions or shifts have seen
    "deltanet": (2 * 32 * 32, 3 * 4 * D),
    "fla_gated_deltanet": (2 * 24 * 48, 4 * (48 + 48 + 96)),
    "kda": (2 * 32 * 32, 3 * 4 * D),
    "gla": (2 * 16 * 32, 0),
    "hgrn2": (2 * 32 * 32, 0),
    "hgrn": (D, 0),
    "gsa": (2 * 2 * 32 * 7, 0),
    "retnet": (2 * 32 * 64, 0),
    "linear_attention": (2 * 32 * 32, 0),
    "rwkv6": (2 * 16 * 32, D),
}


@EACH
def test_costs_are_those_of_the_layer(name):
    special = {"hgrn": {}, "gsa": {"n_heads": 2, "n_slots": 7}}
    special["fla_gated_deltanet"] = {"n_heads": 2, "head_dim": 24}
    options = special.get(name, {"n_heads": 2})
    mixer = build_mixer({"name": name, **options}, D)
    assert mixer.flops(100) == 2 * 100 * MULTIPLICATIONS[name]
    memory, tails = NUMBERS[name]
    assert mixer.state_bytes(100, torch.bfloat16) == 4 * memory + 2 * tails
    assert mixer.init_state(3, 100, dtype=torch.bfloat16).nbytes() == 3 * (4 * memory + 2 * tails)


def test_they_are_described_where_they_cannot_run(capsys):
    assert main(["describe", "quickstart", "--mixers", "gla", "[kda, attention]"]) == 0
    assert re.search(r"mixer parameters +[\d,]+ +[\d,]+", capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run")
def test_without_a_gpu_the_input_is_refused_with_the_reason():
    mixer, x = build_mixer("gla", D), torch.zeros(1, 3, D)
    for run in (lambda: mixer(x), lambda: mixer.extend(x, mixer.init_state(1, 3))):
        with pytest.raises(UserError, match=r"GatedLinearAttention .*: it is on device cpu, and the kernels"):
            run()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "gla", "n_heads": 3},
            "mixer.n_heads = 3: twice their number must divide model.d_model = 64",
        ),
        ({"name": "gsa", "n_slots": 0}, "mixer.n_slots = 0: expected at least 1"),
        ({"name": "hgrn", "n_heads": 1}, "mixer.n_heads = 1: no such key"),
    ],
)
def test_options_that_do_not_fit_are_named(spec, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_mixer(spec, D)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it trains")
def test_a_recipe_that_would_train_on_a_cpu_is_refused_before_its_data_are_touched(capsys, tmp_path):
    mixer = "model.mixer=[identity, {name: selective_attention, below: gla}]"
    assert main(["train", TINY, mixer, f"data.cache_dir={tmp_path / 'cache'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.mixer: 'gla' runs on a GPU alone")
    assert error.count("\n") == 1
    assert not (tmp_path / "cache").exists()
