"""Models to serve: small, in float32, with bytes as tokens."""

import torch

from kvbind.inner.projections import Projections
from kvbind.inner.systems import PROJECTIONS, SYSTEMS
from kvbind.layers.lact.layer import check_fits_lact_layer
from kvbind.models import LactForCausalLM
from models.lact_small import LADDER, exact, small_config

VOCAB = 259
BEGIN, END, PAD = 256, 257, 258
CHUNK = 24
BLOCK = 128
"""Tokens in a block of vLLM's pool on the CPU, for states this small."""

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def causal(inner):
    try:
        check_fits_lact_layer(inner)
    except ValueError:
        return False
    return True


def short(inner):
    """With as few tokens in a chunk, or in a span of them, as several ends take no minutes."""
    if isinstance(inner.refresh, int):
        return inner.replace(refresh=8)
    return inner.replace(chunk=CHUNK) if (inner.chunk or 1) > 64 else inner


SERVED = {
    **{name: (rung.replace(chunk=CHUNK), {}) for name, rung in LADDER.items()},
    **{name: (short(exact(make())), {}) for name, make in SYSTEMS.items() if causal(make())},
}
"""Every rung and every named system that a causal layer takes, each with fields of its own configuration."""

SERVED |= {
    "lact_llm": (LADDER["rung0"].replace(chunk=50, normalize="read"), {"attn_qk_norm": True, "qkv_bias": True}),
    "rung1": (LADDER["rung1"].replace(chunk=CHUNK, query="key"), {"w0_w2_low_rank": 0, "tie_word_embeddings": True}),
    "rung2": (LADDER["rung2"].replace(chunk=CHUNK), {"released_parameters": True, "ttt_nope": True}),
    "rung4": (LADDER["rung4"].replace(chunk=CHUNK), {"no_v_silu": True, "learnable_ttt_scale": False}),
    "rung6": (LADDER["rung6"].replace(chunk=CHUNK), {"qkv_silu": False, "num_lact_heads": 1}),
    "titans": (exact(SYSTEMS["titans"]()), {"window_size": 1, "inter_multi": 2}),
    "delta_net": (exact(SYSTEMS["delta_net"]()), {"window_size": 200}),
}

ALONE = {
    f"{name} alone": (short(exact(make())), {"projections": name}) for name, make in SYSTEMS.items() if name in PROJECTIONS
}
# a chunk's update is left to the next step, of a slot that has all of it
ALONE["rung2 alone"] = (LADDER["rung2"].replace(chunk=CHUNK), {"projections": Projections(rotary="sequence", conv=3)})
SERVED |= ALONE


def model(name, **fields):
    inner, own = SERVED[name]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_attn_heads": 2,
        "num_lact_heads": 2,
        "window_size": 40,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
        "initializer_range": 0.05,
    }
    return LactForCausalLM(small_config(inner, **{**sizes, **own, **fields})).eval()


def tokenizer():
    """Bytes as tokens 0 to 255, in the order of the letters that stand for them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def saved(folder, name="rung0", **fields):
    """A folder with a model and its tokenizer, and the model."""
    made = model(name, **fields)
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return made


def prompt(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def forced(model, asked, answered):
    """Logits from which each answered token was chosen, by one pass over everything."""
    with torch.no_grad():
        logits = model(torch.tensor([[*asked, *answered]]), use_cache=False).logits[0]
    return logits[len(asked) - 1 : -1]
