"""The loops of `loops.py` beside research code that is no package: functions taken out of clones, for the agreement table
alone.

A clone of `https://github.com/OWNER/NAME` is looked for at `ROOT/OWNER/NAME`, with a work tree or bare, and read at the
commit that is named here. The functions that are compared are taken out of their files with the ones they call, without
decorators (compilers) and without the files' imports; casts to bfloat16 and float32 are lifted to float64. Running them
means running that code.
"""

from __future__ import annotations

import ast
import collections
import importlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import loops
import public_code
import torch
import torch.nn.functional as F
from comparing import InDouble, Run
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from loops import Draw, H, Source
from torch import Tensor, nn

Namespace = dict[str, Any]


@dataclass(frozen=True)
class Repository:
    """Where code is read.

    Attributes:
        name: OWNER/NAME.
        commit: the one that is compared.
        files: paths, and of each the functions and classes that are taken out of it.
        around: what these find instead of their imports.
    """

    name: str
    commit: str
    files: Mapping[str, tuple[str, ...]]
    around: Namespace = field(default_factory=dict)

    def taken(self, root: Path) -> Namespace:
        """The functions and classes, ready to be called."""
        return taken(self, root)

    def __hash__(self) -> int:
        return hash((self.name, self.commit, tuple(self.files)))


@cache
def taken(repository: Repository, root: Path) -> Namespace:
    space: Namespace = {
        "torch": torch, "nn": nn, "F": F, "math": math, "rearrange": rearrange, "repeat": repeat, "collections": collections,
        "Optional": Any, "contract": torch.einsum, **repository.around,
    }  # fmt: skip
    for path, names in repository.files.items():
        wanted = set(names)
        text = show(root / repository.name, repository.commit, path)
        for node in ast.parse(text).body:
            target = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else None
            name = getattr(node, "name", target)
            if name not in wanted:
                continue
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node.decorator_list = []
            # annotations name types of the imports that are left out
            code = compile("from __future__ import annotations\n" + ast.unparse(node), f"{repository.name}/{path}", "exec")
            exec(code, space)
            wanted.discard(name)
        if wanted:
            raise LookupError(f"{repository.name}@{repository.commit}: {path} has no {', '.join(sorted(wanted))}")
    return space


def show(clone: Path, commit: str, path: str) -> str:
    """The text of a file at a commit."""
    found = subprocess.run(["git", "-C", str(clone), "show", f"{commit}:{path}"], capture_output=True, text=True, check=True)
    return found.stdout


def flat(x: Tensor) -> Tensor:
    """`[B, T, H, D]` to `[B * H, T, D]`."""
    return x.transpose(1, 2).flatten(0, 1)


def flat_weights(w: Tensor, batch: int) -> Tensor:
    """`[H, in, out]` to `[B * H, in, out]`."""
    return w.expand(batch, *w.shape).flatten(0, 1)


def back(o: Tensor, batch: int) -> Tensor:
    """`[B * H, T, D]` to `[B, T, H, D]`."""
    return o.unflatten(0, (batch, -1)).transpose(1, 2)


SWIGLU = {"gate": 0, "out": 1, "up": 2}
"""The released name of each of a SwiGLU's matrices: w0, w1, w2."""


def view_operands(x: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights `[B * H, in, out]`, q, k, v and rates, as the view-synthesis family takes them."""
    batch = x["q"].shape[0]
    found = {f"w{i}": flat_weights(x["weights"][name], batch) for name, i in SWIGLU.items()}
    found |= {name: flat(x[name]) for name in "qkv"}
    return found | {f"lr{i}": flat(x["lr"][name][..., None]) for name, i in SWIGLU.items()}


def view_outcome(batch: int, output: Tensor, *weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return back(output, batch), {name: weights[i].unflatten(0, (batch, -1)) for name, i in SWIGLU.items()}


FAST = "fast_weight_swish_glu_weight_norm_mini_batch_apply"
MUON = ("silu_backprop", "zeropower_via_newtonschulz5", "TTTOperator")
ZIPMAP = Repository(
    "TooCoolLa/ZipMap", "774349a43417a5e7421639fc7e0f4f78e367fe77", {"zipmap/layers/ttt.py": (*MUON, FAST)}
)  # fmt: skip
TTTLRM = Repository(
    "cwchenwang/tttLRM", "855563e7c02f0bed73679cb20a14f26ad3c726b4", {"model/lact_ttt.py": (*MUON, "ar_ttt_op", FAST)},
    {"sp_support": SimpleNamespace(sp_all_reduce=lambda x: x)},
)  # fmt: skip
ELASTIC = Repository(
    "Mars-tin/fast-spatial-mem", "499464ecd971dc096cc9a27d197aa0b5995f123a", {"fsm/model/model_lacet.py": (*MUON, FAST)}
)  # fmt: skip
VIDEO = Repository(
    "a1600012888/LaCT", "1f84d479fee89e34c58d74a0cf399c2b70564845",
    {
        "lact_ar_video/minVid/models/blocks/functions.py": ("silu_backprop", "zeropower_via_newtonschulz5"),
        "lact_ar_video/minVid/models/blocks/ar_lact_swa_repeat.py": ("ar_fast_weight_swish_glu_weight_norm_mini_batch",),
    },
)  # fmt: skip
IN_PLACE = Repository(
    "ByteDance-Seed/In-Place-TTT", "be2324829b0e91c8fd10a74d4b43714fde6676e1",
    {"hf_models/hf_qwen3/modeling_qwen3.py": ("Qwen3MLP",)}, {"ACT2FN": {"silu": F.silu}},
)  # fmt: skip
TTT = Repository(
    "test-time-training/ttt-lm-pytorch", "cd831db10c8c9a0f6340f02da5613316a8a92b67",
    {"ttt.py": ("scan", "ln_fwd", "ln_fused_l2_bwd", "gelu_bwd", "TTTBase", "TTTLinear", "TTTMLP")},
    {"tree_map": torch.utils._pytree.tree_map},
)  # fmt: skip


def zipmap(space: Namespace, x: Mapping[str, Any], window: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    batch, t = x["q"].shape[:2]
    order = [space["TTTOperator"](s, s + (window or t), True, True) for s in range(0, t, window or t)]
    return view_outcome(batch, *space[FAST](**view_operands(x), ttt_ua_order=order, muon_update_steps=5))


def tttlrm(space: Namespace, x: Mapping[str, Any], chunk: int, strength: float) -> tuple[Tensor, dict[str, Tensor]]:
    batch, t = x["q"].shape[:2]
    outcome = space[FAST](
        **view_operands(x), ttt_config=space["ar_ttt_op"](chunk, t), muon_update_steps=5, elastic_lambda=strength,
        fisher_alpha=0.5, anchor_beta=0.8,
    )  # fmt: skip
    return view_outcome(batch, *outcome)


def elastic(
    space: Namespace, x: Mapping[str, Any], chunk: int, sees: str, importance: str, anchor: str
) -> tuple[Tensor, dict[str, Tensor]]:
    given = view_operands(x)
    batch, t = x["q"].shape[:2]
    order = [space["TTTOperator"](0, t, True, sees != "full")]
    if sees == "full":
        order.append(space["TTTOperator"](0, t, False, True))
    # what they change in place; anchors detached as their driver does, so that later weights can enter them
    fisher = {f"F{i}": torch.zeros_like(given[f"w{i}"]) for i in range(3)}
    stars = {f"w{i}_star": given[f"w{i}"].detach().clone() for i in range(3)}
    options = {
        "muon_update_steps": 5,
        "chunk_size": chunk,
        "apply_before_update": sees == "past",
        "ewc_enabled": True,
        "lambda_ewc": 0.5,
        "fisher_alpha": 0.5,
        "fisher_mode": ("update", "squared", "path").index(importance),
        "anchor_mode": ("fixed", "copy", "average").index(anchor),
        "anchor_beta": 0.5,
    }
    output, *weights = space[FAST](**given, **fisher, **stars, ttt_ua_order=order, **options)
    output, state = view_outcome(batch, output, *weights)
    for name, i in SWIGLU.items():
        # detaching makes new tensors of the same memory, so these hold the last values, though not how they came about
        state |= {f"{name}.importance": fisher[f"F{i}"].unflatten(0, (batch, -1)).clone()}
    return output, state


def video(
    space: Namespace, x: Mapping[str, Any], block: int, clean: int, orthogonalize: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    given = view_operands(x)
    given |= {f"w{i}": given[f"w{i}"].mT for i in range(3)}
    output, *weights = space["ar_fast_weight_swish_glu_weight_norm_mini_batch"](
        **given, w_scale=1.0, mini_batch_size=clean, update_every=block, use_moun=orthogonalize, num_moun_iters=5
    )
    return view_outcome(x["q"].shape[0], output, *(w.mT for w in weights))


def in_place(space: Namespace, x: Mapping[str, Any], lr: float, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    width, hidden = x["weights"]["gate"].shape[1:]
    config = SimpleNamespace(
        hidden_size=width,
        intermediate_size=hidden,
        hidden_act="silu",
        ttt_mode=True,
        ttt_layers=[0],
        ttt_chunk=chunk,
        ttt_lr=lr,
    )
    layer = space["Qwen3MLP"](config, 0).double()
    matrices = {f"{name if name != 'out' else 'down'}_proj.weight": w[0].T for name, w in x["weights"].items()}
    parameters = matrices | {"ttt_conv.weight": x["kernel"][:, None], "ttt_proj.weight": x["projection"]}
    output = torch.func.functional_call(layer, parameters, (x["x"][:, :, 0], x["embedded"]))
    return output[:, :, None], {}


def by_in_place(x: Mapping[str, Any], lr: float, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    v = loops.in_place_target(x["embedded"], x["kernel"], x["projection"], chunk=chunk)
    return loops.in_place_ttt(x["weights"], x["x"], v[:, :, None], lr=lr, chunk=chunk)


def draw_in_place(source: Source) -> dict[str, Any]:
    width, hidden, t = loops.D, 2 * loops.D, 21
    weights = {
        name: w[:1] for name, w in source.matrices(gate=(width, hidden), up=(width, hidden), out=(hidden, width)).items()
    }
    return {
        "weights": weights, "x": source.normal(loops.B, t, 1, width), "embedded": source.normal(loops.B, t, width),
        "kernel": source.normal(width, 5), "projection": source.normal(width, width),
    }  # fmt: skip


def released_ttt(space: Namespace, x: Mapping[str, Any], kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's `ttt` between its projections: mini-batches of 16, the reader's rates the same for all heads and
    sequences.
    """
    layer = space[kind].__new__(space[kind])
    nn.Module.__init__(layer)
    batch, t, heads, width = x["q"].shape
    layer.num_heads, layer.head_dim, layer.width, layer.mini_batch_size = heads, width, heads * width, 16
    layer.config = SimpleNamespace(scan_checkpoint_group_size=0)
    layer.ttt_norm_weight, layer.ttt_norm_bias = x["ln_weight"], x["ln_bias"]
    w = x["weights"]
    last = ("W1", "b1") if kind == "TTTLinear" else ("W2", "b2")
    names = {last[0]: "out", last[1]: "out_bias"} | ({"W1": "in", "b1": "in_bias"} if kind == "TTTMLP" else {})
    for theirs, ours in names.items():
        setattr(layer, theirs, w[ours][:, None] if theirs.startswith("b") else w[ours])

    def mini_batches(y: Tensor) -> Tensor:
        return y.transpose(1, 2).unflatten(2, (t // 16, 16))

    reader = x["reader"].reshape(1, 1, 1, 16, 1).expand(batch, heads, t // 16, 16, 1)
    rate = mini_batches(x["lr"][..., None]).mT
    inputs = {"XQ": mini_batches(x["q"]), "XK": mini_batches(x["k"]), "XV": mini_batches(x["v"])}
    inputs |= {"eta": reader * rate, "token_eta": reader, "ttt_lr_eta": rate}
    output, after = layer.ttt(inputs, 16, None)
    states = {ours: after[f"{theirs}_states"] for theirs, ours in names.items()}
    return output.unflatten(-1, (heads, width)), {
        name: y.squeeze(2) if name.endswith("_bias") else y for name, y in states.items()
    }


def by_ttt(x: Mapping[str, Any], predict: loops.Predict) -> tuple[Tensor, dict[str, Tensor]]:
    batch, t, heads, _ = x["q"].shape
    reader = x["reader"].repeat(t // 16)[None, :, None].expand(batch, t, heads)
    return loops.ttt(**{**x, "reader": reader}, predict=predict)


def draw_ttt(hidden: int | None) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        found = loops.draw_ttt(32, hidden)(source)
        return {**found, "reader": found["reader"][0, :16, 0]}

    return draw


class InOrder:
    """What `AssocScan` of the package assoc-scan computes: `y_t = a_t y_(t-1) + x_t`, one after another along axis 1."""

    def __init__(self, **options: Any) -> None:
        pass

    def __call__(self, gates: Tensor, inputs: Tensor, prev: Tensor) -> Tensor:
        found = []
        for t in range(inputs.shape[1]):
            prev = gates[:, t].reshape(-1, *[1] * (prev.dim() - 1)) * prev + inputs[:, t]
            found.append(prev)
        return torch.stack(found, dim=1)


OMEGA = Repository(
    "engineerA314/atlas-rnn", "1a2cf8a23fbaab66b98de30eb9a38ceab5368aae",
    {
        "atlas_pytorch/rnn_memory.py": (
            "exists", "default", "_sliding_sum_along_time", "RNNMemState", "PolynomialFeatureMap", "MultiheadRMSNorm",
            "OmegaRNNMemoryCell",
        )
    },
    {
        "Module": nn.Module, "Parameter": nn.Parameter, "Linear": nn.Linear, "LinearNoBias": partial(nn.Linear, bias=False),
        "Conv1d": nn.Conv1d, "Rearrange": Rearrange, "AssocScan": InOrder, "NamedTuple": NamedTuple, "Tensor": Tensor,
    },
)  # fmt: skip


@cache
def omega_cell(make: Callable[..., nn.Module]) -> nn.Module:
    made = make(
        8,
        dim_head=loops.D,
        heads=H,
        omega_window=3,
        poly_degree=2,
        poly_mode="elementwise",
        qk_norm=False,
        qkv_conv_kernel=None,
    )
    return made.double()


def omega(space: Namespace, x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    cell = omega_cell(space["OmegaRNNMemoryCell"])
    batch = x["x"].shape[0]
    blank = torch.zeros(batch * H, loops.D, loops.D, dtype=x["x"].dtype)
    start = space["RNNMemState"](0, x["weights"]["out"].mT.expand(batch, -1, -1, -1).flatten(0, 1), blank, None)
    output, after = torch.func.functional_call(cell, dict(x["parameters"]), (x["x"], start))
    return output, {"out": after.S.unflatten(0, (batch, H)).mT, "out.momentum": -after.Z.unflatten(0, (batch, H)).mT}


def by_omega(x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    p = x["parameters"]
    normed = F.rms_norm(x["x"], x["x"].shape[-1:], p["pre_norm.weight"])
    q, k, v = (F.linear(normed, p[f"to_{name}.weight"]).unflatten(-1, (H, loops.D)) for name in "qkv")
    names = {"gamma": "omega_gate", "theta": "momentum", "eta": "lr", "alpha": "decay"}
    gates = {ours: torch.sigmoid(F.linear(normed, p[f"to_{y}.0.weight"], p[f"to_{y}.0.bias"])) for ours, y in names.items()}
    # their loss has a factor 1/2
    gates["gamma"] = gates["gamma"] / 2
    output, state = loops.atlas(
        x["weights"], q, k, v, **gates, coefficients=torch.tensor([0.0, 1.0, 1.0], dtype=q.dtype), predict=loops.linear,
        window=3, batch=None, phi=loops.powers, orthogonalize=False, sees="past",
    )  # fmt: skip
    return F.linear(output.flatten(2), p["to_out.weight"]), state


def draw_omega(source: Source) -> dict[str, Any]:
    width, inner = 8, H * loops.D
    shapes = {"pre_norm.weight": (width,), "to_out.weight": (width, inner)} | {
        f"to_{y}.weight": (inner, width) for y in "qkv"
    }
    for y in ("lr", "decay", "momentum", "omega_gate"):
        shapes |= {f"to_{y}.0.weight": (H, width), f"to_{y}.0.bias": (H,)}
    parameters = {name: source.normal(*shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {
        "x": source.normal(loops.B, 13, width),
        "parameters": parameters,
        "weights": source.matrices(out=(loops.D, loops.D)),
    }


@dataclass(frozen=True)
class Released:
    """One loop beside one function of a repository; as `public_code.Comparison`."""

    name: str
    repository: Repository
    function: str
    ours: Run
    theirs: Callable[[Namespace, Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]
    draw: Draw
    note: str = ""

    def sides(self, root: Path) -> tuple[Run, Run, Draw]:
        """Theirs, ours, and operands of both."""
        space = self.repository.taken(root)

        def theirs(x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            with InDouble():
                return self.theirs(space, x)

        return theirs, self.ours, self.draw


@dataclass(frozen=True)
class ReleasedMemory:
    """The loop beside the layer of atlas-pytorch, without its gate, features and convolutions: a window of updates."""

    name: str = "titans/titans-pytorch, window of chunks"
    repository: Repository = Repository("engineerA314/atlas-pytorch", "6079979a6eb17f38f6e5dfdf41ec2c5286480b8f", {})
    function: str = "OmegaNeuralMemory"
    note: str = "chunk 4, batch 8, window of 3 chunks, spectral_norm_surprises, residual and LayerNorm"

    def sides(self, root: Path) -> tuple[Run, Run, Draw]:
        """Theirs, ours, and operands of both."""
        layer = partial(
            imported(self.repository, root, "atlas_pytorch.omega").OmegaNeuralMemory, omega_window=3, use_omega_gate=False,
            poly_mode="off", use_qkv_convs=False,
        )  # fmt: skip
        memory = public_code.Memory(26, 4, 8, head=True, orthogonalize=True, window=3, make=layer)
        return memory.theirs, memory.ours, memory.draw


@cache
def imported(repository: Repository, root: Path, module: str) -> Any:
    """A module of a repository that is a package, with its own imports, from a copy of its files."""
    folder = tempfile.mkdtemp()
    try:
        git = ["git", "-C", str(root / repository.name), "archive", repository.commit, module.partition(".")[0]]
        archive = subprocess.run(git, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        sys.path.insert(0, folder)
        return importlib.import_module(module)
    finally:
        sys.path[:] = [path for path in sys.path if path != folder]
        shutil.rmtree(folder)


def of(name: str) -> loops.System:
    return next(system for system in loops.SYSTEMS if system.name == name)


def view_family() -> list[Released]:
    found = []
    for name, window in (("zipmap", None), ("zipmap/streaming", 5)):
        system = of(name)
        found.append(Released(name, ZIPMAP, FAST, system.run, lambda s, x, w=window: zipmap(s, x, w), system.draw))
    for name, strength in (("tttlrm/ar", 0.0), ("tttlrm/anchor, one max", 0.05)):

        def joint(x: Mapping[str, Any], strength: float = strength) -> tuple[Tensor, dict[str, Tensor]]:
            output, state = loops.tttlrm(**x, chunk=5, strength=strength, joint=True)
            return output, {matrix: state[matrix] for matrix in x["weights"]}

        note = "its max runs over batch and heads" if strength else ""
        run = partial(tttlrm, chunk=5, strength=strength)
        found.append(Released(name, TTTLRM, FAST, joint, run, of(name).draw, note))
    for system in loops.SYSTEMS:
        if system.family == "elastic_lact":
            run, note = partial(elastic, **system.settings), f"sees {system.settings['sees']}"
            found.append(Released(system.name, ELASTIC, FAST, system.run, run, system.draw, note))
        elif system.family == "lact_video":
            given = {"orthogonalize": False, **system.settings}
            function = "ar_fast_weight_swish_glu_weight_norm_mini_batch"
            found.append(Released(system.name, VIDEO, function, system.run, partial(video, **given), system.draw))
    return found


RELEASED = [
    Released(
        "ttt_linear",
        TTT,
        "TTTLinear.ttt",
        partial(by_ttt, predict=loops.biased_linear),
        partial(released_ttt, kind="TTTLinear"),
        draw_ttt(None),
    ),
    Released(
        "ttt_mlp",
        TTT,
        "TTTMLP.ttt",
        partial(by_ttt, predict=loops.biased_mlp),
        partial(released_ttt, kind="TTTMLP"),
        draw_ttt(4 * loops.D),
        "its derivative of gelu has ten digits",
    ),
    Released(
        "atlas/linear",
        OMEGA,
        "OmegaRNNMemoryCell",
        by_omega,
        omega,
        draw_omega,
        "without Newton-Schulz, gradients at the call's first weights, reads before the write, x + x^2 as features",
    ),
    ReleasedMemory(),
    *view_family(),
    Released(
        "in_place_ttt",
        IN_PLACE,
        "Qwen3MLP.forward",
        partial(by_in_place, lr=0.3, chunk=6),
        partial(in_place, lr=0.3, chunk=6),
        draw_in_place,
        "with its convolution and projection; one head",
    ),
]
"""Every loop beside what is released of it as a repository."""
