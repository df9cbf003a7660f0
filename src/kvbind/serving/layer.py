"""The LaCT layer inside vLLM: attention on vLLM's backends, fast weights from slots and pages, heads divided over ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import DECLARED
from kvbind.layers.lact import LactLayer
from kvbind.layers.norm import ResidualNorm
from kvbind.layers.operands import Paths, make_operands, wide
from kvbind.layers.rotary import Tables
from kvbind.models.lact.config import LactConfig
from kvbind.models.lact.model import LactBlock, LactMLP
from kvbind.serving.cache import FastWeightsMetadata, PendingCache, PendingMetadata, pending_name
from kvbind.serving.checks import state_layout
from kvbind.serving.plugin import BACKEND
from kvbind.serving.states import Pages, Pool
from kvbind.serving.steps import Decoding, Step, advance, packed

WHOLE, ROWS, COLUMNS, THIRDS = "whole", "rows", "columns", "rows of each third"
"""How a parameter is divided over ranks."""

DIVISIONS = {
    r"ttt_norm\.weight": WHOLE,
    r"qkv\.(weight|bias)": THIRDS,
    r"[qk]_norm\.weight": ROWS,
    r"o_proj\.weight": COLUMNS,
    r"qk_(scale|offset)": ROWS,
    r"(ttt_scale|lr)_proj\.(weight|bias)": ROWS,
    rf"({'|'.join(DECLARED)})_proj\.0\.(weight|bias)": ROWS,
    r"w([012]|_\w+)(\.w_(left|right))?": ROWS,
    r"(gate|up)_proj\.weight": ROWS,
    r"down_proj\.weight": COLUMNS,
}
"""Parameters of a layer and of an MLP, by the pattern of their names. Heads are rows, side by side."""


def divided(weight: Tensor, how: str, rank: int, ranks: int) -> Tensor:
    """One rank's part of a parameter.

    Args:
        weight: the parameter.
        how: one of `DIVISIONS`' values.
        rank: whose part.
        ranks: how many there are.

    Raises:
        ValueError: ranks that do not divide it.
    """
    if how == WHOLE or ranks == 1:
        return weight
    axis, groups = int(how == COLUMNS), 3 if how == THIRDS else 1
    if weight.shape[axis] % (groups * ranks):
        raise ValueError(f"tensor_parallel_size must divide {weight.shape[axis] // groups}, as weights have it; got {ranks}")
    parts = weight.unflatten(axis, (groups, ranks, -1)).select(axis + 1, rank)
    return parts.flatten(axis, axis + 1)


def take_part(module: nn.Module) -> None:
    """Give a module on the meta device this rank's part of its parameters, each of which then loads its own part.

    Raises:
        ValueError: a parameter that nothing is known of, which vLLM would not compute with.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for name, parameter in list(module.named_parameters()):
        how = next((how for pattern, how in DIVISIONS.items() if re.fullmatch(pattern, name)), None)
        if how is None:
            raise ValueError(
                f"a model that vLLM serves must have known parameters; {name!r} of {type(module).__name__} is not"
            )
        shape = divided(parameter, how, rank, ranks).shape
        held = nn.Parameter(torch.empty(shape, dtype=parameter.dtype), requires_grad=False)

        def load(parameter: Tensor, whole: Tensor, how: str = how) -> None:
            parameter.data.copy_(divided(whole, how, rank, ranks))

        held.weight_loader = load  # type: ignore[attr-defined]
        owner = module.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(name.rpartition(".")[2], held)
        if isinstance(owner, nn.Linear) and held.dim() == 2:
            owner.out_features, owner.in_features = held.shape


class DividedNorm(nn.Module):
    """RMS norm over channels of which each rank has a part.

    Args:
        norm: the norm of all channels, whose weight it takes.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps or 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., D / ranks]`."""
        y = wide(x)
        squares = tensor_model_parallel_all_reduce(y.square().sum(-1, keepdim=True))
        width = x.shape[-1] * get_tensor_model_parallel_world_size()
        return (y * torch.rsqrt(squares / width + self.eps) * self.weight).to(x.dtype)


class ServedLactLayer(LactLayer, MambaBase):
    """The layer with its sequences in vLLM's pool; it computes as `LactLayer`, of which it is one.

    Args:
        config: of the model.
        vllm_config: vLLM's.
        prefix: the layer's name in vLLM.
    """

    def __init__(self, config: LactConfig, vllm_config: VllmConfig, prefix: str) -> None:
        with torch.device("meta"):
            whole: Any = LactBlock(config).attn
        # as it was built, without building it again
        nn.Module.__init__(self)
        self.__dict__.update(whole.__dict__)
        ranks = get_tensor_model_parallel_world_size()
        self.num_attn_heads //= ranks
        self.num_lact_heads //= ranks
        self.paths = Paths(self.num_attn_heads, self.num_lact_heads, self.paths.eps, self.paths.silu, self.paths.rotary)
        take_part(self)
        if ranks > 1 and self.q_norm is not None and self.k_norm is not None:
            self.add_module("q_norm", DividedNorm(self.q_norm))
            self.add_module("k_norm", DividedNorm(self.k_norm))

        self.prefix, self.layout = prefix, state_layout(config, ranks)
        self.attention = Attention(
            self.num_attn_heads,
            self.head_width,
            self.head_width**-0.5,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=self.window_size,
            prefix=f"{prefix}.attention",
        )
        backend = self.attention.get_attn_backend()
        if not backend.supports_head_size(self.head_width):
            raise ValueError(
                f"num_attn_heads must leave a head width that {backend.get_name()} has, one of "
                f"{backend.get_supported_head_sizes()}; got {config.num_attn_heads} heads of {self.head_width} channels"
            )
        self.pending = PendingCache(self.layout, prefix) if self.layout.places else None
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)
        self.started: dict[str, Tensor] = {}
        self.offered: tuple[FastWeightsMetadata | None, PendingMetadata | None] = (None, None)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One row of numbers."""
        return ((self.layout.size,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """float32, whatever the model's is."""
        return (torch.float32,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Our layout's name."""
        return MambaAttentionBackendEnum[BACKEND]

    def forward(self, x: Tensor, tables: Tables) -> Tensor:  # type: ignore[override]
        """Mix the tokens of a step.

        Args:
            x: normalized input `[1, T, d]`.
            tables: the rotary tables of the tokens' positions.

        Returns:
            `[1, T, d]`.
        """
        q, k, v = self._project(x)
        q, k, fast_q, fast_k = make_operands(q, k, v, self.qk_scale, self.qk_offset, tables, self.paths)
        self.clear_begun_pages()
        mixed = self.attention(q[0].flatten(1), k[0].flatten(1), v[0])[None]
        made = self._logits(x)
        scale = made.pop("scale", None)
        fast = self.fast(fast_q, self.writing.tokens({"k": fast_k, "v": v, **made}))
        output = self.o_proj(self._join(fast, scale, mixed))
        return tensor_model_parallel_all_reduce(output)

    def clear_begun_pages(self) -> None:
        """On the CPU, zero attention's pages that this step begins.

        What other layers left there may be no number, and 0 times that is none either. vLLM clears such pages on other
        devices; on the CPU it clears those of full attention alone.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None or self.qk_scale.device.type != "cpu":
            return
        assert isinstance(metadata, dict)
        cache, slots = self.attention.kv_cache, metadata[self.attention.layer_name].slot_mapping
        size = cache.shape[2]
        cache[slots[slots % size == 0] // size] = 0

    def fast(self, q: Tensor, tokens: Tokens) -> Tensor:
        """The fast weights' output `[1, T, H, D]`, their states brought forward."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            # a run for its memory alone
            return packed(self.inner, self.start, q, tokens, (0, q.shape[1]), None, self.form)[0]
        assert isinstance(metadata, dict)
        own: FastWeightsMetadata = metadata[self.prefix]
        pages = None if self.pending is None else self.pages(metadata[pending_name(self.prefix)])
        count = own.tokens
        queries, writers = q[:, :count], tokens.map(lambda x: x[:, :count])
        if self.offered != (None, None):
            raise RuntimeError(f"{self.prefix} was given one part of a step's metadata without the other")
        if isinstance(own.work, Decoding):
            found = own.work.advance(pages, self.pool, queries, writers, self.form)
        else:
            found = advance(Step(own.work, own.slots, pages), self.pool, queries, writers, self.form)
        if count == q.shape[1]:
            return found
        output = torch.zeros_like(tokens.v).to(q.dtype)
        output[:, :count] = found
        return output

    def offer(self, own: FastWeightsMetadata | None, pending: PendingMetadata | None) -> None:
        """Take what is planned for the next step; when all of it is there, do what comes before that step."""
        planned, waiting = self.offered
        self.offered = own or planned, pending or waiting
        own, pending = self.offered
        if own is None or (pending is None and self.pending is not None):
            return
        self.offered = None, None
        if own.before is not None:
            pages = None if pending is None else self.pages(pending)
            own.before.run(own.slots, pages, self.pool)

    def pages(self, found: PendingMetadata) -> Pages:
        """The pages of a step."""
        assert self.pending is not None
        return Pages(self.pending.kv_cache, found.tables, found.slots)

    @property
    def start(self) -> dict[str, Tensor]:
        """The fast weights that every sequence starts from, as `kvbind.ttt` takes them, in float32."""
        if not self.started:
            self.started = {name: x.float().contiguous() for name, x in self.start_weights().items()}
        return self.started

    @property
    def pool(self) -> Pool:
        """The states of all sequences."""
        return Pool(self.layout, self.kv_cache[0], self.start)


class ServedMLP(LactMLP):
    """The MLP, its hidden channels divided over ranks.

    Args:
        config: of the model.
    """

    def __init__(self, config: LactConfig) -> None:
        with torch.device("meta"):
            super().__init__(config.hidden_size, config.mlp_width)
        take_part(self)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`."""
        return tensor_model_parallel_all_reduce(super().forward(x))


class ServedBlock(nn.Module):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        config: of the model.
        vllm_config: vLLM's.
        prefix: the block's name in vLLM.
    """

    def __init__(self, config: LactConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.attn_norm = ResidualNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = ServedLactLayer(config, vllm_config, f"{prefix}.attn")
        self.mlp_norm = ResidualNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = ServedMLP(config)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """On the residual stream `[1, T, d]`."""
        x, normed = self.attn_norm(x)
        x, normed = self.mlp_norm(x, self.attn(normed, tables))
        output: Tensor = x + self.mlp(normed)
        return output

    def forget_start(self) -> None:
        """Have starting weights made anew, of other parameters."""
        self.attn.started = {}


def blocks(layers: nn.ModuleList) -> Iterator[ServedBlock]:
    """The blocks of a model."""
    for block in layers:
        assert isinstance(block, ServedBlock)
        yield block
