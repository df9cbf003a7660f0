import base64
import json
import math
import re
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pages import WORDS, Page, figure1, models, table2, verdict, write, write_results, write_run
from typer.testing import CliRunner

from kvbind import DepthwiseConv, inner_loss, linearize, systems
from kvbind.cli import app, main
from kvbind.experiments import plotting
from kvbind.experiments.inspection import examples, untrained
from kvbind.experiments.inspection.heads import (
    gathered,
    look_at,
    principal,
    quantized,
    weights_of,
)
from kvbind.experiments.inspection.untrained import as_call, embedded, leaves_of
from kvbind.experiments.outcomes.table import TableRow
from kvbind.experiments.outcomes.verdicts import costs_little
from kvbind.experiments.report import charts, command, svg
from kvbind.experiments.report import run_contents as page_runs
from kvbind.experiments.report.command import make_report, open_server
from kvbind.experiments.report.finding_contents import DRAW
from kvbind.experiments.report.page import as_script, find_parts, headline
from kvbind.experiments.report.rules import plain
from kvbind.experiments.report.sections import sections_of
from kvbind.experiments.scales import digits_apart, widened
from kvbind.experiments.subjects import NONE, SUBJECTS
from kvbind.experiments.training.run_folders import config_header, open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def text(folder):
    return make_report([folder]).read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def script(text, name):
    return re.search(rf'<script [^>]*id="{name}">(.*?)</script>', text, re.DOTALL)[1]


def test_the_page_is_balanced_html_that_names_no_place_outside_itself(page, text):
    assert page.unbalanced == []
    assert page.open == []
    places = [
        attrs[key] for _, attrs, _ in page.elements for key in ("src", "href", "action", "srcset", "data") if key in attrs
    ]
    assert places
    assert all(place.startswith(("#", "data:")) or re.fullmatch(r"[\w./-]+/results\.json", place) for place in places)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 6e6


def test_every_link_leads_somewhere(page, folder):
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs, _ in page.all("a"):
        place = attrs["href"]
        assert place[1:] in ids if place.startswith("#") else (folder / place).is_file()


def test_every_control_has_a_label_and_every_picture_a_description(page):
    controls = page.all("select", "input")
    assert len(controls) >= 12
    named = {attrs.get("for") for _, attrs, _ in page.all("label")}
    for _, attrs, inside in controls:
        assert "label" in inside or attrs.get("id") in named
    assert all(attrs["alt"] for _, attrs, _ in page.all("img"))
    charts = [attrs for _, attrs, _ in page.all("svg") if attrs.get("class") == "chart"]
    assert len(charts) == 2 + 11
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 10 for attrs in charts)
    assert dict(page.elements[0][1])["lang"] == "en"


def test_a_summary_stands_first_and_counts_claims(page):
    order = [attrs["id"] for tag, attrs, _ in page.elements if tag == "section" and "id" in attrs]
    assert order == ["summary", "contents", "tables", "table2-language", "figures", "figure1-language", "explorer"]
    words = page.words()
    assert "3 claims: 1 holds, 1 does not, 1 is not decided" in words
    assert "2 experiments" in words
    assert "Abacus" in words
    # the ladder of the table, on top and in its section
    assert [said for tag, said in page.texts if tag == "figcaption" and "Paper," in said] == ["Paper, 760M"] * 2


def test_claims_have_verdicts_a_plain_rule_and_data(page, text):
    states = re.findall(r'<li class="(yes|no|open)">\s*<span class="badge">([^<]+)<', text)
    assert states == [("open", "not decided"), ("yes", "holds"), ("no", "does not hold")]
    words = page.words()
    assert "It falls so it was".lower() in words.lower()
    assert "Each holds if a number is small." in words
    assert "claims alone (3)" in words


def test_tables_stand_beside_the_papers_with_standard_errors(page, text):
    words = page.words()
    assert "9.500 ± 0.500" in words  # 9 and 10
    assert "17.00" in words
    assert text.count('class="paper"') == 10 * 4
    assert "row <3>" in words
    assert "rung3: steps: 3" in words


def test_texts_are_escaped_wherever_they_stand(page, text):
    assert "What <b>led</b> here." in page.words()
    assert all("b" not in inside for _, _, inside in page.elements)
    assert "<b>two" not in text


def test_the_data_inside_the_page_are_the_models(text):
    data = json.loads(script(text, "data"))
    own = [model for model in data["explorer"] if model["group"] == "trained models"]
    assert own == json.loads(json.dumps(models()))


def test_charts_are_made_of_the_results(folder):
    table, figure = find_parts([folder])[0]
    _, here = table.charts["The ladder"]
    assert here["series"][0]["x"] == [8 + i / 8 for i in range(8)] + [9.5]
    assert here["series"][0]["errors"] == [None] * 8 + [0.5]
    losses, against = table.charts["Training"]
    assert [line["name"] for line in losses["series"]][:2] == ["0 row <0>", "1 row <1>"]
    assert losses["series"][1]["y"][:2] == [4.125, 3.625]
    assert against["series"][3]["y"] == [0.375] * 20
    assert figure.charts["By steps"][0]["series"][0]["y"] == [-1, -2, -3, -4]


@given(
    st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=9)
)
def test_data_in_a_script_end_it_nowhere_and_come_back_as_they_were(data):
    written = as_script(data)
    assert not set("<>&") & set(written)
    assert json.loads(written) == data


def test_results_are_found_at_any_depth_and_in_the_order_of_experiments(folder):
    parts, found = find_parts([folder])
    assert [part.experiment for part in parts] == ["table2", "figure1"]
    assert [model["title"] for model in found] == ["a text", "a picture"]
    assert len(find_parts([folder, folder / "deeper"])[0]) == 2


def test_a_result_without_its_charts_shows_its_pictures(tmp_path):
    png = b"\x89PNG\r\n\x1a\n"
    results = table2()
    for row in results["rows"]:
        for run in row["runs"]:
            del run["training_loss"]
    write(tmp_path / "table" / "results.json", results)
    (tmp_path / "table" / "loss.png").write_bytes(png)
    (tmp_path / "table" / "ladder.png").write_bytes(png)
    part = find_parts([tmp_path])[0][0]
    assert "Training" not in part.charts
    assert [picture.heading for picture in part.undrawn] == ["Training"]
    assert part.undrawn[0].source == f"data:image/png;base64,{base64.b64encode(png).decode()}"


def test_an_experiment_that_the_page_does_not_know_shows_what_it_has(tmp_path):
    results = figure1() | {"experiment": "figure9", "verdicts": [verdict("new", True)]}
    write(tmp_path / "results.json", results)
    part = find_parts([tmp_path])[0][0]
    assert part.charts == {}
    assert part.grids[0].rows == [["1", "9.00"]]
    assert [claim.holds for claim in sections_of([part])[0].claims] == [True]


def test_claims_of_one_rule_stand_together(tmp_path):
    rules = ["a", "a", "b", "a"]
    write(tmp_path / "results.json", figure1() | {"verdicts": [verdict(str(i), True, rule) for i, rule in enumerate(rules)]})
    grouped = sections_of(find_parts([tmp_path])[0])[0].decided
    assert [(rule, [own.claim for own in found]) for rule, found in grouped] == [("a", ["0", "1", "3"]), ("b", ["2"])]


def scales(tmp_path, **verdicts):
    """The one section of figure 1 at several scales, each with a verdict and its number of seeds."""
    for scale, (holds, found) in verdicts.items():
        own = {
            "scale": scale,
            "title": f"Figure 1: it, scale {scale}",
            "verdicts": [verdict("it falls", holds) | {"found": found}],
        }
        write(tmp_path / scale / "results.json", figure1() | own)
    (section,) = sections_of(find_parts([tmp_path])[0])
    return section


def test_scales_of_an_experiment_are_one_section_and_the_largest_leads(tmp_path):
    section = scales(tmp_path, smoke=(True, "1"), paper=(False, "2"), small=(True, "3"))
    assert [part.scale for part in section.parts] == ["paper", "small", "smoke"]
    assert section.title == "Figure 1: it"
    (claim,) = section.claims
    assert (claim.holds, claim.found, claim.scale) == (False, "2", "scale paper, 1 seed")
    assert claim.others == [("scale small, 1 seed", "holds"), ("scale smoke, 1 seed", "holds")]


def test_one_seed_at_a_larger_scale_leaves_the_word_to_a_smaller_one(tmp_path):
    section = scales(tmp_path, small=(None, "-1%, 1 seed"), smoke=(True, "-2%, 3 seeds"))
    assert [(claim.holds, claim.found) for claim in section.claims] == [(True, "-2%, 3 seeds")]


def test_what_several_seeds_leave_open_stays_open(tmp_path):
    section = scales(tmp_path, small=(None, "-1%, 3 seeds"), smoke=(True, "-2%, 1 seed"))
    (claim,) = section.claims
    assert (claim.holds, claim.reason) == (None, "the numbers decide neither way")
    assert claim.others == [("scale smoke, 1 seed", "holds")]
    assert section.counts == {True: 0, False: 0, None: 1}


def test_that_one_seed_decides_nothing_is_said_once(tmp_path):
    undecided = [verdict(str(i), None) | {"found": "here -1%, 1 seed"} for i in range(9)]
    write(tmp_path / "results.json", figure1() | {"verdicts": undecided})
    text = make_report([tmp_path]).read_text()
    assert text.count("one seed has no standard error") == 1
    assert text.count(">not decided<") == 1 + 1  # the heading of the contents, and the one badge


@pytest.mark.parametrize(("holds", "found", "said"), [
    ([True, False, None], "3 seeds", "3 claims: 1 holds, 1 does not, 1 is not decided"),
    ([True] * 3 + [False] * 2, "3 seeds", "5 claims: 3 hold, 2 do not, 0 are not decided"),
    ([True], "3 seeds", "1 claim: 1 holds, 0 do not, 0 are not decided"),
    ([None, None], "-1%, 1 seed", "2 claims, none decided yet: one seed decides nothing"),
    ([None], "-1%, 1 seed", "1 claim, not decided yet: one seed decides nothing"),
    ([None, None], "-1%, 3 seeds", "2 claims, none decided yet"),
    ([], "", "Results"),
])  # fmt: skip
def test_the_headline_counts_every_verdict_and_says_first_where_none_is_decided(holds, found, said, tmp_path):
    verdicts = [verdict(str(i), own) | {"found": found} for i, own in enumerate(holds)]
    write(tmp_path / "results.json", figure1() | {"verdicts": verdicts})
    assert headline(sections_of(find_parts([tmp_path])[0])) == said


def test_probes_of_different_models_are_sections_of_their_own(tmp_path):
    for name in "ab":
        results = figure1() | {"experiment": "probe", "scale": "own", "maps": [], "title": f"Probe: {name}"}
        write(tmp_path / name / "results.json", results)
    assert [(section.name, section.title) for section in sections_of(find_parts([tmp_path])[0])] == [
        ("probe-language", "Probe: a"), ("probe-language-2", "Probe: b")
    ]  # fmt: skip


def test_rules_are_one_plain_sentence():
    assert plain("a number is small; it does not hold if it is large") == "a number is small"
    rule = "right on at least 90% of the tokens that it was not fitted on, in every layer"
    assert plain(rule) == "it classifies at least 90% of held-out tokens correctly, in every layer"


def test_rules_of_the_tables_are_said_plainly():
    rows = {metric: costs_little(row_with(metric), row_with(metric), metric).rule
            for metric in (SUBJECTS["language"].metric, SUBJECTS["views"].metric)}  # fmt: skip
    assert [plain(rule) for rule in rows.values()] == [
        "the change costs less than 2.5%, by at least 2 standard errors over seeds",
        "the change costs less than 0.25, by at least 2 standard errors over seeds",
    ]


def row_with(metric):
    return TableRow(
        name="rung1", label="it", paper=None, inner={}, runs=(), speeds={}, paper_speeds={}, seeds=(), missing=()
    )


# a run of kvbind train


def test_a_run_has_its_curves_and_configuration(tmp_path):
    write_run(tmp_path / "mine")
    (part,), found = find_parts([tmp_path])
    assert found == []
    assert part.lead == "1.5 million parameters, 40 steps, 40,960 tokens, 80 s of training."
    assert part.grids[0].rows == [["0", "300.000", "8.000"], ["20", "70.000", "8.000"], ["40", "50.000", "8.000"]]
    assert list(part.charts) == ["Training", "Learning rate and speed", "Positions"]
    loss, quality = part.charts["Training"]
    assert loss["series"][0]["y"][0] == 5
    # before training the metric is so far off that it would flatten the rest
    assert quality["series"][0]["y"] == [70, 50]
    assert part.charts["Positions"][0]["series"][0]["y"][0] == 4
    assert "seed: 0" in part.details["configuration"]
    assert [picture.heading for picture in part.pictures] == ["it"]
    page = Page(make_report([tmp_path / "mine"]).read_text())
    assert page.unbalanced == []
    words = page.words()
    assert "Run: language, mine" in words
    assert "1 training run" in words
    assert "claims" not in words


def test_a_run_that_is_not_finished_says_so(tmp_path):
    write_run(tmp_path / "mine", finished=False)
    assert find_parts([tmp_path])[0][0].lead == "Not finished: 40 steps so far."


@pytest.mark.parametrize("metrics", ["", '{"step": 0}\n', '{"step": 1, "loss": null}\n'])
def test_a_run_without_a_training_point_has_no_chart_of_it(metrics, tmp_path):
    write_run(tmp_path / "mine", finished=False)
    (tmp_path / "mine" / "metrics.jsonl").write_text(metrics)
    assert "Training" not in find_parts([tmp_path])[0][0].charts


def test_runs_that_experiments_share_are_shown_by_these_alone(tmp_path):
    write_run(tmp_path / "trained" / "language-abc")
    assert find_parts([tmp_path]) == ([], [])
    assert len(find_parts([tmp_path / "trained" / "language-abc"])[0]) == 1


def test_a_model_of_a_run_writes_a_sample(tmp_path, monkeypatch):
    place = write_run(tmp_path / "mine")
    (place / "model").mkdir()
    monkeypatch.setattr(page_runs, "written", lambda place: f"<b>{place.name}")
    assert find_parts([tmp_path])[0][0].samples == {"A sample": "<b>mine"}
    assert "&lt;b&gt;mine" in make_report([tmp_path]).read_text()
    monkeypatch.setattr(page_runs, "LARGEST", 1e6)
    assert find_parts([tmp_path])[0][0].samples == {}


def test_a_model_that_cannot_be_opened_has_no_sample(tmp_path, caplog):
    place = write_run(tmp_path / "mine")
    (place / "model").mkdir()
    assert find_parts([tmp_path])[0][0].samples == {}
    assert "no sample, as run must be finished" in caplog.text


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """A run with weights, and the names of the runs that wrote a sample since."""
    place = write_run(tmp_path / "runs" / "mine")
    write(place / "model" / "model.safetensors", "weights")
    asked = []
    monkeypatch.setattr(page_runs, "written", lambda place: asked.append(place.name) or f"sample {len(asked)}")
    monkeypatch.setattr(command, "untrained_models", lambda: asked.append("random") or models())
    return place, asked


def test_what_takes_long_is_said_and_made_once(sampled):
    place, asked = sampled
    said = []
    first = make_report([place.parent], say=said.append).read_text()
    assert said == [f"sampling text from {place}", "computing the explorer's systems with random weights"]
    assert make_report([place.parent], say=said.append).read_text() == first
    assert asked == ["mine", "random"]
    assert len(said) == 2
    # other weights write another text; the random ones are the same
    (place / "model" / "model.safetensors").write_text("more weights")
    assert "sample 3" in make_report([place.parent], say=said.append).read_text()
    assert asked == ["mine", "random", "mine"]


@pytest.mark.parametrize("content", ["{", "[]", '{"it": 1}'])
def test_a_damaged_cache_is_made_anew(sampled, content):
    place, asked = sampled
    (place.parent / "report.cache.json").write_text(content)
    for _ in range(2):
        assert "sample 1" in make_report([place.parent]).read_text()
    assert asked == ["mine", "random"]


def test_a_cache_that_holds_no_models_is_not_shown(sampled):
    place, asked = sampled
    make_report([place.parent])
    file = place.parent / "report.cache.json"
    file.write_text(json.dumps({key: [{"title": "planted"}] for key in json.loads(file.read_text())}))
    assert "planted" not in make_report([place.parent]).read_text()
    assert asked == ["mine", "random"] * 2


def test_the_command_says_what_it_does(sampled, monkeypatch):
    place, _ = sampled
    monkeypatch.chdir(place.parents[1])
    shown = CliRunner().invoke(app, ["report", "runs"])
    lines = shown.output.splitlines()
    assert lines[:2] == ["sampling text from runs/mine", "computing the explorer's systems with random weights"]
    assert lines[2].startswith("wrote ")


def test_commands_of_a_run_name_it_as_it_is_typed(tmp_path, monkeypatch):
    write_run(tmp_path / "my runs" / "mine")
    monkeypatch.chdir(tmp_path)
    typed = [Path("my runs"), Path(), tmp_path]
    found = [find_parts([folder])[0][0].next_command for folder in typed]
    assert found == [f"kvbind generate '{place}' --prompt \"The \"" for place in
                     ("my runs/mine", "my runs/mine", tmp_path / "my runs" / "mine")]  # fmt: skip
    tasks = {task: page_runs.next_command(Path("runs/mine"), task) for task in ("views", "images")}
    assert tasks == {
        "views": "kvbind render runs/mine",
        "images": "kvbind show runs/mine --out runs/mine/pictures/attention.png",
    }


def test_a_run_was_made_by_the_command_that_its_configuration_names(tmp_path):
    place = write_run(tmp_path / "mine")
    part = find_parts([tmp_path])[0][0]
    assert (part.command, part.details["configuration"]) == ("", "seed: 0\n")
    assert "kvbind train language" not in make_report([tmp_path]).read_text()
    made_by = "kvbind train language --preset tiny train.steps=40"
    (place / "config.yaml").write_text(config_header("language", made_by) + "seed: 0\n")
    part = find_parts([tmp_path])[0][0]
    assert (part.command, part.details["configuration"]) == (made_by, "seed: 0\n")
    task, config = open_run(place)
    assert (task, config.seed) == ("language", 0)


@pytest.mark.parametrize("made_by", ["", "kvbind train language a\nseed: 1", "\udcff"])
def test_a_command_of_no_single_line_is_not_written_down(made_by):
    assert config_header("language", made_by) == "# kvbind train language\n"


# charts


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.booleans())
def test_every_point_of_a_line_is_inside_its_axes(ys, markers):
    series = {"a": [(float(i), y) for i, y in enumerate(ys)]}
    chart = charts.lines(series, title="t", x="x", y="y", tones=["blue"], markers=markers)
    drawn = svg.draw(chart, svg.order_of([chart]))
    (path,) = re.findall(r'class="line" d="M([^"]+)"', drawn)
    height = float(re.search(r'<svg x="\d+" y="\d+" width="\d+" height="(\d+)"', drawn)[1])
    places = [float(point.split()[1]) for point in path.split("L")]
    assert len(places) == len(ys)
    assert all(0 <= place <= height for place in places)


def test_the_steep_beginning_of_a_picture_is_inside_its_axes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting, "write_with", lambda path, write: None)
    monkeypatch.setattr(plotting.Figure, "legend", lambda fig, **_: drawn.extend(fig.axes))
    losses = [6.22, 6.14, *(3 - i / 10 for i in range(8))]
    plotting.curves(tmp_path / "loss.png", {"a": [*enumerate(losses)]}, title="t", x="step", y="loss", rungs=1)
    low, high = drawn[0].get_ylim()
    assert low < min(losses)
    assert high > max(losses)


HERE = [13.441, 13.448, 13.445, 13.441]


def test_numbers_that_hardly_differ_are_drawn_close_together_with_labels_of_their_own():
    chart = charts.dots(list("abcd"), {"here": HERE}, title="Here", x="perplexity", tones=["blue"], digits=2)
    drawn = svg.draw(chart, svg.order_of([chart]))
    assert re.findall(r'class="value">([^<]+)<', drawn) == ["13.441", "13.448", "13.445", "13.441"]
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    # 0.007 of the 0.134 that a hundredth is, and a tenth of room on both sides
    assert max(places) - min(places) == pytest.approx(0.007 / (0.13448 * 1.2) * (svg.WIDTH - 14 - svg.LABEL), abs=0.2)
    titles = re.findall(r"here: ([\d.]+)</title>", drawn)
    assert titles == ["13.441", "13.448", "13.445", "13.441"]


def test_pictures_give_close_numbers_room_and_labels_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "write_with", lambda path, write: None)
    with plotting.figure(tmp_path / "it.png", 4, 3) as fig:
        ax = fig.subplots()
        plotting.rung_dots(ax, list("abcd"), HERE, title="Here", colour=plotting.BLUE)
        assert [text.get_text() for text in ax.texts] == ["13.441", "13.448", "13.445", "13.441"]
        low, high = ax.get_xlim()
        assert high - low == pytest.approx(0.13448 * 1.24)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_a_widened_range_holds_the_range_and_is_a_hundredth_wide(low, span):
    high = low + span
    less, more = widened(low, high)
    assert less <= low <= high <= more
    assert more - less >= 0.0099 * max(abs(low), abs(high))
    if high - low >= 0.01 * max(abs(low), abs(high)):
        assert (less, more) == (low, high)


@pytest.mark.parametrize(("values", "digits"), [
    ([8.0, 9.5], 2), ([13.441, 13.445, 13.448], 3), ([13.44, 13.44], 2), ([1.0, 1.00001], 5), ([], 2), ([0.0, 1e-30], 8)
])  # fmt: skip
def test_labels_have_the_digits_that_tell_numbers_apart(values, digits):
    assert digits_apart(values, 2) == digits


def test_a_logarithmic_axis_of_close_numbers_has_ticks():
    chart = charts.bars(["a", "b"], {"one": [1.31e5, 1.32e5]}, title="t", x="x", tones=["blue"], log=True)
    assert 'class="tick"' in svg.draw(chart, svg.order_of([chart]))


def test_a_line_is_cut_where_a_number_is_missing():
    chart = charts.lines(
        {"a": [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, 2.0)]}, title="t", x="x", y="y", tones=["blue"]
    )
    (path,) = re.findall(r'class="line" d="([^"]+)"', svg.draw(chart, svg.order_of([chart])))
    assert path.count("M") == 2
    assert path.count("L") == 1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans())
@example(1e6, 1e6, True)
@example(5e5, 1.0, True)
def test_ticks_are_round_and_inside_their_axis(low, span, log):
    low = abs(low) + 1e-3 if log else low
    axis = svg.Axis(low, low + span, 100, 400, log=log)
    ticks = axis.ticks()
    assert all(99.9 <= place <= 400.1 for place, _ in ticks)
    assert len({said for _, said in ticks}) == len(ticks) <= 12
    if not log:
        assert len(ticks) >= 2


def test_bars_are_as_long_as_their_numbers():
    chart = charts.bars(
        ["a", "b"], {"one": [1.0, 2.0], "two": [None, 4.0]}, title="t", x="x", tones=["blue", "orange"], log=False
    )
    drawn = svg.draw(chart, svg.order_of([chart]))
    widths = [float(x) for x in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(4 * widths[0], abs=0.3)


def test_names_in_charts_are_text():
    chart = charts.dots(["<b>"], {"</svg><script>": [1.0]}, title="<i>", x="&", tones=["blue"])
    drawn = svg.draw(chart, svg.order_of([chart]))
    assert Page(drawn).unbalanced == []
    assert {tag for tag, _, _ in Page(drawn).elements} <= {"svg", "g", "path", "circle", "text", "title"}


def test_numbers_of_a_chart_are_a_table():
    series = {"a": [(1.0, 2.0), (3.0, 4.0)], "b": [(1.0, 5.0)]}
    chart = charts.lines(series, title="t", x="step", y="loss", tones=["blue", "orange"])
    assert svg.numbers(chart) == ("t: loss by step", ["step", "a", "b"], [["1", "2", "5"], ["3", "4", NONE]])


def test_figure_2_is_drawn_from_its_maps():
    maps = [{"layer": 3, "sets": {"Q": [[0.0, 1.0], [2.0, 3.0]], "K": [[4.0, 5.0]]}}]
    (chart,) = DRAW["figure2"]({"maps": maps})["t-SNE"]
    assert [(one["name"], one["x"], one["y"]) for one in chart["series"]] == [("Q", [0, 2], [1, 3]), ("K", [4], [5])]
    assert DRAW["figure2"]({}) == {}


def test_figure_3_is_drawn_against_its_first_row():
    rows = [{"name": f"rung{i}", "label": "it", "loss_by_position": [[0.0, 2.0 + i], [64.0, 1.0]]} for i in range(2)]
    left, right = DRAW["figure3"]({"rows": rows})["Along the sequence"]
    assert left["series"][1]["y"] == [3, 1]
    assert right["series"][1]["y"] == [1, 0]
    assert [one["tone"] for one in left["series"]] == [0, 1]


def test_figure_4_runs_by_the_clock_from_its_first_step_and_leaves_out_skipped_ones():
    forms = {
        "recurrent": {"losses": [9.0, 3.0, math.nan, 3.0], "seconds": [50.0, 2.0, 2.0, 2.0], "first_step": 1},
        "parallel": {"losses": [9.0, 3.5, 3.0, 3.0], "seconds": [50.0, 1.0, 1.0, 1.0], "first_step": 1},
    }
    clock, apart = DRAW["figure4"]({"forms": json.loads(json.dumps(forms))})["By the clock"]
    assert [one["x"] for one in clock["series"]] == [[2, 6], [1, 2, 3]]
    assert apart["series"][0]["y"] == [0, 0.5, None, 0]
    json.dumps([clock, apart], allow_nan=False)


def test_errors_of_the_theorems_are_the_largest_of_all_draws():
    errors = [{p: {"state": x, "matrix": 0.0, "parallel": None} for p in ("float64", "float32")} for x in (1e-15, 3e-15)]
    (chart,) = DRAW["theorems"]({"cases": [{"name": "it", "draws": errors}]})["Errors"]
    assert {one["name"]: one["x"] for one in chart["series"] if "64" in one["name"]} == {
        "state, float64": [3e-15], "matrix, float64": [1e-18], "parallel, float64": [None]
    }  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [
    (lambda place: place / "nowhere", "there is no"),
    (lambda place: place, "found none below"),
])  # fmt: skip
def test_folders_without_results_are_refused(make, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", str(make(tmp_path))])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_results_that_are_no_json_are_refused_by_name(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json must be JSON"):
        find_parts([tmp_path])


def test_an_overview_of_several_tasks_is_no_result_of_its_own(tmp_path):
    write(tmp_path / "results.json", {"language": table2()})
    assert find_parts([tmp_path]) == ([], [])


def test_the_page_is_served_on_this_machine_alone(folder, text):
    path = folder / "report.html"
    server, address = open_server(path, 0)
    assert server.server_address[0] == "127.0.0.1"
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with urllib.request.urlopen(address) as answer:
            assert answer.read().decode() == text
        with pytest.raises(ValueError, match="port must be one that is free"):
            open_server(path, server.server_port)
        server.shutdown()
        thread.join()


def test_the_command_writes_where_it_is_told(folder, tmp_path):
    path = tmp_path / "new" / "page.html"
    shown = CliRunner().invoke(app, ["report", str(folder), "--out", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "wrote" in shown.output
    assert path.stat().st_size > 1e5


# what the explorer is told


CELLS = torch.arange(len(WORDS))


def call_of(spec):
    return as_call(spec, leaves_of(spec, embedded(WORDS)))


@given(st.integers(1, 40), st.floats(1e-3, 1e3), st.integers(0, 9))
def test_kept_weights_are_within_a_hundredth_of_the_largest(size, scale, seed):
    matrix = scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    codes, most = quantized(matrix)
    assert codes.dtype == torch.int8
    assert (weights_of(codes, most) - matrix).abs().max() <= 0.01 * most
    assert torch.equal(weights_of(codes, most).sign() * matrix.sign() >= 0, torch.ones(size, size, dtype=torch.bool))


def test_weights_of_nothing_are_nothing():
    codes, most = quantized(torch.zeros(3, 3))
    assert most == 0
    assert not codes.any()


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_cells_hold_the_weights_of_their_tokens(count, most, data):
    sizes = data.draw(st.lists(st.integers(1, most), min_size=count, max_size=count))
    cells = torch.repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    matrix = torch.randn(len(cells), len(cells), dtype=torch.float64)
    found = gathered(matrix, cells)
    assert found.shape == (count, count)
    for row in range(count):
        for column in range(count):
            block = matrix[cells == row][:, cells == column]
            assert float(found[row, column]) == pytest.approx(float(block.sum(1).mean()))


def test_a_text_has_as_few_cells_as_a_page_can_show():
    example, cells = examples.text(["ab"] * 300)
    assert example["tokens"][:2] == ["ababab", "ababab"]
    assert len(example["tokens"]) == 100 == int(cells.max()) + 1
    assert cells[:4].tolist() == [0, 0, 0, 1]
    assert example["unit"] == "cell of 3 tokens"
    assert examples.text(["a"] * 128)[0]["unit"] == "token"


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_cells_of_pictures_are_squares_of_patches(panels, height, width):
    pixels = torch.zeros(1, 2, 2, dtype=torch.uint8)
    example, cells = examples.pictures([("", pixels)] * panels, (height, width))
    rows, columns = example["grid"]
    assert len(cells) == panels * height * width
    assert sorted(set(cells.tolist())) == list(range(panels * rows * columns))
    assert panels * rows * columns <= examples.PICTURE_CELLS
    panel, y, x = panels - 1, height - 1, width // 2
    side = -(-height // rows)
    if panels * height * width <= examples.PICTURE_CELLS:
        assert (rows, columns) == (height, width)
        assert cells.tolist() == list(range(len(cells)))
    elif height == width and height % side == 0:
        assert int(cells[(panel * height + y) * width + x]) == (panel * rows + y // side) * columns + x // side


def test_vectors_in_a_plane_keep_their_distances():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(40, 2, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 1.0])
    basis = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64))[0]
    places, shares = principal(plane @ basis.T + 3)
    assert torch.allclose(torch.cdist(places, places), torch.cdist(plane, plane), atol=1e-6)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > 0.9
    assert principal(torch.ones(3, 4))[1] == [0, 0]
    assert principal(torch.ones(3, 1))[0].shape == (3, 2)


@pytest.mark.parametrize("name", ["lact_llm", "titans", "delta_net", "ttt_mlp"])
def test_a_head_alone_is_what_it_is_among_others(name):
    spec = untrained.systems.SYSTEMS[name]()
    spec = spec.replace(chunk=min(spec.chunk, 8))
    call = call_of(spec)
    options = dict(call.options)
    whole = linearize(spec, call.weights, call.q, call.k, call.v, **options).matrix()
    losses = inner_loss(spec, call.weights, call.k, call.v, **options)
    looks = look_at(call, CELLS)
    for head in range(2):
        found = looks[head]
        codes = np.frombuffer(base64.b64decode(found["codes"]), dtype=np.int8).reshape(64, 64)
        assert found["most"] == pytest.approx(float(whole[0, head].abs().max()), rel=1e-3)
        kept = weights_of(torch.from_numpy(codes.copy()), found["most"])
        assert (kept - whole[0, head]).abs().max() <= 0.011 * found["most"]
        assert found["after"] == pytest.approx(losses[0, head].tolist(), rel=1e-3, abs=1e-3)
        assert found["steps"][1][1] == pytest.approx(float(losses[0, head].mean()), rel=1e-3, abs=1e-3)
        assert len(found["q"][0]) == len(found["k_at"]) == 64


def test_tokens_that_do_not_write_have_no_key():
    spec = systems.lact_nvs()
    call = call_of(spec)
    call.options["update_tokens"] = slice(0, 20)
    found = look_at(call, CELLS)[0]
    assert found["k_at"] == list(range(20))
    assert len(found["q"][0]) == 64
    assert len(found["k"][0]) == 20


def test_a_convolution_is_looked_at_as_a_whole():
    call = call_of(systems.vittt("conv"))
    assert isinstance(call.spec.network, DepthwiseConv)
    assert [look["name"] for look in look_at(call, CELLS)] == ["convolution"]


def test_a_loss_that_grows_without_bound_has_no_number():
    spec = systems.delta_net().replace(direction="ascent", token_lr=False)
    call = call_of(spec)
    call.options["lr"] = 1e30
    found = look_at(call, CELLS)[0]
    assert found["steps"][-1][1] is None
    json.dumps(found, allow_nan=False)


def test_every_named_system_can_be_looked_into():
    found = untrained.untrained_models()
    once = [name for name in systems.SYSTEMS if systems.named(name).writes == systems.named(name).window_size == 1]
    assert [model["title"] for model in found] == once
    assert set(systems.SYSTEMS) - set(once) == {"delta_product", "rwkv7", "atlas"}
    for model in found:
        cells = 64
        if model["example"]["kind"] == "text":
            assert len(model["example"]["tokens"]) == cells
        assert model["rows"][0]["name"] == "rung0"
        for row in model["rows"]:
            assert all(look["size"] == cells for layer in row["layers"] for look in layer["heads"])
    assert [row["name"] for row in found[0]["rows"]] == [*(f"rung{i}" for i in range(7)), "ascent"]
    assert found[0]["rows"][0]["obstacle"].startswith("update='all'")
    assert found[0]["rows"][2]["obstacle"] is None
