"""Fast heads divided over two ranks."""

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-serving makes an environment with it")

import torch  # noqa: E402
from served import CHUNK, VOCAB, forced, prompt, saved  # noqa: E402

NEW = 2 * CHUNK + 2


def test_two_ranks_say_what_one_model_says(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # norms over all channels, a bias and low-rank matrices are divided too
    model = saved(tmp_path, "rung0", attn_qk_norm=True, qkv_bias=True, num_lact_heads=4)
    llm = vllm.LLM(
        str(tmp_path),
        dtype="float32",
        tensor_parallel_size=2,
        max_model_len=512,
        max_num_batched_tokens=70,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=32 << 20,
        max_logprobs=VOCAB,
        logprobs_mode="raw_logits",
    )
    prompts = [prompt(n, seed=n) for n in (1, CHUNK, 2 * CHUNK + 3, 75)]
    params = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=VOCAB)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    for asked, output in zip(prompts, outputs, strict=True):
        got = list(output.outputs[0].token_ids)
        expected = model.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=NEW, eos_token_id=None)
        assert got == expected[0, len(asked) :].tolist()
        logits = torch.tensor([[step[i].logprob for i in range(VOCAB)] for step in output.outputs[0].logprobs])
        torch.testing.assert_close(logits, forced(model, asked, got), rtol=0, atol=1e-4)
    llm.llm_engine.engine_core.shutdown()
