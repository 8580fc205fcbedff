"""Published attention models and hybrids, saved by transformers with random weights, as run folders."""

import json

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from mixerlab.__main__ import main
from mixerlab.lm.exchange.layouts import read_model
from mixerlab.lm.exchange.published import Published
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.folder import Run
from mixerlab.options import ConfigError
from tiny_runs import GOLDEN, train

transformers.logging.disable_progress_bar()
VOCAB = 259
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
SSM = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
WHOLE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
CASES = {
    "llama": ("Llama", {}),
    "llama tied": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": ROPE, "rms_norm_eps": 1e-3, "num_key_value_heads": None},
    ),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 6, "rms_norm_eps": 1e-3}),
    "qwen3 with wide heads": ("Qwen3", {"head_dim": 16, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "bamba": ("Bamba", {**SSM, **WHOLE, "attn_layer_indices": [1]}),
    "bamba as published, half rotated": (
        "Bamba",
        {**SSM, "hidden_size": 32, "mamba_d_head": "auto", "mamba_n_heads": 8, "attn_layer_indices": [1]},
    ),
    "llama with biases": ("Llama", {"attention_bias": True}),
    "bamba tied": (
        "Bamba",
        {**SSM, **WHOLE, "attn_layer_indices": [0, 2], "tie_word_embeddings": True, "mamba_proj_bias": True},
    ),
}  # fmt: skip


def published(name, **options):
    """A model of transformers in which every parameter is random and matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                continue  # a run has none, so it must be 0
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def convert(folder, run):
    assert main(["convert", str(folder), "--to", str(run)]) == 0
    return Run.open(run)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_the_logits_are_those_of_transformers(name, options, tmp_path):
    model = published(name, **options)
    model.save_pretrained(tmp_path / "folder")
    decoder = convert(tmp_path / "folder", tmp_path / "run").decoder()
    ids = torch.randint(VOCAB, (2, 37))
    with torch.no_grad():
        ours, theirs = decoder(ids), model(ids, use_cache=False).logits
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_bias_that_a_run_cannot_have_is_named(tmp_path, capsys):
    model = published("Llama", attention_bias=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias[2] = 1
    model.save_pretrained(tmp_path / "folder")
    assert main(["convert", str(tmp_path / "folder"), "--to", str(tmp_path / "run")]) == 2
    assert "model.layers.1.self_attn.o_proj.bias is not zero; expected zeros" in capsys.readouterr().err


def test_frequencies_in_older_files_are_left_out_and_names_may_lack_the_prefix(tmp_path):
    model = published("Llama")
    model.model.save_pretrained(tmp_path / "folder")  # without its head
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    assert "embed_tokens.weight" in weights
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    weights["lm_head.weight"] = model.lm_head.weight.detach()
    save_file(weights, tmp_path / "folder" / "model.safetensors")
    decoder = convert(tmp_path / "folder", tmp_path / "run").decoder()
    ids = torch.randint(VOCAB, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_layers_can_be_replaced_in_a_new_run(tmp_path, capsys):
    published("Llama", vocab_size=257).save_pretrained(tmp_path / "folder")
    run = convert(tmp_path / "folder", tmp_path / "run")
    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    recipe["data"] |= {"source": "files", "files": [str(GOLDEN / "text.txt")], "seq_len": 16}
    recipe["data"] |= {"cache_dir": str(tmp_path / "cache")}
    recipe["optim"] |= {"warmup_steps": 0}
    recipe["trainer"] |= {"steps": 1, "batch_size": 2, "val_batches": 1}
    recipe["model"]["mixer"] = ["mamba2", recipe["model"]["mixer"]]
    recipe["logging"] |= {"dir": str(tmp_path / "runs"), "sample_tokens": 0}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    assert train(tmp_path / "mine.yaml", f"init_from={run.path}") == 0
    out, err = capsys.readouterr()
    assert "blocks.0.mixer" in out + err


@pytest.fixture
def read(tmp_path):
    """The model section of what config.json says, with these values beside SIZES."""

    def make(kind, **values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": kind, **SIZES, **values}))
        return read_model(Published.read(path))[1]

    return make


def test_positions_are_said_in_two_ways(read):
    assert read("llama")["mixer"]["rope_theta"] == 10000.0
    assert read("llama", rope_theta=7.0, rope_scaling=None)["mixer"]["rope_theta"] == 7.0
    assert read("llama", rope_parameters=ROPE)["mixer"]["rope_theta"] == 500.0


def test_heads_may_be_wider_than_their_share(read):
    assert "head_dim" not in read("llama", head_dim=6)["mixer"]
    assert read("llama", head_dim=8)["mixer"]["head_dim"] == 8
    assert read("qwen3")["mixer"]["head_dim"] == 128, "the default of transformers"


def test_windows_are_said_in_three_ways(read):
    def windows(model):
        mixers = model["mixer"] if isinstance(model["mixer"], list) else [model["mixer"]]
        return [mixer.get("window") for mixer in mixers]

    assert windows(read("mistral", sliding_window=5)) == [5]
    assert windows(read("mistral")) == [4096]
    assert windows(read("qwen2", sliding_window=5)) == [None], "use_sliding_window is false"
    used = {"use_sliding_window": True, "sliding_window": 5}
    assert windows(read("qwen2", **used, max_window_layers=2)) == [None, None, 5]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(read("qwen2", **used, layer_types=types)) == [5, None, 5]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; expected \"silu\""),
        ("mistral", {"attention_bias": True}, "attention_bias = True; expected false"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True; expected false"),
        ("qwen2", {"head_dim": 8}, "head_dim = 8; expected hidden_size / num_attention_heads = 6"),
        ("llama", {"head_dim": "6"}, "head_dim = '6'; expected an integer of at least 1"),
        ("mistral", {"num_key_value_heads": 0}, "num_key_value_heads = 0; expected an integer"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "expected null, since positions are not scaled"),
        ("llama", {"rope_parameters": {"type": "yarn", "factor": 4}}, "rope_parameters.type = 'yarn'; expected"),
        ("llama", {"rope_parameters": {"factor": 4}}, "rope_parameters.factor = 4; expected none, since positions"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5; expected 1, as llama has"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type = 'llama3'; expected"),
        ("llama", {"rope_parameters": 3}, "rope_parameters = 3; expected a mapping"),
        ("llama", {"rope_theta": "big"}, "rope_theta = 'big'; expected a number above 0"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps = -1; expected a number above 0"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000; expected at most 10000"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes'; expected true or false"),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["sliding_attention", ["x"], "full_attention"]},
            "; expected 3 times full_attention or sliding_attention",
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers = '2'; expected"),
        ("bamba", SSM, "rope_parameters.partial_rotary_factor is missing; expected a share of the head"),
        ("bamba", {**SSM, **WHOLE, "mamba_d_head": 9}, "mamba_d_head = 9; expected mamba_expand * hidden_size"),
        ("bamba", {**SSM, **WHOLE, "attn_layer_indices": [3]}, "attn_layer_indices = [3]; expected a list"),
        ("bamba", {**SSM, **WHOLE, "attn_layer_indices": "1"}, "attn_layer_indices = '1'; expected a list"),
    ],
)  # fmt: skip
def test_what_this_code_has_not_is_named(kind, values, message, read):
    with pytest.raises(ConfigError) as raised:
        read(kind, **values)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_recipe_that_is_written_can_be_read(tmp_path):
    published("Qwen3", head_dim=6).save_pretrained(tmp_path / "folder")
    run = convert(tmp_path / "folder", tmp_path / "run")
    assert load_recipe(run.path / "recipe.yaml") == run.recipe
    assert run.recipe.model.mixer.options.qk_norm
    assert run.recipe.model.mixer.options.norm_eps == run.recipe.model.norm_eps == 1e-6
