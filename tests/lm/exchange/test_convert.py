"""Published checkpoints, saved by transformers with random weights: the same logits, text, and every refusal."""

import json
import os
import shutil
from types import ModuleType

import pytest
import torch
import transformers
import yaml
from filelock import FileLock
from safetensors.torch import load, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from mixerlab.__main__ import main
from mixerlab.data.tokenizers import train_bpe
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import read
from mixerlab.lm.run.folder import Run
from tiny_runs import generate, train

transformers.logging.disable_progress_bar()
VOCAB = 283  # a tokenizer of 280 tokens and padding

MAMBA = {"state_size": 4}
MAMBA2 = {"state_size": 8, "head_dim": 8, "num_heads": 6, "n_groups": 2, "chunk_size": 16}
CASES = {
    "mamba": ("mamba", MAMBA),
    "mamba untied, biased": ("mamba", {**MAMBA, "tie_word_embeddings": False, "use_bias": True, "conv_kernel": 3}),
    "mamba of other norms": ("mamba", {**MAMBA, "layer_norm_epsilon": 1e-3}),
    "mamba2 of other norms": ("mamba2", {**MAMBA2, "layer_norm_epsilon": 1e-3}),
    "mamba wide, no conv bias": ("mamba", {**MAMBA, "use_conv_bias": False, "time_step_rank": 5, "expand": 3}),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2 tied, biased": ("mamba2", {**MAMBA2, "tie_word_embeddings": True, "use_bias": True, "n_groups": 1}),
    "mamba2 wide, no conv bias": ("mamba2", {**MAMBA2, "use_conv_bias": False, "expand": 4, "head_dim": 16}),
    "mamba2 clamped": ("mamba2", {**MAMBA2, "time_step_limit": (0.01, 0.05), "conv_kernel": 2}),
}  # fmt: skip


def published(kind, **options):
    """A model of transformers in which every parameter is random and matters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": VOCAB, **options}
    model = (
        MambaForCausalLM(MambaConfig(**sizes))
        if kind == "mamba"
        else Mamba2ForCausalLM(Mamba2Config(**sizes))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save(model, folder, tokenizer=True, **options):
    model.save_pretrained(folder, **options)
    if tokenizer:
        texts = ["the cat sat on the mat\n" * 9, "def f(x):\n    return x + 1\n" * 9]
        train_bpe(texts, 280).tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def convert(folder, run):
    assert main(["convert", str(folder), "--to", str(run)]) == 0
    return run


def refusal(folder, run, capsys) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert main(["convert", str(folder), "--to", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """By kind, a folder that nobody changes."""
    root = tmp_path_factory.mktemp("published")
    return {
        "mamba": save(published("mamba", **MAMBA), root / "mamba"),
        "mamba2": save(published("mamba2", **MAMBA2), root / "mamba2"),
    }


@pytest.fixture
def copy(checkpoint, tmp_path):
    """Copies a folder and changes its config.json."""

    def make(kind, **values):
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint[kind], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    return make


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_the_logits_are_those_of_transformers(kind, options, tmp_path, monkeypatch):
    model = published(kind, **options)
    decoder = Run.open(convert(save(model, tmp_path / "folder"), tmp_path / "run")).decoder()
    ids = torch.randint(VOCAB, (2, 37))
    with torch.no_grad():
        ours, theirs = decoder(ids), model(ids, use_cache=False).logits
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()

        # transformers computes norms and steps in float32, whatever the weights have; here in float64.
        class Float64(ModuleType):
            float32 = torch.float64

            def __getattr__(self, name):
                return getattr(torch, name)

        for module in (modeling_mamba, modeling_mamba2):
            monkeypatch.setattr(module, "torch", Float64("torch"))
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        ours, theirs = decoder.double()(ids), model.double()(ids, use_cache=False).logits
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_the_run_generates_and_says_how(kind, checkpoint, tmp_path, capsys):
    run = tmp_path / "runs" / "it" / "published"
    convert(checkpoint[kind], run)
    said = capsys.readouterr().out
    assert f"{kind}, 2 layers of width 24" in said
    assert "M parameters\n" in said
    assert f"mixerlab generate {run} " in said
    assert generate(run, "--prompt", "the cat", "--max-new-tokens", "30", "--temperature", "5") == 0
    assert capsys.readouterr().out.startswith("the cat")
    state = read(Run(run).checkpoints.last())
    assert state["global_step"] == 0
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__
    assert list(run.parent.iterdir()) == [run]  # nothing else is left


def test_the_tokenizer_is_the_folders_padded_to_the_models_size(copy, tmp_path):
    folder = copy("mamba", eos_token_id=7)  # an ordinary token: the default of some configuration
    tokenizer = Run(convert(folder, tmp_path / "run")).tokenizer()
    original = train_bpe(["the cat sat on the mat\n" * 9, "def f(x):\n    return x + 1\n" * 9], 280)
    assert tokenizer.vocab_size == VOCAB > original.vocab_size
    text = "the cat\n  <|endoftext|> <|unused 281|> é"
    assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.decode_bytes([*tokenizer.encode(text), *range(280, 283)]) == text.encode()
    assert tokenizer.eod_id == original.eod_id


def test_what_ends_a_document_is_what_the_folder_says(copy, tmp_path):
    folder = copy("mamba")
    tokenizer = train_bpe(["the cat sat on the mat\n" * 9], 270).tokenizer
    tokenizer.add_special_tokens(["<stop>", "<halt>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    stop, halt = map(tokenizer.token_to_id, ("<stop>", "<halt>"))
    assert Run(convert(folder, tmp_path / "1")).tokenizer().decode_bytes([0]) == b""  # <|endoftext|>
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [halt]}))
    assert Run(convert(folder, tmp_path / "2")).tokenizer().eod_id == halt
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert Run(convert(folder, tmp_path / "3")).tokenizer().eod_id == stop


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_the_recipe_is_whole_and_trains_such_a_model(kind, checkpoint, tmp_path):
    run = convert(checkpoint[kind], tmp_path / "run")
    recipe = Run(run).recipe
    assert load_recipe(run / "recipe.yaml") == recipe  # the data are there too
    model = recipe.model
    assert (model.block, model.mlp, model.norm, model.mixer.name) == (
        "transformer",
        "none",
        "rmsnorm",
        kind,
    )
    assert recipe.data.options.tokenizer_file == str(run / "tokenizer.json")


def test_the_weights_can_be_trained_further(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 200)
    run = convert(checkpoint["mamba2"], tmp_path / "run")
    before = read(Run(run).checkpoints.last())["state_dict"]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"source": "files", "files": [str(tmp_path / "a.txt")], "seq_len": 16}
    recipe["data"] |= {"cache_dir": str(tmp_path / "cache")}
    recipe["trainer"] |= {"steps": 2, "batch_size": 2, "val_batches": 1}
    recipe["optim"] |= {"lr": 1e-6, "weight_decay": 0.0, "warmup_steps": 0}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train(run / "recipe.yaml", f"resume={run}") == 0
    after = read(Run(run).checkpoints.last())
    assert after["global_step"] == 2
    for name, tensor in after["state_dict"].items():
        assert 0 < (tensor - before[name]).abs().max() <= 1e-5, name  # two small steps from there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_stored_as_float32_and_said(dtype, tmp_path, capsys):
    model = published("mamba2", **MAMBA2).to(dtype)
    run = convert(save(model, tmp_path / "folder"), tmp_path / "run")
    assert f"{str(dtype).removeprefix('torch.')} stored as float32" in capsys.readouterr().out
    decoder = Run.open(run).decoder()
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    ids = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(
            decoder(ids), model.float()(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )


def test_parts_are_put_together(checkpoint, tmp_path, capsys):
    folder = save(published("mamba2", **MAMBA2), tmp_path / "parts", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    whole = Run.open(convert(checkpoint["mamba2"], tmp_path / "whole")).decoder()
    parts = Run.open(convert(folder, tmp_path / "run")).decoder()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))

    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"{lost}: no such file, but model.safetensors.index.json names it" in refusal(
        folder, tmp_path / "2", capsys
    )
    index = folder / "model.safetensors.index.json"
    for wrong in ({}, {"weight_map": {"a": "../a"}}, {"weight_map": {"a": 3}}, {"weight_map": 3}):
        index.write_text(json.dumps(wrong))
        assert f"{index}: weight_map" in refusal(folder, tmp_path / "2", capsys)


WIDTHS = {"headdim": 8, "ngroups": 2, "d_state": 8}


def original(model, folder, layer, **config):
    """The same weights as `mamba_ssm` names them, in its vocabulary padded to a multiple of 8."""
    folder.mkdir()
    weights = {
        name.replace("embeddings", "embedding"): tensor.clone() for name, tensor in model.state_dict().items()
    }
    padding = torch.zeros(-VOCAB % 8, 24)
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        weights[name] = torch.cat((weights[name], padding))
    save_file(weights, folder / "model.safetensors")
    values = {"d_model": 24, "n_layer": 2, "vocab_size": VOCAB, "rms_norm": True, **config}
    values["ssm_cfg"] = layer
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (("mamba", MAMBA), {"d_state": 4, "dt_rank": "auto", "use_fast_path": False}),
        (("mamba2", {**MAMBA2, "tie_word_embeddings": True}), {"layer": "Mamba2", **WIDTHS}),
    ],
    ids=["Mamba1", "Mamba2"],
)  # fmt: skip
def test_the_layout_of_mamba_ssm_is_read_too(model, layer, tmp_path, capsys):
    model = published(model[0], **model[1])
    folder = original(model, tmp_path / "folder", layer)
    run = Run.open(convert(folder, tmp_path / "run"))
    assert "tokenizer   none, so mixerlab generate cannot be used" in capsys.readouterr().out
    assert run.recipe.data.options.vocab_size == 288
    ids = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits
        torch.testing.assert_close(run.decoder()(ids)[..., :VOCAB], theirs, rtol=1e-4, atol=1e-4)
    assert generate(tmp_path / "run") == 2
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "layer", "message"),
    [
        ({}, {"layer": "Mamba3"}, "ssm_cfg.layer = 'Mamba3'; expected Mamba1 or Mamba2"),
        ({}, {"layer": "Mamba2", "d_ssm": 24}, "ssm_cfg.d_ssm = 24; expected null"),
        ({}, {"layer": "Mamba2", "D_has_hdim": True}, "ssm_cfg.D_has_hdim = True; expected false"),
        ({}, {"layer": "Mamba2", "rmsnorm": False}, "ssm_cfg.rmsnorm = False; expected true"),
        ({}, {"layer": "Mamba2", "norm_before_gate": True}, "norm_before_gate = True; expected false"),
        ({}, {"headdim": 8}, "ssm_cfg.headdim = 8; expected none"),
        ({}, "Mamba2", "ssm_cfg = 'Mamba2'; expected a mapping"),
        ({"rms_norm": False}, {}, "rms_norm = False; expected true"),
        ({"attn_layer_idx": [1]}, {}, "attn_layer_idx = [1]; expected []"),
        ({"d_intermediate": 64}, {}, "d_intermediate = 64; expected 0"),
    ],
)
def test_what_mamba_ssm_has_and_this_code_has_not_is_named(config, layer, message, tmp_path, capsys):
    folder = original(published("mamba", **MAMBA), tmp_path / "folder", layer, **config)
    assert message in refusal(folder, tmp_path / "run", capsys)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            "mamba",
            {"model_type": "gpt2"},
            "model_type = 'gpt2'; expected llama, mistral, qwen2, qwen3, mamba,",
        ),
        ("mamba", {"model_type": ["llama"]}, "model_type = ['llama']; expected llama, mistral"),
        ("mamba", {"model_type": None}, "model_type = None; expected llama, mistral"),
        ("mamba", {"hidden_size": "24"}, "hidden_size = '24'; expected an integer of at least 1"),
        ("mamba", {"hidden_size": 0}, "hidden_size = 0; expected an integer"),
        ("mamba", {"num_hidden_layers": True}, "num_hidden_layers = True; expected an integer"),
        ("mamba", {"expand": 1.5}, "expand = 1.5; expected an integer"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; expected \"silu\""),
        ("mamba", {"use_bias": "no"}, "use_bias = 'no'; expected true or false"),
        ("mamba", {"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0; expected a number above 0"),
        ("mamba", {"rms_norm": False}, "rms_norm = False; expected true"),
        ("mamba", {"intermediate_size": 50}, "intermediate_size = 50; expected 48"),
        ("mamba", {"time_step_rank": "most"}, "time_step_rank = 'most'; expected an integer"),
        ("mamba", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}; expected null"),
        ("mamba", {"vocab_size": 200}, "tokenizer.json: 280 tokens; expected at most the 200"),
        ("mamba2", {"num_heads": 5}, "num_heads = 5; expected expand * hidden_size / head_dim = 6"),
        ("mamba2", {"n_groups": 4}, "these options do not fit together: model.mixer.n_groups = 4"),
        ("mamba2", {"time_step_limit": [0.1, 0.01]}, "time_step_limit = [0.1, 0.01]; expected two numbers"),
        ("mamba2", {"time_step_limit": None}, "time_step_limit = None; expected two numbers"),
        ("mamba2", {"time_step_limit": [0, 10**400]}, "; expected two numbers"),
        # Sizes that must not be tried.
        ("mamba", {"hidden_size": 10**30}, "expected an integer of at least 1 and below 2^31"),
        ("mamba", {"num_hidden_layers": 10**9}, "it describes a model of over 576,0"),
        ("mamba", {"vocab_size": 10**9}, "it describes a model of over 24,000,00"),
        ("mamba2", {"state_size": 2**31 - 1, "conv_kernel": 2**31 - 1}, "such a model cannot be built"),
        # What is well formed and not what the weights are.
        ("mamba", {"num_hidden_layers": 1}, "tensor backbone.layers.1."),
        ("mamba", {"num_hidden_layers": 3}, "no tensor backbone.layers.2.norm.weight and 9 more"),
        ("mamba", {"state_size": 5}, "A_log has shape (48, 4); expected (48, 5) by config.json"),
        ("mamba", {"use_conv_bias": False}, "mixer.conv1d.bias is none of the model"),
        ("mamba", {"tie_word_embeddings": False}, "no tensor lm_head.weight in the weights"),
        ("mamba2", {"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ("mamba2", {"vocab_size": 300}, "has shape (283, 24); expected (300, 24)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(kind, values, message, copy, tmp_path, capsys):
    folder = copy(kind, **values)
    error = refusal(folder, tmp_path / "run", capsys)
    assert message in error
    assert str(folder) in error
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_whole_are_named(copy, tmp_path, capsys):
    folder, run = copy("mamba"), tmp_path / "run"
    file = folder / "model.safetensors"
    content = file.read_bytes()
    weights = load(content)

    file.write_bytes(content[:-100])
    assert f"{file}: not a whole safetensors file" in refusal(folder, run, capsys)
    file.write_bytes(b"")
    assert f"{file}: not a whole safetensors file" in refusal(folder, run, capsys)
    save_file(weights | {"backbone.layers.0.mixer.extra": torch.ones(1)}, file)
    assert "tensor backbone.layers.0.mixer.extra is none of the model" in refusal(folder, run, capsys)
    save_file(weights | {"backbone.embedding.weight": torch.ones(VOCAB, 24)}, file)
    assert "is there twice" in refusal(folder, run, capsys)
    save_file({name: tensor for name, tensor in weights.items() if not name.endswith("1.mixer.D")}, file)
    assert "no tensor backbone.layers.1.mixer.D in the weights" in refusal(folder, run, capsys)
    save_file(weights | {"backbone.norm_f.weight": torch.ones(24, dtype=torch.int8)}, file)
    assert "backbone.norm_f.weight has dtype torch.int8" in refusal(folder, run, capsys)
    file.unlink()
    assert f"{folder}: no weights; expected model.safetensors" in refusal(folder, run, capsys)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin: pickled weights can run code and are not read" in refusal(folder, run, capsys)
    assert not run.exists()


def test_a_model_without_its_head_is_read_where_the_head_is_the_embedding(checkpoint, tmp_path):
    model = MambaForCausalLM.from_pretrained(checkpoint["mamba"])
    folder = save(model.backbone, tmp_path / "folder")
    bare = Run.open(convert(folder, tmp_path / "bare")).decoder()
    whole = Run.open(convert(checkpoint["mamba"], tmp_path / "whole")).decoder()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), bare.parameters(), strict=True))


def test_files_that_are_not_what_they_should_be_are_named(copy, tmp_path, capsys):
    folder, run = copy("mamba"), tmp_path / "run"
    (folder / "tokenizer.json").write_text("{}")
    assert f"{folder}/tokenizer.json: not a tokenizer.json of the tokenizers library" in refusal(
        folder, run, capsys
    )
    tokenizer = train_bpe(["ab"], 260).tokenizer
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    state["model"]["vocab"]["x"] = state["model"]["vocab"].pop("<|endoftext|>")
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert "no token ends a document; expected the eos_token of tokenizer_config.json" in refusal(
        folder, run, capsys
    )
    for eos in (["a"], {"content": ["a"]}, 7):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert "no token ends a document" in refusal(folder, run, capsys)
    state["model"]["vocab"]["</s>"] = 270
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert "leave gaps" in refusal(folder, run, capsys)
    for text, what in (("{", "not JSON"), ("[]", "list in JSON; expected a mapping"), ("\xff", "not JSON")):
        (folder / "config.json").write_text(text, encoding="latin-1")
        assert f"{folder}/config.json: {what}" in refusal(folder, run, capsys)
    (folder / "config.json").unlink()
    assert f"{folder}/config.json: no such file" in refusal(folder, run, capsys)


def test_places_that_cannot_be_used_are_named(checkpoint, tmp_path, capsys, monkeypatch):
    folder = checkpoint["mamba"]
    monkeypatch.chdir(tmp_path)
    assert "nowhere: no such folder" in refusal("nowhere", tmp_path / "run", capsys)
    assert "hf download state-spaces/mamba-130m-hf" in refusal("state-spaces/mamba-130m-hf", "run", capsys)
    assert "that is a file; expected the folder" in refusal(folder / "config.json", tmp_path / "run", capsys)
    (tmp_path / "file").write_text("")
    assert f"--to {tmp_path}/file: it exists already" in refusal(folder, tmp_path / "file", capsys)
    assert "file/run: it cannot be written" in refusal(folder, tmp_path / "file" / "run", capsys)
    assert f"--to {tmp_path}: it exists already; expected a new or an empty" in refusal(
        folder, tmp_path, capsys
    )
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "recipe.yaml").is_file()


def test_what_a_killed_conversion_left_goes_with_the_next_and_one_at_a_time_writes(
    checkpoint, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "runs" / "it"

    def kill(*args):
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(torch, "save", kill)
        convert(checkpoint["mamba"], run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = run.parent.iterdir()
    assert left.name == ".convert-it"
    with FileLock(left / ".lock"):
        assert "another process is converting to that folder" in refusal(checkpoint["mamba"], run, capsys)
    convert(checkpoint["mamba"], run)
    assert list(run.parent.iterdir()) == [run]
