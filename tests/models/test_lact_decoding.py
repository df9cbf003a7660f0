"""Decoding by replays: the same tokens, logits and caches as decoding call by call.

On a CPU work is recorded in place of captured (`replaying`): a replay runs no Python, on the memory that was recorded.
"""

import copy
import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from lact_small import LADDER, cache_of, small_model, tokens
from torch.utils import _pytree as pytree

import kvbind
from kvbind.forms import pending
from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.launching import cuda_graphs
from kvbind.layers import lact as lact_layers
from kvbind.models import LactCache
from kvbind.models.lact import decoding
from kvbind.models.lact.cache import CACHE
from replaying import Recording, capture
from strategies import error, memory

ROWS = [tokens(1, n, seed=n)[0] for n in (23, 4, 16)]
NEW = 40
"""Tokens that are generated: five chunks of 8, four windows of 10."""


@pytest.fixture
def replays(monkeypatch):
    """Turns replays on; calling it with False turns them off."""

    def switch(on=True):
        monkeypatch.setattr(decoding, "can_capture", lambda device: on)

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    switch()
    return switch


def prompts(rows=ROWS):
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return ids, mask


def generate(model, ids, **options):
    return model.generate(ids, **{"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, **options})


def assert_same(mine, other, tolerance=1e-10):
    assert (mine.seen, mine.columns, len(mine)) == (other.seen, other.columns, len(other))
    for one, two in zip(mine.states, other.states, strict=True):
        assert (one.seen, one.cache.held) == (two.seen, two.cache.held)
        assert one.fast.pending_lengths == two.fast.pending_lengths
        assert one.fast.tensors.keys() == two.fast.tensors.keys()
        for name, x in one.fast.tensors.items():
            torch.testing.assert_close(x, two.fast.tensors[name], rtol=0, atol=tolerance, msg=name)
        for i, held in enumerate(one.cache.held):
            where = slice(one.cache.keys.shape[1] - held, None)
            for x, y in ((one.cache.keys, two.cache.keys), (one.cache.values, two.cache.values)):
                torch.testing.assert_close(x[i, where], y[i, where], rtol=0, atol=tolerance)


def rounding(model, dtype="bfloat16"):
    """The model, decoding with fast weights rounded to a dtype."""
    for layer in model.model.layers:
        layer.attn.decode_dtype = dtype
    return model


def is_replayed(cache):
    return cache.rows is not None and "token" in cache.rows.graphs


def test_a_recording_runs_no_python_again_and_keeps_its_memory():
    x, made, calls = torch.zeros(3), [], []

    def work():
        calls.append(len(calls))
        made.append(x + 1)
        x.add_(made[-1] * (2 if len(calls) > 1 else 1))

    replay = capture(work)
    assert torch.equal(x, torch.zeros(3))
    address = made[0].data_ptr()
    for _ in range(2):
        replay()
    assert torch.equal(x, torch.full((3,), 3.0))
    assert torch.equal(made[0], torch.full((3,), 2.0))
    assert (len(calls), made[0].data_ptr()) == (1, address)
    with pytest.raises(RuntimeError, match="read on the host"), Recording():
        bool(x.sum() > 0)


@pytest.mark.parametrize("rung", ["rung0", "rung2", "rung6"])
def test_greedy_tokens_and_the_cache_are_those_of_calls(rung, replays):
    model = small_model(LADDER[rung]).double()
    ids, mask = prompts()
    got = generate(model, ids, attention_mask=mask)
    assert is_replayed(cache_of(got))
    replays(False)
    expected = generate(model, ids, attention_mask=mask)
    assert cache_of(expected).rows is None
    assert torch.equal(got.sequences, expected.sequences)
    assert_same(cache_of(got), cache_of(expected))


@pytest.mark.parametrize(
    ("kernels", "lengths", "steps", "updates", "dtype"),
    [
        ("0", (62, 63, 62, 20), 3, 3, None),
        ("0", (63, 63), 3, 1, None),
        ("force", (62, 63), 1, 1, None),
        ("0", (62, 63, 62, 20), 3, 3, "bfloat16"),
        ("0", (63, 63), 3, 1, "bfloat16"),
    ],
)
def test_calls_read_and_update_by_the_operators_of_replays(kernels, lengths, steps, updates, dtype, replays, monkeypatch):
    """On operands of the same shapes and strides, though prefill leaves matrices transposed and one for all rows."""
    monkeypatch.setenv("KVBIND_KERNELS", kernels)
    if kernels == "force" and not runs_on(torch.device("cpu")):
        pytest.skip("kernels run on a CPU where Triton interprets them: TRITON_INTERPRET=1")
    found = {}

    def watched(name, function):
        def run(*args):
            with Recording() as recording:
                result = function(*args)
            found.setdefault(name, []).append(recording.kinds)
            return result

        return run

    reads = "read" if dtype is None else "read_rounded"
    for name in (reads, "completed"):
        changed = watched(name, getattr(pending, name))
        for module in (pending, lact_layers.slots):
            monkeypatch.setattr(module, name, changed)

    inner = LADDER["rung2"].replace(chunk=64)
    model = small_model(inner, num_hidden_layers=1, w0_w2_low_rank=0, decode_dtype=dtype)
    ids, mask = prompts([tokens(1, n, seed=n)[0] for n in lengths])
    kinds = []
    for on in (True, False):
        replays(on)
        got = generate(model, ids, attention_mask=mask, max_new_tokens=steps + 1)
        assert is_replayed(cache_of(got)) == on
        assert cache_of(got).seen == tuple(n + steps for n in lengths)
        kinds.append({name: set(each) for name, each in found.items()})
        made = len(found["completed"])
        found.clear()
    assert kinds[0] == kinds[1]
    assert {name: len(each) for name, each in kinds[0].items()} == {reads: 1, "completed": 1}
    # of calls; rows that are due in one step are updated one by one where others are not
    assert made == updates
    (update,) = kinds[0]["completed"]
    assert ("kvbind.recurrent_swiglu.default" in dict(update)) == (kernels == "force")


@pytest.mark.parametrize("batch", [1, 2])
def test_logits_are_those_of_one_pass(batch, replays):
    model = small_model(LADDER["rung0"])
    ids = tokens(batch, 60)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-10)):
        model.to(dtype)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            first = model(ids[:, :5], use_cache=True)
            cache, logits = cache_of(first), [first.logits]
            for t in range(5, 60):
                logits.append(model(ids[:, t : t + 1], cache=cache).logits)
        assert is_replayed(cache)
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 0}], ids=str)
def test_beams_and_samples_are_those_of_calls(options, replays):
    model = small_model(LADDER["rung0"]).double()
    ids, mask = prompts()
    found = []
    for on in (True, False):
        replays(on)
        torch.manual_seed(0)
        found.append(generate(model, ids, attention_mask=mask, **options))
    assert is_replayed(cache_of(found[0]))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_same(cache_of(found[0]), cache_of(found[1]))


SHAPES = {
    "a window of one": {"window_size": 1},
    "a chunk longer than the window": {"inner": LADDER["rung0"].replace(chunk=24)},
    "chunks of one token": {"inner": LADDER["rung0"].replace(chunk=1)},
    "retention, normalized to read": {"inner": LADDER["rung0"].replace(retention=True, normalize="read")},
    "keys for queries": {"inner": LADDER["rung0"].replace(query="key", direction="ascent")},
    "an MLP under squared error": {"inner": memory(8)},
    "no rates, biases and norms": {
        "inner": LADDER["rung4"],
        "qkv_bias": True,
        "attn_qk_norm": True,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_models_go_on_alike(name, replays):
    model = small_model(**SHAPES[name]).double()
    ids, mask = prompts()
    got = generate(model, ids, attention_mask=mask, max_new_tokens=26)
    assert is_replayed(cache_of(got))
    replays(False)
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=26)
    assert torch.equal(got.sequences, expected.sequences)
    assert_same(cache_of(got), cache_of(expected))


def started(model, batch=3, length=13):
    """A cache that is being replayed, and one that has had the same tokens by calls."""
    ids, caches = tokens(batch, length + 6), []
    with torch.no_grad():
        for steps in (1, 6):
            cache = cache_of(model(ids[:, :length], use_cache=True))
            for part in ids[:, length:].split(steps, 1):
                model(part, cache=cache)
            caches.append(cache)
    assert is_replayed(caches[0])
    assert caches[1].rows is None
    return caches


@pytest.mark.parametrize(
    "act", ["look", "copy", "deepcopy", "file", "pytree", "repeat", "select", "reorder", "several tokens", "crop"]
)
@pytest.mark.parametrize("window", [10, 6])
def test_whatever_is_done_to_a_cache_it_goes_on_as_one_of_calls(act, window, replays, tmp_path):
    model = small_model(LADDER["rung0"], window_size=window).double()
    pair = started(model)
    for place, cache in enumerate(pair):
        if act == "look":
            assert cache.states[0].seen == (19, 19, 19)
        elif act in ("copy", "deepcopy"):
            pair[place] = getattr(copy, act)(cache)
        elif act == "file":
            torch.save(cache, tmp_path / "cache.pt")
            pair[place] = torch.load(tmp_path / "cache.pt", weights_only=False)
        elif act == "pytree":
            pair[place] = pytree.tree_map(torch.clone, cache)
        elif act == "repeat":
            cache.batch_repeat_interleave(2)
        elif act == "select":
            cache.batch_select_indices(torch.tensor([2, 0]))
        elif act == "reorder":
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            assert (cache.rows is None) == bool(place)
        elif act == "crop":
            with pytest.raises(ValueError, match="cannot be cropped"):
                cache.crop(-1)
        else:
            with torch.no_grad():
                model(tokens(3, 9, seed=3), cache=cache)
    assert_same(*pair)
    more, logits = tokens(len(pair[0].seen), 11, seed=4), []
    with torch.no_grad():
        logits.append(torch.cat([model(part, cache=pair[0]).logits for part in more.split(1, 1)], 1))
        logits.append(model(more, cache=pair[1]).logits)
    assert is_replayed(pair[0])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-10)
    assert_same(*pair)


@pytest.mark.parametrize("act", ["copy", "reorder"])
def test_rounded_rows_are_moved_as_others_are(act, replays):
    model = rounding(small_model(LADDER["rung2"]))
    ids, more, found = tokens(3, 19), tokens(3, 11, seed=4), []
    for on in (True, False):
        replays(on)
        with torch.no_grad():
            cache = cache_of(model(ids[:, :13], use_cache=True))
            for part in ids[:, 13:].split(1, 1):
                model(part, cache=cache)
            if act == "copy":
                cache = copy.deepcopy(cache)
            else:
                cache.reorder_cache(torch.tensor([2, 0, 0]))
            logits = torch.cat([model(part, cache=cache).logits for part in more.split(1, 1)], 1)
        assert is_replayed(cache) == on
        found.append((logits, cache))
    assert error(found[0][0], found[1][0]) < 0.02
    mine, other = (cache.states[0].fast.tensors for _, cache in found)
    for name, x in mine.items():
        torch.testing.assert_close(x, other[name], rtol=0, atol=1e-4)


def test_a_cache_can_be_read_without_being_advanced(replays):
    model = small_model().double()
    cache, other = started(model)
    token = tokens(3, 1, seed=8)
    with torch.no_grad():
        found = [model(token, cache=x, use_cache=False).logits for x in (cache, other, cache)]
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
    assert_same(cache, other)


def test_later_calls_reuse_what_the_first_has_made(replays, monkeypatch):
    made = []
    monkeypatch.setattr(cuda_graphs, "capture", lambda work, *rest: made.append(1) or capture(work, *rest))
    model = small_model().double()
    ids, mask = prompts()
    generate(model, ids, attention_mask=mask)
    decoder = decoding.decoder_of(model)
    rows, count = decoder.rows, len(made)
    assert len(rows) == 1
    kept = rows[0]
    generate(model, ids, attention_mask=mask)
    assert decoder.rows == [kept]
    assert len(made) == count
    # rows for another batch size take the place of those that nobody is in
    generate(model, ids[:2], attention_mask=mask[:2])
    assert [x.batch for x in decoder.rows] == [2]


def test_all_of_it_goes_with_the_model(replays):
    model = small_model().double()
    generate(model, tokens(1, 9))
    kept = weakref.ref(decoding.decoder_of(model).rows[0].layers[0].keys)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert kept() is None


def test_caches_that_take_turns_are_each_right(replays, caplog):
    model = small_model().double()
    ids = [tokens(1, 30, seed=n) for n in (1, 2)]
    caches, logits = [LactCache(), LactCache()], [[], []]
    with torch.no_grad(), caplog.at_level(logging.INFO, "kvbind"):
        for t in range(30):
            for cache, row, found in zip(caches, ids, logits, strict=True):
                found.append(model(row[:, t : t + 1], cache=cache).logits)
        for row, found in zip(ids, logits, strict=True):
            torch.testing.assert_close(torch.cat(found, 1), model(row).logits, rtol=0, atol=1e-10)
    assert caplog.text.count("take turns") == 1


def test_weights_may_change_between_tokens(replays):
    model = small_model().double()
    cache, other = started(model)
    token = tokens(3, 2, seed=8)

    def both_agree():
        with torch.no_grad():
            replays()
            mine = model(token[:, :1], cache=cache).logits
            replays(False)
            torch.testing.assert_close(mine, model(token[:, :1], cache=other).logits, rtol=0, atol=1e-10)
        return is_replayed(cache)

    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert both_agree()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    assert both_agree()
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)
    assert both_agree()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight * 2
    assert both_agree()


@pytest.mark.parametrize("window", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rung", ["rung0", "rung2", "rung6"])
def test_rounded_reads_are_the_same_for_calls_and_replays_and_as_near_as_is_said(rung, dtype, window, replays):
    """Over a whole generation of tokens that are given: five chunks, four windows, rows of different lengths.

    Attention to several keys and updates round differently in calls and replays, and now and then a query to the next
    bfloat16. Before that they are the same.
    """
    ids, mask = prompts([tokens(1, n, seed=n)[0] for n in (17, 1, 9)])
    more, found = tokens(len(ROWS), NEW, seed=9), {}
    for rounds, on in ((None, True), ("bfloat16", True), ("bfloat16", False)):
        replays(on)
        model = rounding(small_model(LADDER[rung], hidden_size=128, window_size=window).to(dtype), rounds)
        with torch.no_grad():
            cache = cache_of(model(ids, attention_mask=mask, use_cache=True))
            logits = torch.cat([model(part, cache=cache).logits for part in more.split(1, 1)], 1).double()
        assert is_replayed(cache) == on
        found[rounds, on] = logits, cache
    (exact, plain), (mine, replayed), (called, other) = found.values()
    assert window > 1 or torch.equal(mine[:, :7], called[:, :7])
    assert error(mine, called) < 0.02
    assert not torch.equal(mine, exact)
    # rows of rung 2 share the matrices that nothing updates
    shared = {name for name, x in replayed.states[0].fast.tensors.items() if x.stride(0) == 0}
    assert shared == ({"weights.gate", "weights.up"} if rung == "rung2" else set())
    # what later layers write depends on what the first reads, which itself writes as it did
    for name, x in plain.states[0].fast.tensors.items():
        assert torch.equal(x, replayed.states[0].fast.tensors[name]), name
    assert replayed.states[0].seen == other.states[0].seen == tuple(n + NEW for n in (17, 1, 9))
    wrong = (mine - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert wrong.max() < 0.05
    # and beside the definition, in float64 and in one pass
    fields = {"hidden_size": 128, "window_size": window, "ttt_form": "recurrent"}
    definition = small_model(LADDER[rung], **fields).to(dtype).double()
    with torch.no_grad():
        every, kept = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
        defined = definition(every, attention_mask=kept, use_cache=False).logits[:, -NEW:]
    far, farther = error(exact, defined), error(mine, defined)
    assert farther < (1.15 * far if dtype == torch.bfloat16 else 2**-7)


def test_states_that_are_not_float32_are_read_as_they_are(replays):
    model, ids = small_model().double(), tokens(2, 9)
    expected = generate(model, ids, max_new_tokens=12)
    found = generate(rounding(model), ids, max_new_tokens=12)
    assert is_replayed(cache_of(found))
    assert_same(cache_of(found), cache_of(expected), 0)


def test_what_decoding_reads_may_be_changed_between_tokens(replays):
    model, found = small_model(LADDER["rung2"]), []
    for on in (True, False):
        replays(on)
        with torch.no_grad():
            cache, logits = cache_of(model(tokens(2, 13), use_cache=True)), []
            for dtype in ("bfloat16", None, "bfloat16", None):
                rounding(model, dtype)
                logits += [model(part, cache=cache).logits for part in tokens(2, 3, seed=8).split(1, 1)]
                assert is_replayed(cache) == on
        found.append((torch.cat(logits, 1), cache))
    # rounded reads rarely differ by more; reads of the other kind would differ from the first on
    torch.testing.assert_close(found[0][0][:, :6], found[1][0][:, :6], rtol=0, atol=1e-5)
    assert error(found[0][0], found[1][0]) < 0.02
    assert_same(*(cache for _, cache in found), tolerance=0.02)


def test_rows_that_differ_in_what_nothing_updates_are_called(replays, caplog):
    model, token = rounding(small_model(LADDER["rung2"])), tokens(2, 1, seed=8)
    with torch.no_grad(), caplog.at_level(logging.INFO, "kvbind"):
        cache = cache_of(model(tokens(2, 9), use_cache=True))
        states = cache.states
        for place, state in enumerate(states):
            fast = state.pending.state
            gate = fast.tensors["weights.gate"] * torch.tensor([1.0, 2.0])[:, None, None, None]
            fast = replace(fast, tensors={**fast.tensors, "weights.gate": gate})
            states[place] = replace(state, pending=pending.PendingState.of(fast))
        other = copy.deepcopy(cache)
        mine = model(token, cache=cache).logits
        assert cache.rows is None
        assert "'weights.gate' must be the same for all rows" in caplog.text
        exact = model(token, cache=other, use_cache=False).logits
    assert 0 < error(mine, exact) < 0.05


def hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)


def own_forward(model):
    attn = model.model.layers[0].attn
    attn.forward = lambda *args, forward=attn.forward: forward(*args)


def other_loop(model):
    model.model.layers[1].inner = model.model.layers[1].inner.replace(direction="ascent")


def token_visibility(model):
    for layer in model.model.layers:
        layer.inner = kvbind.systems.linear_attention(chunk=8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "model.layers.1.mlp has a hook"),
        (own_forward, "model.layers.0.attn has a hook or another forward"),
        (other_loop, "layers have different inner loops"),
        (token_visibility, "visibility='token'"),
    ],
)
def test_what_cannot_be_captured_is_called_and_said_once(change, reason, replays, caplog):
    model = small_model(LADDER["rung6"]).double()
    ids, mask = prompts()
    change(model)
    with caplog.at_level(logging.INFO, "kvbind"):
        got = generate(model, ids, attention_mask=mask)
        again = generate(model, ids, attention_mask=mask)
    assert cache_of(got).rows is None
    assert caplog.text.count(reason) == 1
    assert torch.equal(got.sequences, again.sequences)
    assert torch.equal(got.sequences, generate(model, ids, attention_mask=mask, use_cache=False).sequences)


def test_a_capture_that_fails_loses_nothing(replays, monkeypatch, caplog):
    def refuse(work, *_):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = small_model().double()
    ids, mask = prompts()
    expected = generate(model, ids, attention_mask=mask, use_cache=False).sequences
    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    with caplog.at_level(logging.INFO, "kvbind"):
        got = generate(model, ids, attention_mask=mask)
    assert torch.equal(got.sequences, expected)
    assert caplog.text.count("not permitted") == 1
    replays(False)
    assert_same(cache_of(got), cache_of(generate(model, ids, attention_mask=mask)))


def test_calls_that_want_more_than_logits_are_not_replayed(replays, caplog):
    model = small_model().double()
    cache, other = started(model)
    token = tokens(3, 1, seed=8)
    with torch.no_grad():
        assert len(model(token, cache=cache, output_hidden_states=True).hidden_states) == 3
        assert model(token, cache=cache, labels=token).loss is not None
        model(token.repeat(1, 2), cache=other)
    assert_same(cache, other)
    with caplog.at_level(logging.INFO, "kvbind"):
        model(token, cache=cache).logits.sum().backward()
    assert "gradients are on" in caplog.text
    assert model.lm_head.weight.grad is not None


def test_returned_logits_stay_what_they_are(replays):
    model = small_model().double()
    cache, _ = started(model)
    with torch.no_grad():
        first = model(tokens(3, 1, seed=8), cache=cache)
        before = first.logits.clone()
        model(tokens(3, 1, seed=9), cache=cache)
    assert torch.equal(first.logits, before)
    assert getattr(first, CACHE) is cache
