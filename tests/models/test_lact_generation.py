"""Generation with a cache of constant size: it says what one forward pass over everything says."""

import copy

import pytest
import torch
from lact_small import LADDER, cache_of, small_model, tokens, word_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, pipeline

import kvbind
from kvbind.models import LactCache
from kvbind.models.lact.cache import CACHE

LENGTH = 37
"""Tokens of a sequence: four chunks of 8 and a rest; nearly four windows of 10."""

SYSTEMS = {**LADDER, "Titans": kvbind.systems.titans(chunk=8), "DeltaNet": kvbind.systems.delta_net(chunk=1)}


def generate(model, ids, **options):
    return model.generate(ids, **{"do_sample": False, "max_new_tokens": 20, **options})


def in_pieces(model, ids, sizes):
    cache, outputs = LactCache(), []
    with torch.no_grad():
        for part in ids.split(sizes, dim=1):
            outputs.append(model(part, cache=cache).logits)
    return torch.cat(outputs, dim=1), cache


@pytest.mark.parametrize("name", SYSTEMS)
def test_token_by_token_equals_one_pass(name):
    model = small_model(SYSTEMS[name], initializer_range=0.02)
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    got, _ = in_pieces(model, ids, [1] * LENGTH)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    # in double precision there is no rounding to hide behind
    model.double()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    got, _ = in_pieces(model, ids, [1] * LENGTH)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [[LENGTH], [5, 32], [8, 8, 8, 13], [16, 1, 1, 19], [30, 3, 4]])
@pytest.mark.parametrize("rung", ["rung0", "rung2", "rung6"])
def test_prefill_in_any_pieces_equals_one_pass(rung, sizes):
    model = small_model(LADDER[rung]).double()
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    got, cache = in_pieces(model, ids, sizes)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert cache.get_seq_length() == LENGTH
    assert cache.seen == (LENGTH, LENGTH)


@pytest.mark.parametrize("chunk", [3, 10, 64])
def test_chunks_of_another_length_than_the_window_decode_alike(chunk):
    model = small_model(LADDER["rung0"].replace(chunk=chunk)).double()
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    got, _ = in_pieces(model, ids, [2] * 18 + [1])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_window_of_one_token_keeps_no_keys():
    model = small_model(window_size=1).double()
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    got, cache = in_pieces(model, ids, [1] * LENGTH)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert cache.states[0].cache.keys.shape[1] == 0


def padded(rows, side="left"):
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


ROWS = [tokens(1, n, seed=n)[0] for n in (23, 4, 16)]


@pytest.mark.parametrize("rung", LADDER)
def test_greedy_generation_equals_that_without_a_cache(rung):
    model = small_model(LADDER[rung]).double()
    ids, mask = padded(ROWS)
    got = generate(model, ids, attention_mask=mask)
    assert torch.equal(got, generate(model, ids, attention_mask=mask, use_cache=False))
    for i, row in enumerate(ROWS):
        alone = generate(model, row[None])
        assert torch.equal(got[i, ids.shape[1] :], alone[0, len(row) :])


def test_prompts_with_holes_generate_as_without():
    model = small_model(LADDER["rung2"]).double()
    rows = [tokens(1, n, seed=n)[0] for n in (9, 12)]
    ids, mask = padded([torch.cat((rows[0][:4], tokens(1, 3)[0], rows[0][4:])), rows[1]])
    mask[0, 4:7] = 0
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        found = generate(model, ids, attention_mask=mask, max_new_tokens=6, **options)
        for i, row in enumerate(rows):
            alone = generate(model, row[None], max_new_tokens=6, **options)
            assert torch.equal(found[i, ids.shape[1] :], alone[0, len(row) :])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["mask", "padding token"])
def test_prompts_padded_on_the_right_are_refused_by_the_name_of_the_setting(given, use_cache):
    model = small_model(LADDER["rung2"])
    ids, mask = padded(ROWS, "right")
    with pytest.raises(ValueError, match="padding_side='left'"):
        generate(model, ids, use_cache=use_cache, **({"attention_mask": mask} if given else {}))
    with pytest.raises(ValueError, match="padding_side='left'"):
        generate(model, ids[1:2], attention_mask=mask[1:2], use_cache=use_cache)


def test_generation_reads_each_token_once():
    model = small_model()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generate(model, tokens(1, 13), max_new_tokens=5)
    assert lengths == [13, 1, 1, 1, 1]


@pytest.mark.parametrize("rung", ["rung0", "rung6"])
def test_beam_search_equals_that_without_a_cache(rung):
    model = small_model(LADDER[rung]).double()
    ids, mask = padded(ROWS)
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    got = generate(model, ids, **options)
    assert torch.equal(got, generate(model, ids, use_cache=False, **options))
    assert not torch.equal(got[::2], generate(model, ids, attention_mask=mask))


def test_sampling_equals_that_without_a_cache():
    model = small_model().double()
    ids, mask = padded(ROWS)
    options = {"attention_mask": mask, "do_sample": True, "top_k": 0, "num_return_sequences": 2}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(generate(model, ids, use_cache=use_cache, **options))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("whole", [True, False], ids=["all tokens again", "new tokens alone"])
def test_a_cache_passed_on_continues_the_conversation(whole):
    model = small_model().double()
    ids, mask = padded(ROWS)
    first = generate(model, ids, attention_mask=mask, max_new_tokens=9, return_dict_in_generate=True)
    # the last generated token is not in the cache; the second turn adds rows of different lengths, padded on the left
    more, more_mask = padded([tokens(1, n, seed=90 + n)[0] for n in (3, 6, 1)])
    conversation = torch.cat([first.sequences, more], dim=1)
    conversation_mask = torch.cat([mask, torch.ones(3, 9, dtype=torch.long), more_mask], dim=1)
    expected = generate(model, conversation, attention_mask=conversation_mask)
    assert cache_of(first).get_seq_length() == first.sequences.shape[1] - 1
    given = conversation if whole else conversation[:, first.sequences.shape[1] - 1 :]
    got = generate(model, given, attention_mask=conversation_mask, **{CACHE: cache_of(first)})
    assert torch.equal(got[:, -20:], expected[:, -20:])


@pytest.mark.parametrize("size", [1, 5, 8])
def test_prefill_chunking_of_generate_changes_nothing(size):
    model = small_model().double()
    ids, mask = padded(ROWS)
    got = generate(model, ids, attention_mask=mask, prefill_chunk_size=size)
    assert torch.equal(got, generate(model, ids, attention_mask=mask))


def test_reordered_caches_continue_the_chosen_sequences():
    model = small_model().double()
    ids, mask = padded(ROWS)
    chosen = torch.tensor([2, 0, 0, 1])
    more = tokens(4, 12, seed=5)
    cache = LactCache()
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        cache.reorder_cache(chosen)
        got = model(more, attention_mask=torch.cat([mask[chosen], torch.ones(4, 12)], 1), cache=cache).logits
        for i, source in enumerate(chosen.tolist()):
            sequence = torch.cat([ROWS[source], more[i]])[None]
            torch.testing.assert_close(got[i], model(sequence).logits[0, -12:], rtol=0, atol=1e-10)
    assert cache.seen == (28, 35, 35, 16)
    repeated = LactCache()
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=repeated)
    repeated.batch_repeat_interleave(2)
    assert repeated.seen == (23, 23, 4, 4, 16, 16)
    assert repeated.batch_size == 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prefill_leaves_the_state_of_each_row_alone(side):
    model = small_model().double()
    ids, mask = padded(ROWS, side)
    together = cache_of(model(ids, attention_mask=mask))
    for i, row in enumerate(ROWS):
        alone = cache_of(model(row[None]))
        for one, other in zip(together.states, alone.states, strict=True):
            mine = one.select(torch.tensor([i]))
            assert mine.seen == other.seen
            assert mine.fast.pending_lengths == other.fast.pending_lengths
            for name, x in other.fast.tensors.items():
                torch.testing.assert_close(mine.fast.tensors[name], x, rtol=0, atol=1e-10)
            held = other.cache.held[0]
            assert mine.cache.held == (held,)
            torch.testing.assert_close(mine.cache.keys[:, -held:], other.cache.keys[:, -held:], rtol=0, atol=1e-10)


def test_the_cache_is_as_large_after_a_long_prompt_as_after_a_short_one():
    model = small_model()
    sizes = []
    for length in (16, 160, 643, 647):
        with torch.no_grad():
            sizes.append(cache_of(model(tokens(1, length), use_cache=True)).nbytes)
    assert len(set(sizes)) == 1
    assert sizes[0] == 2 * (6 * 2048 + 3 * 128 + 896 + 4 * 56 + 2 * 1152)


def test_a_copied_cache_is_a_fork():
    model = small_model().double()
    prompt, one, other = tokens(1, 21), tokens(1, 9, seed=1), tokens(1, 9, seed=2)
    with torch.no_grad():
        cache = cache_of(model(prompt))
        fork = copy.deepcopy(cache)
        model(one, cache=cache)
        got = model(other, cache=fork).logits
        torch.testing.assert_close(got, model(torch.cat([prompt, other], 1)).logits[:, 21:], rtol=0, atol=1e-10)


def test_a_cache_can_be_read_without_being_advanced():
    model = small_model()
    with torch.no_grad():
        cache = cache_of(model(tokens(1, 21)))
        first = model(tokens(1, 4, seed=1), cache=cache, use_cache=False).logits
        assert cache.get_seq_length() == 21
        assert torch.equal(model(tokens(1, 4, seed=1), cache=cache).logits, first)
    assert cache.get_seq_length() == 25
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (0, -1, 0)


def test_cropping_is_refused():
    model = small_model()
    cache = cache_of(model(tokens(1, 21)))
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, tokens(1, 9), assistant_model=small_model(LADDER["rung6"]))


def test_what_does_not_fit_a_cache_raises():
    model = small_model()
    cache = cache_of(model(tokens(2, 21)))
    with pytest.raises(ValueError, match="past_key_values must hold 1 sequences"):
        model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(tokens(2, 3), cache=cache, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="position_ids must go on"):
        model(tokens(2, 3), cache=cache, position_ids=torch.arange(3)[None])
    with pytest.raises(TypeError, match="LactCache"):
        model(tokens(2, 3), cache=DynamicCache())
    with pytest.raises(ValueError, match="advance"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, tokens(1, 9), cache_implementation="static")
    for layer in model.model.layers:
        layer.inner = layer.inner.replace(direction="ascent")
    with pytest.raises(ValueError, match="its spec differs in direction"):
        model(tokens(2, 3), cache=cache)


def test_a_text_pipeline_generates_from_a_saved_model(tmp_path):
    tokenizer = word_tokenizer()
    model = small_model(vocab_size=27)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    got = run(["a b c d e f g h i j", "k"], batch_size=2, max_new_tokens=12, do_sample=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt, output in zip(["a b c d e f g h i j", "k"], got, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = tokenizer.decode(generate(again, ids, max_new_tokens=12)[0], skip_special_tokens=True)
        assert output[0]["generated_text"].replace(" ", "") == expected.replace(" ", "")
