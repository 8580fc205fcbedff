"""Runs exported for transformers: the same logits and tokens there, the same bytes after coming back, every refusal."""

import json
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mixerlab.lm.exchange.export as export_module
from mixerlab.__main__ import main
from mixerlab.data.tokenizers import ByteTokenizer, train_bpe
from mixerlab.lm.exchange.native import native_configs, native_weights
from mixerlab.lm.exchange.tokenizer_files import HARD_TEXT, write_tokenizer
from mixerlab.lm.model.generation import generate
from mixerlab.lm.run.checkpoint import reshard
from untrained_runs import ATTENTION, MAMBA, MAMBA2, STEP, TEXTS, untrained

transformers.logging.disable_progress_bar()

WINDOWED = {**ATTENTION, "window": 8}
SWIGLU = {"mlp": "swiglu", "mlp_dim": 40}
NATIVE = {
    "llama": ({**SWIGLU, "mixer": ATTENTION}, "LlamaForCausalLM"),
    "llama tied": (
        {
            "mlp": "swiglu",
            "mixer": {"name": "attention", "rope_theta": 500.0},
            "norm_eps": 1e-6,
            "tie_embeddings": True,
        },
        "LlamaForCausalLM",
    ),
    "mistral": ({**SWIGLU, "mixer": WINDOWED}, "MistralForCausalLM"),
    "qwen3": ({**SWIGLU, "mixer": {**ATTENTION, "qk_norm": True}}, "Qwen3ForCausalLM"),
    "llama with wide heads": ({**SWIGLU, "mixer": {**ATTENTION, "head_dim": 10}}, "LlamaForCausalLM"),
    "qwen3 with windows": (
        {**SWIGLU, "mixer": [{**WINDOWED, "qk_norm": True}, {**ATTENTION, "qk_norm": True}]},
        "Qwen3ForCausalLM",
    ),
    "mamba": ({"mlp": "none", "mixer": MAMBA}, "MambaForCausalLM"),
    "mamba tied, biased": (
        {
            "mlp": "none",
            "mixer": {**MAMBA, "bias": True, "dt_rank": 3, "d_conv": 3},
            "norm_eps": 1e-6,
            "tie_embeddings": True,
        },
        "MambaForCausalLM",
    ),
    "mamba2": ({"mlp": "none", "mixer": MAMBA2}, "Mamba2ForCausalLM"),
    "mamba2 tied, biased": (
        {"mlp": "none", "mixer": {**MAMBA2, "bias": True, "conv_bias": False}, "tie_embeddings": True},
        "Mamba2ForCausalLM",
    ),
    "bamba": ({**SWIGLU, "mixer": [MAMBA2, ATTENTION]}, "BambaForCausalLM"),
    "bamba, half rotated": ({**SWIGLU, "mixer": [MAMBA2, {**ATTENTION, "rope_dim": 4}]}, "BambaForCausalLM"),
    "bamba tied": (
        {**SWIGLU, "n_layers": 3, "mixer": [ATTENTION, MAMBA2], "tie_embeddings": True},
        "BambaForCausalLM",
    ),
}
QWEN2 = {
    "qwen2": {**SWIGLU, "mixer": {**ATTENTION, "bias": True}},
    "qwen2 with windows": {
        **SWIGLU,
        "mixer": [{**ATTENTION, "bias": True}, {**WINDOWED, "bias": True}],
    },
}
"""Without a tokenizer: transformers puts that of Qwen2 in the place of any other."""
REMOTE: dict[str, dict] = {
    "sessa": {"block": "gated", "norm": "layernorm", "mixer": {"name": "sessa", "n_heads": 2}},
    "hybrid": {
        "mixer": [{"name": "parallel", "mixers": [ATTENTION, MAMBA2]}, {"name": "identity"}],
        "mlp": "gelu",
    },
    "clamped": {"mlp": "none", "mixer": {**MAMBA2, "dt_limit": [0.01, 0.05]}, "tie_embeddings": True},
}


def export(run, to, *arguments):
    assert main(["export", str(run.path), "--to", str(to), *arguments]) == 0
    return to


def refusal(run, to, capsys, *arguments):
    """The one line that the command ends with."""
    capsys.readouterr()
    assert main(["export", str(run.path), "--to", str(to), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not to.exists()
    return err


def load(folder, **options):
    options |= {"output_loading_info": True, "dtype": torch.float32}
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


def content(folder):
    """The bytes of all files but the card, which tells of the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def assert_same(run, model):
    """The same logits, and 50 tokens generated greedily."""
    decoder = run.decoder().float()
    rows = decoder.embedding.num_embeddings
    ids = torch.randint(rows, (2, 70), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, theirs = decoder(ids), model(ids, use_cache=False).logits
        assert (ours - theirs).norm() <= 1e-5 * ours.norm()
        prompt = ids[:1, :11]
        mask = torch.ones_like(prompt)
        tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=50, do_sample=False)[0, 11:]
    expected = [int(token) for token in generate(decoder, prompt.tolist(), 50, temperature=0)]
    assert tokens.tolist() == expected[: len(tokens)]
    assert len(tokens) == 50 or tokens[-1] == model.config.eos_token_id


@pytest.mark.parametrize(("model", "architecture"), NATIVE.values(), ids=NATIVE)
def test_transformers_computes_and_generates_the_same(model, architecture, tmp_path, capsys):
    run = untrained(tmp_path / "run", model)
    folder = export(run, tmp_path / "out", "--format", "native")
    assert f"native: {architecture} of transformers" in capsys.readouterr().out
    reloaded = load(folder)
    assert type(reloaded).__name__ == architecture
    assert_same(run, reloaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("model", QWEN2.values(), ids=QWEN2)
def test_qwen2_goes_without_a_tokenizer(model, tmp_path):
    run = untrained(tmp_path / "run", model, tokenizer=None)
    reloaded = load(export(run, tmp_path / "out", "--format", "native"))
    assert type(reloaded).__name__ == "Qwen2ForCausalLM"
    assert_same(run, reloaded)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_one_epsilon_of_transformers_does_for_both_of_ours(tmp_path):
    def small(decoder):
        for block in decoder.layers:
            block.mixer.q_proj.weight.mul_(1e-3)
            block.mixer.k_proj.weight.mul_(1e-3)

    run = untrained(tmp_path / "run", NATIVE["qwen3"][0], change=small)
    assert run.recipe.model.norm_eps != run.recipe.model.mixer.options.norm_eps
    assert_same(run, load(export(run, tmp_path / "out", "--format", "native")))


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [
        *((model, "bytes") for model, _ in NATIVE.values()),
        *((model, None) for model in QWEN2.values()),
        (NATIVE["llama"][0], "bpe"),
    ],
    ids=[*NATIVE, *QWEN2, "llama with bpe"],
)
def test_export_convert_export_gives_the_same_bytes(model, tokenizer, tmp_path):
    run = untrained(tmp_path / "run", model, tokenizer)
    first = export(run, tmp_path / "first", "--format", "native")
    assert main(["convert", str(first), "--to", str(tmp_path / "back")]) == 0
    back = type(run).open(tmp_path / "back")
    second = export(back, tmp_path / "second", "--format", "native")
    assert content(first) == content(second)
    ids = torch.randint(250, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(back.decoder()(ids), run.decoder()(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"block": "gated"}, "model.block = 'gated': a native export needs 'transformer'"),
        ({"norm": "layernorm"}, "model.norm = 'layernorm': a native export needs 'rmsnorm'"),
        ({"mlp": "gelu"}, "model.mlp = 'gelu': a native export needs 'swiglu'"),
        ({"mixer": {**ATTENTION, "rope": False}}, "model.mixer.rope = false: a native export needs true"),
        (
            {"mixer": {**ATTENTION, "bias": True, "qk_norm": True}},
            "model.mixer.bias = true: a native export needs false with qk_norm",
        ),
        (
            {"mixer": [ATTENTION, WINDOWED]},
            "model.mixer[1].window = 8: a native export needs null in every layer, or qk_norm",
        ),
        (
            {"mixer": [ATTENTION, {**ATTENTION, "n_heads": 2}]},
            "model.mixer[1].n_heads = 2: a native export needs 4, as model.mixer[0] has",
        ),
        (
            {"mixer": [{**WINDOWED, "qk_norm": True}, {**ATTENTION, "qk_norm": True, "window": 4}]},
            "model.mixer[1].window = 4: a native export needs 8 or null in every layer",
        ),
        (
            {"mixer": {**ATTENTION, "bias": True, "head_dim": 10}},
            "model.mixer.head_dim = 10: a native export needs null with bias",
        ),
        (
            {"mixer": {**ATTENTION, "rope_dim": 2}},
            "model.mixer.rope_dim = 2: a native export needs null, or layers of mamba2 too",
        ),
        ({"mixer": MAMBA}, "model.mlp = 'swiglu': a native export needs 'none'"),
        ({"mixer": MAMBA2}, "model.mlp = 'swiglu': a native export needs 'none', or layers of attention too"),
        (
            {"mixer": {**MAMBA2, "dt_limit": [0.0, 0.1]}, "mlp": "none"},
            "model.mixer.dt_limit = [0.0, 0.1]: a native export needs [0.0, inf]",
        ),
        (
            {"mixer": {**MAMBA2, "norm_eps": 1e-6}, "mlp": "none"},
            "model.mixer.norm_eps = 1e-06: a native export needs 1e-05, model.norm_eps",
        ),
        (
            {"mixer": [MAMBA2, {**ATTENTION, "qk_norm": True}]},
            "model.mixer[1].qk_norm = true: a native export needs false beside mamba2",
        ),
        ({"mixer": [MAMBA, ATTENTION]}, "model.mixer = 'attention mamba': a native export needs"),
        ({"mixer": "identity"}, "model.mixer = 'identity': a native export needs attention, mamba or mamba2"),
    ],
)
def test_what_prevents_a_native_export_is_named(model, message, tmp_path, capsys):
    run = untrained(tmp_path / "run", {"mlp": "swiglu", "mixer": ATTENTION, **model})
    error = refusal(run, tmp_path / "out", capsys, "--format", "native")
    assert message in error
    assert error.endswith("; --format remote takes any recipe\n")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_where_transformers_would_replace_the_tokenizer_of_qwen2_it_is_llama_with_biases(tokenizer, tmp_path):
    run = untrained(tmp_path / "run", QWEN2["qwen2"], tokenizer)
    first = export(run, tmp_path / "out", "--format", "native")
    reloaded = load(first)
    assert type(reloaded).__name__ == "LlamaForCausalLM"
    assert_same(run, reloaded)
    assert main(["convert", str(first), "--to", str(tmp_path / "back")]) == 0
    second = export(type(run).open(tmp_path / "back"), tmp_path / "second", "--format", "native")
    assert content(first) == content(second)


def test_a_tokenizer_that_transformers_would_replace_goes_with_our_code(tmp_path, capsys):
    run = untrained(tmp_path / "run", QWEN2["qwen2 with windows"], "bpe")
    assert "model.mixer.bias makes it model_type 'qwen2'" in refusal(
        run, tmp_path / "out", capsys, "--format", "native"
    )
    export(run, tmp_path / "out")
    assert "remote: modeling_mixerlab.py" in capsys.readouterr().out


@pytest.mark.parametrize("model", REMOTE.values(), ids=REMOTE)
def test_any_other_decoder_goes_with_code_that_imports_mixerlab(model, tmp_path, capsys):
    run = untrained(tmp_path / "run", {"mlp": "swiglu", **model})
    folder = export(run, tmp_path / "out")
    said = capsys.readouterr().out
    assert "remote: modeling_mixerlab.py" in said
    assert "not native  model." in said
    reloaded = load(folder, trust_remote_code=True)
    assert_same(run, reloaded)
    config = json.loads(
        (folder / "config.json").read_text(), parse_constant=pytest.fail
    )  # JSON has no infinity
    assert config["model_type"] == "mixerlab"


def test_our_code_takes_batches_beams_labels_and_padding_on_one_side(tmp_path):
    run = untrained(tmp_path / "run", {**SWIGLU, "mixer": [ATTENTION, MAMBA]})
    model = load(export(run, tmp_path / "out"), trust_remote_code=True)
    decoder = run.decoder()
    ids = torch.randint(250, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 400}
    with torch.no_grad():
        cached = model.generate(ids, attention_mask=mask, **greedy)
        assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **greedy))
        beams = {"attention_mask": mask, "num_beams": 3, **greedy}
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))

        nll, _ = decoder(ids[:, :-1], ids[:, 1:])
        torch.testing.assert_close(model(ids, labels=ids).loss, nll.mean())

        right, left = mask.clone(), mask.clone()
        right[0, -3:] = left[0, :3] = 0
        torch.testing.assert_close(model(ids, attention_mask=right).logits, decoder(ids))
        with pytest.raises(ValueError, match="no padding on the left"):
            model(ids, attention_mask=left)
        with pytest.raises(ValueError, match="no padding on the right"):
            model.generate(ids, attention_mask=right, **greedy)
        together = model.generate(ids, attention_mask=left, **greedy)
        assert torch.equal(
            together[0, 9:], model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], **greedy)[0, 6:]
        )
        assert torch.equal(together[1], cached[1])
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, decoder(ids)[:, -2:])


def test_our_code_saves_what_it_has_read(tmp_path):
    run = untrained(tmp_path / "run", REMOTE["clamped"])
    model = load(export(run, tmp_path / "out"), trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", trust_remote_code=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert_same(run, again)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(TEXTS, 280)], ids=["bytes", "bpe"])
def test_tokens_are_the_same_there_whatever_the_text(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tokenizer.vocab_size + 3, 64, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    alphabet = "".join(map(chr, [*range(0x250), *range(0x2000, 0x2100), 0x1F600]))
    for text in (HARD_TEXT, alphabet, "", " ", "\n\n", "<|endoftext|>", "a<|unused 281|>b", *TEXTS):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eod_id
    assert len(theirs) == tokenizer.vocab_size + 3


def test_tokens_that_a_tokenizer_adds_to_text_are_left_out(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_bpe(TEXTS, 280)
    eod = (tokenizer.eod_token, tokenizer.eod_id)
    tokenizer.tokenizer.post_processor = TemplateProcessing(single=f"{eod[0]} $A", special_tokens=[eod])
    write_tokenizer(tokenizer, tokenizer.vocab_size, 64, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert theirs("the cat")["input_ids"] == tokenizer.encode("the cat")


def test_rows_beyond_the_tokenizer_are_named(tmp_path):
    run = untrained(tmp_path / "run", NATIVE["llama"][0], "bpe", rows=283)
    assert_same(run, load(export(run, tmp_path / "out")))


def test_many_weights_go_into_several_files(tmp_path):
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    folder = export(run, tmp_path / "out", "--max-shard-size", "20KB")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    assert_same(run, load(folder))
    assert main(["convert", str(folder), "--to", str(tmp_path / "back")]) == 0


def test_shards_of_a_checkpoint_and_bf16_weights_are_read(tmp_path):
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    whole = export(run, tmp_path / "whole")
    reshard(run.checkpoints.at(STEP), 2)
    assert content(export(run, tmp_path / "sharded")) == content(whole)

    low = untrained(tmp_path / "low", NATIVE["llama"][0], trainer={"steps": STEP, "precision": "bf16-true"})
    assert_same(low, load(export(low, tmp_path / "out")))


def test_the_card_tells_of_the_run(tmp_path):
    run = untrained(tmp_path / "run", {**SWIGLU, "mixer": [ATTENTION, MAMBA]})
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: transformers" in front
    assert "| valid/loss | 2.5 |" in card
    assert "trust_remote_code=True" in card
    assert "pip install mixerlab" in card
    assert f"after {STEP} steps" in card
    assert "n_kv_heads: 2" in card
    assert "seq_len: 64" in card


@pytest.mark.parametrize("fault", ["order", "name", "scale"])
def test_what_does_not_come_back_the_same_is_not_written(fault, tmp_path, capsys, monkeypatch):
    def faulty(config, decoder):
        weights = native_weights(config, decoder)
        key = "model.layers.1.self_attn.k_proj.weight"
        if fault == "order":
            weights[key] = decoder.layers[1].mixer.k_proj.weight.detach()
        elif fault == "name":
            weights["model.layers.1.self_attn.other.weight"] = weights.pop(key)
        else:
            weights[key] = weights[key] * 1.01
        return weights

    monkeypatch.setattr(export_module, "native_weights", faulty)
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    error = refusal(run, tmp_path / "out", capsys, "--format", "native")
    assert ("does not read back" if fault == "name" else "the logits of what was written differ") in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_tokens_generated_there_are_noticed(tmp_path, capsys, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    def wrong(self, ids, **options):
        return torch.cat((ids, torch.zeros(1, 50, dtype=torch.int64)), dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", wrong)
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    assert "generates other tokens" in refusal(run, tmp_path / "out", capsys)


def test_places_and_sizes_that_cannot_be_used_are_named(tmp_path, capsys):
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    command = ["export", str(run.path), "--to"]
    assert main([*command, str(tmp_path)]) == 2
    assert "it exists already; expected a new or an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "out"), "--max-shard-size", "many"])
    assert "many: expected a size such as 500MB or 5GB" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert "file/out: it cannot be written" in refusal(run, tmp_path / "file" / "out", capsys)


def test_without_transformers_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    run = untrained(tmp_path / "run", NATIVE["llama"][0])

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(export_module, "import_module", absent)
    error = refusal(run, tmp_path / "out", capsys)
    assert (
        "No module named 'transformers'; expected it installed: pip install 'mixerlab[transformers]'" in error
    )


def test_what_transformers_computes_otherwise_goes_with_our_code(tmp_path, capsys, monkeypatch):
    def halved(config, decoder):
        return {name: weight / 2 for name, weight in native_weights(config, decoder).items()}

    monkeypatch.setattr(export_module, "native_weights", halved)
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    export(run, tmp_path / "out")
    said = capsys.readouterr().out
    assert "remote: modeling_mixerlab.py" in said
    assert "not native  model_type = 'llama': the logits of what was written differ by" in said


def test_a_window_that_is_another_is_noticed(tmp_path, capsys, monkeypatch):
    def wider(*args):
        return [{**config, "sliding_window": 117} for config in native_configs(*args)]

    monkeypatch.setattr(export_module, "native_configs", wider)
    run = untrained(tmp_path / "run", {**SWIGLU, "mixer": {**ATTENTION, "window": 100}})
    assert "logits of what was written differ" in refusal(run, tmp_path / "out", capsys, "--format", "native")


def test_the_end_of_a_document_does_not_end_the_comparison(tmp_path, monkeypatch):
    lengths = []
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    whole = LlamaForCausalLM.generate

    def watched(self, ids, **options):
        text = whole(self, ids, **options)
        lengths.append(text.shape[1] - ids.shape[1])
        return text

    def says_eod(decoder):
        decoder.norm.weight.zero_()  # all logits are equal, and the first token, which ends a document, is chosen

    monkeypatch.setattr(LlamaForCausalLM, "generate", watched)
    export(untrained(tmp_path / "run", NATIVE["llama"][0], change=says_eod), tmp_path / "out")
    assert lengths == [50]


def test_weights_that_are_not_finite_are_said_to_be(tmp_path, capsys):
    run = untrained(
        tmp_path / "run", NATIVE["llama"][0], change=lambda decoder: decoder.norm.weight.fill_(torch.nan)
    )
    assert "the run's logits are not finite" in refusal(run, tmp_path / "out", capsys)


def test_no_token_pads(tmp_path):
    folder = export(untrained(tmp_path / "run", NATIVE["llama"][0]), tmp_path / "out")
    assert load(folder).model.embed_tokens.padding_idx is None, "its embedding would not be trained further"


def test_rows_of_any_length_come_back(tmp_path, capsys):
    run = untrained(tmp_path / "run", NATIVE["llama"][0], data={"name": "text", "seq_len": 131072})
    first = export(run, tmp_path / "first")
    capsys.readouterr()
    assert main(["convert", str(first), "--to", str(tmp_path / "back")]) == 0
    assert (
        "rows are 131,072 tokens long; to train it on shorter ones, set data.seq_len"
        in capsys.readouterr().out
    )
    second = export(type(run).open(tmp_path / "back"), tmp_path / "second")
    assert content(first) == content(second)
    assert json.loads((first / "config.json").read_text())["max_position_embeddings"] == 131072


def test_the_card_does_not_say_where_files_lie(tmp_path):
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "cache_dir: mixerlab" in card
    assert "~" not in card
    assert str(tmp_path) not in card


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **options):
        raise SafetensorError("Error while serializing: IoError(Os { code: 28 })")

    monkeypatch.setattr(export_module, "save_torch_state_dict", full)
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    assert "it cannot be written: Error while serializing" in refusal(run, tmp_path / "out", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_read_back_is_not_called_unwritable(tmp_path, capsys, monkeypatch):
    def unreadable(*args, **options):
        raise OSError("no such cache")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreadable)
    run = untrained(tmp_path / "run", NATIVE["llama"][0])
    error = refusal(run, tmp_path / "out", capsys)
    assert "transformers cannot read back what was written: no such cache" in error


def test_what_a_native_export_leaves_out_is_said(tmp_path, capsys):
    run = untrained(tmp_path / "run", {**SWIGLU, "mixer": ATTENTION, "dropout": 0.3})
    export(run, tmp_path / "out")
    assert "model.dropout is left out" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["native", "remote"])
def test_the_backend_that_trained_a_run_is_not_needed(format, tmp_path):
    mixers = {"native": {**MAMBA2, "backend": "mamba_ssm"}, "remote": {"name": "sessa", "backend": "triton"}}
    run = untrained(tmp_path / "run", {"mlp": "none", "mixer": mixers[format]})
    folder = export(run, tmp_path / "out", "--format", format)
    assert_same(run, load(folder, trust_remote_code=format == "remote"))
    assert "triton" not in (folder / "config.json").read_text()
