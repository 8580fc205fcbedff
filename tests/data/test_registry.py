from dataclasses import dataclass, fields

import pytest
from omegaconf import OmegaConf

from data import DATA_MODULES, DataModule, build_data, data_config, data_names, register_data
from data.text import TextConfig, TextData


def test_text_is_registered():
    assert "text" in data_names()
    assert data_config("text") is TextConfig
    data = build_data(TextConfig(tokenizer="bytes", seq_len=7), seed=3)
    assert isinstance(data, TextData)
    assert (data.seq_len, data.vocab_size, data.seed) == (7, 257, 3)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data module 'txet': did you mean 'text'\? valid: .*text"):
        data_config("txet")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("data.registry.DATA_MODULES", dict(DATA_MODULES))


@dataclass
class CountingConfig:
    name: str = "counting"


@pytest.mark.usefixtures("registry")
def test_a_module_of_ones_own_is_built_from_its_config():
    @register_data("counting", CountingConfig)
    class Counting(DataModule):
        vocab_size = 10
        seq_len = 4

        def train_dataset(self):
            return []

        def val_datasets(self):
            return {}

    assert "counting" in data_names()
    assert isinstance(build_data(CountingConfig(), seed=0), Counting)


@pytest.mark.usefixtures("registry")
def test_a_name_is_taken_only_once_and_a_schema_is_a_dataclass():
    with pytest.raises(ValueError, match="'text' is registered already"):
        register_data("text", CountingConfig)(DataModule)
    with pytest.raises(TypeError, match="must be a dataclass"):
        register_data("other", dict)(DataModule)


@pytest.mark.parametrize("name", data_names())
def test_a_config_is_a_schema_with_help_for_every_option(name):
    config_class = data_config(name)
    assert OmegaConf.to_object(OmegaConf.structured(config_class)) == config_class()
    assert config_class().name == name
    for option in fields(config_class):
        assert option.metadata["help"], option.name
