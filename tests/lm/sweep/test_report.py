"""The files of a report, and the commands `sweep` and `report` where nothing is trained."""

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pandas as pd
import pytest
from rich.console import Console

from mixerlab.__main__ import main
from mixerlab.lm.sweep.report import report
from mixerlab.options import ConfigError
from sweeps import begun, fail, finish, made_up, recipe_file


@pytest.fixture
def sweep(tmp_path):
    """Two mixers, two seeds and two learning rates, with buckets; a mixer's name is nobody's markup."""
    settings = []
    for mixer, accuracy in (("[attention, <b>sessa]", 0.9), ("mamba2|x", 0.4)):
        for lr, worse in (("1e-3", 0.0), ("3e-3", 0.2)):
            for seed in (0, 1):
                value = accuracy - worse + seed / 50
                final = {
                    "valid__accuracy": value,
                    "lag_512__accuracy": value / 2,
                    "lag_1024__accuracy": value / 4,
                }
                curve = [("valid/accuracy", {3: value / 2, 6: value})]
                values = {"model.mixer": mixer, "seed": str(seed), "optim.lr": lr}
                settings.append((values, final | {"curve": curve, "speeds": [1.0, 2000.0]}))
    return made_up(tmp_path, settings)


class Page(HTMLParser):
    """Tags, texts and where a page gets things from."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_terminal_shows_the_table_and_what_may_be_said(sweep, capsys):
    assert main(["report", str(sweep.path)]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "mamba2|x" in line and "1,004" in line]
    for cell in ("1e-3", "2", "0.410 ± 0.014", "0.400 to 0.420", "0.500", "1,004", "240", "2k", "0.25 KiB"):
        assert cell in line
    assert (
        "[attention, <b>sessa] has the best mean valid accuracy, and the intervals of its differences" in out
    )
    assert "Runs: 8 finished" in out
    assert f"report {sweep.path / 'report' / 'report.html'}" in out


def test_the_csv_has_the_numbers_unrounded(sweep):
    main(["report", str(sweep.path)])
    table = pd.read_csv(sweep.path / "report" / "table.csv")
    best = table.iloc[0]
    assert list(table["optim.lr"]) == [1e-3, 1e-3]
    assert best["valid/accuracy"] == pytest.approx(0.91)
    assert best["valid/accuracy std"] == pytest.approx(0.02 / 2**0.5)
    assert (best["valid/accuracy low"], best["valid/accuracy high"]) == pytest.approx((0.9, 0.92))
    assert best["lag_1024/accuracy"] == pytest.approx(0.91 / 4)
    assert best["training_FLOPs"] == 6 * 4 * 10
    assert len(pd.read_csv(sweep.path / "report" / "runs.csv")) == 8


def test_markdown_has_a_table_for_the_results_and_one_for_the_buckets(sweep):
    main(["report", str(sweep.path)])
    lines = (sweep.path / "report" / "report.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 * 4
    assert "| mamba2\\|x | 0.410 ± 0.014 | 0.205 ± 0.007 | 0.103 ± 0.004 |" in rows
    assert rows[4] == "| mixer | valid | lag_512 | lag_1024 |"


def test_the_page_needs_no_network_and_takes_no_name_for_markup(sweep):
    main(["report", str(sweep.path)])
    page = Page((sweep.path / "report" / "report.html").read_text())
    assert [source[:26] for source in page.sources] == ["data:image/svg+xml;base64,"] * 3
    for source in page.sources:
        assert ElementTree.fromstring(base64.b64decode(source[26:])).tag.endswith("svg")
    assert not {"script", "link", "b"} & set(page.tags)
    assert "[attention, <b>sessa]" in page.texts
    assert page.tags.count("table") == 3


def test_a_name_with_braces_and_dollars_is_a_name(tmp_path):
    sweep = made_up(tmp_path, [({"model.mixer": "$a$b$", "seed": "0"}, {"valid__loss": 1.0})], "x{y}")
    report([sweep], Console(file=io.StringIO()))
    assert "<h1>x{y}</h1>" in (sweep.path / "report" / "report.html").read_text()


def test_a_link_in_the_report_is_not_followed(sweep, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (sweep.path / "report").mkdir()
    (sweep.path / "report" / "table.csv").symlink_to(precious)
    with pytest.raises(ConfigError, match="a link"):
        report([sweep], Console(file=io.StringIO()))
    assert precious.read_text() == "mine"


def test_another_metric_and_folder_can_be_asked_for(sweep, tmp_path, capsys):
    main(["report", str(sweep.path), "--metric", "lag_1024/accuracy", "--to", str(tmp_path / "there")])
    assert "has the best mean lag 1024 accuracy" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "there").iterdir()} == {
        *("table.csv", "runs.csv", "report.md", "report.html"),
        *("results.svg", "curves.svg", "datasets.svg"),
    }
    assert not (sweep.path / "report").exists()


def test_several_sweeps_are_reported_together(sweep, tmp_path):
    other = made_up(tmp_path, [({"seed": "0"}, {"valid__accuracy": 0.3})], "other")
    assert main(["report", str(sweep.path), str(other.path)]) == 0
    table = pd.read_csv(sweep.path / "report+other" / "table.csv")
    assert list(table["sweep"]) == ["made-up", "made-up", "other"]


def test_the_same_report_twice_is_the_same_to_the_byte(sweep):
    def files():
        main(["report", str(sweep.path)])
        return {path.name: path.read_bytes() for path in (sweep.path / "report").iterdir()}

    assert files() == files()


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"),
    [
        (lambda sweep: None, (), "no run has finished, so there is no table yet; 2 waiting"),
        (
            lambda sweep: fail(sweep, "seed=0"),
            (),
            "no run has finished, so there is no table yet; 1 failed, 1 waiting",
        ),
        (
            lambda sweep: finish(sweep, "seed=0", valid__loss=1.0),
            ("--metric", "valid/los"),
            "--metric valid/los: no run has it; did you mean 'valid/loss'? valid: valid/loss",
        ),
    ],
)
def test_what_cannot_be_reported_is_said_in_a_line(tmp_path, capsys, prepare, arguments, said):
    sweep = begun(tmp_path, "seed=0,1")
    prepare(sweep)
    assert main(["report", str(sweep.path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_dry_run_lists_the_points_and_writes_nothing(tmp_path, capsys):
    source, given = recipe_file(tmp_path), ["model.mixer=attention,mamba2", "seed=0,1"]
    assert (
        main(["sweep", source, *given, f"logging.dir={tmp_path / 'runs'}", "--dry-run", "--jobs", "2"]) == 0
    )
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+(attention|mamba2) ", line)]
    assert [row[:2] for row in rows] == [[m, s] for m in ("attention", "mamba2") for s in "01"]
    assert all(row[4] == "6" for row in rows), "steps"
    assert rows[0][2:6] == rows[1][2:6]
    assert rows[0][2] != rows[2][2]
    assert re.search(r"4 runs, 2 at a time: about \d", out)
    assert not (tmp_path / "runs").exists()


def test_the_time_is_not_known_where_the_steps_are_not(tmp_path, capsys):
    assert main(["sweep", recipe_file(tmp_path), "seed=0,1", "trainer.epochs=1", "--dry-run"]) == 0
    assert ": not known how long, without validations" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["mdl.mixer=a,b"], ["seed=0,1,"], ["seed=0"], []])
def test_wrong_values_are_answered_in_a_line(tmp_path, capsys, given):
    assert main(["sweep", recipe_file(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
