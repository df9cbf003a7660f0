"""lm-evaluation-harness loads the model through transformers' Auto classes, as it loads any other."""

import pytest
import torch
from lact_small import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvbind.models.lact  # noqa: F401  registers the architecture

harness = pytest.importorskip("lm_eval.models.huggingface")


def byte_tokenizer():
    """One token per byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def test_the_harness_scores_continuations_as_the_model_does(tmp_path):
    from lm_eval.api.instance import Instance

    model = small_model(vocab_size=257)
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    lm = harness.HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=2)

    pairs = [("def f(x):", " return x"), ("import numpy", " as np\n"), ("a", "b")]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    for (context, continuation), score in zip(pairs, scores, strict=True):
        prompt, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (context, context + continuation))
        with torch.no_grad():
            logs = model(whole).logits.float().log_softmax(-1)[0]
        expected = sum(logs[t - 1, whole[0, t]] for t in range(prompt.shape[1], whole.shape[1]))
        assert score == pytest.approx(float(expected), abs=1e-3)
