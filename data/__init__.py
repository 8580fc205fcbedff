"""Data modules: what a decoder is trained and validated on, looked up by name."""

from mixerlab.data import tasks, text  # noqa: F401  (importing registers them)
from mixerlab.data.module import DataError, DataModule, Rows
from mixerlab.data.registry import DATA, build_data, register_data
from mixerlab.data.tokenizers import TextTokenizer, load_tokenizer
from mixerlab.options import option

__all__ = [
    "DATA",
    "DataError",
    "DataModule",
    "Rows",
    "TextTokenizer",
    "build_data",
    "load_tokenizer",
    "option",
    "register_data",
]
