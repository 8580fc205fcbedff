"""A decoder of mixerlab as a model of transformers.

Needs the package mixerlab, and what the decoder's own mixers need: AutoModelForCausalLM.from_pretrained(FOLDER,
trust_remote_code=True).

Letters: B batch, T time, V vocabulary.
"""

import importlib
from typing import Any

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

        Rows may be padded on the right; with a cache they are decoded together, and none may be padded.
        """
        cache = kwargs.get(CACHE)
        if attention_mask is not None and (attention_mask.long().diff(dim=1) > 0).any():
            raise ValueError("attention_mask: mixerlab's decoders read no padding on the left of a row")
        if cache is None:
            logits = self.decoder(input_ids)
        else:
            if attention_mask is not None and not attention_mask.all():
                raise ValueError("attention_mask: mixerlab decodes rows of one length, without padding")
            if cache.states is None:
                cache.states = self.decoder.init_state(len(input_ids), cache.max_len)
            logits, cache.states = self.decoder.extend(input_ids, cache.states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if generation_config.use_cache is not False:
            model_kwargs[CACHE] = MixerlabCache(generation_config.max_length)
