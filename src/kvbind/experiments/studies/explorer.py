"""The explorer's trained models: what their layers do on a held-out text, image or scene, row by row of table 2.

Writes, beside `results.json`, one compressed file that `kvbind report` puts into its page, so that models can be
looked into where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.experiments.inspection import examples
from kvbind.experiments.inspection.examples import Example
from kvbind.experiments.inspection.heads import look_at, spec_data
from kvbind.experiments.layer_calls import LayerCall, seen_calls
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.saved_models.attention_maps import spread
from kvbind.experiments.subjects import SUBJECTS
from kvbind.experiments.subjects.rows import BASELINES
from kvbind.experiments.tables.table2 import TABLE
from kvbind.experiments.training.trained_rows import train_rows
from kvbind.tasks.images.augment import normalized
from kvbind.tasks.views.drawing import evaluation_batches
from kvbind.tasks.views.task import predict
from kvbind.train.files import to_json, write_text
from kvbind.train.step import precision

FILE = "models.json.gz"

LAYERS = 2
"""Layers that are looked at: the first and the last."""

CHUNKS, TOKENS = 8, 8192
"""The text is so many chunks long, and no longer than so many tokens or than the model was trained on."""


def reproduce(**options: Any) -> dict[str, Any]:
    """Look into the model of every row, of its first seed, and write what was seen.

    Args:
        options: the fields of `kvbind.experiments.request.Request`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit.
        UnfinishedError: no run is finished, or none has its weights here.
    """
    request = Request(**options)
    trained = train_rows(
        "explorer", [row for row in TABLE.rows if row not in BASELINES], tuple(SUBJECTS), request, weights=True
    )
    rows, example = [], None
    for name in trained.runs:
        seed, metric = min(trained.runs[name]), trained.subject.metric
        model, task, job = trained.open(name, seed)
        example, layers = LOOK[request.task](model, task, job.config, trained.device)
        number = TABLE.rows.index(name)
        label = trained.labels[name] if number >= TABLE.rungs else f"{number} {trained.labels[name]}"
        value = trained.runs[name][seed].result["held_out"][metric.name]
        rows.append({"name": name, "label": label, "found": f"{metric.title} {value:.{metric.digits}f}", **layers})
        request.say(f"{name}: {len(layers['layers'])} layer(s)")
    title = f"{request.task}, scale {request.scale}"
    seen = {
        "title": title,
        "group": "trained models",
        "about": f"Trained as in table 2, {title}, the first seed; shown on {trained.subject.held_out}, the first and the "
        f"last layer.{trained.missing}",
        "example": example,
        "rows": rows,
    }
    write_text(trained.out / FILE, to_json(seen) + "\n")
    findings = Findings(
        experiment="explorer",
        title=f"Explorer: {title}",
        lead="Models prepared to be looked into: kvbind report shows them.",
        config=trained.config,
        data={"models": FILE, "runs": trained.folders()},
        verdicts=[],
        tables={},
        pictures={},
    )
    return write_findings(trained.out, request, findings, trained.device)


def calls_of(model: nn.Module, config: Any, device: torch.device, *inputs: Any, **named: Any) -> list[LayerCall]:
    """The calls that a model's layers make, in their order."""
    calls: list[LayerCall] = []
    with torch.no_grad(), precision(config.train, device), seen_calls(model, calls.append):
        model(*inputs, **named)
    return calls


def look_at_layers(layers: Sequence[Sequence[LayerCall]], cells: Tensor) -> dict[str, Any]:
    """The first and the last layer, each with the heads of all its calls."""
    return {
        **spec_data(layers[0][0].spec),
        "layers": [
            {"name": f"layer {i}", "heads": [look for call in layers[i] for look in look_at(call, cells)]}
            for i in spread(len(layers), LAYERS)
        ],
    }


def language(model: Any, task: Any, config: Any, device: torch.device) -> tuple[Example, dict[str, Any]]:
    """A language model on the beginning of the first held-out sample."""
    chunk = model.config.inner.chunk or TOKENS
    ids = task.evaluation[0]["input_ids"][:1, : min(CHUNKS * chunk, TOKENS)]
    calls = calls_of(model, config, device, input_ids=ids.to(device), use_cache=False)
    tokens = [task.tokenizer.decode([token]) for token in ids[0].tolist()]
    example, cells = examples.text(tokens)
    return example, look_at_layers([[call] for call in calls], cells)


def images(model: Any, task: Any, config: Any, device: torch.device) -> tuple[Example, dict[str, Any]]:
    """ViTTT on the first held-out image; a layer's calls are those of its heads and of its convolution."""
    pixels, label = task.held_out_image(0)
    x = normalized(pixels[None].to(device), config.data.mean, config.data.std)
    calls = calls_of(model.vittt, config, device, x)
    tokens = calls[0].q.shape[1]
    # later stages of a hierarchical model have other patches
    by_layer = [calls[i : i + 2] for i in range(0, len(calls), 2) if calls[i].q.shape[1] == tokens]
    side = round(tokens**0.5)
    example, cells = examples.pictures([(f"class {task.names[label]}", pixels)], (side, side))
    return example, look_at_layers(by_layer, cells)


def views(model: Any, task: Any, config: Any, device: torch.device) -> tuple[Example, dict[str, Any]]:
    """View synthesis on the first held-out scene, whose input views are written and all of whose views read."""
    batch = next(iter(evaluation_batches(task.held_out, config.data)))
    one = {name: x[:1].to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    inputs, targets = (task.held_out.pixels(one[name], device) for name in ("image", "target_image"))
    calls: list[LayerCall] = []
    with torch.no_grad(), precision(config.train, device), seen_calls(model, calls.append):
        predict(model, inputs, one)
    panels = [(f"{kind} {i + 1}", (255 * x).round().byte()) for kind, own in (("input", inputs), ("target", targets))
              for i, x in enumerate(own[0])]  # fmt: skip
    patch = model.config.patch_size
    grid = (inputs.shape[-2] // patch, inputs.shape[-1] // patch)
    example, cells = examples.pictures(panels, grid)
    return example, look_at_layers([[call] for call in calls], cells)


LOOK = {"language": language, "images": images, "views": views}
"""By task."""
