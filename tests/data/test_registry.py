import sys
from dataclasses import dataclass, fields

import pytest
from omegaconf import OmegaConf

from mixerlab.data import DATA, DataError, DataModule, build_data, option, register_data
from mixerlab.data.text import TextConfig, TextData
from mixerlab.options import Choice, ConfigError, UserError

VALID = ", ".join(DATA.names())


def test_text_is_registered():
    assert "text" in DATA.names()
    assert DATA.config_class("text") is TextConfig
    data = build_data({"name": "text", "tokenizer": "bytes", "seq_len": 7}, seed=3)
    assert isinstance(data, TextData)
    assert (data.seq_len, data.vocab_size, data.seed) == (7, 257, 3)


def test_a_choice_is_built_as_it_is():
    config = TextConfig(tokenizer="bytes", seq_len=7)
    data = build_data(Choice("text", config), seed=3)
    assert isinstance(data, TextData)
    assert data.config is config


def test_a_name_is_built_with_its_defaults():
    assert build_data("text", seed=0).config == TextConfig()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data module 'txet': did you mean 'text'\? valid: .*text"):
        DATA.config_class("txet")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("txt", f"data = 'txt': no such data module; did you mean 'text'? valid: {VALID}"),
        (3, f"data = 3: expected a data module's name or a mapping; valid: {VALID}"),
        ({"seq_len": 3}, f"data.name is missing: valid: {VALID}"),
        ({"name": "text", "seq_len": 0}, "data.seq_len = 0: expected at least 1"),
        ({"name": "text", "valid_fraction": 1}, "data.valid_fraction = 1: expected above 0 and below 1"),
        ({"name": "text", "source": "hf"}, "data.dataset = null: source = hf needs the name of a dataset"),
        (
            {"name": "text", "source": "hf", "dataset": "pandas", "column": "text"},
            "data.dataset = 'pandas': the library's own reader of that name unpickles files; expected owner/name",
        ),
    ],
)
def test_a_wrong_spec_is_one_line_that_says_what_would_be_right(spec, message):
    with pytest.raises(ConfigError) as error:
        build_data(spec, seed=0)
    assert str(error.value) == message


def test_a_misspelt_option_is_answered_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"^data\.seq_le = 3: no such key; did you mean 'seq_len'\? valid: "
    ):
        build_data({"name": "text", "seq_le": 3}, seed=0)


def test_data_that_cannot_be_used_are_for_the_user_to_put_right():
    assert issubclass(DataError, UserError)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(DATA, "_entries", dict(DATA._entries))


@dataclass
class CountingConfig:
    step: int = option(1, "from one token to the next", min=1)


class Counting(DataModule):
    vocab_size = 10
    seq_len = 4

    def train_dataset(self):
        return []

    def val_datasets(self):
        return {}


@pytest.mark.usefixtures("registry")
def test_a_module_of_ones_own_is_built_from_its_config():
    register_data("counting", CountingConfig)(Counting)
    assert "counting" in DATA.names()
    data = build_data({"name": "counting", "step": 3}, seed=0)
    assert isinstance(data, Counting)
    assert data.config == CountingConfig(3)


@pytest.mark.usefixtures("registry")
def test_a_name_is_taken_only_once_and_a_schema_is_a_dataclass():
    with pytest.raises(ValueError, match="'text' is registered already"):
        register_data("text", CountingConfig)(DataModule)
    with pytest.raises(TypeError, match="must be a dataclass"):
        register_data("other", dict)(DataModule)


@pytest.mark.parametrize("name", DATA.names())
def test_a_config_is_a_schema_with_help_for_every_option(name):
    config_class = DATA.config_class(name)
    assert OmegaConf.to_object(OmegaConf.structured(config_class)) == config_class()
    for item in fields(config_class):
        assert item.name != "name"
        assert item.metadata["help"], item.name


# Installed packages

MODULE = """
from dataclasses import dataclass
from mixerlab.data import DataModule, option, register_data

@dataclass
class Config:
    step: int = option(1, "from one token to the next", min=1)

@register_data("counting", Config)
class Counting(DataModule):
    vocab_size, seq_len = 10, 4
    def train_dataset(self): return []
    def val_datasets(self): return {}
"""


@pytest.fixture
def install(tmp_path, monkeypatch, registry):
    """Installs a package that brings the data module "counting", in a module of the given content."""

    def install(content):
        (tmp_path / "counting_data.py").write_text(content)
        info = tmp_path / "counting_pack-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting-pack\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[mixerlab.data]\ncounting = counting_data\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("counting_data", None)


def test_an_installed_package_brings_a_data_module_that_is_imported_when_it_is_asked_for(install):
    install(MODULE)
    assert set(DATA.names()) - set(DATA.registered()) == {"counting"}
    assert "counting_data" not in sys.modules
    data = build_data({"name": "counting", "step": 2}, seed=5)
    assert (type(data).__module__, data.config.step, data.seed) == ("counting_data", 2, 5)
    with pytest.raises(ConfigError, match=r"^data\.stp = 2: no such key; did you mean 'step'\? valid: step$"):
        build_data({"name": "counting", "stp": 2}, seed=0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import no_such_library", "failed: ModuleNotFoundError: No module named 'no_such_library'"),
        ("x = 1", "'counting_data' registers no data module of that name"),
    ],
)
def test_a_broken_package_is_named_to_those_who_ask_for_it_alone(install, content, reason):
    install(content)
    assert isinstance(build_data("text", seed=0), TextData)
    with pytest.raises(ConfigError) as error:
        build_data("counting", seed=0)
    where = "data = 'counting': data module 'counting' of the installed package 'counting-pack': "
    assert str(error.value).startswith(where)
    assert str(error.value).endswith(reason)
