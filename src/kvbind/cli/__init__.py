"""The command `kvbind`.

Commands import what they need when they run, so that `kvbind --help` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbind.bench.app import app as bench
from kvbind.screen import LogLines, Screen
from kvbind.tasks import TASKS, preset_files


class Commands(typer.Typer):
    """Commands in whose paths `~` stands for the user's home, which no shell puts there in `--out=~/run`."""

    def command(self, *names: Any, **options: Any) -> Any:
        """As typer's."""
        enter = super().command(*names, **options)

        def entered(function: Callable[..., None]) -> Callable[..., None]:
            @functools.wraps(function)
            def run(*values: Any, **named: Any) -> None:
                function(*map(at_home, values), **{name: at_home(x) for name, x in named.items()})

            enter(run)
            return function

        return entered


def at_home(value: Any) -> Any:
    """A path, or paths in a list, with the user's home for `~`; anything else as it is."""
    if isinstance(value, list):
        return [at_home(x) for x in value]
    return value.expanduser() if isinstance(value, Path) else value


app = Commands(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Edits of the configuration, such as train.steps=500 model.inner.update=last."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="Data to use in place of the configuration's: a file, a folder, or hub:NAME.", metavar="PATH"
    ),
]

Layout = Literal["kvbind", "released"]

TASK_NAMES = ", ".join(TASKS)

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print the whole configuration too, which the run's folder has in any case.")
]

USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for a command line that is none, which has no public name of its own."""

NEXT = {
    "language": 'kvbind generate {run} --prompt "The "',
    "images": "kvbind show {run} --out attention.png",
    "views": "kvbind render {run}",
}
"""What to look at a trained model with, by its task."""


def console() -> Console:
    """Where commands write what they were asked for."""
    return Screen()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, and leave with its exit code; a user's mistake ends it with one line on stderr and code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    lines = logging.getLogger("kvbind")
    if not lines.handlers:
        lines.addHandler(LogLines())
    for stream in (sys.stdout, sys.stderr):
        # a terminal without a letter gets its number, not an error
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # what is written first will say what is wrong with it
                stream.reconfigure(errors="backslashreplace")
    traceback = "--traceback" in words
    try:
        code = app([word for word in words if word != "--traceback"], prog_name="kvbind", standalone_mode=False)
    except USAGE as error:
        fail_usage(error)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if traceback:
            raise
        fail(error, 2)
    except RuntimeError as error:
        if traceback or type(error).__name__ not in ("TrainingStoppedError", "OutOfMemoryError", "WorkerKilledError"):
            raise
        fail(error, 1)
    else:
        # commands return nothing, and what ends them early its code
        sys.exit(code or 0)


def fail_usage(error: Any) -> NoReturn:
    """Say in one line what is wrong with the command line, and leave. Without any word, the help is there already."""
    said = " ".join(error.format_message().replace("Value error, ", "").split())
    if said and type(error).__name__ != "NoArgsIsHelpError":
        stderr = Screen(stderr=True)
        stderr.print("error: ", style="bold red", end="")
        command = "kvbind" if error.ctx is None else error.ctx.command_path
        stderr.print(f"{said[0].lower()}{said[1:].rstrip('.')} ({command} --help says what it takes)", soft_wrap=True)
    sys.exit(error.exit_code)


def fail(error: Exception, code: int) -> NoReturn:
    """Say what went wrong in one line, and leave."""
    stderr = Screen(stderr=True)
    stderr.print("error: ", style="bold red", end="")
    stderr.print(str(error), soft_wrap=True)
    stderr.print("(--traceback shows where)", style="dim")
    sys.exit(code)


@contextlib.contextmanager
def continuable() -> Iterator[None]:
    """Ctrl-C ends a long run with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted; the same command goes on from the last checkpoint"
        Screen(stderr=True).print(f"\n{said}{', without --fresh' if '--fresh' in sys.argv else ''}", soft_wrap=True)
        raise typer.Exit(130) from None


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from importlib.metadata import version

        console().print(f"kvbind {version('kvbind')}")
        raise typer.Exit


@app.callback(epilog="Errors are one line; [bold]--traceback[/] anywhere on the command line shows where they came from.")
def kvbind(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Test-time training with key-value binding, run as the linear attention it is (arXiv 2602.21204)."""


@app.command()
def systems() -> None:
    """List the named inner loops, by family: whether each has a parallel form, and what it is built of, in short."""
    from itertools import groupby

    from kvbind.forms.analysis import parallel_obstacles
    from kvbind.inner.systems import SYSTEMS, family

    screen = console()
    wide = max(map(len, SYSTEMS)) + 2
    # lines of a terminal are cut at its end, a file's are left whole
    shown: dict[str, Any] = {
        "no_wrap": True,
        "overflow": "ellipsis" if screen.is_terminal else "ignore",
        "crop": screen.is_terminal,
    }
    screen.print(f"{'system':<{wide}}{'parallel':<10}built of", style="dim", **shown)
    for title, names in groupby(SYSTEMS, lambda name: family(SYSTEMS[name])):
        screen.print(f"\n{title}", style="bold", **shown)
        for name in names:
            inner = SYSTEMS[name]()
            parallel = "no" if parallel_obstacles(inner) else "yes"
            screen.print(f"{name:<{wide}}{parallel:<10}{in_short(inner)}", **shown)
    screen.print(
        "\nkvbind explain NAME says which linear attention one is, kvbind compare NAME NAME where two differ", **shown
    )


def in_short(inner: Any) -> str:
    """What an inner loop is built of, in words: not all, as `explain` says that, but enough to tell systems apart."""
    from kvbind.inner.value import Value

    def part(name: str, x: Any) -> str:
        if isinstance(x, Value):
            # of what is inside, choices alone: numbers and lists are for `explain`
            inside = [part(field, y) if isinstance(y, bool | Value) else y for field, y in x.said().items()]
            kind = type(x).__name__ if name in ("network", "head") else name
            return " ".join([kind, *(y for y in inside if isinstance(y, str))])
        return f"{'' if x else 'no '}{name}" if isinstance(x, bool) else f"{name} {x}"

    return ", ".join(part(name, x).replace("_", " ") for name, x in inner.said().items())


@app.command()
def explain(
    system: Annotated[
        str, typer.Argument(help="A named system (`kvbind systems` lists them), or a YAML file of an inner loop.")
    ],
    edits: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="Edits of the inner loop, such as update=last.", show_default=False),
    ] = None,
    rung: Annotated[
        int | None, typer.Option(help="Take this rung of its ladder, 0 (itself) to 6 (linear attention).", min=0, max=6)
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens in a chunk, instead of the system's own.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads, for the costs; default 4.", show_default=False)] = None,
    key_width: Annotated[
        int | None, typer.Option(help="Channels of keys and queries per head; default 384.", show_default=False)
    ] = None,
    value_width: Annotated[int | None, typer.Option(help="Channels of values per head; default as the keys.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden width of the fast network; default as the keys.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in a sequence; default 32768.", show_default=False)] = None,
) -> None:
    """Say which linear attention an inner loop is, whether it has a parallel form and if not why, and what it costs.

    For example: [bold]kvbind explain lact_llm --rung 2[/], [bold]kvbind explain titans momentum=false[/], or
    [bold]kvbind explain mine.yaml[/] with a file such as

    [dim]{network: SwiGLU, momentum: true, chunk: 512}[/]
    """
    from kvbind.forms.analysis import Shapes
    from kvbind.forms.analysis import explain as analyse
    from kvbind.inner.systems import ladder

    ((_, inner),) = inner_loops([system, *(edits or [])], 1)
    if rung is not None:
        inner = list(ladder(inner).values())[rung]
    if chunk is not None:
        inner = inner.replace(chunk=chunk)
    usual = Shapes()
    assumed = [name for name, size in {"heads": heads, "key-width": key_width, "tokens": tokens}.items() if size is None]
    heads, tokens = (usual.heads if heads is None else heads), (usual.tokens if tokens is None else tokens)
    key_width = usual.key_width if key_width is None else key_width
    value_width, hidden = (key_width if width is None else width for width in (value_width, hidden))
    shapes = Shapes(heads, key_width, value_width, hidden, tokens)
    screen = console()
    # a terminal's lines break between words, a file's are left whole
    screen.print(str(analyse(inner, shapes)), soft_wrap=not screen.is_terminal)
    if assumed:
        options = ", ".join(f"--{name}" for name in assumed)
        screen.print(
            f"  assumed: the sizes of a layer of the 760M language model, where {options} would say others",
            soft_wrap=not screen.is_terminal,
        )


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM [FIELD=VALUE]... [SYSTEM [FIELD=VALUE]...]",
            help="Two named systems or YAML files of inner loops, each with edits behind it; or one, and edits of it.",
            show_default=False,
        ),
    ],
) -> None:
    """Say field by field in what two inner loops differ, or what edits change of one.

    For example: [bold]kvbind compare kda gdn2[/], [bold]kvbind compare titans mine.yaml[/],
    [bold]kvbind compare lact_llm update=last lact_video[/], or [bold]kvbind compare lact_llm momentum=false chunk=64[/]
    """
    from kvbind.inner.systems.registry import named_or_file

    loops = inner_loops(words, 2)
    if len(loops) == 1 and len(words) > 1:
        loops = [(words[0], named_or_file(words[0])), *loops]
    if len(loops) == 1:
        raise ValueError(f"compare takes two inner loops, or edits of one, such as update=last; got {words[0]!r} alone")
    (first, one), (second, other) = loops
    differing = one.differences(other)
    if not differing:
        console().print(f"{first} and {second} are the same inner loop")
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("field", first, second):
        table.add_column(name, no_wrap=name == "field", overflow="fold")
    for name, values in differing.items():
        table.add_row(Text(name, "bold"), *("-" if value is None else repr(value) for value in values))
    console().print(table)


def inner_loops(words: Sequence[str], most: int) -> list[tuple[str, Any]]:
    """The inner loops of a command line, `SYSTEM [FIELD=VALUE]...` at most so many times, with what was written of each.

    Raises:
        ValueError, TypeError: edits before any system, more systems than that, or one or an edit that is none.
    """
    groups: list[list[str]] = []
    for word in words:
        if "=" not in word or Path(word).is_file():
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f"an edit must stand behind the system that it is of; got {word!r} first")
    if len(groups) > most:
        found = " and ".join(x[0] for x in groups)
        raise ValueError(f"there must be at most {most} system{'s' * (most > 1)}, with edits FIELD=VALUE; got {found}")
    return [(" ".join(group), edited_loop(*group)) for group in groups]


def edited_loop(system: str, *edits: str) -> Any:
    """A named system, or that in a file, with edits."""
    from kvbind.inner.systems.registry import named_or_file

    inner = named_or_file(system)
    if not edits:
        return inner
    from omegaconf import OmegaConf

    from kvbind.tasks.inner_loops import edited
    from kvbind.train.config import parse_overrides

    fields: Any = OmegaConf.to_container(parse_overrides(edits))
    return edited(inner, fields)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A language model's folder, or a training run's.", show_default=False)],
    slots: Annotated[
        int | None, typer.Option(help="Requests that run at once; must fit the memory.", min=1, show_default=False)
    ] = None,
) -> None:
    """Serve a language model over OpenAI's protocol, with vLLM. Further options are those of [bold]vllm serve[/].

    For example: [bold]kvbind serve runs/mine --port 8000 --served-model-name mine[/]
    """
    from kvbind.serving.command import serve as start

    start(folder, slots, context.args)


@app.command()
def reproduce(
    experiment: Annotated[
        str,
        typer.Argument(
            help="Which: table1 (gradient ascent, and keys for queries), table2 (the ladder), theorems, figure1 (more inner "
            "steps at test time), figure2 (queries beside keys), figure3 (loss by position), figure4 (the forms by the "
            "clock), gaps (each row's gap to the full system along training), sizes (the same by size), chunks "
            "(views in several updates), capacity (recall by bytes of state), systems (language models side by side), "
            "(views in several updates), simplify (how much of training from scratch fine-tuning a simplified model saves), "
            "explorer (models to look into), or all."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help=f"What is trained: {TASK_NAMES}, or all; default language, of capacity recall.", show_default=False
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="smoke (minutes on two CPU cores), small (one GPU), large (ten times as much), or paper.")
    ] = "smoke",
    seeds: Annotated[int, typer.Option(help="Training runs per row, each from another seed.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; default runs/EXPERIMENT-TASK-SCALE.", show_default=False)
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(help="Folder of the training runs; default trained/ in --out, or runs/trained.", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Keep what is finished and go on with the rest, or train everything anew."),
    ] = True,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Train no longer than this: unfinished runs leave a checkpoint, and the report is on those that are "
            "finished. 0 only writes reports.",
            min=0.0,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Runs trained at once, in turn over all GPUs; default one per GPU, or per CPU core up to 4. Several small "
            "runs may share a GPU.",
            min=1,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Data in place of the configuration's; for several tasks TASK=PATH, once for each.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    measure_steps: Annotated[
        int | None,
        typer.Option(
            help="Time this many steps of each row on generated data instead of training, and project the whole; at --scale "
            "paper 20, unless --train is given.",
            min=1,
            show_default=False,
        ),
    ] = None,
    really_train: Annotated[
        bool, typer.Option("--train", help="At --scale paper: train indeed, which takes months of one GPU.")
    ] = False,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows to train, or to measure steps of, with commas between them, such as rung0,rung2,window; default all. "
            "Others are reported where they are finished.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing: list the runs, how far each is, and how long the rest takes.")
    ] = False,
    price: Annotated[float, typer.Option(help="Of a GPU for an hour, for projections.", min=0.0)] = 2.5,
    efficiency: Annotated[
        float, typer.Option(help="Of several GPUs over as many times one, for projections; assumed.", min=0.0)
    ] = 0.9,
    verbose: Verbose = False,
    overrides: Overrides = None,
) -> None:
    """Reproduce a table or figure of the paper, or all of them: train, evaluate, time, and write the report.

    [bold]kvbind reproduce table2 --task language --scale smoke[/] trains all seven
    rungs of the ladder and two controls on the Python standard library's own
    source, on a laptop, in minutes. Interrupt it and run it again: it goes on.
    Rows that tables share are trained once; [bold]kvbind reproduce all[/] plans
    them together and fills all GPUs.
    """
    from kvbind.experiments import EXPERIMENTS, open_experiment
    from kvbind.experiments.budget import plan_experiment
    from kvbind.experiments.findings import Measure
    from kvbind.inner.value import nearest

    known = (*EXPERIMENTS, "all")
    if experiment not in known:
        raise ValueError(f"experiment must be one of {', '.join(known)}; got {experiment!r}{nearest(experiment, known)}")
    steps = measure_steps or (20 if scale == "paper" and not (really_train or plan) else None)
    module = open_experiment("everything" if experiment == "all" else experiment)
    usual = "all" if experiment == "all" else getattr(module, "TASK", "language")
    named, task = sources(data or []), task or usual
    if isinstance(named, dict) and task != "all" and set(named) != {task}:
        raise ValueError(f"data must be of the task {task}; got data for {', '.join(named)}")
    chosen = None if rows is None else tuple(name.strip() for name in rows.split(","))
    asked: dict[str, Any] = {
        "task": task,
        "scale": scale,
        "seeds": seeds,
        "out": out,
        "trained": trained,
        "fresh": not resume,
        "minutes": minutes,
        "rows": chosen,
        "data": named,
        "workers": workers,
        "measure": None if steps is None else Measure(steps, chosen, price, efficiency),
        "overrides": overrides or [],
        "console": console(),
        "verbose": verbose,
    }
    if plan:
        plan_experiment(experiment, **asked)
        return
    with continuable():
        module.reproduce(**asked)


def sources(words: Sequence[str]) -> str | dict[str, str] | None:
    """What `--data` says: a path, or one for each task that is named.

    Raises:
        ValueError: several paths without tasks, or a task twice.
    """
    named = [word.partition("=") for word in words]
    if len(words) == 1 and named[0][0] not in TASKS:
        return words[0]
    for task, _, _ in named:
        if task not in TASKS:
            raise ValueError(f"data must be one path, or TASK=PATH with a task among {TASK_NAMES}; got {list(words)}")
    found = {task: path for task, _, path in named}
    if len(found) < len(named):
        raise ValueError(f"data must name each task once; got {list(words)}")
    return found or None


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders with results of kvbind reproduce; default runs.", metavar="[FOLDER]...", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The page; default report.html in the first folder.", show_default=False, metavar="FILE"),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the page at an address of this machine, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of that address; 0 for a free one.", min=0, max=65535)] = 8000,
    bind: Annotated[
        str, typer.Option(help="Where to listen; another address lets whoever reaches it read the page and its results.")
    ] = "127.0.0.1",
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name by which browsers reach the address, such as a proxy's; may be given several times.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make one page of all results: claims with verdicts, tables beside the paper's, figures, and models to look into.

    The page is one file that needs no network. Trained models are in it where [bold]kvbind reproduce explorer[/] was run.

    For example: [bold]kvbind report runs --serve[/]
    """
    from kvbind.experiments.page.command import make_report, open_server

    check_file("--out", out)
    path = make_report(folders or [Path("runs")], out)
    console().print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
    if serve:
        server, address = open_server(path, port, bind=bind, hosts=host or ())
        console().print(f"{address} (Ctrl-C ends it)", soft_wrap=True)
        with server, contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@app.command()
def train(
    task: Annotated[str, typer.Argument(help=f"What to train: {TASK_NAMES}.")],
    overrides: Overrides = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A YAML file, or a shipped configuration; default the smallest, of one's own pictures photos. "
            + " ".join(f"{task.capitalize()}: {', '.join(preset_files(task))}." for task in TASKS),
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; default runs/TASK-PRESET-HASH, the hash telling configurations apart.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Start anew, instead of going on where the folder's run stopped. That is kept until the new one has a "
            "checkpoint.",
        ),
    ] = False,
    accept_changed_data: Annotated[
        bool,
        typer.Option(
            "--accept-changed-data",
            help="Go on though files of the data were edited, removed or added since, and write that down in the folder.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train a model, or go on with a run that was interrupted.

    Ctrl-C leaves a checkpoint, from which the same command goes on. A larger train.steps in the same --out goes on longer.

    For example: [bold]kvbind train language --preset tiny model.inner.update=last train.steps=500[/], or on text of your own
    [bold]kvbind train language --data book.txt[/]

    On several GPUs: [bold]torchrun --nproc-per-node 8 -m kvbind train language --preset 760m[/]
    """
    from kvbind.experiments.runs import CONFIG, WEIGHTS, begun_before, open_run, run_name, train_run
    from kvbind.experiments.subjects import named_subject
    from kvbind.tasks import open_task_module
    from kvbind.tasks.contents import RECORD, check_unchanged
    from kvbind.train.bars import progress_bars
    from kvbind.train.checkpoint import checkpoints
    from kvbind.train.config import read_config, to_yaml
    from kvbind.train.loop import pick_device
    from kvbind.train.ranks import connected, rank

    edits = with_data(overrides, "source", data)
    module = open_task_module(task)
    suited = getattr(module, "suited_preset", lambda edits: None)
    preset = preset or suited(edits) or named_subject(task).scales["smoke"].preset
    config = read_config(module.Config, module.PRESETS, preset, edits)
    as_before = getattr(module, "as_before", None)
    if as_before is not None and out is not None and not fresh and (out / CONFIG).is_file():
        trained_on, before = open_run(out)
        config = as_before(config, before) if trained_on == task else config
    config = module.resolve(config)
    folder = out or Path("runs") / run_name(task, config).replace(task, f"{task}-{Path(preset).stem}", 1)
    earlier = begun_before(task, config, folder) if out is None else None
    with connected(config.train.device):
        first = rank() == 0
        screen = console() if first else Screen(quiet=True)

        def begun(parameters: int) -> None:
            if verbose:
                screen.print(to_yaml(config), style="dim", soft_wrap=True)
            screen.print(
                f"{task}, preset {preset}: {parameters:,} parameters, {config.train.steps:,} steps, on "
                f"{pick_device(config.train.device)}",
                soft_wrap=True,
            )
            screen.print(f"run folder: {folder} (the configuration is in its {CONFIG})", soft_wrap=True)
            if earlier is not None:
                tell_earlier(screen, *earlier, config.train.steps)

        with continuable(), progress_bars(screen if first else None) as add:
            bar = add("training", config.train.steps)
            run = train_run(
                task, config, folder, bar, fresh=fresh, accept_changed_data=accept_changed_data,
                begun=begun,
            )  # fmt: skip
        if run.reused and first and not accept_changed_data and (folder / RECORD).is_file():
            check_unchanged(folder, module.Task(config).contents(), checkpoints(folder))
    if run.reused:
        screen.print(f"{folder} holds this run, finished earlier: nothing was trained (--fresh trains anew)", soft_wrap=True)
    show_metrics(screen, run.result["held_out"])
    screen.print(f"{run.result['steps']} steps in {run.result['training_seconds']:.0f} s, {run.result['skipped']} skipped")
    screen.print(f"model: {folder / WEIGHTS}", soft_wrap=True)
    say_next(screen, task, folder)


def tell_earlier(screen: Console, run: Path, steps: int, wanted: int) -> None:
    """That a run begins anew though `run` might have gone on, and how to do that instead."""
    quoted = shlex.quote(str(run))
    if steps < wanted:
        text = f"a new run: {run} is the same with {steps:,} steps, and the same command with --out {quoted} goes on from it"
    else:
        text = (
            f"a new run: {run} is the same on data that have changed since, and the same command with --out {quoted} "
            "--accept-changed-data goes on with it"
        )
    screen.print(text, soft_wrap=True)


def check_file(option: str, path: Path | None) -> None:
    """Raise `ValueError` where a file cannot be written as a folder is there, before anything else takes its time."""
    if path is not None and path.is_dir():
        raise ValueError(f"{option} must be a file to write; {str(path)!r} is a folder")


def say_next(screen: Console, task: str, run: Path) -> None:
    """The next commands to type, a line each."""
    quoted = shlex.quote(str(run))
    shown = [NEXT[task].format(run=quoted)] if task in NEXT else []
    say(screen, [*shown, f"kvbind eval {quoted}"])


def say(screen: Console, commands: Sequence[str]) -> None:
    """Commands to type next, a line each."""
    for i, command in enumerate(commands):
        screen.print(f"{'' if i else 'next:':<5} {command}", soft_wrap=True)


def with_data(overrides: list[str] | None, key: str, data: str | None) -> list[str]:
    """Edits of a configuration, and after them `--data`, if it is given, as the data's `key`."""
    if data == "":
        raise ValueError(f"data must name a file, a folder or hub:NAME; got {data!r}")
    return [*(overrides or []), *([] if data is None else [f"data.{key}={json.dumps(data)}"])]


@app.command()
def plan(
    overrides: Overrides = None,
    preset: Annotated[
        str, typer.Option(help=f"A YAML file, or a shipped configuration: {', '.join(preset_files('language'))}.")
    ] = "760m",
    gpus: Annotated[str, typer.Option(help="How many; several numbers with commas between them for a comparison.")] = "8",
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence; default the configuration's.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences in a step; default as many as keep its tokens the same.", show_default=False),
    ] = None,
    hardware: Annotated[str, typer.Option(help="Which GPUs: h100, h200, a100 or a100-40gb, eight to a node.")] = "h100",
    recompute: Annotated[
        str, typer.Option(help="What is computed again in the backward pass: block, offload, selective or none.")
    ] = "block",
    budget: Annotated[
        float | None, typer.Option(help="Tokens to train on, such as 15e9; default the configuration's.", show_default=False)
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing: list the runs, how far each is, and how long the rest takes.")
    ] = False,
    price: Annotated[float | None, typer.Option(min=0.0, help="Of an hour of one GPU.", show_default=False)] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Results of kvbind bench step or scaling, to take efficiencies from; may be given several times.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    write: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.", metavar="FILE")] = None,
) -> None:
    """Plan the training of a language model: mesh, memory, communication, time and price, for any number of GPUs.

    A model of time and memory whose error on measured steps is printed below it.

    For example: [bold]kvbind plan --preset 760m --gpus 64 --tokens 1048576[/], or with edits of the configuration such as
    [bold]model.inner.update=last model.inner.normalize=false[/]
    """
    from kvbind.plan.command import run_plan

    check_file("--json", write)
    run_plan(
        preset, gpus, overrides or [], console(), tokens=tokens, batch=batch, hardware=hardware, recompute=recompute,
        budget=budget, price=price, calibrate=calibrate or [], write=write,
    )  # fmt: skip


def run_and_rest(words: Sequence[str]) -> tuple[str | None, Path, list[str]]:
    """What `[TASK] RUN [KEY=VALUE]...` says: the task, where it is named before the run, the run's folder, and the rest.

    Raises:
        ValueError: no run.
    """
    named = words[0] in TASKS and len(words) > 1 and ("=" not in words[1] or Path(words[1]).is_dir())
    task, rest = (words[0], words[1:]) if named else (None, words)
    if not named and len(words) > 1 and "=" not in words[1]:
        from kvbind.inner.value import nearest

        raise ValueError(f"task must be one of {TASK_NAMES}; got {words[0]!r}{nearest(words[0], TASKS)}")
    return task, Path(rest[0]).expanduser(), list(rest[1:])


def check_task(task: str | None, trained_on: str, run: Path) -> None:
    """Raise `ValueError` where a task was named that is not the run's."""
    if task not in (None, trained_on):
        raise ValueError(f"run must be one of task {task!r}; {str(run)!r} is one of {trained_on!r}")


@app.command("eval")
def evaluate(
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
    from kvbind.experiments.runs import load_model, open_run
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
    show_metrics(console(), metrics)
    if write is not None:
        write_text(write, to_json(metrics, indent=2) + "\n")


def show_metrics(screen: Console, metrics: dict[str, Any]) -> None:
    """Held-out metrics: numbers one per line, then series."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in metrics.items():
        if not isinstance(value, list):
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    screen.print(table)
    for name, value in metrics.items():
        if isinstance(value, list):
            every = max(len(value) // 8, 1)
            screen.print(f"{name.replace('_', ' ')}: " + "  ".join(f"{place}: {x:.3f}" for place, x in value[::every]))


@app.command()
def probe(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of a finished training run, or of a model of this library.", show_default=False),
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data whose held-out part to probe the model on; default what it was trained on, where that is known.",
            metavar="PATH",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="The most steps of the inner loop; 1, 2, 4 ... up to so many are tried.", min=1)
    ] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report; default probe/ in the run's, or runs/probe-NAME for a model alone.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Try on a trained model what a memory of keys and values could not bear: the paper's four probes, at test time.

    More steps of the inner loop, its gradient the other way, keys in the place of queries; and whether queries lie among
    the keys, and outputs among the values. Nothing is trained. Any saved model of the three families: language, view
    synthesis, ViTTT.

    For example: [bold]kvbind probe runs/mine[/], or of a converted release
    [bold]kvbind probe mine --data book.txt data.evaluation_samples=16[/]
    """
    from kvbind.experiments.findings import Request
    from kvbind.experiments.probe import probe as run_probes
    from kvbind.experiments.saved import open_saved

    saved = open_saved(model, data, overrides or [])
    screen = console()
    results = run_probes(saved, Request(task=saved.task, scale="own", console=screen, out=out), model, steps)
    show_tables(screen, results)


@app.command()
def simplify(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of a finished training run, or of a model of this library.", show_default=False),
    ],
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="What its inner loop becomes: rung0 to rung6 of its own ladder, ascent, key_for_query, a named system, or "
            "a YAML file of an inner loop. Edits such as model.inner.update=last hold on top of it, or alone.",
            show_default=False,
            metavar="NAME|FILE",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of fine-tuning.", min=1)] = 100,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data to fine-tune on, a part of which is held out; default what the model was trained on, where that is "
            "known.",
            metavar="PATH",
        ),
    ] = None,
    targets: Annotated[
        Literal["data", "outputs"],
        typer.Option(help="What is learned: the task's own targets, or what the model said before (distillation)."),
    ] = "data",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/simplify-TASK-HASH.", show_default=False)
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, instead of going on where the folder's run stopped.")
    ] = False,
    accept_changed_data: Annotated[
        bool,
        typer.Option("--accept-changed-data", help="Go on though files of the data were edited, removed or added since."),
    ] = False,
) -> None:
    """Give a trained model a simpler inner loop, fine-tune it, and say what that costs and gains.

    Every weight that still has a meaning is kept. The report has the quality before, after the edit and after each tenth of
    the steps, and the speed of both models. Ctrl-C leaves a checkpoint, from which the same command goes on; the model that
    is left in the run's folder opens like any other.

    For example: [bold]kvbind simplify runs/mine --to rung2 --steps 200[/], or of a converted release
    [bold]kvbind simplify mine --to rung2 --data book.txt --targets outputs train.learning_rate=1e-4[/]
    """
    from kvbind.experiments.findings import Request
    from kvbind.experiments.runs import WEIGHTS
    from kvbind.experiments.simplified import plan as plan_edit
    from kvbind.experiments.simplified import simplify as run_edit

    planned = plan_edit(model, to, steps, data=data, targets=targets, out=out, overrides=overrides or [])
    screen = console()
    with continuable():
        request = Request(task=planned.saved.task, scale="own", console=screen, fresh=fresh)
        results = run_edit(planned, request, accept_changed_data=accept_changed_data)
    show_tables(screen, results)
    screen.print(f"model: {planned.folder / WEIGHTS}", soft_wrap=True)
    say_next(screen, planned.saved.task, planned.folder)


def show_tables(screen: Console, results: dict[str, Any]) -> None:
    """The tables of a report."""
    for one in results["tables"]:
        table = Table(title=one["heading"], title_justify="left", box=None, header_style="dim", pad_edge=False)
        for i, name in enumerate(one["header"]):
            table.add_column(name, justify="right" if i else "left")
        for row in one["rows"]:
            table.add_row(*row)
        screen.print(table)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished training run, or of a model in transformers' format.")],
    prompt: Annotated[str, typer.Option(help="What the text starts with.")] = "import ",
    tokens: Annotated[int, typer.Option(help="How many to write.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 always takes the likeliest token.", min=0.0)] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that make up this probability.", min=0.0, max=1.0)
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="For a model folder: 'bytes', or a tokenizer by name; default the folder's own.")
    ] = None,
) -> None:
    """Write text with a trained model.

    For example: [bold]kvbind generate runs/mine --prompt "def main(" --tokens 400[/]
    """
    import torch

    from kvbind.tasks.language import open_trained

    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must have at most 64 bits; got {seed}")
    model, words = open_trained(run, tokenizer)
    ids = torch.from_numpy(words.encode(prompt))[None]
    if not ids.numel():
        raise ValueError("prompt must hold at least one token; got an empty text")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    )
    written = model.to(device).generate(
        ids.to(device), max_new_tokens=tokens, pad_token_id=words.end, eos_token_id=words.end, **sampling
    )
    console().print(words.decode(written[0].tolist()), soft_wrap=True)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint: its folder, or a file of weights with its configuration beside it.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Layout, typer.Option(help="What to write: a model of this library, or one for the released code.")
    ] = "kvbind",
    config: Annotated[
        str | None,
        typer.Option(
            help="The released configuration, where it is not beside the weights: a JSON or YAML file, or a published size, "
            "such as vittt_base or 24x768.",
            show_default=False,
            metavar="FILE|NAME",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of the released code to this library's, or back.

    LaCT language models, ViTTT and LaCT view synthesis are told apart by their
    parameters. ViTTT's weights say all sizes; a language model needs its JSON
    file, view synthesis its YAML file.

    For example: [bold]kvbind convert vittt_base.pth mine[/], or
    [bold]kvbind convert lact.pt mine --config lact_l24_d768_ttt2x.yaml[/]
    """
    from kvbind.models.convert import convert as run_conversion

    console().print(f"wrote {run_conversion(source, target, to=to, config=config)}", soft_wrap=True)


@app.command("in-place")
def in_place(
    source: Annotated[
        Path, typer.Argument(help="Folder of a language model of transformers, or of a released In-Place TTT checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    layers: Annotated[
        str | None,
        typer.Option(
            help="Which MLPs become fast weights: every n-th, or numbers such as 0,6,12. Default: every 6th.",
            metavar="N|N,N,...",
            show_default=False,
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens between updates. Default: 4096.", min=1, show_default=False)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The inner learning rate. Default: 3.", show_default=False)] = None,
    values: Annotated[
        Literal["hidden", "embeddings"] | None,
        typer.Option(help="What values are made of: the MLP's input, or embeddings. Default: hidden.", show_default=False),
    ] = None,
) -> None:
    """Turn MLPs of a saved Llama, Qwen3 or the like into fast weights.

    The model written says what the one read says, until it is trained. A
    released In-Place TTT checkpoint has its own settings, and takes no options.

    For example: [bold]kvbind in-place Qwen3-8B mine --layers 6 --chunk 4096[/]
    """
    from kvbind.models.in_place import InPlaceConfig
    from kvbind.models.in_place import in_place as run_conversion

    numbers: Any = None
    if layers is not None:
        parts = layers.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise typer.BadParameter(
                f"must be a number or numbers with commas between them; got {layers!r}", param_hint="--layers"
            )
        numbers = int(layers) if len(parts) == 1 else [int(part) for part in parts]
    given = {"layers": numbers, "chunk": chunk, "lr": lr, "values": values}
    written = run_conversion(source, target, **{name: x for name, x in given.items() if x is not None})
    made, screen = InPlaceConfig.from_pretrained(written), console()
    inside, numbers = made.text_config, ", ".join(map(str, made.fast_layers))
    screen.print(f"wrote {written}", soft_wrap=True)
    screen.print(
        f"a {inside.model_type} of {inside.num_hidden_layers} layers; the MLPs of layers {numbers} are fast weights "
        f"(In-Place TTT), written every {made.chunk:,} tokens",
        soft_wrap=True,
    )
    quoted = shlex.quote(str(written))
    say(screen, [f'kvbind generate {quoted} --prompt "The "'])
    screen.print(
        f"in Python: kvbind.models.InPlaceForCausalLM.from_pretrained({str(written)!r}), to train it", soft_wrap=True
    )


@app.command()
def show(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK] RUN",
            help="Folder of the training run; the task, images, may stand before it.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    image: Annotated[int, typer.Option(help="Number of the held-out image.", min=0)] = 0,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="A query's place, as fractions of the image's height and width; may be given several times. Default: three "
            "places down the middle.",
            metavar="Y,X",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A layer to draw, from 0; may be given several times. Default: up to four over the depth.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw what a trained image model attends to: the linear attention that each layer's inner loops are.

    For example: [bold]kvbind show runs/mine --out picture.png --image 7 --at 0.3,0.6[/]
    """
    from kvbind.experiments.show_images import PLACES, read_place
    from kvbind.experiments.show_images import show as draw

    check_file("--out", out)
    task, run, rest = run_and_rest(words)
    if task not in (None, "images"):
        raise ValueError(f"task must be 'images'; got {task!r}")
    if rest:
        raise ValueError(f"show takes a run alone; got {' '.join(rest)!r} behind it")
    places = [read_place(text) for text in at] if at else PLACES
    answer = draw(run, out, image=image, places=places, layers=layer or ())
    console().print(f"class {answer['class']}, predicted {answer['predicted']}; wrote {out}", soft_wrap=True)


@app.command()
def render(
    run: Annotated[Path, typer.Argument(help="Folder of a training run of task views.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; default `pictures` in the run's.", show_default=False)
    ] = None,
    scenes: Annotated[int, typer.Option(help="How many held-out scenes, at the most.", min=1)] = 4,
    frames: Annotated[int, typer.Option(help="Of the turntable.", min=1)] = 48,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Other scenes to show: a folder or JSON file of posed images.", metavar="PATH"),
    ] = None,
) -> None:
    """Draw what a trained view synthesis model sees: inputs, predictions and errors, and a camera moving around scenes."""
    from kvbind.experiments.runs import load_model, open_run
    from kvbind.tasks.views import Task
    from kvbind.tasks.views.render import write_pictures
    from kvbind.train.loop import pick_device

    trained_on, config = open_run(run, with_data(None, "held_out_source", data))
    if trained_on != "views":
        raise ValueError(f"run must be one of task 'views'; {str(run)!r} is one of {trained_on!r}")
    opened = Task(config, training=False)
    model = load_model(run, opened).to(pick_device(config.train.device))
    for path in write_pictures(model, opened, out or run / "pictures", scenes=scenes, frames=frames):
        console().print(f"wrote {path}", soft_wrap=True)
