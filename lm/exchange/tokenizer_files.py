"""Tokenizers as transformers reads and writes them: tokenizer.json and tokenizer_config.json.

Letters: V rows of the embedding.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mixerlab.data.tokenizers import BYTE_OF, EOD_TOKENS, JsonTokenizer, TextTokenizer

HARD_TEXT = (
    "The quick brown fox's naïve café\n\n  x = 1\t\t# ünïcödé 你好 🙂‍🧑 <|endoftext|></s> 1234567\r\n"
    "e\u0301 ﬁ \u00a0\u3000|\x00\x7f   "
)
"""Accents composed and not, emoji, runs of white space, control characters, digits, the names of special tokens."""


def pad(tokenizer: Tokenizer, size: int, vocab_size: int) -> None:
    """Gives a tokenizer of `size` tokens a special token for each further row of the embedding, up to V.

    An embedding is often padded to a round size. With a special token for each row of padding, whatever the model
    says is decoded, and training further finds a vocabulary of the same size.
    """
    tokenizer.add_special_tokens([f"<|unused {i}|>" for i in range(size, vocab_size)])


def write_tokenizer(tokenizer: TextTokenizer, vocab_size: int, seq_len: int, folder: Path) -> None:
    """Writes files from which transformers makes the same tokens of every text."""
    exported, eod = _as_json(tokenizer)
    pad(exported, tokenizer.vocab_size, vocab_size)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # No padding token: it would be this one too, and transformers trains no padding token's embedding.
        **dict.fromkeys(("bos_token", "eos_token"), eod),
        "split_special_tokens": True,  # text that spells out a special token is text
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    (folder / "tokenizer.json").write_text(exported.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def adds_tokens(tokenizer: TextTokenizer) -> bool:
    """Whether it adds special tokens to text, where training does not ask it not to."""
    added = isinstance(tokenizer, JsonTokenizer) and tokenizer.tokenizer.num_special_tokens_to_add(
        is_pair=False
    )
    return bool(added)


def _as_json(tokenizer: TextTokenizer) -> tuple[Tokenizer, str]:
    """A copy of a run's tokenizer as one of the `tokenizers` library, and what ends a document in it."""
    if isinstance(tokenizer, JsonTokenizer):
        state = json.loads(tokenizer.tokenizer.to_str())
        if adds_tokens(tokenizer):
            state["post_processor"] = None  # training leaves such tokens out
        return Tokenizer.from_str(json.dumps(state)), tokenizer.eod_token
    # Bytes: a byte-level BPE that merges nothing.
    bytewise = Tokenizer(models.BPE(vocab=BYTE_OF, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([EOD_TOKENS[0]])
    return bytewise, EOD_TOKENS[0]
