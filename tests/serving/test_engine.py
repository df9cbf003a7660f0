"""Models in vLLM say what they say by themselves, whatever else is served and however steps cut them up."""

import random
import time

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-serving makes an environment with it")

import torch  # noqa: E402
from served import BLOCK, CHUNK, SERVED, VOCAB, forced, prompt, saved, tokenizer  # noqa: E402

from kvbind.bench.models.serving import RequestLoad, answer  # noqa: E402
from kvbind.serving.sizes import RequestSize  # noqa: E402

SIZE = 70
"""Tokens in a step: neither a multiple of a chunk nor of a block."""


ENGINES = []


def engine(folder, **options):
    given = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_batched_tokens": SIZE,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 32 << 20,
        "max_logprobs": VOCAB,
        "logprobs_mode": "raw_logits",
        "disable_log_stats": False,
    }
    # an engine that is forgotten takes from the process what all of them share
    ENGINES.append(vllm.LLM(str(folder), **{**given, **options}))
    return ENGINES[-1]


def greedy(tokens=8, **options):
    return vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **options)


def ask(llm, prompts, *params, **options):
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    return llm.generate(asked, *params, use_tqdm=False, **options)


def poison(llm):
    """Fill everything that our layers keep with NaN."""

    def fill(model):
        for block in model.model.layers:
            block.attn.kv_cache[0].fill_(torch.nan)
            if block.attn.pending is not None:
                block.attn.pending.kv_cache.fill_(torch.nan)

    llm.apply_model(fill)


def said(output):
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_generate(name, tmp_path):
    model = saved(tmp_path, name)
    llm = engine(tmp_path)
    poison(llm)
    span = max(model.config.inner.span, 4)
    # over five points where a state can stop, from prompts before, at and behind one
    prompts = [prompt(n, seed=n) for n in (1, span - 1, span, 2 * span + 3, 75)]
    new = 5 * span + 2
    outputs = ask(llm, prompts, greedy(new, logprobs=VOCAB))
    for asked, output in zip(prompts, outputs, strict=True):
        logits = torch.tensor([[step[i].logprob for i in range(VOCAB)] for step in output.outputs[0].logprobs])
        alone = forced(model, asked, said(output))
        far = 1e-4
        if name.startswith("atlas"):
            # of updates that feed on themselves float32 keeps fewer digits, and either evaluation may be the worse one:
            # tokens that are nearly as likely may change places
            far = max(far, 3 * (forced(model.double(), asked, said(output)) - alone).abs().max().item())
            model.float()
            chosen = alone.gather(-1, torch.tensor(said(output))[:, None]).squeeze(-1)
            assert (alone.amax(-1) - chosen).max() <= 2 * far
        else:
            expected = model.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=new, eos_token_id=None)
            assert said(output) == expected[0, len(asked) :].tolist()
        torch.testing.assert_close(logits, alone, rtol=0, atol=far)


def test_fast_weights_may_be_read_in_bfloat16(tmp_path):
    model = saved(tmp_path, "rung2", decode_dtype="bfloat16")
    llm = engine(tmp_path)
    poison(llm)
    prompts = [prompt(n, seed=n) for n in (5, CHUNK, 2 * CHUNK + 3, 75)]
    outputs = ask(llm, prompts, greedy(3 * CHUNK, logprobs=VOCAB))
    for asked, output in zip(prompts, outputs, strict=True):
        logits = torch.tensor([[step[i].logprob for i in range(VOCAB)] for step in output.outputs[0].logprobs])
        # the first comes of the prompt, which is read as ever
        exact = forced(model, asked, said(output))
        torch.testing.assert_close(logits[:1], exact[:1], rtol=0, atol=1e-4)
        assert not torch.allclose(logits[1:], exact[1:], rtol=0, atol=1e-4)
        assert ((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(folder):
    # of the full system, rounding grows over dozens of chunks until two evaluations part
    return saved(folder, "rung2")


@pytest.fixture(scope="module")
def llm(folder, model):
    return engine(folder)


@pytest.fixture(scope="module")
def caching(folder, model):
    return engine(folder, enable_prefix_caching=True, max_num_batched_tokens=300)


def check(model, asked, answered):
    """Greedy decoding would have chosen every token that was answered, up to rounding."""
    logits = forced(model, asked, answered)
    chosen = logits.gather(1, torch.tensor(answered)[:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max() < 1e-4


def run(llm, requests, rng, aborted=()):
    """Requests (prompt, parameters) that arrive at random steps; those `aborted` are so when they have that many tokens."""
    core, waiting, done = llm.llm_engine, list(requests), {}
    aborted = dict(aborted)
    while waiting or core.has_unfinished_requests():
        for _ in range(min(rng.choice([0, 0, 1, 2, 5]), len(waiting))):
            name, ids, params = waiting.pop()
            core.add_request(name, {"prompt_token_ids": ids}, params)
        for output in core.step():
            done[output.request_id] = output
            if len(said(output)) >= aborted.get(output.request_id, 10**9):
                core.abort_request([output.request_id])
                del aborted[output.request_id]
    return done


def free_blocks(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def test_requests_of_any_length_arrive_at_any_time(llm, model):
    rng = random.Random(0)
    poison(llm)
    free = free_blocks(llm)
    requests = [(str(i), prompt(rng.randint(1, 700), seed=i), greedy(rng.randint(1, 60))) for i in range(64)]
    done = run(llm, requests, rng)
    for name, asked, params in requests:
        answered = said(done[name])
        assert len(answered) == params.max_tokens
        check(model, asked, answered)
    assert free_blocks(llm) == free


def test_an_aborted_request_leaves_the_others_and_gives_back_what_it_had(llm, model):
    rng = random.Random(1)
    free = free_blocks(llm)
    requests = [(f"a{i}", prompt(rng.randint(1, 300), seed=i), greedy(40)) for i in range(12)]
    done = run(llm, requests, rng, aborted={"a1": 1, "a4": CHUNK, "a9": 20}.items())
    for name, asked, _ in requests:
        check(model, asked, said(done[name]))
        assert len(said(done[name])) == (40 if name not in ("a1", "a4", "a9") else len(said(done[name])))
    assert len(said(done["a1"])) < 40
    assert free_blocks(llm) == free


def test_a_prompt_given_up_halfway_is_forgotten(llm, model):
    core, free = llm.llm_engine, free_blocks(llm)
    core.add_request("long", {"prompt_token_ids": prompt(600)}, greedy())
    core.step()
    core.step()
    assert free_blocks(llm) < free
    core.abort_request(["long"])
    (output,) = ask(llm, [prompt(77, seed=5)], greedy(30))
    check(model, prompt(77, seed=5), said(output))
    assert free_blocks(llm) == free


def test_a_long_prompt_is_read_once(caching, model):
    shared = prompt(3 * BLOCK + 40)
    prompts = [[*shared, *prompt(30, seed=i)] for i in (1, 2)]
    for i, asked in enumerate([*prompts, prompts[1]]):
        (output,) = ask(caching, [asked], greedy(40))
        check(model, asked, said(output))
        # states are kept where steps end, at ends of blocks
        assert output.num_cached_tokens % BLOCK == 0
        assert (output.num_cached_tokens >= 2 * BLOCK) == (i > 0)


def test_prompts_share_what_others_read_while_they_run(caching, model):
    rng = random.Random(2)
    stems = [prompt(n, seed=100 + n) for n in (130, 260, 520)]
    requests = []
    for i in range(24):
        ids = [*rng.choice(stems), *prompt(rng.randint(1, 100), seed=i)]
        requests.append((f"p{i}", ids, greedy(rng.randint(1, 50))))
    done = run(caching, requests, rng)
    for name, asked, _ in requests:
        check(model, asked, said(done[name]))
    assert sum(output.num_cached_tokens for output in done.values()) > 10 * BLOCK


def preemptions(llm, monkeypatch):
    """A list that fills with the requests that an engine preempts."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, original = [], scheduler._preempt_request

    def count(request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", count)
    return preempted


def page_bytes(llm):
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    (page,) = {group.kv_cache_spec.page_size_bytes for group in groups}
    return page


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "prefix caching"])
def test_preempted_requests_are_computed_anew(folder, model, cached, monkeypatch):
    # room for some four sequences, where eight are let in
    small = engine(folder, enable_prefix_caching=cached, num_gpu_blocks_override=26, max_num_batched_tokens=300)
    preempted = preemptions(small, monkeypatch)
    poison(small)
    requests = [(f"r{i}", prompt(100 + 7 * i, seed=i), greedy(200)) for i in range(8)]
    done = run(small, requests, random.Random(3))
    assert preempted
    for name, asked, _ in requests:
        check(model, asked, said(done[name]))


def test_requests_of_a_model_without_attention_share_prefixes_and_are_preempted(tmp_path, monkeypatch):
    model = saved(tmp_path, "titans alone")
    # room for four sequences, each of two slots, where eight are let in
    served = engine(tmp_path, enable_prefix_caching=True, num_gpu_blocks_override=10, max_num_batched_tokens=300)
    preempted = preemptions(served, monkeypatch)
    poison(served)
    assert page_bytes(served) == RequestSize.of(model.config, 4, step=BLOCK, cached=True).page
    free, rng, requests = free_blocks(served), random.Random(4), []
    for i in range(24):
        stem = prompt(rng.choice([0, 130, 520]), seed=3)
        requests.append((f"m{i}", [*stem, *prompt(rng.randint(1, 150), seed=i)], greedy(rng.randint(1, 60))))
    done = run(served, requests, rng, aborted={"m3": 1, "m7": 5}.items())
    for name, asked, params in requests:
        check(model, asked, said(done[name]))
        assert len(said(done[name])) == params.max_tokens or name in ("m3", "m7")
    assert preempted
    assert sum(output.num_cached_tokens for output in done.values()) >= BLOCK
    assert free_blocks(served) == free


def test_stop_strings_end_a_text(llm, model):
    text, reader = "kvbind", tokenizer()
    (whole,) = llm.generate([text], greedy(40), use_tqdm=False)
    stop = whole.outputs[0].text[5:7]
    (output,) = llm.generate([text], greedy(40, stop=[stop]), use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == whole.outputs[0].text.split(stop)[0]
    check(model, reader(text).input_ids, said(output))


def test_the_end_token_ends_a_text(llm, tmp_path):
    asked = prompt(30, seed=3)
    (output,) = ask(llm, [asked], greedy(30))
    end = said(output)[10]
    other = saved(tmp_path, "rung2", eos_token_id=end)
    params = vllm.SamplingParams(temperature=0, max_tokens=30)
    (output,) = ask(engine(tmp_path), [asked], params)
    expected = other.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=30)[0, len(asked) :].tolist()
    assert said(output) == expected
    assert expected[-1] == end
    assert len(expected) <= 11


def test_logits_of_a_prompt_are_those_of_one_pass(llm, model):
    asked = prompt(3 * CHUNK + 5, seed=9)
    (output,) = ask(llm, [asked], greedy(1, prompt_logprobs=VOCAB))
    logits = torch.tensor([[step[i].logprob for i in range(VOCAB)] for step in output.prompt_logprobs[1:]])
    with torch.no_grad():
        expected = model(torch.tensor([asked]), use_cache=False).logits[0, :-1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["rung2", "ttt_linear alone"])
def test_half_precision_stays_near(name, tmp_path):
    model = saved(tmp_path, name)
    asked = prompt(3 * CHUNK + 5, seed=9)
    (output,) = ask(engine(tmp_path, dtype="bfloat16"), [asked], greedy(2 * CHUNK, logprobs=VOCAB))
    logits = torch.tensor([[step[i].logprob for i in range(VOCAB)] for step in output.outputs[0].logprobs])
    expected = forced(model.bfloat16(), asked, said(output)).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "prefix caching"])
def test_a_request_takes_the_pages_that_are_told(llm, caching, model, cached):
    served = caching if cached else llm
    size = RequestSize.of(model.config, 4, step=128, cached=cached)
    manager = served.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    assert {group.kv_cache_spec.block_size for group in manager.kv_cache_config.kv_cache_groups} <= {size.block, 1024}
    assert page_bytes(served) == size.page
    core, free = served.llm_engine, free_blocks(served)
    core.add_request("one", {"prompt_token_ids": prompt(300, seed=77)}, greedy(200))
    taken = set()
    while core.has_unfinished_requests():
        (output, *_) = core.step() or [None]
        if output is not None and len(said(output)) > 1:
            taken.add(free - free_blocks(served))
    # pages that are cached are free, as they are taken back when they are needed
    assert max(taken - {0}) <= size.states + size.window + size.pending
    assert max(taken) > size.window + size.pending - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp8"}, "quantization must be None .* got 'fp8'"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be 'auto' .* got 'fp8'"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size must divide num_attn_heads = 2; got 4"),
        ({"additional_config": {"kvbind_slots": 1000}}, "slots must be at most [0-9]+, .* got 1000"),
    ],
)
def test_what_cannot_be_served_is_one_clear_error(folder, model, options, message):
    with pytest.raises(ValueError, match=message):
        engine(folder, **options)


def test_the_benchmark_counts_what_it_asked_for(folder, model):
    load = RequestLoad(requests=6, prompt=100, answer=9, rate=50.0, running=3, step=64)
    begin = time.perf_counter()
    found = answer(folder, load, 256, "float32")
    assert 0 < found["seconds"] < time.perf_counter() - begin
    assert found["requests_per_second"] == pytest.approx(6 / found["seconds"])
    wanted = sum(tokens for *_, tokens in load.drawn(256))
    assert found["tokens_per_second"] == pytest.approx(wanted / found["seconds"])
    assert 0 < found["first_p50"] <= found["first_p99"] < found["seconds"]
    assert 0 < found["next_p50"] <= found["next_p99"] < found["seconds"]
