"""In-Place TTT written out anew: a plain model of transformers whose MLPs go row by row and chunk by chunk."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from kvbind.models import InPlaceForCausalLM

VOCAB, CHUNK, LR = 31, 5, 0.7

FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def plain(kind="llama", seed=0, **fields):
    """A small language model with random weights, in float32."""
    torch.manual_seed(seed)
    config = CONFIGS[kind](**{**FIELDS, **fields})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def trained(base, seed=1, **options):
    """In-Place TTT on it, with new parameters as training might leave them, in float64."""
    model = InPlaceForCausalLM.from_base(base, **{"layers": 2, "chunk": CHUNK, "lr": LR, **options}).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mlp in model.fast_mlps:
            for module in (mlp.ttt_conv, mlp.ttt_proj):
                if module is not None:
                    module.weight.copy_(0.4 * torch.randn(module.weight.shape, generator=generator))
    return model


def small(kind="llama", **options):
    """A small model with trained fast weights, in evaluation mode."""
    return trained(plain(kind), **options)


class ReferenceMLP(nn.Module):
    """The MLP of one layer, by the definition."""

    def __init__(self, mlp, chunk, lr):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.ttt_conv, self.ttt_proj = mlp.ttt_conv, mlp.ttt_proj
        self.chunk, self.lr, self.source = chunk, lr, None

    def forward(self, x):
        source = x if self.source is None else self.source
        return torch.stack([self.row(*pair) for pair in zip(x, source, strict=True)])

    def row(self, x, source):
        matrix, outputs = self.down_proj.weight.T, []
        for start in range(0, len(x), self.chunk):
            part, around = x[start : start + self.chunk], source[start : start + self.chunk]
            phi = F.silu(part @ self.gate_proj.weight.T) * (part @ self.up_proj.weight.T)
            outputs.append(phi @ matrix)
            if len(part) == self.chunk:
                values = torch.stack([self.value(around, i) for i in range(self.chunk)])
                if self.ttt_proj is not None:
                    values = values @ self.ttt_proj.weight
                matrix = matrix + self.lr * phi.T @ values
        return torch.cat(outputs)

    def value(self, around, place):
        kernel = self.ttt_conv.weight[:, 0]
        total = torch.zeros_like(around[0])
        for tap in range(kernel.shape[1]):
            seen = place + tap - kernel.shape[1] // 2
            if 0 <= seen < len(around):
                total = total + kernel[:, tap] * around[seen]
        return total


def reference_of(model):
    """A plain model of the same weights whose chosen MLPs are `ReferenceMLP`s; parameters of its own."""
    base = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation="sdpa").double().eval()
    held = model.base.state_dict()
    base.load_state_dict({name: x for name, x in held.items() if "ttt_" not in name})
    for i in model.config.fast_layers:
        mlp = copy.deepcopy(model.base.model.layers[i].mlp)
        base.model.layers[i].mlp = ReferenceMLP(mlp, model.config.chunk, model.config.lr)
    return base


def reference_logits(model, reference, ids):
    """Logits `[T, vocab]` of one row of ids `[T]`, all tokens at once."""
    source = reference.get_input_embeddings()(ids[None]) if model.config.values == "embeddings" else None
    for i in model.config.fast_layers:
        reference.model.layers[i].mlp.source = source
    return reference(ids[None], use_cache=False).logits[0]


def tokens(*lengths, seed=0):
    """Rows of random ids, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator) for n in lengths]


def padded(rows, side):
    """Rows in one batch: ids, mask, and the positions of tokens among tokens."""
    most = max(map(len, rows))
    ids = torch.zeros(len(rows), most, dtype=torch.long)
    for out, row in zip(ids, rows, strict=True):
        place = slice(most - len(row), most) if side == "left" else slice(0, len(row))
        out[place] = row
    mask = (ids != 0).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
