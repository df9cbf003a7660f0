"""Results in small, as `kvbind reproduce` writes them, and the page that is made of them."""

import json
from html.parser import HTMLParser

import torch

from kvbind import systems
from kvbind.experiments.inspection import examples
from kvbind.experiments.inspection.heads import look_at, spec_data
from kvbind.experiments.inspection.untrained import as_call, embedded, leaves_of

WORDS = ["one", "</script><b>two", "three & four", "'five'"] * 16

MADE = {"command": "kvbind reproduce it", "seeds": [0], "scale": "smoke", "versions": {"torch": "2"},
        "machine": {"device": "Abacus"}, "config": {"seed": 0}}  # fmt: skip


def verdict(claim, holds, rule="a number is small"):
    return {"claim": claim, "rule": rule, "holds": holds, "found": "so it was"}


def curve(start):
    return [[float(i), start + 1 / (i + 1)] for i in range(20)]


def table2():
    """A table of the task "language" whose last row has two seeds."""
    rows = []
    for i, name in enumerate(("rung0", "rung1", "rung2", "rung3", "rung4", "rung5", "rung6", "ascent", "key_for_query")):
        held_out = {"perplexity": 8.0 + i / 8, "bits_per_byte": 3.0, "tokens": 640, "loss_by_position": curve(2.0 + i / 8)}
        run = {"folder": "trained/it", "held_out": held_out, "untrained": {"perplexity": 300.0}, "parameters": 1000,
               "unit": "tokens", "tokens": 5000,
               "training_loss": curve(3.0 + i / 8), "machine": MADE["machine"], "training_seconds": 1.0}  # fmt: skip
        runs = [{"seed": 0, **run}, *([{"seed": 1, **run, "held_out": held_out | {"perplexity": 10.0}}] if i == 8 else [])]
        rows.append({
            "name": name, "label": f"row <{i}>", "applies": True, "perplexity": 8.0 + i / 8, "inner": {"steps": i},
            "runs": runs,
            "recurrent_tokens_per_second": 1e4 * (i + 1), "parallel_tokens_per_second": 2e4 if i > 1 else None,
            "paper": {"perplexity": 16.0 + i / 8, "recurrent_mtok": 4.5, "parallel_mtok": None},
        })  # fmt: skip
    throughput = {"batch": 1, "tokens": 64, "heads": 2, "width": 8}
    return MADE | {"experiment": "table2", "task": "language", "rows": rows, "throughput": throughput,
                   "verdicts": [verdict("one seed says it", None)]}  # fmt: skip


def figure1():
    steps = [{"steps": i, "metric": 8.0 + i, "inner_loss": -float(i), "by_layer": [-1.0 * i, -2.0 * i]} for i in range(1, 5)]
    return MADE | {"experiment": "figure1", "task": "language", "steps": steps, "metric": "perplexity", "title": "Figure 1",
                   "lead": "What <b>led</b> here.", "verdicts": [verdict("it falls", True), verdict("it rises", False)],
                   "tables": [{"heading": "By steps", "header": ["steps", "ppl\nhere"], "rows": [["1", "9.00"]]}],
                   "pictures": [{"heading": "By steps", "file": "steps.png", "text": "steps"}]}  # fmt: skip


def models():
    """A model of two rows, as `kvbind reproduce explorer` leaves it."""
    text, cells = examples.text(WORDS)
    picture, _ = examples.pictures([("a grey one", torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8) * 4)], (8, 8))
    rows = []
    for name, spec in {"rung0": systems.lact_llm(chunk=8), "rung6": systems.linear_attention()}.items():
        call = as_call(spec, leaves_of(spec, embedded(WORDS)))
        layers = [{"name": f"layer {i}", "heads": look_at(call, cells)} for i in range(2)]
        rows.append({"name": name, "label": name, **spec_data(spec), "layers": layers})
    of = {"group": "trained models", "about": "Trained, it says."}
    return [
        of | {"title": "a text", "example": text, "rows": rows},
        of | {"title": "a picture", "example": picture, "rows": rows},
    ]


def write_run(place, finished=True):
    """A run of `kvbind train language` with a picture, without its model."""
    place.mkdir(parents=True)
    (place / "config.yaml").write_text("# kvbind train language\nseed: 0\n")
    held_out = {"held_out/perplexity": 300.0, "held_out/bits_per_byte": 8.0, "held_out/loss_by_position": curve(5.0)}
    rows = [{"step": 0, **held_out}]
    for i in range(1, 41):
        rows.append(
            {"step": i, "loss": 2 + 3 / i, "learning_rate": i / 1e4, "tokens_per_second": 1e4 + i, "seconds": 2.0 * i}
        )
        if i % 20 == 0:
            own = {"held_out/perplexity": 90.0 - i, "held_out/loss_by_position": curve(3.0)}
            rows.append({"step": i, **held_out, **own})
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        found = {"task": "language", "steps": 40, "parameters": 1_500_000, "tokens": 40960, "training_seconds": 80.4,
                 "versions": MADE["versions"], "machine": MADE["machine"]}  # fmt: skip
        (place / "result.json").write_text(json.dumps(found))
    (place / "pictures").mkdir()
    (place / "pictures" / "it.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return place


def write_results(folder):
    """A folder with a table, a figure without its picture, and two models."""
    for name, results in {"table2-language-smoke": table2(), "deeper/figure1-language-smoke": figure1()}.items():
        write(folder / name / "results.json", results)
    for i, model in enumerate(models()):
        write(folder / f"explorer-{i}" / "results.json",
              MADE | {"experiment": "explorer", "task": "language", "models": "models.json"})  # fmt: skip
        write(folder / f"explorer-{i}" / "models.json", model)
    return folder


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


class Page(HTMLParser):
    """Elements of a page with their attributes, in order, and texts by the element that they stand in."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.unbalanced = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.unbalanced.append((tag, tuple(self.open)))
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def all(self, *tags):
        return [(tag, attrs, inside) for tag, attrs, inside in self.elements if tag in tags]

    def words(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())
