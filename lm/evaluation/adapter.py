"""A decoder as lm-evaluation-harness sees a model.

Letters: B rows of a batch, T time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track

from mixerlab.data import TextTokenizer
from mixerlab.data.module import IGNORE
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.model.generation import generate
from mixerlab.lm.parallel.processes import World
from mixerlab.options import ConfigError, one_of

NEW_TOKENS = 256
"""Tokens to generate where a task does not say how many, as in the harness' own models."""

GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
"""What a task's generation_kwargs may say."""

TOLD = 1024
"""Answers that a process tells the others at a time: torch's store takes no message beyond 16 MiB."""


class MixerlabLM(TemplateLM):
    """Answers the harness' requests with a decoder and its tokenizer.

    Where there are several processes, each is given all requests, answers its share of the batches and is told what the
    others have answered. The batches, and so the numbers, are those of one process.
    """

    def __init__(
        self,
        decoder: Decoder,
        text_tokenizer: TextTokenizer,
        max_length: int,
        batch_size: int = 16,
        low_precision: bool = False,
        world: World | None = None,
    ):
        """`max_length` is the most tokens that are read at once; `low_precision` scores in bf16 autocast."""
        super().__init__()
        self.decoder, self.text_tokenizer = decoder, text_tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.low_precision, self.world = low_precision, world or World()
        self.requests = self.cut = 0
        """How many texts were read, and how many of them lost their beginning to fit in `max_length`."""

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; no model here is trained with special ones around it."""
        return self.text_tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not after:  # a token spans the border
            after = self.tok_encode(continuation)
        return before, after

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy generation gives it) of each (_, context, continuation)."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ConfigError(
                f"--max-length {self.max_length}: a continuation to be scored has {longest} tokens; expected at least "
                "that"
            )
        rows = [
            ((context + continuation)[-self.max_length - 1 :], len(continuation))
            for _, context, continuation in requests
        ]
        self.requests += len(rows)
        self.cut += sum(
            len(context) + n > len(ids) for (_, context, _), (ids, n) in zip(requests, rows, strict=True)
        )

        def answer(batch: list[int]) -> list[tuple[float, bool]]:
            return self._score([rows[i] for i in batch])

        return [
            (nats, greedy) for nats, greedy in self._shared("scoring", [len(ids) for ids, _ in rows], answer)
        ]

    @torch.inference_mode()
    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """As `_loglikelihood_tokens`, of one batch of (tokens, how many at their end are the continuation)."""
        device = self.decoder.embedding.weight.device
        T = max(len(ids) for ids, _ in rows) - 1
        input_ids = torch.full((len(rows), T), self.eot_token_id)  # (B, T)
        labels = torch.full((len(rows), T), IGNORE)
        for row, (ids, n) in enumerate(rows):
            last = len(ids) - 1
            input_ids[row, :last] = torch.tensor(ids[:-1])
            labels[row, last - n : last] = torch.tensor(ids[len(ids) - n :])
        with torch.autocast(device.type, torch.bfloat16, enabled=self.low_precision):
            nll, correct = self.decoder(input_ids.to(device), labels.to(device))  # (B, T) each
        likelihoods = -nll.double().sum(1)
        greedy = (correct | (labels == IGNORE).to(device)).all(1)
        return list(zip(likelihoods.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of each text, from an end-of-document token on; every token counts once, a window's first sees one before."""
        windows: list[tuple[None, list[int], list[int]]] = []
        texts: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(i)
        totals = [0.0] * len(requests)
        for i, (likelihood, _) in zip(texts, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What greedy generation, or sampling, adds to each text until an end of the document or one of its stops."""
        prompts, stops = [], []
        groups: dict[tuple[int, float, float], list[int]] = {}  # those that can be in one batch
        for i, request in enumerate(requests):
            text, given = request.args
            options: Any = normalize_gen_kwargs(given, NEW_TOKENS)
            for name, value in options.items():
                if name not in GENERATION and (name, value) != ("num_beams", 1):
                    raise ConfigError(
                        f"task {request.task_name}: generation_kwargs.{name} = {value!r}: nothing here generates so; "
                        f"{one_of(name, GENERATION)}"
                    )
            new_tokens, temperature = options["max_gen_toks"], float(options.get("temperature", 0))
            if (room := self.max_length - new_tokens) < 1:
                raise ConfigError(
                    f"--max-length {self.max_length}: task {request.task_name} generates up to {new_tokens} tokens; "
                    "expected more than that"
                )
            ids = self.tok_encode(text) or [self.eot_token_id]
            prompts.append(ids[-room:])
            stops.append([stop for stop in options["until"] if stop])
            groups.setdefault((new_tokens, temperature, float(options.get("top_p", 1))), []).append(i)
            self.requests += 1
            self.cut += len(ids) > room
        texts = [""] * len(requests)
        for (new_tokens, temperature, top_p), members in groups.items():
            answer = partial(
                self._generate,
                [prompts[i] for i in members],
                [stops[i] for i in members],
                max_new_tokens=new_tokens,
                temperature=temperature,
                top_p=top_p,
            )
            found = self._shared("generating", [len(prompts[i]) for i in members], answer)
            for i, text in zip(members, found, strict=True):
                texts[i] = text
        return texts

    def _generate(
        self, prompts: list[list[int]], stops: list[list[str]], batch: list[int], **options: Any
    ) -> list[str]:
        """As `generate_until`, of the prompts with the numbers in `batch`, all at a time."""
        ids: list[list[int]] = [[] for _ in batch]
        said = [bytearray() for _ in batch]
        ended = [False] * len(batch)
        for tokens in generate(self.decoder, [prompts[i] for i in batch], seed=batch[0], **options):
            self.world.is_at("generating")
            for row, token in enumerate(tokens.tolist()):
                if ended[row] or token == self.eot_token_id:
                    ended[row] = True
                    continue
                ids[row].append(token)
                new = self.text_tokenizer.decode_bytes([token])
                said[row] += new
                for end in map(str.encode, stops[batch[row]]):
                    ended[row] |= end in said[row][-len(end) - len(new) :]
            if all(ended):
                break
        texts = [self.text_tokenizer.decode(row) for row in ids]
        for row, i in enumerate(batch):
            for stop in stops[i]:
                texts[row] = texts[row].partition(stop)[0]
        return texts

    def _shared(
        self, doing: str, lengths: Sequence[int], answer: Callable[[list[int]], list[Any]]
    ) -> list[Any]:
        """What `answer` says to all requests, whose lengths are given: in batches of similar ones, the longest first.

        Each process answers every `world.size`-th batch. All return all answers, as JSON has them.
        """
        world = self.world
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches = [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
        mine, answers = batches[world.rank :: world.size], []
        console = Console(stderr=True, quiet=world.rank > 0)
        for batch in track(mine, doing, console=console, transient=True):
            world.is_at(doing)
            answers.append(answer(batch))
        found: list[Any] = [None] * len(lengths)
        at_once = max(1, TOLD // self.batch_size)  # batches of each
        for k in range(0, len(batches), at_once * world.size):
            told = world.gather(answers[k // world.size :][:at_once])
            for rank, part in enumerate(told):
                for batch, said in zip(batches[k + rank :: world.size], part, strict=False):
                    for i, value in zip(batch, said, strict=True):
                        found[i] = value
        return found
