"""docs/your-own-data.md, followed to the letter: the package it shows installs, keeps the contract and trains."""

import csv
import sys

import pytest

from pages import MIXERLAB, Page, break_package, run

PAGE = Page("your-own-data.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return PAGE.install("copy_data", tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("site"))


def train(site, tmp_path, *overrides, code=0):
    short = ["trainer.steps=3", "trainer.val_batches=2", f"logging.dir={tmp_path / 'runs'}"]
    return run([*MIXERLAB, "train", *PAGE.command("mixerlab train"), *short, *overrides], site, code)


def test_a_whole_data_module_takes_fewer_than_60_lines():
    assert PAGE.lines_of_code() < 60


def test_the_data_module_keeps_the_contract(site):
    run([sys.executable, "-c", *PAGE.command("python -c")], site)


def test_a_name_is_all_it_takes_to_train_on_it(site, tmp_path):
    train(site, tmp_path, "data.length=8")
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    assert "length: 8" in (folder / "recipe.yaml").read_text()
    with (folder / "metrics.csv").open() as file:
        metrics = {row["metric"] for row in csv.DictReader(file)}
    assert {"valid/loss", "two_symbols/accuracy"} <= metrics
    assert "valid/bits_per_byte" not in metrics
    run([*MIXERLAB, "validate", str(folder)], site)


def test_a_module_in_the_recipe_does_the_same(tmp_path):
    (tmp_path / "copy_data.py").write_text(PAGE.shown("python"))
    train(tmp_path, tmp_path, "plugins=copy_data")


def test_an_option_of_an_installed_data_module_is_checked(site, tmp_path):
    done = train(site, tmp_path, "data={name: copy, lenght: 4}", code=2)
    valid = "did you mean 'length'? valid: n_symbols, length, n_rows"
    assert done.stderr == f"error: data.lenght = 4: no such key; {valid}\n"
    done = train(site, tmp_path, "data.length=0", code=2)
    assert done.stderr == "error: data.length = 0: expected at least 1\n"


def test_a_broken_package_is_named_to_those_who_ask_for_it_alone(site, tmp_path):
    broken = break_package(site, "copy_data", "raise RuntimeError('out of order')", tmp_path / "site")
    (line,) = train(broken, tmp_path, code=2).stderr.splitlines()
    assert line.startswith("error: data = 'copy': data module 'copy' of the installed package 'copy-data': ")
    assert line.endswith("RuntimeError: out of order")
    done = train(broken, tmp_path, "data=cpy", code=2)
    assert done.stderr.startswith(
        "error: data = 'cpy': no such data module; did you mean 'copy'? valid: copy, "
    )
    train(broken, tmp_path, "data=text", "--print-config")
