"""A decoder of mixerlab as a model of transformers.

Needs the package mixerlab, and what the decoder's own mixers need: AutoModelForCausalLM.from_pretrained(FOLDER,
trust_remote_code=True).

Letters: B batch, T time, V vocabulary.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mixerlab.lm.model.decoder import Decoder
from mixerlab.mixers import State

# Its name in transformers 5.24 and later, and before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MixerlabConfig(PretrainedConfig):
    """`model` is the section of the recipe; `plugins` are the modules that register its mixers."""

    model_type = "mixerlab"

    def __init__(
        self,
        vocab_size: int = 257,
        model: dict[str, Any] | None = None,
        plugins: list[str] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.model = dict(model or {})
        self.plugins = list(plugins or [])
        self.num_hidden_layers = self.model.get("n_layers", 0)
        self.hidden_size = self.model.get("d_model", 0)
        # Whether the head is the embedding is the decoder's business: it then has one parameter for both.
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


class MixerlabCache(Cache):
    """The States of all layers, for up to `max_len` positions."""

    def __init__(self, max_len: int):
        super().__init__(layers=[])
        self.max_len = max_len
        self.states: list[State] | None = None

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return 0 if self.states is None else self.states[0].longest

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.states is not None:
            self.states = [state._map(lambda rows: rows.index_select(0, beam_idx)) for state in self.states]

    def crop(self, *args: Any) -> None:
        raise NotImplementedError("decoding that takes tokens back: a recurrent state cannot forget them")


class MixerlabForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MixerlabConfig

    def __init__(self, config: MixerlabConfig):
        super().__init__(config)
        for plugin in config.plugins:
            importlib.import_module(plugin)
        self.decoder = Decoder(config.vocab_size, **config.model)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # all weights are in the files

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """(B, T) -> logits (B, T, V), and the mean loss of (B, T) labels, which it shifts.

        Rows may be padded on the right without a cache, and on the left with one: prompts are read apart, and then
        decoded together.
        """
        cache = kwargs.get(CACHE)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        mask = mask[:, -input_ids.shape[1] :]  # of what is new
        change, wrong = mask.diff(dim=1), "left" if cache is None else "right"
        if (change > 0 if cache is None else change < 0).any() or not mask.any(dim=1).all():
            raise ValueError(f"attention_mask: mixerlab reads no padding on the {wrong} of a row here")
        if cache is None:
            logits = self.decoder(input_ids)
        elif cache.states is not None:
            logits, cache.states = self.decoder.extend(input_ids, cache.states)
        else:
            logits, cache.states = self._read(input_ids, mask.sum(dim=1).tolist(), cache.max_len)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        kept = kwargs.get("logits_to_keep", 0)
        logits = logits[:, -kept:] if isinstance(kept, int) else logits[:, kept]
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _read(self, input_ids: Tensor, lengths: list[int], max_len: int) -> tuple[Tensor, list[State]]:
        """Prompts (B, T), of which the last `lengths` tokens count -> logits (B, T, V), 0 before, and the States."""
        if min(lengths) == input_ids.shape[1]:
            return self.decoder.extend(input_ids, self.decoder.init_state(len(input_ids), max_len))
        read = [
            self.decoder.extend(ids[None, -length:], self.decoder.init_state(1, max_len))
            for ids, length in zip(input_ids, lengths, strict=True)
        ]
        logits = torch.cat([F.pad(row, (0, 0, input_ids.shape[1] - row.shape[1], 0)) for row, _ in read])
        states = zip(*(states for _, states in read), strict=True)
        return logits, [type(layer[0]).cat(layer) for layer in states]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if generation_config.use_cache is not False:
            model_kwargs[CACHE] = MixerlabCache(generation_config.max_length)
