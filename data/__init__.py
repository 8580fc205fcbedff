"""Data modules: what a decoder is trained and validated on, looked up by name."""

from data import text  # noqa: F401  (importing registers it)
from data.module import DataError, DataModule, Rows
from data.registry import DATA_MODULES, build_data, data_config, data_names, register_data
from data.tokenizers import TextTokenizer, load_tokenizer

__all__ = [
    "DATA_MODULES",
    "DataError",
    "DataModule",
    "Rows",
    "TextTokenizer",
    "build_data",
    "data_config",
    "data_names",
    "load_tokenizer",
    "register_data",
]
