"""Formulas: what one GPU holds, sends and computes in a training step of the LaCT language model on a mesh.

They follow `kvbind.train.parallel`: weights, gradients and AdamW's averages in float32, sharded over `shard x sequence`
ranks and gathered block by block; activations of whole blocks made again in the backward pass, or not; the parallel form
split over `sequence` ranks, which exchange states and the ends of windows; the recurrent form, rank after rank.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cache, cached_property

import torch

from kvbind.forms.explained.analysis import sequence_schedule
from kvbind.forms.explained.block_costs import BlockWork
from kvbind.forms.explained.costs import Shapes, cost, training_flops
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.forms.parallel.summary import is_dense
from kvbind.hardware import Accelerator
from kvbind.inner.value import check_choice, check_positive_int
from kvbind.models import LactConfig, LactForCausalLM
from kvbind.models.flops import TRAINED, Parts, lact_flops
from kvbind.models.lact.loss import PIECE

RECOMPUTE = ("block", "offload", "selective", "none")

REPEATED = ("block", "offload")
"""Where the whole forward pass of a block is made again."""

OFFLOADED_INPUTS = 2
"""Block inputs that a GPU holds where they are kept in host memory: the one in use, and the one that comes next."""

STATE_COPIES = 6
"""States of all chunks that one layer holds at once in the backward pass of the parallel form: writes, orthogonalized
writes, their sums, and the gradient of each."""

BLOCK_STATE_COPIES = 2
"""Likewise where the parallel form runs in blocks of tokens: the state before each block, and its gradient."""

LOGIT_BYTES = 2
"""Per logit that exists, of bfloat16: the gradient takes its place."""

OPTIMIZER_NUMBERS = 7
"""Float32 numbers that AdamW's fused step moves for each parameter: it reads all four, and writes all but the gradient."""


@dataclass(frozen=True)
class Mesh:
    """How many GPUs there are along each dimension of `train.parallel`.

    Attributes:
        replicate: copies of the weights.
        shard: data ranks that share a copy.
        sequence: ranks that share a sequence, and their part of the copy.
    """

    replicate: int = 1
    shard: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for dimension in fields(self):
            check_positive_int(dimension.name, getattr(self, dimension.name))

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.sequence

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def weights(self) -> int:
        """Ranks among which one copy of the weights is divided."""
        return self.shard * self.sequence


@dataclass(frozen=True)
class PlannedTraining:
    """What is trained.

    Attributes:
        config: of the model.
        length: tokens in a sequence.
        batch: sequences in an optimizer step.
        recompute: "block", "offload", "selective" or "none": which activations are made again in the backward pass.
        gather_bytes: of one weight when it is gathered: 4 for float32, 2 for bfloat16.
        preset: the size's name, to compare with measured points; "" for another.
        rung: of the ladder, likewise.
    """

    config: LactConfig
    length: int
    batch: int = 1
    recompute: str = "block"
    gather_bytes: int = 4
    preset: str = ""
    rung: str = ""

    def __post_init__(self) -> None:
        for name in ("length", "batch", "gather_bytes"):
            check_positive_int(name, getattr(self, name))
        check_choice("recompute", self.recompute, RECOMPUTE)

    @property
    def form(self) -> str:
        """The form in which the inner loop is evaluated: "parallel" or "recurrent"."""
        wanted, inner = self.config.ttt_form, self.config.inner
        if wanted != "auto":
            return str(wanted)
        many = inner.chunk is not None and self.length > inner.chunk
        return "parallel" if many and not parallel_obstacles(inner) else "recurrent"

    @property
    def scans(self) -> bool:
        """Whether ranks that share a sequence run its fast weights all at once."""
        return self.form == "parallel" and sequence_schedule(self.config.inner) == "scan"

    @property
    def tokens_per_step(self) -> int:
        """Of all sequences."""
        return self.length * self.batch

    @cached_property
    def flops(self) -> Parts:
        """Model FLOPs of one sequence, by part."""
        return lact_flops(self.config, self.length)

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Parameters in all, and in one block."""
        return _parameters(self.config.to_json_string(use_diff=False))

    @property
    def shapes(self) -> Shapes:
        """Sizes of a layer's inner loop."""
        return Shapes(self.config.num_lact_heads, *self.config.fast_widths, self.length)

    @property
    def blocks(self) -> BlockWork | None:
        """What the parallel form computes in blocks of tokens, where it does and is the form."""
        if self.form != "parallel" or not self.config.fast_weights:
            return None
        return cost(self.config.inner, self.shapes).blocks

    @property
    def computed_flops(self) -> float:
        """Operations on one sequence, forward and backward: model FLOPs, and what blocks of tokens compute beyond them."""
        total, blocks = sum(self.flops.values()), self.blocks
        if blocks is None:
            return total
        defined = self.config.num_hidden_layers * training_flops(self.config.inner, self.shapes)
        return total - defined + self.config.num_hidden_layers * TRAINED * blocks.total * self.shapes.heads * self.length

    @property
    def states(self) -> float:
        """How many tokens there are to each state of a layer that the parallel form holds."""
        blocks, chunk = self.blocks, self.config.inner.chunk
        return float(chunk or self.length) if blocks is None else float(blocks.tokens)

    @property
    def write_bytes(self) -> int:
        """Bytes in float32 of the fast weights that one layer updates, all heads."""
        inner, s = self.config.inner, self.shapes
        hidden = (s.hidden,) * inner.network.hidden_layers
        sizes = {name: math.prod(shape) for name, shape in inner.network.shapes(s.key_width, s.value_width, hidden).items()}
        vectors = inner.network.vector_shapes(s.key_width, s.value_width, hidden)
        sizes |= {name: math.prod(shape) for name, shape in vectors.items()}
        return 4 * s.heads * sum(sizes[name] for name in inner.updated)

    @property
    def scan_bytes(self) -> float:
        """What one layer of each rank sends to all others, forward: its writes, and how states pass through them."""
        inner, s = self.config.inner, self.shapes
        if self.blocks is None:
            # momentum travels before writes are orthogonalized, and what became of them after
            return float(self.write_bytes * (1 + (inner.momentum and inner.orthogonalize is not None)))
        parts = 1 + inner.momentum
        width = inner.network.shapes(s.key_width, s.value_width, (s.hidden,) * inner.network.hidden_layers)["out"][0]
        passing = (parts * width) ** 2 if is_dense(inner) else parts**2
        return float(parts * self.write_bytes + 4 * s.heads * passing)

    def obstacle(self, mesh: Mesh) -> str | None:
        """Why its sequences cannot be cut over `mesh`, or None."""
        inner, local = self.config.inner, self.length // mesh.sequence
        if mesh.sequence == 1:
            return None
        if self.length % mesh.sequence:
            return f"{self.length} tokens cannot be divided among {mesh.sequence} ranks"
        least = max(self.config.reach, inner.span or 1)
        return f"{local} tokens on a rank are fewer than a window or a chunk, {least}" if local < least else None


@cache
def _parameters(config: str) -> tuple[int, int]:
    """Parameters of the model that a configuration as JSON describes, in all and in one block."""
    with torch.device("meta"):
        model = LactForCausalLM(LactConfig.from_dict(json.loads(config)))
    everything, block = (sum(p.numel() for p in module.parameters()) for module in (model, model.model.layers[0]))
    return everything, block


@dataclass(frozen=True)
class Memory:
    """Bytes that one GPU holds at its fullest: in the backward pass of a block.

    Attributes:
        weights: in float32.
        gradients: in float32; of whole weights where gradients are summed over several passes before ranks exchange them.
        optimizer: AdamW's two averages.
        gathered: weights of other ranks while they are needed, and gradients before they are divided.
        kept: inputs of all blocks, and whatever else of them is kept for the backward pass.
        block: everything that one block keeps, and its gradients.
        states: of one layer's chunks.
        halo: keys and values of the neighbour in a sequence, and states of all ranks, in one layer.
        logits: of the piece of tokens whose loss is computed.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    kept: float
    block: float
    states: float
    halo: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


def memory(job: PlannedTraining, mesh: Mesh, block_bytes: float) -> Memory:
    """What one GPU holds.

    Args:
        job: what is trained.
        mesh: how many GPUs along each dimension.
        block_bytes: per token and channel of the residual stream, of everything that one block keeps while its backward pass
            runs; measured.
    """
    config, (everything, block) = job.config, job.parameters
    d, layers = config.hidden_size, config.num_hidden_layers
    tokens = job.length / mesh.sequence
    passes = job.batch // mesh.data
    sharded = mesh.weights > 1
    root = everything - layers * block
    gathered = job.gather_bytes * (root + 2 * block) + 4 * (root + block) if sharded else 0.0
    # products of a block: q, k, v, attention, fast weights, both outputs; the MLP's two. In bfloat16
    products = 2 * (7 + 2 * config.mlp_width / d)
    per_layer = {"block": 4.0, "offload": 4.0, "selective": 4.0 + products, "none": block_bytes}[job.recompute]
    held = OFFLOADED_INPUTS if job.recompute == "offload" else layers
    states = 0.0
    if config.inner.chunk is not None and job.form == "parallel":
        copies = STATE_COPIES if job.blocks is None else BLOCK_STATE_COPIES
        states = copies * job.write_bytes * (tokens / job.states + 1)
    halo = 0.0
    if mesh.sequence > 1:
        halo = 2 * 2 * d * (config.reach - 1) + mesh.sequence * 2 * job.write_bytes
    return Memory(
        weights=4 * everything / mesh.weights,
        gradients=4 * everything / (mesh.weights if passes == 1 else 1),
        optimizer=8 * everything / mesh.weights,
        gathered=gathered,
        kept=held * per_layer * d * tokens,
        block=0.0 if job.recompute == "none" else block_bytes * d * tokens,
        states=states,
        halo=halo,
        logits=LOGIT_BYTES * min(PIECE, tokens) * config.vocab_size,
    )


def host_bytes(job: PlannedTraining, mesh: Mesh) -> float:
    """What one GPU keeps in its host's memory: the inputs of all blocks, or nothing."""
    config = job.config
    return 4.0 * config.num_hidden_layers * config.hidden_size * job.length / mesh.sequence * (job.recompute == "offload")


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one GPU receives in an optimizer step.

    Attributes:
        gather: of weights, forward and backward.
        scatter: of gradients, among the ranks that share a copy of the weights.
        reduce: of gradients, among copies.
        states: fast weights along a sequence.
        halo: keys and values of the neighbour's last tokens.
        per_layer: of states and halo, of one layer and one pass forward and backward; it does not grow with the sequence.
    """

    gather: float
    scatter: float
    reduce: float
    states: float
    halo: float
    per_layer: float

    @property
    def total(self) -> float:
        """The bytes of all parts together."""
        return self.gather + self.scatter + self.reduce + self.states + self.halo


def traffic(job: PlannedTraining, mesh: Mesh) -> StepTraffic:
    """What one GPU receives in a step.

    In each of a step's passes blocks are gathered forward and backward, the rest once; gradients meet once in a step. A
    sequence exchanges states and halo forward, forward again where blocks are recomputed, and backward.

    Args:
        job: what is trained.
        mesh: how many GPUs along each dimension.
    """
    everything, block = job.parameters
    config, passes = job.config, job.batch // mesh.data
    gathered = everything + config.num_hidden_layers * block
    others = (mesh.weights - 1) / mesh.weights
    states = halo = 0.0
    if mesh.sequence > 1:
        # all ranks' ends, or a whole state, with its pending tokens, from the rank before
        one = float(cost(config.inner, job.shapes).state_bytes)
        states = (mesh.sequence - 1.0) * job.scan_bytes if job.scans else one
        # sequences begin and end with whole chunks on every rank, so that no pending tokens travel
        halo = 2 * 2.0 * config.hidden_size * (config.reach - 1)
    times = config.num_hidden_layers * passes * (3 if job.recompute in REPEATED else 2)
    return StepTraffic(
        gather=passes * job.gather_bytes * gathered * others,
        scatter=4 * everything * others,
        reduce=2 * 4 * everything / mesh.weights * (mesh.replicate - 1) / mesh.replicate,
        states=times * states,
        halo=times * halo,
        per_layer=2 * (states + halo),
    )


def bandwidth(mesh: Mesh, over: str, hardware: Accelerator) -> float:
    """Bytes per second that each GPU of a group receives, by datasheet.

    Ranks are numbered with the sequence innermost, then shards, then copies. A group that stays in a node has its links. One
    that spans nodes has the network cards of all its members in a node together, up to the links.

    Args:
        mesh: of all GPUs.
        over: "sequence", "weights" or "replicate".
        hardware: the GPUs.
    """
    size, stride = {
        "sequence": (mesh.sequence, 1),
        "weights": (mesh.weights, 1),
        "replicate": (mesh.replicate, mesh.weights),
    }[over]
    if size * stride <= hardware.node:
        return hardware.link
    in_node = min(size, max(1, hardware.node // stride))
    return min(hardware.link, hardware.network * in_node)


@dataclass(frozen=True)
class Seconds:
    """How long a step takes, part by part.

    Attributes:
        compute: matrix products, by the efficiency that was measured, with everything elementwise.
        optimizer: going over weights, gradients and averages.
        weights: gathering weights and exchanging gradients, as far as it is not hidden behind computing.
        sequence: exchanging states and halo, likewise.
    """

    compute: float
    optimizer: float
    weights: float
    sequence: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.optimizer + self.weights + self.sequence


def seconds(job: PlannedTraining, mesh: Mesh, hardware: Accelerator, efficiency: float, exposed: float) -> Seconds:
    """How long a step takes.

    Block inputs that are kept in host memory are taken to travel behind computing.

    Args:
        job: what is trained.
        mesh: how many GPUs along each dimension.
        hardware: the GPUs.
        efficiency: the fraction of `hardware.flops` at which products go, recomputed ones among them.
        exposed: the fraction of the communication's time, at datasheet bandwidth, by which a step gets longer; above 1 where
            links do not reach it.
    """
    everything, _ = job.parameters
    sequences = job.batch / mesh.data
    again = (4 if job.recompute in REPEATED else 3) / 3
    total, fast = job.computed_flops, job.flops.get("fast weights", 0.0)
    # where states are handed on, each rank waits for that of the one before it
    own = total / mesh.sequence if job.scans else (total - fast) / mesh.sequence + fast
    computed = sequences * own * again
    sent = traffic(job, mesh)
    weights = (sent.gather + sent.scatter) / bandwidth(mesh, "weights", hardware)
    weights += sent.reduce / bandwidth(mesh, "replicate", hardware)
    return Seconds(
        compute=computed / (efficiency * hardware.flops),
        optimizer=OPTIMIZER_NUMBERS * 4 * everything / mesh.weights / hardware.memory_bandwidth,
        weights=exposed * weights,
        sequence=exposed * (sent.states + sent.halo) / bandwidth(mesh, "sequence", hardware),
    )
