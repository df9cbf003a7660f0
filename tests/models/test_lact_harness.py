"""lm-evaluation-harness loads the model through transformers' Auto classes, as it loads any other."""

import pytest
import torch
from lact_small import small_model

import kvbind.models.lact  # noqa: F401  registers the architecture
from kvbind.tasks.tokenizers import Bytes

harness = pytest.importorskip("lm_eval.models.huggingface")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A model of bytes, its tokenizer, and both as the harness opens them."""
    folder = tmp_path_factory.mktemp("model")
    model = small_model(vocab_size=256, pad_token_id=None, eos_token_id=0, initializer_range=0.3)
    model.save_pretrained(folder)
    tokenizer = Bytes().for_transformers()
    tokenizer.save_pretrained(folder)
    return model, tokenizer, harness.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


def test_the_harness_scores_continuations_as_the_model_does(opened):
    from lm_eval.api.instance import Instance

    model, tokenizer, lm = opened
    pairs = [("def f(x):", " return x"), ("import numpy", " as np\n"), ("a", "b")]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    for (context, continuation), score in zip(pairs, scores, strict=True):
        prompt, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (context, context + continuation))
        with torch.no_grad():
            logs = model(whole).logits.float().log_softmax(-1)[0]
        expected = sum(logs[t - 1, whole[0, t]] for t in range(prompt.shape[1], whole.shape[1]))
        assert score == pytest.approx(float(expected), abs=1e-3)


def test_the_harness_generates_until_a_string_as_the_model_does(opened):
    from lm_eval.api.instance import Instance

    model, tokenizer, lm = opened
    contexts = ["def f(x):", "a", "import numpy as np"]
    whole = {}
    for context in contexts:
        ids = tokenizer(context, return_tensors="pt").input_ids
        whole[context] = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :].tolist()
    # a letter that comes up behind the first few, by which generation and the text both end
    stop = next(chr(i) for i in whole[contexts[0]][2:] if 32 < i < 127 and i not in whole[contexts[0]][:2])
    options = {"until": [stop], "max_gen_toks": 16, "do_sample": False}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(context, dict(options)), idx=i)
        for i, context in enumerate(contexts)
    ]
    found = lm.generate_until(requests, disable_tqdm=True)
    expected = [tokenizer.decode(ids, skip_special_tokens=True).split(stop)[0] for ids in whole.values()]
    assert found == expected
    assert len(found[0]) < len(tokenizer.decode(whole[contexts[0]], skip_special_tokens=True))
