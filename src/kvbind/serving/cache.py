"""Where vLLM keeps what a layer keeps: a slot per sequence for fast weights, sliding pages for pending keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from kvbind.serving.checks import state_layout
from kvbind.serving.states import StateLayout
from kvbind.serving.steps import Decoding, Pieces, Preparation, StepPlan


@dataclass
class FastWeightsMetadata:
    """What one step does with states, planned once for all layers whose slots are numbered alike.

    Attributes:
        work: a plan, or a step that brings one token to each sequence.
        slots: each sequence's slot, int64 `[n]`.
        tokens: how many the step has, without padding.
        before: what comes before the step where that may be replayed.
        pieces: where the step's pieces are, for layers that read the tokens before them.
    """

    work: StepPlan | Decoding
    slots: Tensor
    tokens: int
    before: Preparation | None
    pieces: Pieces


class FastWeightsBuilder(AttentionMetadataBuilder[FastWeightsMetadata]):
    """Plans steps on the host, where vLLM knows all lengths.

    A step of single tokens may be the replay of a graph, of which Python sees nothing: what it does differently from token
    to token lies in buffers of a fixed place, or is done here, before it.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layout = layout_of(vllm_config)
        most = vllm_config.scheduler_config.max_num_seqs
        self.slots, self.places = torch.zeros(2, most, dtype=torch.int64, device=device)
        self.rows = torch.arange(most + 1, device=device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of single tokens, where these are all done alike."""
        alike = Decoding.is_for(layout_of(vllm_config))
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if alike else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FastWeightsMetadata:
        """What a step's layers read of it, as vLLM asks for it before each step."""
        return self._built(common_attn_metadata, capture=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FastWeightsMetadata:
        """The same while a CUDA graph of the step is captured."""
        return self._built(common_attn_metadata, capture=True)

    def _built(self, common: CommonAttentionMetadata, capture: bool) -> FastWeightsMetadata:
        bounds = common.query_start_loc_cpu.tolist()[: common.num_reqs + 1]
        # exact where nothing is speculated, and speculation is refused
        known = common.seq_lens_cpu_upper_bound
        totals = (common.seq_lens if known is None else known).tolist()
        seen = [total - (b - a) for total, (a, b) in zip(totals, pairwise(bounds), strict=False)]
        slots = mamba_get_block_table_tensor(
            common.block_table_tensor,
            common.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )[: common.num_reqs, 0].long()

        work: StepPlan | Decoding
        before, count = None, common.num_reqs
        if common.max_query_len == 1 and Decoding.is_for(self.layout) and count <= len(self.slots):
            # rows that pad the step have slot 0, which no sequence has
            self.slots[:count] = slots.masked_fill(common.seq_lens[:count] == 0, 0)
            self.places[:count] = (common.seq_lens[:count] - 1).clamp(min=0) % (self.layout.places or 1)
            slots, work = self.slots[:count], Decoding(self.slots[:count], self.places[:count])
            pieces = Pieces(self.rows[: count + 1], self.rows[:count], None)
            if not capture:
                real = [x for x, (a, b) in zip(seen, pairwise(bounds), strict=True) if b > a]
                before = Preparation.of(self.layout, real, self.device)
        else:
            work, count = StepPlan.of(self.layout, bounds, seen, self.device), bounds[-1]
            pieces = Pieces.of(bounds, seen, self.device)
        found = FastWeightsMetadata(work, slots, count, before, pieces)
        for name in self.layer_names:
            self.vllm_config.compilation_config.static_forward_context[name].offer(found, None)
        return found


def layout_of(vllm_config: VllmConfig) -> StateLayout:
    """The layout of states on one rank."""
    return state_layout(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)


class FastWeightsBackend(AttentionBackend):
    """Names the builder; the layer computes by itself."""

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's register."""
        return "KVBIND_FAST_WEIGHTS"

    @staticmethod
    def get_builder_cls() -> type[FastWeightsBuilder]:
        """What makes the metadata of a step."""
        return FastWeightsBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        """None: the layer is its own implementation."""
        raise NotImplementedError

    @classmethod
    def is_ssm(cls) -> bool:
        """True: one slot per sequence."""
        return True


@dataclass
class PendingMetadata:
    """Each sequence's pages `[n, pages]`, and the place of each of the step's tokens `[T]`."""

    tables: Tensor
    slots: Tensor


class PendingBuilder(AttentionMetadataBuilder[PendingMetadata]):
    """Hands on vLLM's tables."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PendingMetadata:
        """The metadata of a step, with the pages of its sequences."""
        found = PendingMetadata(common_attn_metadata.block_table_tensor, common_attn_metadata.slot_mapping)
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            layers[layers[name].owner].offer(None, found)
        return found


class PendingBackend(AttentionBackend):
    """Pages of any size, which only our layers read."""

    @staticmethod
    def get_name() -> str:
        """Its name in messages."""
        return "KVBIND_PENDING"

    @staticmethod
    def get_builder_cls() -> type[PendingBuilder]:
        """What makes the metadata of a step."""
        return PendingBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        """None: nothing attends to these pages."""
        raise NotImplementedError

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        """Any dtype is held: these pages are never computed with."""
        return True


def pending_name(prefix: str) -> str:
    """What vLLM calls the pages of a layer."""
    return f"{prefix}.pending"


class PendingCache(nn.Module, AttentionLayerBase):
    """Pages that hold the keys and values of tokens whose chunk is not complete.

    They are as large as those of attention, and given back as tokens leave the window of a chunk.

    Args:
        layout: of the states on this rank.
        prefix: the name in vLLM of the layer whose they are.
    """

    def __init__(self, layout: StateLayout, prefix: str) -> None:
        super().__init__()
        self.layout, self.owner = layout, prefix
        self.kv_cache = torch.tensor([])
        config = get_current_vllm_config()
        self.dtype = config.model_config.dtype
        config.compilation_config.static_forward_context[pending_name(prefix)] = self

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Pages of a sliding window: a token more than are looked back at, the one that looks."""
        keys, _ = self.layout.widths
        return SlidingWindowSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.layout.heads,
            head_size=keys,
            dtype=self.dtype,
            sliding_window=self.layout.reach + 1,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        """What vLLM asks for the pages' layout."""
        return PendingBackend
