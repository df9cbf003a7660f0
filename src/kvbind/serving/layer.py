"""A model's layers in vLLM: attention on vLLM's backends, fast weights from slots and pages, heads divided over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from kvbind.forms.evaluate import Form
from kvbind.forms.halves import split
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import given_gates
from kvbind.inner.spec import InnerLoop
from kvbind.layers.fast_weights.convolution import Tails
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.layout import Layout
from kvbind.layers.norm import ResidualNorm
from kvbind.layers.operands import make_operands
from kvbind.layers.rotary import Tables
from kvbind.models.lact.blocks import LactMLP, make_mixer
from kvbind.models.lact.config import LactConfig
from kvbind.serving.cache import FastWeightsMetadata, PendingCache, PendingMetadata, pending_name
from kvbind.serving.checks import state_layout
from kvbind.serving.plugin import BACKEND
from kvbind.serving.ranks import OF_MLP, divide_fast_weights, divide_lact, take_part
from kvbind.serving.states import Pages, Pool
from kvbind.serving.steps import Decoding, PieceTails, ServedStep, advance, packed


class InPool(MambaBase):
    """A layer of fast weights whose sequences are in vLLM's pool; it is one of the layers of `kvbind.layers` as well."""

    inner: InnerLoop
    form: Form

    def enter(self, config: LactConfig, vllm_config: VllmConfig, prefix: str) -> None:
        """Be this rank's part of a model's layer, and known to vLLM.

        Args:
            config: of the model.
            vllm_config: vLLM's.
            prefix: the layer's name in vLLM.
        """
        with torch.device("meta"):
            whole = make_mixer(config)
        # as it was built, without building it again
        nn.Module.__init__(self)
        self.__dict__.update(whole.__dict__)
        self.prefix, self.layout = prefix, state_layout(config, get_tensor_model_parallel_world_size())
        self.dtype = vllm_config.model_config.dtype
        self.pending = PendingCache(self.layout, prefix) if self.layout.places and self.layout.paged else None
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)
        self.started: dict[str, Tensor] = {}
        self.started_rounded: dict[str, Tensor] = {}
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

    def metadata(self) -> FastWeightsMetadata | None:
        """What this step does with states; None in a run for its memory alone."""
        every = get_forward_context().attn_metadata
        if every is None:
            return None
        assert isinstance(every, dict)
        if self.offered != (None, None):
            raise RuntimeError(f"{self.prefix} was given one part of a step's metadata without the other")
        own: FastWeightsMetadata = every[self.prefix]
        return own

    def fast(self, q: Tensor, tokens: Tokens) -> Tensor:
        """The fast weights' output `[1, T, H, D]`, their states brought forward."""
        own = self.metadata()
        if own is None:
            return packed(self.inner, self.start, q, tokens, (0, q.shape[1]), None, self.form)[0]
        pages = None
        if self.pending is not None:
            every = get_forward_context().attn_metadata
            assert isinstance(every, dict)
            pages = self.pages(every[pending_name(self.prefix)])
        if isinstance(own.work, Decoding):
            return own.work.advance(pages, self.pool, q, tokens, self.form)
        return advance(ServedStep(own.work, own.slots, pages), self.pool, q, tokens, self.form)

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
    def rounded_start(self) -> dict[str, Tensor] | None:
        """The same rounded to bfloat16; None where steps read fast weights as they are."""
        if not isinstance(self, LactLayer) or self.decode_dtype is None:
            return None
        if not self.started_rounded:
            self.started_rounded = {name: split(x)[0] for name, x in self.start.items()}
        return self.started_rounded

    @property
    def pool(self) -> Pool:
        """The states of all sequences."""
        return Pool(self.layout, self.kv_cache[0], self.start, self.dtype, self.rounded_start)


class ServedLactLayer(LactLayer, InPool):
    """The layer with its sequences in vLLM's pool; it computes as `LactLayer`, of which it is one.

    Args:
        config: of the model.
        vllm_config: vLLM's.
        prefix: the layer's name in vLLM.
    """

    def __init__(self, config: LactConfig, vllm_config: VllmConfig, prefix: str) -> None:
        self.enter(config, vllm_config, prefix)
        divide_lact(self)
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

    def forward(self, x: Tensor, layout: Layout, tables: Tables) -> Tensor:  # type: ignore[override]
        """Mix the tokens of a step.

        Args:
            x: normalized input `[1, T, d]`.
            layout: the tokens' positions.
            tables: their rotary tables.

        Returns:
            `[1, T, d]`.
        """
        q, k, v = self._project(x)
        q, k, fast_q, fast_k = make_operands(q, k, v, self.qk_scale, self.qk_offset, tables, self.paths)
        self.clear_begun_pages()
        mixed = self.attention(q[0].flatten(1), k[0].flatten(1), v[0])[None]
        made = self._logits(x)
        scale = made.pop("scale", None)
        tokens = self.writing.tokens({"k": fast_k, "v": v, **made})
        own = self.metadata()
        count = x.shape[1] if own is None else own.tokens
        fast = padded(self.fast(fast_q[:, :count], tokens.map(lambda y: y[:, :count])), x.shape[1])
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


class ServedFastWeightLayer(FastWeightLayer, InPool):
    """The layer without attention, likewise; what its convolutions read of earlier tokens is in the pool too.

    Args:
        config: of the model.
        vllm_config: vLLM's.
        prefix: the layer's name in vLLM.
    """

    def __init__(self, config: LactConfig, vllm_config: VllmConfig, prefix: str) -> None:
        self.enter(config, vllm_config, prefix)
        divide_fast_weights(self)

    def forward(self, x: Tensor, layout: Layout, tables: Tables) -> Tensor:  # type: ignore[override]
        """The block's outputs, as `ServedLactLayer.forward` takes and gives them."""
        own = self.metadata()
        count = x.shape[1] if own is None else own.tokens
        tails: Tails | PieceTails = Tails() if own is None else PieceTails(own.pieces, own.slots, self.pool)
        places = layout.positions[:, :count]
        made = self._make(x[:, :count], Layout(places), places, tails)
        rates = dict.fromkeys(self.inner.updated, made.lr)
        fast = self.fast(made.q, Tokens(made.k, made.v, rates, given_gates(**made.gates)))
        output = self.o_proj(padded(self._join(fast, made), x.shape[1]))
        return tensor_model_parallel_all_reduce(output)


def padded(x: Tensor, length: int) -> Tensor:
    """`[1, T, ...]` with zeros behind it, `[1, length, ...]`."""
    if x.shape[1] == length:
        return x
    output = x.new_zeros(1, length, *x.shape[2:])
    output[:, : x.shape[1]] = x
    return output


class ServedMLP(LactMLP):
    """The MLP, its hidden channels divided over ranks.

    Args:
        config: of the model.
    """

    def __init__(self, config: LactConfig) -> None:
        with torch.device("meta"):
            super().__init__(config.hidden_size, config.mlp_width)
        take_part(self, OF_MLP)

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
        self.attn: ServedLactLayer | ServedFastWeightLayer
        served = ServedLactLayer if config.projections is None else ServedFastWeightLayer
        self.attn = served(config, vllm_config, f"{prefix}.attn")
        self.mlp_norm = ResidualNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = ServedMLP(config)

    def forward(self, x: Tensor, layout: Layout, tables: Tables) -> Tensor:
        """On the residual stream `[1, T, d]`."""
        x, normed = self.attn_norm(x)
        x, normed = self.mlp_norm(x, self.attn(normed, layout, tables))
        output: Tensor = x + self.mlp(normed)
        return output

    def forget_start(self) -> None:
        """Have starting weights made anew, of other parameters."""
        self.attn.started, self.attn.started_rounded = {}, {}


def blocks(layers: nn.ModuleList) -> Iterator[ServedBlock]:
    """The blocks of a model."""
    for block in layers:
        assert isinstance(block, ServedBlock)
        yield block
