"""Options and named choices: what is accepted, what is lost on the way (nothing), and what a wrong value is told."""

import math
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixerlab.options as module
from mixerlab.options import (
    Choice,
    ConfigError,
    PluginError,
    Registry,
    check_options,
    first_line,
    one_of,
    option,
    plain,
    report_problems,
    show,
    with_new_names,
)


@dataclass
class Inner:
    rate: float = option(0.5, "a share", min=0, below=1)
    pair: tuple[float, float] = option((0.9, 0.95), "two numbers")

    def problems(self, largest=1.0):
        if sum(self.pair) > largest * 2:
            yield "pair", f"expected a sum of at most {largest * 2:g}"


@dataclass
class Options:
    count: int = option(3, "how many", min=1, max=9)
    name: str | None = option(None, "what it is called")
    kind: Literal["round", "square", "32"] = option("round", "its shape")
    files: list[str] = option([], "where it lies")
    budget: int | float | str | None = option(None, "what it may cost", above=0)
    on: bool = option(False, "whether it is")
    anything: Any = option(None, "whatever")
    inner: Inner = field(default_factory=Inner)


def refusal(**values):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        check_options(Options, values, "top")
    return str(caught.value)


def test_what_is_not_given_has_its_default():
    assert check_options(Options, {}) == Options()
    assert check_options(Options, {"inner": None}) == Options()
    assert check_options(Options, {"inner": {"rate": 0.25}}).inner == Inner(0.25)


def test_every_instance_gets_a_list_of_its_own():
    first, second = Options(), Options()
    first.files.append("a")
    assert second.files == []


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("count", 9, 9),
        ("name", "a", "a"),
        ("name", None, None),
        ("kind", "square", "square"),
        ("kind", 32, "32"),
        ("files", "one.txt", ["one.txt"]),
        ("files", ("a", "b"), ["a", "b"]),
        ("budget", "10M", "10M"),
        ("budget", 7, 7),
        ("budget", 7.5, 7.5),
        ("anything", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_arrive_as_the_type_of_the_option(key, given, value):
    found = getattr(check_options(Options, {key: given}), key)
    assert found == value
    assert type(found) is type(value)


def test_a_number_may_be_written_as_an_integer():
    rate = check_options(Inner, {"rate": 0}).rate
    assert rate == 0
    assert type(rate) is float
    assert check_options(Inner, {"pair": [1, 0]}).pair == (1.0, 0.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 2.0}, "top.count = 2.0: expected an integer"),
        ({"count": True}, "top.count = true: expected an integer"),
        ({"count": None}, "top.count = null: expected an integer"),
        ({"count": 0}, "top.count = 0: expected at least 1 and at most 9"),
        ({"count": 10}, "top.count = 10: expected at least 1 and at most 9"),
        ({"on": 1}, "top.on = 1: expected true or false"),
        ({"on": "yes"}, "top.on = 'yes': expected true or false"),
        ({"name": 3}, "top.name = 3: expected text or null"),
        ({"kind": "sqare"}, "top.kind = 'sqare': expected one of round, square, 32 (did you mean 'square'?)"),
        ({"files": [1]}, "top.files = [1]: expected a list, each item text"),
        ({"budget": 0}, "top.budget = 0: expected above 0"),
        ({"inner": {"rate": 1}}, "top.inner.rate = 1: expected at least 0 and below 1"),
        ({"inner": {"rate": math.nan}}, "top.inner.rate = nan: expected a number"),
        ({"inner": {"pair": [1]}}, "top.inner.pair = [1]: expected a list of 2, each a number"),
        ({"inner": 3}, "top.inner = 3: expected a mapping with keys rate, pair"),
        ({"coutn": 3}, "top.coutn = 3: no such key; did you mean 'count'? valid: count, name, "),
        ({"inner": {"ratio": 3}}, "top.inner.ratio = 3: no such key; did you mean 'rate'? valid: rate, pair"),
    ],
)
def test_a_wrong_value_is_told_by_its_key_and_what_would_be_right(values, said):
    assert refusal(**values).startswith(said)


def test_without_a_path_keys_stand_alone():
    with pytest.raises(ConfigError, match=r"^count = 0: "):
        check_options(Options, {"count": 0})


def test_a_former_name_is_answered_with_the_one_of_today(monkeypatch):
    monkeypatch.setattr(module, "RENAMED", {"number": "count", "colour": "paint"})
    assert refusal(number=3) == "top.number = 3: no such key; it is called count now"
    assert "it is called" not in refusal(colour=3), "not a name that this section has"


def test_old_names_are_renewed_at_any_depth():
    old = {"model": {"mlp_width": 3, "mixer": [{"head_width": 8}, ({"rope_base": 1.0},)]}, "lr": 0.1}
    assert with_new_names(old) == {
        "model": {"mlp_dim": 3, "mixer": [{"head_dim": 8}, [{"rope_theta": 1.0}]]},
        "lr": 0.1,
    }


def test_text_has_no_nul_which_no_path_can_hold():
    for bad in ({"name": "a\0b"}, {"files": ["a", "\0"]}):
        with pytest.raises(ConfigError, match=r"top\..* = .*: expected text without the character NUL"):
            check_options(Options, bad, "top")


def test_problems_that_only_the_whole_shows_are_told_by_their_key():
    report_problems(Inner(), "top.inner")
    with pytest.raises(ConfigError, match=r"^top\.inner\.pair = \(2, 1\): expected a sum of at most 2$"):
        report_problems(Inner(pair=(2, 1)), "top.inner")
    report_problems(Inner(pair=(2, 1)), "top.inner", 5.0)
    report_problems(object(), "has no problems")


TEXT = st.text(st.characters(exclude_characters="\0"))


@given(
    st.builds(
        Options,
        count=st.integers(1, 9),
        name=st.none() | TEXT,
        kind=st.sampled_from(["round", "square", "32"]),
        files=st.lists(TEXT),
        budget=st.none() | st.integers(1) | st.floats(1, 1e9) | TEXT,
        on=st.booleans(),
        inner=st.builds(Inner, rate=st.floats(0, 0.99), pair=st.tuples(st.floats(0, 1), st.floats(0, 1))),
    )
)
def test_plain_values_are_checked_to_the_same_options(options):
    assert check_options(Options, plain(options)) == options


def test_plain_values_share_nothing_with_the_options():
    options = Options(files=["a"])
    plain(options)["files"].append("b")
    assert options.files == ["a"]


def test_small_words():
    assert [show(value) for value in (None, True, "a", 1e-3)] == ["null", "true", "'a'", "0.001"]
    assert one_of("sesa", ["sessa", "mamba"]) == "did you mean 'sessa'? valid: sessa, mamba"
    assert one_of("nothing like it", ["sessa"]) == "valid: sessa"
    assert first_line(ValueError(" one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


class Thing:
    """What a registry of the tests holds."""


@pytest.fixture
def registry():
    things: Registry[Thing] = Registry("thing", "mixerlab.tests")

    @things.register("ball", Inner)
    class Ball(Thing):
        pass

    return things


def test_a_name_or_a_mapping_or_a_choice_is_chosen(registry):
    by_name = registry.choose("ball")
    assert by_name == Choice("ball", Inner())
    assert registry.choose({"name": "ball"}) == registry.choose(by_name) == by_name
    chosen = registry.choose({"name": "ball", "rate": 0.25})
    assert chosen.options == Inner(0.25)
    assert plain(chosen) == {"name": "ball", "rate": 0.25, "pair": [0.9, 0.95]}
    assert registry.choose(plain(chosen)) == chosen
    assert issubclass(registry.implementation("ball"), Thing)
    assert registry.config_class("ball") is Inner


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("bal", "toys.first = 'bal': no such thing; did you mean 'ball'? valid: ball"),
        (3, "toys.first = 3: expected a thing's name or a mapping; valid: ball"),
        ({"rate": 1}, "toys.first.name is missing: valid: ball"),
        ({"name": "ball", "rat": 1}, "toys.first.rat = 1: no such key; did you mean 'rate'?"),
        ({"name": "ball", "rate": 2}, "toys.first.rate = 2: expected at least 0 and below 1"),
    ],
)
def test_a_wrong_choice_is_told_by_its_key(registry, spec, said):
    with pytest.raises(ConfigError) as caught:
        registry.choose(spec, "toys.first")
    assert str(caught.value).startswith(said)


def test_an_unknown_name_is_looked_up_in_vain(registry):
    for look in (registry.implementation, registry.config_class):
        with pytest.raises(ConfigError, match="unknown thing 'bal': did you mean 'ball'"):
            look("bal")


def test_one_name_is_one_class(registry):
    with pytest.raises(ValueError, match="a thing named 'ball' is registered already"):

        @registry.register("ball", Inner)
        class Other(Thing):
            pass


def test_a_module_may_be_imported_twice(registry):
    for _ in range(2):

        @registry.register("cube", Inner)
        class Cube(Thing):
            pass

    assert registry.implementation("cube") is Cube


@dataclass
class NoHelp:
    a: int = 3


@dataclass
class NoDefault:
    a: int


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (dict, "must be a dataclass"),
        (NoHelp, "has no help for a; expected option"),
        (NoDefault, "has no default for a"),
    ],
)
def test_a_schema_is_checked_when_it_registers(registry, schema, said):
    with pytest.raises(TypeError, match=f"the config class of thing 'odd' {said}"):
        registry.register("odd", schema)(Thing)


@pytest.fixture
def installed(registry, monkeypatch, tmp_path):
    """Makes a module that an installed package promises `cone` in."""

    def install(source):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "cones_of_tests.py").write_text(source)
        monkeypatch.delitem(module.sys.modules, "cones_of_tests", raising=False)
        entry = EntryPoint("cone", "cones_of_tests", "mixerlab.tests")
        found = module.EntryPoints([entry])
        monkeypatch.setattr(module, "_installed", lambda group, path: found)

    return install


def test_what_a_package_promises_is_imported_once_it_is_asked_for(registry, installed):
    installed("raise RuntimeError('not asked for')")
    assert registry.names() == ["ball", "cone"]
    assert registry.registered() == ["ball"]
    registry.choose("ball")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise KeyError('x')", "importing 'cones_of_tests' failed: KeyError: 'x'"),
        ("import sys; sys.exit(3)", "importing 'cones_of_tests' failed: SystemExit: 3"),
        ("", "'cones_of_tests' registers no thing of that name"),
    ],
)
def test_a_package_that_breaks_its_promise_is_named(registry, installed, source, said):
    installed(source)
    with pytest.raises(PluginError, match=r"thing 'cone' of the installed package '\?': "):
        registry.implementation("cone")
    with pytest.raises(ConfigError) as caught:
        registry.choose("cone", "toys")
    assert str(caught.value).startswith("toys = 'cone': thing 'cone' of the installed package")
    assert said in str(caught.value)
