"""Figure 2: queries beside keys, and outputs beside values, in the layers of a trained language model.

A memory would be read where it was written: queries would lie among the keys, and outputs among the values. t-SNE shows
whether they do. Since a picture of that kind can mislead, three numbers say the same without eyes: how well a linear probe
tells the two sets apart, how far apart their distributions are, and how many queries have a key nearby.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbind.experiments import plotting
from kvbind.experiments.layer_calls import first_calls
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.plotting import picture
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.training.trained_rows import train_rows
from kvbind.train.step import precision

ROW = "rung0"

POINTS, MOST_LAYERS = 400, 4
"""Tokens of each set, and layers, that are looked at."""

NEAR, SAME = 0.95, 1e-4
"""The quantile of keys' distances to their nearest other key up to which a distance counts as near; and the share of their
mean distance up to which two keys are one, as the values of equal tokens are in a first layer."""

APART, FAR = 0.9, 0.5
"""A probe at least this accurate tells two sets apart; at most this share of near queries is few."""

Points = NDArray[np.float64]

PAIRS = {"queries and keys": ("Q", "K"), "outputs and values": ("O", "V")}


@dataclass(frozen=True)
class Numbers:
    """How two sets of vectors differ, averaged over heads.

    Attributes:
        probe: the accuracy of a linear probe on tokens that it was not fitted on; 0.5 is chance.
        energy: their energy distance over twice the mean distance between them: 0 for equal distributions, at most 1.
        energy_of_halves: the same between two halves of the second set, which is what chance gives.
        near: the share of the first set whose nearest neighbour in the second is near.
    """

    probe: float
    energy: float
    energy_of_halves: float
    near: float


@dataclass(frozen=True)
class Layer:
    """What was found in one layer.

    Attributes:
        number: of the layer.
        numbers: by pair.
        maps: t-SNE of the first head by pair, the first set's points before the second's; empty where none is drawn.
    """

    number: int
    numbers: Mapping[str, Numbers]
    maps: Mapping[str, Points]


def reproduce(**options: Any) -> dict[str, Any]:
    """Look at the layers of the full system, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is "language". The first run is drawn.

    Returns:
        What `results.json` holds.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: another task, an unknown scale, or an edit that does not fit.
        UnfinishedError: no run is finished, or none has its weights here.
    """
    check_sklearn("figure2")
    request = Request(**options)
    trained = train_rows("figure2", [ROW], ["language"], request, weights=True)
    found: list[list[Layer]] = []
    for seed in trained.runs[ROW]:
        model, task, job = trained.open(ROW, seed)
        sets = held_out_sets(model, task, job.config, trained.device)
        chosen = sorted({round(x) for x in np.linspace(0, len(sets) - 1, min(len(sets), MOST_LAYERS))})
        found.append([look(i, sets[i], draw=not found) for i in chosen])
    draw(trained.out / "sets.png", found[0])
    means = {(layer.number, pair): mean_numbers([own[i].numbers[pair] for own in found])
             for i, layer in enumerate(found[0]) for pair in PAIRS}  # fmt: skip
    findings = Findings(
        experiment="figure2",
        title=f"Figure 2: queries and keys, outputs and values, scale {request.scale}",
        lead=f"Fast weights of the trained full system on held-out text. {about(len(found))} A first layer's values are "
        f"those of single tokens, few and far apart, so that near says little of them.{trained.missing}",
        config=trained.config,
        data={
            "layers": [{"layer": layer, "sets": pair, **asdict(x)} for (layer, pair), x in means.items()],
            "maps": [as_map(layer, pair) for layer in found[0] for pair in PAIRS],
            "runs": trained.folders(),
        },
        verdicts=judge(means),
        tables={"Without eyes": (HEADER, lines_of(means))},
        pictures={"t-SNE": ("sets.png", "t-SNE of queries and keys, and of outputs and values, one head, by layer")},
    )
    return write_findings(trained.out, request, findings, trained.device)


HEADER = ["layer", "sets", "probe's\naccuracy", "energy\ndistance", "of two\nhalves", "share\nnear"]
"""Of the table that `lines_of` has the lines of."""


def lines_of(means: Mapping[tuple[int, str], Numbers]) -> list[list[str]]:
    """The numbers by layer and pair, as texts."""
    return [
        [str(layer), pair, f"{x.probe:.1%}", f"{x.energy:.3f}", f"{x.energy_of_halves:.3f}", f"{x.near:.1%}"]
        for (layer, pair), x in means.items()
    ]


def about(seeds: int) -> str:
    """What the numbers are, in sentences."""
    return (
        "Probe: logistic regression, fitted on one half of the tokens, measured on the other. Energy distance: relative, "
        f"from 0 (equal sets) to 1, beside that of two halves of one set. Near: at most the {NEAR:.0%} quantile of the "
        f"distances of keys (values) to the nearest other one, so that {NEAR:.0%} or more would be near if both sets were "
        f"of one kind. {POINTS} tokens of each set at most; averages over heads and {seeds} seed(s)."
    )


def check_sklearn(what: str) -> None:
    """Raise `ImportError` where scikit-learn is not installed, which `what` needs."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs scikit-learn: pip install scikit-learn") from error


def as_map(layer: Layer, pair: str) -> dict[str, Any]:
    """A map as `results.json` holds it: the points of each set."""
    places = layer.maps[pair].astype(np.float64).round(1).tolist()  # finer than a picture shows
    middle = len(places) // 2
    return {"layer": layer.number, "sets": dict(zip(PAIRS[pair], (places[:middle], places[middle:]), strict=True))}


def held_out_sets(
    model: Any, task: Any, config: Any, device: torch.device, name: str = "language"
) -> list[dict[str, Tensor]]:
    """Queries, keys, values and outputs of each layer on the first held-out batch, by the names that `PAIRS` has.

    Of tokens that write, where not all do; of ViTTT, in its heads.

    Args:
        model: on the device.
        task: the model's, with its held-out data.
        config: of the run.
        device: where the model is.
        name: of the task.
    """
    found = []
    for calls in first_calls(name, model, task, config, device):
        call = calls[0]
        with torch.no_grad(), precision(config.train, device):
            sets = {"Q": call.q, "K": call.k, "V": call.v, "O": call.output()}
        writers = call.options.get("update_tokens")
        found.append(sets if writers is None else {key: x[:, writers] for key, x in sets.items()})
    return found


def look(number: int, sets: Mapping[str, Tensor], draw: bool) -> Layer:
    """Measure both pairs of a layer, and map the first head's points where they will be drawn."""
    points = {name: by_head(x) for name, x in sets.items()}
    numbers, maps = {}, {}
    for pair, (one, other) in PAIRS.items():
        both = list(zip(points[one], points[other], strict=True))
        numbers[pair] = mean_numbers([measure(*own) for own in both])
        if draw:
            maps[pair] = tsne(np.concatenate(both[0]))
    return Layer(number, numbers, maps)


def by_head(x: Tensor) -> list[Points]:
    """Vectors `[B, T, H, D]` of tokens spread evenly over batch and sequence, `[POINTS, D]` per head."""
    tokens = x.flatten(0, 1)
    chosen = torch.linspace(0, len(tokens) - 1, min(POINTS, len(tokens)), device=x.device).long()
    return list(tokens[chosen].transpose(0, 1).double().cpu().numpy())


def measure(one: Points, other: Points) -> Numbers:
    """The numbers of two sets of as many vectors each, of the same tokens in the same order."""
    across, within = distances(one, other), distances(other, other)
    within[within <= SAME * within.mean()] = np.inf
    near = np.quantile(within.min(1), NEAR)
    half = other[::2], other[1::2]
    return Numbers(
        probe(one, other), energy_distance(one, other), energy_distance(*half), float((across.min(1) <= near).mean())
    )


def probe(one: Points, other: Points) -> float:
    """How often logistic regression, fitted on the first half of the tokens, is right on the second."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    middle = len(one) // 2
    train, test = (np.concatenate([x[own] for x in (one, other)]) for own in (slice(middle), slice(middle, None)))
    labels = [np.repeat([0, 1], len(x) // 2) for x in (train, test)]
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels[0])
    return float(fitted.score(test, labels[1]))


def energy_distance(one: Points, other: Points) -> float:
    """`(2 E|X - Y| - E|X - X'| - E|Y - Y'|) / 2 E|X - Y|` (Szekely and Rizzo, 2013): 0 for equal sets, at most 1."""
    across = 2 * distances(one, other).mean()
    return float((across - distances(one, one).mean() - distances(other, other).mean()) / across) if across else 0.0


def distances(one: Points, other: Points) -> Points:
    """Euclidean, `[n, m]`."""
    exact = "donot_use_mm_for_euclid_dist"
    found: Points = torch.cdist(torch.from_numpy(one), torch.from_numpy(other), compute_mode=exact).numpy()
    return found


def tsne(points: Points) -> Points:
    """Vectors `[n, D]` as places `[n, 2]`."""
    from sklearn.manifold import TSNE

    found: Points = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(points)
    return found


def mean_numbers(many: Sequence[Numbers]) -> Numbers:
    """Field by field."""
    return Numbers(**{name: statistics.fmean(asdict(x)[name] for x in many) for name in asdict(many[0])})


def judge(means: Mapping[tuple[int, str], Numbers]) -> list[Verdict]:
    """Whether the sets lie apart in every layer."""
    verdicts = []
    for pair in PAIRS:
        own = {layer: x for (layer, name), x in means.items() if name == pair}
        probes, near = [x.probe for x in own.values()], [x.near for x in own.values()]
        first, second = pair.split(" and ")
        verdicts += [
            Verdict(
                f"a linear probe tells {first} from {second}",
                f"right on at least {APART:.0%} of the tokens that it was not fitted on, in every layer",
                min(probes) >= APART,
                f"{min(probes):.1%} to {max(probes):.1%} over {len(own)} layer(s)",
            ),
            Verdict(
                f"{first} do not lie among the {second}",
                f"at most {FAR:.0%} of them are near one, in every layer; {NEAR:.0%} would be if they were of one kind",
                max(near) <= FAR,
                f"{min(near):.1%} to {max(near):.1%} are near",
            ),
        ]
    return verdicts


def draw(path: Path, layers: Sequence[Layer]) -> None:
    """A column per layer, a row per pair."""
    colours = ((plotting.BLUE, plotting.ORANGE), (plotting.GREEN, plotting.RED))
    with picture(path, 2.5 * len(layers) + 1.2, 5.3) as fig:
        axes = fig.subplots(len(PAIRS), len(layers), squeeze=False)
        for row, (pair, own, names) in enumerate(zip(PAIRS, colours, PAIRS.values(), strict=True)):
            for ax, layer in zip(axes[row], layers, strict=True):
                places = layer.maps[pair]
                middle = len(places) // 2
                for name, colour, part in zip(names, own, (places[:middle], places[middle:]), strict=True):
                    ax.scatter(part[:, 0], part[:, 1], s=5, color=colour, alpha=0.6, linewidths=0, label=name)
                ax.set_xticks([])
                ax.set_yticks([])
                ax.grid(visible=False)
                x = layer.numbers[pair]
                ax.set_title(f"layer {layer.number}" if row == 0 else "")
                ax.set_xlabel(f"probe {x.probe:.0%}, near {x.near:.0%}", fontsize=8.5, color=plotting.MUTED)
            axes[row, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2.5)
