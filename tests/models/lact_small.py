"""Small LaCT language models for tests."""

import torch

import kvbind
from kvbind.models import LactConfig, LactForCausalLM
from kvbind.models.lact.cache import CACHE

VOCAB = 61


def exact(inner):
    """The inner loop with orthogonalization in full precision."""
    if inner.orthogonalize is None:
        return inner
    return inner.replace(orthogonalize=inner.orthogonalize.replace(dtype=torch.float32))


LADDER = {name: exact(rung) for name, rung in kvbind.systems.ladder(kvbind.systems.lact_llm(chunk=8)).items()}


def small_config(inner=LADDER["rung0"], **fields):
    return LactConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attn_heads": 4,
            "num_lact_heads": 2,
            "window_size": 10,
            "w0_w2_low_rank": 4,
            "intermediate_size": 48,
            "inner": inner,
            "initializer_range": 0.1,
            "base_lr": 0.1,
            "pad_token_id": 0,
            "eos_token_id": None,
            **fields,
        }
    )


def small_model(inner=LADDER["rung0"], *, seed=0, **fields):
    """In evaluation mode, in torch's default dtype."""
    torch.manual_seed(seed)
    return LactForCausalLM(small_config(inner, **fields)).eval()


def tokens(batch, length, seed=0):
    """Random ids, none of them padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def cache_of(output):
    """The cache in what a model or `generate` returns, under the installed transformers' name of it."""
    return getattr(output, CACHE)


def word_tokenizer():
    """Letters as tokens 1 to 26, padding and what is no letter as 0."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, **{chr(96 + i): i for i in range(1, 27)}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    letters = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.WhitespaceSplit(), letters])
    plain.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", padding_side="left")
