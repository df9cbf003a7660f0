"""`explain`: which linear attention an inner loop is, whether it has a parallel form, and what it costs.

`form="auto"`, `form="parallel"` and `explain` all go by `kvbind.forms.obstacles`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvbind.forms.explained.costs import Cost, Shapes, cost, dual_work
from kvbind.forms.explained.wording import operands, output_rule, parallel_kind, state_rule
from kvbind.forms.obstacles import Obstacle, best_form, parallel_obstacles
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import RUNGS, ladder


class NoParallelFormError(ValueError):
    """A parallel form was asked of an inner loop that has none.

    Args:
        explanation: the whole analysis.
        asked: the argument that asked for it.

    Attributes:
        explanation: the whole analysis.
    """

    def __init__(self, explanation: Explanation, asked: str = "form='parallel'") -> None:
        self.explanation = explanation
        reasons = "\n".join(f"  - {obstacle}" for obstacle in explanation.obstacles)
        super().__init__(f"{asked} needs an inner loop that has a parallel form; this one has none:\n{reasons}")


def sequence_schedule(
    spec: InnerLoop, schedule: Literal["auto", "scan", "ring"] = "auto", form: str = "auto"
) -> Literal["scan", "ring"]:
    """How an inner loop runs over a row that is cut over ranks: all ranks at once and a scan, or rank after rank.

    Args:
        spec: the inner loop.
        schedule: what `kvbind.SequenceShard` asks for.
        form: what `kvbind.ttt` was asked for; "recurrent" leaves the ring.

    Raises:
        ValueError: `visibility="full"`, under which every token sees all others; or "scan" beside `form="recurrent"`, or for
            a network with biases, a window, or a gate of the output, `orthogonalize`, `clip` or `normalize` beside what is
            not in the six lines.
        NoParallelFormError: "scan" for an inner loop that has no parallel form.
    """
    if spec.visibility == "full":
        raise ValueError("sequence parallelism needs a causal inner loop; got visibility='full'")
    obstacles = parallel_obstacles(spec)
    if schedule == "scan" and form == "recurrent":
        raise ValueError("schedule='scan' runs the parallel form; got form='recurrent', which runs in schedule='ring'")
    if schedule == "scan" and obstacles:
        raise NoParallelFormError(explain(spec), "schedule='scan'")
    # what ranks fold of a state is its last layer's matrix, and beyond the six lines by its product with one of features
    shaped = spec.orthogonalize is not None or spec.clip or bool(spec.normalize)
    unfolded = spec.network.has_bias or spec.window_size > 1
    unfolded = unfolded or ((spec.network.has_gate or shaped) and bool(spec.extensions))
    if schedule == "scan" and unfolded:
        names = ", ".join(spec.extensions)
        raise ValueError(
            f"schedule='scan' takes no network with biases, no window, and neither a gate of the output nor orthogonalize, "
            f"clip or normalize beside {names}; got {spec!r}"
        )
    return "ring" if obstacles or unfolded or schedule == "ring" or form == "recurrent" else "scan"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` of it is for people.

    Attributes:
        spec: the inner loop.
        operands: the effective query, key, value and starting state of the linear attention it is.
        state_rule: how its state evolves from write to write.
        output_rule: what an output reads.
        obstacles: what stands in the way of a parallel form.
        parallel_kind: how the parallel form works, or None where there is none.
        nearest: the inner loop after every obstacle's edit: `spec` itself where it is parallel.
        shapes: the sizes for which `cost` was counted.
        cost: what a forward pass needs.
    """

    spec: InnerLoop
    operands: dict[str, str]
    state_rule: str
    output_rule: str
    obstacles: tuple[Obstacle, ...]
    parallel_kind: str | None
    nearest: InnerLoop
    shapes: Shapes
    cost: Cost
    linear_attention: bool = field(default=True, init=False)

    @property
    def parallel(self) -> bool:
        """Whether there is a parallel form of whole sequences."""
        return not self.obstacles

    @property
    def form(self) -> Literal["recurrent", "dual", "parallel"]:
        """What `form="auto"` runs on more than a chunk: "dual" is parallel inside spans, which run in order."""
        return best_form(self.spec)

    @property
    def sequence_schedule(self) -> Literal["scan", "ring"] | None:
        """How it runs over a row cut over ranks (`kvbind.SequenceShard`); None where it is not causal."""
        return None if self.spec.visibility == "full" else sequence_schedule(self.spec)

    @property
    def kernels(self) -> str:
        """What runs its form on GPUs, for people; empty where that is PyTorch alone."""
        from kvbind.forms.on_kernels.dispatch import kernels_of  # which goes by this analysis

        return kernels_of(self.spec)

    @property
    def nearest_name(self) -> str | None:
        """The rung of the inner loop's own ladder that `nearest` is, or None."""
        return next((name for name, rung in ladder(self.spec).items() if rung == self.nearest), None)

    def __str__(self) -> str:
        lines = [f"{self.spec!r}", "", "linear attention: yes, exactly"]
        lines += [f"  {name:<5}= {text}" for name, text in self.operands.items()]
        lines += [f"  {self.state_rule}", f"  {self.output_rule}", ""]
        if self.parallel:
            lines.append(f"parallel: yes, {self.parallel_kind}")
        else:
            inside = "inside spans alone, by the dual form, as" if self.form == "dual" else "no, because"
            lines.append(f"parallel: {inside}")
            lines += [f"  - {obstacle}" for obstacle in self.obstacles]
            edits = {name: value for obstacle in self.obstacles for name, value in obstacle.edit.items()}
            edit = ", ".join(f"{name}={value!r}" for name, value in edits.items())
            name = self.nearest_name
            rung = f"{name.replace('rung', 'rung ')} ({RUNGS[name]}), that is, " if name else ""
            lines.append(f"nearest parallel relative: {rung}replace({edit})")
        lines.append(f"over ranks: {_OVER_RANKS[self.sequence_schedule]}")
        lines.append(f"on GPUs: {self.kernels or 'PyTorch'}")
        s, c = self.shapes, self.cost
        among = c.orthogonalize_flops_per_token
        orthogonalization = f", of which orthogonalization {among / 1e6:.3f}" if among else ""
        lines += [
            "",
            f"cost of a forward pass ({s.heads} heads, Dk = {s.key_width}, Dv = {s.value_width}, "
            f"Dh = {s.hidden}, T = {s.tokens}, {str(s.dtype).removeprefix('torch.')}):",
            f"  {c.flops_per_token / 1e6:.3f} MFLOP per token{orthogonalization}",
            f"  token by token: {c.read / 1e3:.1f} kFLOP per read, {c.write / 1e3:.1f} kFLOP per write, of each head",
        ]
        if c.blocks is not None:
            b = c.blocks
            solve = f", triangular systems {b.system / 1e3:.1f}" if b.system else ""
            lines.append(
                f"  in blocks of {b.columns} writes: {b.total / 1e3:.1f} kFLOP per token and head (states and features "
                f"{(b.states + b.features) / 1e3:.1f}, pairs of tokens {(b.scores + b.gates) / 1e3:.1f}{solve})"
            )
        lines += [
            f"  {c.bytes_per_token / 1e3:.2f} kB moved per token",
            f"  {c.decode_bytes_per_token / 1e3:.1f} kB moved for one more token in decoding, state included",
            f"  {c.state_bytes / 2**20:.2f} MiB of state per sequence, whatever its length",
        ]
        if self.form == "dual":
            block, flops = dual_work(self.spec, s)
            lines.append(
                f"  {flops / 1e6:.3f} MFLOP per token besides, in the dual form: attention in blocks of {block} tokens"
            )
        return "\n".join(lines)


_OVER_RANKS = {
    "scan": "all at once, with an exclusive scan of states across ranks",
    "ring": "one after another, each from the state of the one before",
    None: "no, every token sees all others",
}


def explain(spec: InnerLoop, shapes: Shapes | None = None) -> Explanation:
    """Say which linear attention an inner loop is, whether it has a parallel form and if not why, and what it costs.

    Args:
        spec: the inner loop.
        shapes: sizes for the costs; default a layer of the paper's 760M language model.

    Raises:
        TypeError: `spec` is no `InnerLoop`, or `shapes` no `Shapes`.
    """
    if not isinstance(spec, InnerLoop):
        raise TypeError(f"spec must be a kvbind.InnerLoop; got {type(spec).__name__}")
    if not isinstance(shapes, Shapes | None):
        raise TypeError(f"shapes must be a kvbind.forms.explained.costs.Shapes or None; got {type(shapes).__name__}")
    shapes = shapes or Shapes()
    obstacles = parallel_obstacles(spec)
    # at once, as some fields need others
    nearest = spec.replace(**{name: value for obstacle in obstacles for name, value in obstacle.edit.items()})
    return Explanation(
        spec=spec,
        operands=operands(spec),
        state_rule=state_rule(spec),
        output_rule=output_rule(spec),
        obstacles=obstacles,
        parallel_kind=None if obstacles else parallel_kind(spec),
        nearest=nearest,
        shapes=shapes,
        cost=cost(spec, shapes),
    )
