"""Small options for every task."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "symbol_soup": {"min_tokens": 30, "max_tokens": 200},
    "symbol_soup, letters": {"tokenization": "letters", "min_tokens": 30, "max_tokens": 60},
    "mqar": {},
    "mqar, random": {"random_non_queries": True, "vocab_size": 32, "test_pairs": [1, 8]},
    "diffuse_mqar": {"lags": [200, 400], "n_train": 1000},
    "selective_copying": {"length": 64},
    "induction_heads": {"seq_len": 32, "test_lengths": [16, 64]},
    "mad_recall": {"seq_len": 32},
    "mad_recall, values alone": {"seq_len": 32, "every_token": False},
    "mad_noisy_recall": {"seq_len": 32},
    "mad_fuzzy_recall": {"seq_len": 40},
    "mad_selective_copying": {"seq_len": 64},
    "mad_compression": {},
    "mad_memorization": {"n_train": 1000},
}


def options(variant):
    return {"name": variant.partition(",")[0], **VARIANTS[variant]}
