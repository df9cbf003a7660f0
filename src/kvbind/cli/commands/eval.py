"""`kvbind eval`: metrics of a run on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbind.cli import output
from kvbind.cli.arguments import TASK_NAMES, Data, check_file, check_task, run_and_rest, with_data


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK] RUN [KEY=VALUE]...",
            help="Folder of the finished training run, and edits of its configuration, such as data.length=4096. The task, "
            f"{TASK_NAMES}, may stand before it.",
            show_default=False,
        ),
    ],
    data: Data = None,
    write: Annotated[
        Path | None, typer.Option("--json", help="Also write all metrics to this file.", metavar="FILE")
    ] = None,
) -> None:
    """Evaluate a run on its held-out data, or on others.

    Language: perplexity, bits per byte, loss by position. Images: top-1 and top-5 accuracy. Views: PSNR and SSIM.

    For example: [bold]kvbind eval runs/mine --data book.txt data.length=4096[/]
    """
    from kvbind.experiments.training.runs import load_model, open_run
    from kvbind.tasks import open_task_module
    from kvbind.train.files import to_json, write_text
    from kvbind.train.loop import evaluate as evaluation
    from kvbind.train.loop import pick_device

    task, run, overrides = run_and_rest(words)
    check_file("--json", write)
    trained_on, _ = open_run(run)
    check_task(task, trained_on, run)
    module = open_task_module(trained_on)
    # where a task tells them apart, the source of what is held out
    source = "held_out_source" if hasattr(module.Config().data, "held_out_source") else "source"
    _, config = open_run(run, with_data(overrides, source, data))
    opened = module.Task(config, training=False)
    device = pick_device(config.train.device)
    metrics = evaluation(load_model(run, opened).to(device), opened, config.train, device)
    output.show_metrics(output.console(), metrics)
    if write is not None:
        write_text(write, to_json(metrics, indent=2) + "\n")
