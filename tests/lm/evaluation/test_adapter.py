"""What the harness is answered, against one text at a time without padding; every kind of mixer and tokenizer."""

import math

import pytest
import torch
from lm_eval.api.instance import Instance

from mixerlab.data.module import IGNORE
from mixerlab.data.tokenizers import ByteTokenizer
from mixerlab.lm.evaluation.adapter import MixerlabLM
from mixerlab.lm.model.generation import generate
from mixerlab.options import ConfigError
from ranks import Ranks
from untrained_runs import ATTENTION, MAMBA, MAMBA2, untrained

MIXERS = {
    "attention": {**ATTENTION, "window": 8},
    "mamba": MAMBA,
    "sessa and mamba2": [{"name": "sessa", "n_heads": 2}, MAMBA2],
    "gated_deltanet": {"name": "gated_deltanet", "n_heads": 2},
    "parallel": {"name": "parallel", "mixers": [ATTENTION, MAMBA2]},
}
PAIRS = [
    ("the cat sat on", " the mat"),
    ("def f(x):", "\n    return x"),
    ("", "the"),
    ("a ", "b"),
    ("é 語 " * 9, "the cat sat"),
]


def asked(kind, arguments):
    return [
        Instance(kind, doc={}, arguments=a, idx=i, metadata=("made-up", i, 1))
        for i, a in enumerate(arguments)
    ]


@pytest.fixture(params=MIXERS, scope="module")
def mixer(request):
    return MIXERS[request.param]


def model_of(folder, mixer, tokenizer="bpe", **options):
    run = untrained(folder / "run", {"mlp": "gelu", "mixer": mixer}, tokenizer)
    return MixerlabLM(run.decoder(), run.tokenizer(), **{"max_length": 24, "batch_size": 3} | options)


@torch.no_grad()
def expected(model, context, continuation):
    """(log-likelihood, whether it is greedy) of tokens, from the logits of this row alone, in float64."""
    ids = torch.tensor([(context + continuation)[-model.max_length - 1 :]])
    logits = model.decoder(ids[:, :-1])[0].double().log_softmax(-1)[-len(continuation) :]  # (n, V)
    wanted = torch.tensor(continuation)
    return float(logits.gather(-1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_continuations_have_the_likelihood_that_they_have_alone(mixer, tokenizer, tmp_path):
    model = model_of(tmp_path, mixer, tokenizer)
    answers = model.loglikelihood(asked("loglikelihood", PAIRS))
    for (context, continuation), (likelihood, is_greedy) in zip(PAIRS, answers, strict=True):
        context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
        before = model.tok_encode(context) or [model.eot_token_id]
        after = model.tok_encode(context + continuation)[len(model.tok_encode(context)) :]
        value, greedy = expected(model, before, after)
        assert likelihood == pytest.approx(value, abs=1e-4)
        assert is_greedy == greedy
    assert model.requests == len(PAIRS)
    lengths = [len(model.tok_encode("".join(pair))) + (not pair[0]) for pair in PAIRS]
    assert model.cut == sum(length > 25 for length in lengths) > 0


def test_what_is_likeliest_is_called_greedy(mixer, tmp_path):
    model = model_of(tmp_path, mixer, "bytes")
    tokens = [int(t) for t in generate(model.decoder, [[97, 98]], 4, temperature=0)]
    other = [*tokens[:3], (tokens[3] + 1) % 256]
    answers = model._loglikelihood_tokens([(None, [97, 98], tokens), (None, [97, 98], other)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_every_token_of_a_long_text_counts_once(tmp_path):
    model = model_of(tmp_path, ATTENTION, "bytes")
    text = "the cat sat on the mat, and then on the other mat; é"
    ids = model.tok_encode(text)
    stream = [model.eot_token_id, *ids]
    total = 0.0
    for start in range(0, len(ids), 24):  # a window's tokens are read after the last one before it
        window = stream[start : start + 25]
        if len(window) < 25:  # the last one goes back, and predicts only what is left
            total += expected(model, stream[-25:-24] + stream[-24 : -len(window) + 1], window[1:])[0]
        else:
            total += expected(model, window[:1], window[1:])[0]
    short, empty = "a", ""
    requests = asked("loglikelihood_rolling", [(text,), (short,), (empty,)])
    answers = model.loglikelihood_rolling(requests)
    assert answers[1:] == [pytest.approx(expected(model, [256], [97])[0], abs=1e-4), 0.0]
    assert answers[0] == pytest.approx(total, abs=1e-3)


def alone(model, text, new_tokens, stops):
    """Greedy generation of one text."""
    ids = model.tok_encode(text)[-(model.max_length - new_tokens) :] or [model.eot_token_id]
    found = []
    for token in generate(model.decoder, [ids], new_tokens, temperature=0):
        if int(token) == model.eot_token_id:
            break
        found.append(int(token))
    text = model.text_tokenizer.decode(found)
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_texts_of_different_lengths_go_on_as_each_would_alone(mixer, tokenizer, tmp_path):
    model = model_of(tmp_path, mixer, tokenizer)
    prompts = [context for context, _ in PAIRS]
    unstopped = [alone(model, prompt, 12, []) for prompt in prompts]
    longest = max(unstopped, key=len)
    stop = longest[1:3]  # one is ended in its midst
    arguments = [(prompt, {"until": [stop], "max_gen_toks": 12}) for prompt in prompts]
    answers = model.generate_until(asked("generate_until", arguments))
    assert answers == [alone(model, prompt, 12, [stop]) for prompt in prompts]
    assert len(answers[unstopped.index(longest)]) < len(longest) > 3


def test_generation_ends_where_all_texts_have_come_to_a_stop(tmp_path):
    model = model_of(tmp_path, ATTENTION, "bytes", max_length=60)
    prompts = [[1 + i, 2] for i in range(3)]
    steps = [
        [int(token) for token in generate(model.decoder, [prompt], 40, temperature=0)] for prompt in prompts
    ]
    ends = [chr(next(t for t in row if t < 128)) for row in steps]
    taken: list[str] = []
    model.world.is_at = taken.append
    model._generate(prompts, [[end] for end in ends], [0, 1, 2], max_new_tokens=40, temperature=0)
    assert len(taken) == max(row.index(ord(end)) + 1 for row, end in zip(steps, ends, strict=True)) < 40


def test_each_task_has_its_own_options_in_one_call(tmp_path):
    model = model_of(tmp_path, ATTENTION)
    arguments = [
        ("the", {"until": [], "max_gen_toks": 3}),
        ("the", {"until": [], "max_new_tokens": 9}),
        ("the", {"until": "\n", "max_gen_toks": 9, "do_sample": True, "temperature": 5.0, "top_p": 0.9}),
    ]
    few, many, sampled = model.generate_until(asked("generate_until", arguments))
    assert (few, many) == (alone(model, "the", 3, []), alone(model, "the", 9, []))
    assert sampled != many
    assert sampled == model.generate_until(asked("generate_until", arguments))[2]


def test_a_token_that_spans_the_border_is_scored_all_the_same(tmp_path):
    model = model_of(tmp_path, ATTENTION)
    assert model._encode_pair("on th", "e") == (model.tok_encode("on th"), model.tok_encode("e"))
    assert model.tok_encode("on the") != model.tok_encode("on th") + model.tok_encode("e")


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as refused:
        call(asked("made-up", arguments))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_does_not_fit_is_refused_with_the_length_that_would(tmp_path):
    model = model_of(tmp_path, ATTENTION, "bytes")
    said = refusal(model.loglikelihood, ("a", "b" * 25))
    assert said == "--max-length 24: a continuation to be scored has 25 tokens; expected at least that"
    assert math.isfinite(model.loglikelihood(asked("loglikelihood", [("a", "b" * 24)]))[0][0])
    said = refusal(model.generate_until, ("a", {"until": []}))
    assert said == "--max-length 24: task made-up generates up to 256 tokens; expected more than that"
    said = refusal(model.generate_until, ("a", {"until": [], "max_gen_toks": 2, "top_q": 3}))
    assert "made-up: generation_kwargs.top_q = 3: nothing here generates so; did you mean 'top_p'?" in said


class Thread:
    """What the adapter needs of a World, for one thread of `Ranks`."""

    def __init__(self, rank, size, gather):
        self.rank, self.size, self.gather = rank, size, gather

    def is_at(self, doing):
        pass


def test_ranks_share_the_batches_and_all_know_all_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mixerlab.lm.evaluation.adapter.TOLD", 4
    )  # so that they tell each other several times
    one = model_of(tmp_path, ATTENTION, "bytes", batch_size=2)
    texts = [("the cat"[: 1 + i % 7], "sat"[: 1 + i % 3]) for i in range(13)]
    arguments = [(text, {"until": ["\n"], "max_gen_toks": 3 + i % 2}) for i, (text, _) in enumerate(texts)]
    scored = [0, 0, 0]

    def work(rank, gather):
        model = MixerlabLM(one.decoder, ByteTokenizer(), 24, 2, world=Thread(rank, 3, gather))
        score = model._score
        model._score = lambda rows: scored.__setitem__(rank, scored[rank] + len(rows)) or score(rows)
        return model.loglikelihood(asked("loglikelihood", texts)), model.generate_until(
            asked("generate_until", arguments)
        )

    expected = (
        one.loglikelihood(asked("loglikelihood", texts)),
        one.generate_until(asked("generate_until", arguments)),
    )
    assert Ranks(3).run(work) == [expected] * 3
    assert sorted(scored) == [4, 4, 5]


def test_padding_has_no_label(tmp_path):
    model = model_of(tmp_path, ATTENTION, "bytes")
    seen = []

    def decoder(ids, labels):
        seen.append((ids.tolist(), labels.tolist()))
        return torch.ones(labels.shape), labels >= 0

    model.decoder.forward = decoder
    model._score([([1, 2, 3, 4], 2), ([5, 6], 1)])
    assert seen == [
        ([[1, 2, 3], [5, 256, 256]], [[IGNORE, 3, 4], [6, IGNORE, IGNORE]]),
    ]
