"""Fast heads divided over two ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-serving makes an environment with it")

import torch  # noqa: E402
from served import CHUNK, VOCAB, forced, prompt, saved  # noqa: E402

import published  # noqa: E402
from kvbind.inner.projections import Projections  # noqa: E402
from kvbind.layers.layout import Layout  # noqa: E402
from kvbind.models.lact.blocks import LactBlock  # noqa: E402
from kvbind.serving import layer, ranks  # noqa: E402
from models.lact_small import LADDER, small_config  # noqa: E402

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


class Ranks:
    """Two ranks as threads of this process."""

    def __init__(self, monkeypatch):
        self.local, self.meet, self.parts = threading.local(), threading.Barrier(2, timeout=60), [None, None]
        replaced = {
            "get_tensor_model_parallel_rank": lambda: self.local.rank,
            "get_tensor_model_parallel_world_size": lambda: 2,
            "tensor_model_parallel_all_reduce": self.reduce,
        }
        for name, stand_in in replaced.items():
            for module in (ranks, layer):
                monkeypatch.setattr(module, name, stand_in, raising=False)
        monkeypatch.setattr(layer, "get_forward_context", lambda: SimpleNamespace(attn_metadata=None))

    def reduce(self, x):
        self.parts[self.local.rank] = x
        self.meet.wait()
        whole = self.parts[0] + self.parts[1]
        self.meet.wait()
        return whole

    def run(self, work):
        """What `work` returns on each."""

        def at(rank):
            self.local.rank = rank
            return work()

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(at, range(2)))


OTHERS = {
    "keys alone convolved": (LADDER["rung0"], Projections(rotary="sequence", conv=3, conv_on=("k",), output_norm="none")),
    "a gate of two layers": (LADDER["rung6"], Projections(skip="value", output_gate="silu", gate_bias=True, gate_rank=2)),
}
ALONE = {name: (inner, name) for name, inner in published.SYSTEMS.items()} | OTHERS


@pytest.mark.parametrize("name", ALONE)
def test_two_ranks_of_a_layer_without_attention_say_what_it_says(name, monkeypatch):
    inner, projections = ALONE[name]
    config = small_config(inner, projections=projections)
    torch.manual_seed(0)
    whole = LactBlock(config).attn
    for parameter in whole.parameters():
        # so that no head is like another
        torch.nn.init.normal_(parameter, std=0.3)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32), compilation_config=SimpleNamespace(static_forward_context={})
    )
    x = torch.randn(1, 11, config.hidden_size)

    def work():
        served = layer.ServedFastWeightLayer(config, vllm_config, "layer")
        for key, parameter in served.named_parameters():
            parameter.weight_loader(parameter, whole.get_parameter(key))
        with torch.no_grad():
            return served(x, Layout.rows(11, x.device), None)

    with torch.no_grad():
        expected = whole(x)[0]
    for found in Ranks(monkeypatch).run(work):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
