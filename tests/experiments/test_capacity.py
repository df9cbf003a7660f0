"""Capacity: points, gains and verdicts by hand, and the whole command in small."""

import json
import math

import pytest
import torch
import yaml

from kvbind.experiments.report.page import find_parts
from kvbind.experiments.studies import capacity
from kvbind.experiments.studies.capacity import (
    MIXERS,
    CapacityPoint,
    bytes_of,
    configured,
    gain,
    judge,
    panels,
    sized,
    taken,
)
from kvbind.experiments.training.plans import UnfinishedError
from kvbind.inner.systems import PROJECTIONS, SYSTEMS
from kvbind.tasks import recall

TOY = [
    "data.vocabulary=16", "data.length=16", "data.pairs=[2,4]", "data.batch=4", "data.evaluation_samples=4",
    "model.inner.chunk=4", "train.steps=2", "train.warmup=0", "train.device=cpu",
]  # fmt: skip


def curve(*points, seeds=1, spread=0.0):
    return [
        CapacityPoint(8, size, 1e-2, {seed: accuracy + spread * (-1) ** seed * index for seed in range(seeds)}, [])
        for index, (size, accuracy) in enumerate(points)
    ]


def test_a_gain_is_the_mean_difference_over_the_bytes_that_both_have():
    # over log bytes from 2 to 4 KiB the one is flat at 60, the other rises from 20 to 40
    own, reference = curve((512, 60), (2**14, 60)), curve((2**10, 0), (2**12, 40))
    found = gain(own, reference)
    assert (found.low, found.high) == (2**10, 2**12)
    assert found.points == pytest.approx([60 - 20])
    assert found.error is None
    # a corner in between: 0 to 40 in the first half, 40 in the second
    bent = curve((2**10, 0), (2**11, 40), (2**12, 40))
    assert gain(own, bent).points == pytest.approx([60 - (20 + 40) / 2])
    assert gain(curve((2**9, 1), (2**11, 1)), curve((2**10, 0), (2**12, 40))).points == pytest.approx([1 - 10])


def test_states_of_no_common_size_or_seed_have_no_gain():
    reference = curve((2**10, 0), (2**12, 40))
    assert gain(curve((2**12, 1), (2**13, 1)), reference) is None
    assert gain(curve((2**11, 1)), reference) is None
    late = [CapacityPoint(8, size, 1e-2, {7: 1.0}, []) for size in (2**10, 2**12)]
    assert gain(late, reference) is None


def test_verdicts_say_what_seeds_decide():
    reference = curve((2**10, 20), (2**12, 40), seeds=3)
    curves = {
        "softmax": curve((2**13, 99), (2**14, 100), seeds=3),
        "delta_net": curve((2**10, 40), (2**12, 60), seeds=3, spread=1.0),
        "gla": curve((2**10, 10), (2**12, 20), seeds=3, spread=1.0),
        "rung0": curve((2**10, 20), (2**12, 41), seeds=3, spread=30.0),
        "rung1": curve((2**13, 90), (2**14, 90), seeds=3),
        "rung2": reference,
        "linear_attention": reference,
    }
    found = {verdict.claim.split()[0]: verdict for verdict in judge(curves)}
    assert {name: verdict.holds for name, verdict in found.items()} == {
        "softmax": True, "delta_net": True, "gla": False, "rung0": None, "rung1": None, "rung2": None,
    }  # fmt: skip
    assert found["delta_net"].found.startswith("+20.2 ± 0.3 points from 1 to 4 KiB, 3 seeds")
    assert found["rung1"].found == "no sizes of state in common"
    one = judge({"delta_net": curve((2**10, 90), (2**12, 95)), "linear_attention": curve((2**10, 20), (2**12, 40))})
    assert [verdict.holds for verdict in one] == [None]
    assert [verdict.holds for verdict in judge({"softmax": curve((2**10, 94.9), (2**11, 100))})] == [False]


@pytest.mark.parametrize(
    ("edit", "values"), [("8", [8]), ("[8,16]", [8, 16]), ("[8.0]", [8]), ("[]", None), ("8.5", None), ("-1", None),
                         ("[a]", None), ("true", None)],
)  # fmt: skip
def test_edits_of_what_is_tried_give_its_values(edit, values):
    edits = ["data.batch=4", f"{capacity.WIDTH}={edit}"]
    if values is None:
        with pytest.raises(ValueError, match="hidden_size must be a number above 0"):
            taken(edits, capacity.WIDTH, (1, 2))
        return
    assert taken(edits, capacity.WIDTH, (1, 2)) == values
    assert edits == ["data.batch=4"]
    assert taken(["train.learning_rate=1e-3"], capacity.RATE, (1e-2,)) == [1e-3]
    assert taken([], capacity.RATE, (1e-2,)) == (1e-2,)


def test_every_causal_system_is_compared_in_its_own_layer_behind_a_convolution():
    assert set(MIXERS) >= {"softmax", *(f"rung{i}" for i in range(7)), *PROJECTIONS, "linear_attention", "in_place_ttt"}
    assert not {"zipmap", "vittt", "lact_nvs", "lact_video"} & set(MIXERS)
    for mixer in MIXERS:
        config = sized(configured("tiny", TOY, mixer), 8, 1e-2, 0)
        inner = recall.inner_loop(config.model)
        assert config.model.fields["projections"]["conv"] == 4
        if mixer in SYSTEMS:
            made = SYSTEMS[mixer]()
            if made.orthogonalize is not None:  # the precision is the preset's
                made = made.replace(orthogonalize=made.orthogonalize.replace(dtype=torch.float32))
            assert inner == made.replace(chunk=4 if made.chunk > 1 else 1)
        assert bytes_of(config) > 0, mixer


def test_bytes_are_those_of_what_tokens_change():
    sizes = {
        name: bytes_of(sized(configured("tiny", TOY, name), 8, 1e-2, 0))
        for name in ("linear_attention", "rung6", "rung2", "rung0")
    }
    layers, matrix, tails = 2, 8 * 8, 3 * 3 * 8
    assert sizes["linear_attention"] == 4 * layers * (matrix + tails)
    # three tokens may wait for the end of a chunk: keys, values and rates
    assert sizes["rung6"] == 4 * layers * (matrix + tails + 3 * (16 + 1))
    # with momentum, whose gate waits too; one matrix of three is updated
    assert sizes["rung2"] == 4 * layers * (2 * matrix + tails + 3 * (16 + 2))
    assert sizes["rung0"] == 4 * layers * (2 * 3 * matrix + tails + 3 * (16 + 3 + 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("capacity")
    options = {
        "task": "recall", "out": out, "seeds": 1, "rows": ["softmax", "rung2", "linear_attention"],
        "overrides": [*TOY, "model.fields.hidden_size=[8,16]", "train.learning_rate=[1e-2,2e-2]"],
    }  # fmt: skip
    return out, options, capacity.reproduce(workers=1, **options)


def test_the_command_leaves_curves_verdicts_and_a_figure(made):
    out, options, results = made
    assert json.loads((out / "results.json").read_text())["curves"] == json.loads(json.dumps(results["curves"]))
    assert [one["name"] for one in results["curves"]] == options["rows"]
    for one in results["curves"]:
        assert [point["width"] for point in one["points"]] == [8, 16]
        for point in one["points"]:
            assert set(point["accuracy"]) == {0}
            assert [pairs for pairs, _ in point["by_pairs"]] == [2, 4]
            assert not point["untried"]
    assert len(results["tables"][0]["rows"]) == 6
    assert {"device", "cores"} <= set(results["machine"])
    assert (out / "capacity.png").stat().st_size > 1000
    assert (out / "capacity.svg").is_file()
    assert len(list((out / "trained").glob("recall-*"))) == 3 * 2 * 2
    (part,) = find_parts([out])[0]
    assert part.experiment == "capacity"
    (charts,) = part.charts.values()
    assert [chart["log"] for chart in charts] == [True]


def test_the_rate_is_the_one_that_validation_chooses(made):
    out, _, results = made
    found = {}
    for path in (out / "trained").glob("recall-*/result.json"):
        held_out, config = (
            json.loads(path.read_text())["held_out"],
            yaml.safe_load((path.parent / "config.yaml").read_text()),
        )
        key = config["model"]["mixer"], config["model"]["fields"]["hidden_size"], config["train"]["learning_rate"]
        if config["model"]["mixer"] == "softmax":
            found.setdefault(key[1:], []).append(held_out["validation_accuracy"])
    for point in results["curves"][0]["points"]:
        means = {rate: math.fsum(x) / len(x) for (width, rate), x in found.items() if width == point["width"]}
        assert means[point["rate"]] == max(means.values())


def test_the_same_command_trains_nothing_again_and_a_longer_one_goes_on(made, monkeypatch):
    _, options, results = made

    def refuse(*args, **named):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr("kvbind.experiments.training.runs.train", refuse)
        again = capacity.reproduce(workers=1, minutes=0.0, **options)
    assert again["curves"] == results["curves"]
    # of a mixer for which there is no time nothing is said but that
    more = capacity.reproduce(workers=1, minutes=0.0, **{**options, "rows": [*options["rows"], "kda"]})
    assert more["curves"] == results["curves"]
    assert more["unfinished"] == "kda at width 8 (seed 0), kda at width 16 (seed 0)"
    assert more["unfinished"] in more["lead"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "language"}, "task must be one of 'recall'"),
        ({"scale": "smal"}, "scale must be one of"),
        ({"rows": ["delta"]}, "rows must be one of 'softmax', .*got 'delta'"),
        ({"data": "book.txt"}, "data must be None, as rows of recall are drawn"),
        ({"overrides": ["model.inner.system=gla"]}, "overrides must leave model.inner.system to the comparison"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        capacity.reproduce(**{"task": "recall", "out": tmp_path, "workers": 1} | options)


def test_without_time_for_a_single_run_there_is_no_report(tmp_path):
    with pytest.raises(UnfinishedError):
        capacity.reproduce(task="recall", out=tmp_path, workers=1, minutes=0.0, overrides=TOY, rows=["softmax"])


def test_the_picture_has_a_side_for_the_ladder_and_one_for_systems():
    both = ["linear_attention", "softmax"]
    assert panels(["softmax", "rung0", "gla", "linear_attention"]) == {
        "The ladder": [["rung0"], both],
        "Systems": [["gla"], both],
    }
    assert panels(["softmax", "kda"]) == {"Systems": [["kda"], ["softmax"]]}
    assert panels(["softmax"]) == {"Systems": [[], ["softmax"]]}
