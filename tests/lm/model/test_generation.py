"""Generation against sampling by hand, for prompts of several lengths."""

import pytest
import torch

from mixerlab.data.tokenizers import ByteTokenizer
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.model.generation import generate, sample, stream_texts


@pytest.fixture(scope="module")
def decoder():
    decoder = Decoder(257, d_model=16, n_layers=2, mixer=["sessa", "attention"]).eval()
    decoder.initialize(0)
    for parameter in decoder.parameters():
        parameter.data *= 8  # far from uniform, so that the likeliest token is clear
    return decoder


def test_greedy_decoding_takes_the_likeliest_token_of_the_whole_sequence(decoder):
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    tokens = torch.stack(list(generate(decoder, prompts, 6, temperature=0)), dim=1)
    for prompt, continued in zip(prompts, tokens.tolist(), strict=True):
        ids = list(prompt)
        for token in continued:
            assert decoder(torch.tensor([ids]))[0, -1].argmax().item() == token
            ids.append(token)


def test_the_seed_decides_the_sample(decoder):
    def run(seed):
        return torch.stack(list(generate(decoder, [[1, 2]], 20, temperature=2.0, seed=seed))).tolist()

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch.Generator().manual_seed(0)

    def seen(top_p):
        return {int(sample(logits, 1.0, top_p, generator)) for _ in range(300)}

    assert seen(0.5) == {0}
    assert seen(0.51) == {0, 1}
    assert seen(0.8) == {0, 1}
    assert seen(1.0) == {0, 1, 2, 3}


def test_samples_follow_the_tempered_distribution():
    logits = torch.tensor([[0.6, 0.4]]).log().expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    share = (sample(logits, 0.5, 1.0, generator) == 0).double().mean()
    assert share == pytest.approx(0.36 / (0.36 + 0.16), abs=0.01)


def test_characters_are_whole_and_the_end_of_a_document_ends_the_text(decoder, monkeypatch):
    tokenizer = ByteTokenizer()
    first, second = "é§".encode(), b"ab"

    def tokens(*_, **__):
        for a, b in zip([*first, 120], [*second, 256, 99, 99], strict=True):
            yield torch.tensor([a, b])

    monkeypatch.setattr("mixerlab.lm.model.generation.generate", tokens)
    pieces = list(stream_texts(decoder, tokenizer, ["", ""], max_new_tokens=5))
    assert [text for i, text in pieces if i == 0] == ["é", "§", "x"]
    assert [text for i, text in pieces if i == 1] == ["a", "b"]


def test_a_prompt_without_tokens_is_refused(decoder):
    with pytest.raises(ValueError, match="at least one token"):
        list(generate(decoder, [[1], []], 3))
