"""In-Place TTT around models of transformers: what it computes, trains, generates, saves and refuses."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_place_reference import (
    CHUNK,
    LR,
    VOCAB,
    padded,
    plain,
    reference_logits,
    reference_of,
    small,
    tokens,
    trained,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GemmaConfig,
    MistralConfig,
    Phi3Config,
    SeedOssConfig,
    StableLmConfig,
)

import kvbind
from checkpointing import enable_checkpointing
from kvbind.cli import main
from kvbind.layers.in_place.layer import InPlaceMLP
from kvbind.models import InPlaceCache, InPlaceConfig, InPlaceForCausalLM
from kvbind.models.in_place import in_place
from kvbind.models.lact.cache import CACHE
from kvbind.screen import visible
from kvbind.tasks.tokenizers import Bytes

LENGTH = 3 * CHUNK + 3
KINDS = ("llama", "qwen3")


def close(got, expected, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def grown(model, ids, mask, positions, splits, cache=None):
    """Logits of a batch read in pieces of the given numbers of columns, and the cache at the end."""
    outputs, start = [], 0
    for size in splits:
        stop = start + size
        output = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop], use_cache=True,
            **({} if cache is None else {CACHE: cache}),
        )  # fmt: skip
        cache = output[CACHE]
        outputs.append(output.logits)
        start = stop
    return torch.cat(outputs, dim=1), cache


# at the start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_models_own_at_the_start(kind, dtype):
    base = plain(kind).to(dtype)
    ids = torch.stack(tokens(LENGTH, LENGTH))
    with torch.no_grad():
        expected = base(ids).logits
        model = InPlaceForCausalLM.from_base(base, layers=2, chunk=CHUNK)
        assert torch.equal(model(ids).logits, expected)
    assert [mlp.layer for mlp in model.fast_mlps] == [0, 2]
    assert {p.dtype for p in model.parameters()} == {dtype}
    diagonal = model.fast_mlps[0].ttt_proj.weight.diagonal()
    assert torch.equal(torch.diag(diagonal), model.fast_mlps[0].ttt_proj.weight)
    assert 0 < diagonal.float().std() < 0.04


@pytest.mark.parametrize(
    ("config", "fields"),
    [(GemmaConfig, {"hidden_act": "gelu_pytorch_tanh"}), (MistralConfig, {"sliding_window": 4})],
    ids=["Gemma", "Mistral"],
)
def test_other_activations_and_windows_are_the_models_own(config, fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": None, "pad_token_id": 0}
    base = AutoModelForCausalLM.from_config(config(**sizes, **heads, **fields)).eval()
    ids = torch.stack(tokens(LENGTH, LENGTH))
    with torch.no_grad():
        expected = base(ids).logits
        model = InPlaceForCausalLM.from_base(base, layers=1, chunk=CHUNK)
        assert torch.equal(model(ids).logits, expected)
        model = model.double()
        for mlp in model.fast_mlps:
            mlp.ttt_conv.weight.normal_()
            mlp.ttt_proj.weight.normal_()
        whole = model(ids, use_cache=False).logits
        assert (whole - expected).abs().max() > 1e-3
        close(grown(model, ids, torch.ones_like(ids), torch.arange(LENGTH).expand(2, -1), [1] * LENGTH)[0], whole)


def test_new_parameters_start_alike_however_a_model_is_made():
    config = InPlaceConfig(text_config=plain().config, layers=[1], chunk=CHUNK)
    for model in (InPlaceForCausalLM(config), AutoModelForCausalLM.from_config(config)):
        (mlp,) = model.fast_mlps
        assert mlp.layer == 1
        assert not mlp.ttt_conv.weight.any()
        assert mlp.ttt_proj.weight.diagonal().all()


def test_no_parameter_of_the_base_is_copied_or_drawn_anew():
    base = plain()
    # what is not of transformers' own making has no mark that it is finished
    base.lm_head = torch.nn.Linear(16, VOCAB, bias=False)
    held = {name: (p, p.detach().clone()) for name, p in base.named_parameters()}
    model = InPlaceForCausalLM.from_base(base, layers=1, chunk=CHUNK)
    found = dict(model.base.named_parameters())
    for name, (parameter, before) in held.items():
        assert found[name] is parameter
        assert torch.equal(parameter, before)
    assert model.fast_mlps[0].start_weights()["out"].data_ptr() == base.model.layers[0].mlp.down_proj.weight.data_ptr()


# the definition


@pytest.mark.parametrize(
    "options",
    [{}, {"values": "embeddings"}, {"projection": False}, {"conv_width": 3}, {"ttt_form": "recurrent"}],
    ids=["hidden", "embeddings", "no projection", "narrow", "recurrent"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_definitions(kind, options):
    model = small(kind, **options)
    rows = tokens(LENGTH, LENGTH)
    reference = reference_of(model)
    weights = torch.randn(2, LENGTH, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    output = model(torch.stack(rows), use_cache=False).logits
    expected = torch.stack([reference_logits(model, reference, row) for row in rows])
    close(output, expected)
    with torch.no_grad():
        assert (output - plain(kind).double()(torch.stack(rows)).logits).abs().max() > 1e-2

    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    got = {name: p.grad for name, p in model.base.named_parameters()}
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        close(gradient, wanted[name], atol=1e-9)
        assert gradient.any()


def test_a_layer_is_one_call_of_ttt_on_its_own_weights():
    mlp = small().fast_mlps[0]
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    call = mlp.inner_call(x)
    assert call.inner == kvbind.systems.in_place_ttt(CHUNK) == mlp.inner
    assert kvbind.explain(call.inner).parallel
    expected, _ = call.run()
    reference = torch.stack([_reference_mlp(mlp).row(row, row) for row in x])
    close(expected.squeeze(2), reference)
    close(call.linearize().output().squeeze(2), reference)


def test_a_layer_in_a_model_of_ones_own_reads_sequences_from_their_start():
    model = trained(plain())
    mlp = model.fast_mlps[1]
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    source = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for values in (x, source):
        got, expected = mlp.from_start(x, values), mlp.inner_call(x, values).run()[0].squeeze(2)
        close(got, expected)
        close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)), atol=1e-8)
    with pytest.raises(RuntimeError, match=r"from_start"):
        mlp(x)
    with pytest.raises(ValueError, match=r"x must be \[B, T, 16\] with at least one sequence; got shape \[33, 16\]"):
        mlp.from_start(torch.zeros(33, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"source must have the shape of x"):
        mlp.from_start(x, source[:, 1:])


def _reference_mlp(mlp):
    from in_place_reference import ReferenceMLP

    return ReferenceMLP(mlp, CHUNK, LR)


@pytest.mark.parametrize("length", [40, 41])
def test_many_chunks_are_run_in_spans_where_no_gradient_is_wanted(length):
    model = small(chunk=2)
    rows = tokens(length, length)
    reference = reference_of(model)
    with torch.no_grad():
        output = model(torch.stack(rows), use_cache=True)
        close(output.logits, torch.stack([reference_logits(model, reference, row) for row in rows]))
        more = model(torch.stack(rows)[:, :1], **{CACHE: output[CACHE]}).logits
        expected = [reference_logits(model, reference, torch.cat([row, row[:1]]))[-1:] for row in rows]
        close(more, torch.stack(expected))


# padding and packing


@pytest.mark.parametrize("values", ["hidden", "embeddings"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_writes_nothing(side, values):
    model = small(values=values)
    rows = tokens(LENGTH, 2, CHUNK + 1, 2 * CHUNK)
    ids, mask, positions = padded(rows, side)
    reference = reference_of(model)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    expected = torch.cat([reference_logits(model, reference, row) for row in rows])
    close(output[mask.bool()], expected)
    output[mask.bool()].square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in reference.named_parameters():
        close(model.base.get_parameter(name).grad, parameter.grad, atol=1e-8)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 3 * CHUNK + 2), min_size=2, max_size=3),
    data=st.data(),
    values=st.sampled_from(["hidden", "embeddings"]),
)
def test_a_batch_read_in_any_pieces_says_what_each_row_says_alone(lengths, data, values):
    """Rows of any lengths with padding anywhere, cut anywhere."""
    model = MODELS[values]
    columns = max(lengths) + data.draw(st.integers(0, 3))
    rows = tokens(*lengths)
    ids = torch.zeros(len(rows), columns, dtype=torch.long)
    for out, row in zip(ids, rows, strict=True):
        out[sorted(data.draw(st.permutations(range(columns)))[: len(row)])] = row
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cuts = sorted(data.draw(st.sets(st.integers(1, columns - 1), max_size=4))) if columns > 1 else []
    splits = [b - a for a, b in zip([0, *cuts], [*cuts, columns], strict=True)]
    with torch.no_grad():
        output, cache = grown(model, ids, mask, positions, splits)
        expected = torch.cat([reference_logits(model, REFERENCES[values], row) for row in rows])
    close(output[mask.bool()], expected)
    assert cache.seen == tuple(lengths)


MODELS = {values: small(values=values) for values in ("hidden", "embeddings")}
REFERENCES = {values: reference_of(model) for values, model in MODELS.items()}


@pytest.mark.parametrize("values", ["hidden", "embeddings"])
def test_packed_documents_are_documents_of_their_own(values):
    model = MODELS[values]
    rows = tokens(2 * CHUNK + 1, 3, CHUNK, 1, CHUNK + 3)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        output = model(torch.cat(rows)[None], position_ids=positions).logits
        expected = torch.cat([reference_logits(model, REFERENCES[values], row) for row in rows])
        close(output[0], expected)
        ends = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()], dtype=torch.int32)
        close(model(torch.cat(rows)[None], position_ids=positions, cu_seq_lens_q=ends).logits[0], expected)
        short = torch.cat(rows)[None, -4:]
        close(model(short, position_ids=torch.tensor([[0, 1, 0, 1]])).logits[0, :2], model(short[:, :2]).logits[0])
    with pytest.raises(ValueError, match="cu_seq_lens_q must be None beside an attention_mask"):
        model(torch.cat(rows)[None], attention_mask=torch.ones_like(positions), cu_seq_lens_q=ends)
    with pytest.raises(ValueError, match="use_cache must be False for packed documents"):
        model(torch.cat(rows)[None], position_ids=positions, use_cache=True)


# generation

PROMPTS = tokens(CHUNK + 3, 2, 2 * CHUNK - 1, seed=7)
NEW = 3 * CHUNK + 1


def continued(model, reference, row, count):
    """Greedy continuation of one row, everything computed anew for every token."""
    for _ in range(count):
        row = torch.cat([row, reference_logits(model, reference, row)[-1].argmax()[None]])
    return row


@pytest.mark.parametrize("values", ["hidden", "embeddings"])
def test_a_batch_generates_what_full_recomputation_says_of_each_row(values):
    model = MODELS[values]
    ids, mask, _ = padded(PROMPTS, "left")
    with torch.no_grad():
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
        for row, prompt in zip(output, PROMPTS, strict=True):
            expected = continued(model, REFERENCES[values], prompt, NEW)
            assert torch.equal(row[-len(expected) :], expected)
    # each crosses at least three ends of chunks while decoding
    assert all((len(prompt) + NEW) // CHUNK - len(prompt) // CHUNK >= 3 for prompt in PROMPTS)
    # and the tokens follow from what was written: another model says something else
    other = model.generate(ids[:1, -len(PROMPTS[0]) :], do_sample=False, max_new_tokens=NEW)
    assert torch.equal(other[0], output[0, -len(other[0]) :])
    bare = reference_of(model)
    for i in model.config.fast_layers:
        torch.nn.init.zeros_(bare.model.layers[i].mlp.ttt_conv.weight)
    assert not torch.equal(continued(model, bare, PROMPTS[0], NEW), other[0])


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "temperature": 2.0}, {"num_beams": 3, "do_sample": False, "num_return_sequences": 2}],
    ids=["sampling", "beams"],
)
def test_generation_with_a_cache_is_that_without(options):
    model = MODELS["hidden"]
    ids, mask, _ = padded(PROMPTS, "left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=NEW, use_cache=use_cache, **options))
    assert torch.equal(*found)
    assert len({tuple(row.tolist()) for row in found[0]}) == len(found[0])


def test_generation_goes_on_from_the_cache_it_returns():
    model = MODELS["hidden"]
    ids = torch.stack(tokens(CHUNK + 2, CHUNK + 2))
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=CHUNK, **options)
    cache = first[CACHE]
    assert isinstance(cache, InPlaceCache)
    whole = torch.ones_like(first.sequences)
    second = model.generate(first.sequences, attention_mask=whole, max_new_tokens=CHUNK, **{CACHE: cache}, **options)
    assert torch.equal(second.sequences, model.generate(ids, do_sample=False, max_new_tokens=2 * CHUNK))


def test_decoding_goes_on_behind_prompts_that_end_in_padding():
    model, reference = MODELS["hidden"], REFERENCES["hidden"]
    prompts, more = tokens(CHUNK + 2, CHUNK - 2), tokens(CHUNK, CHUNK, seed=9)
    ids, mask, positions = padded(prompts, "right")
    ids = torch.cat([ids, torch.stack(more)], dim=1)
    mask = torch.cat([mask, torch.ones_like(ids[:, mask.shape[1] :])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output, _ = grown(model, ids, mask, positions, [CHUNK + 2] + [1] * CHUNK)
        for row, prompt, rest in zip(output, prompts, more, strict=True):
            expected = reference_logits(model, reference, torch.cat([prompt, rest]))
            close(row[-CHUNK:], expected[-CHUNK:])
    with pytest.raises(ValueError, match="attention_mask must not end in padding"):
        model.generate(ids[:, : CHUNK + 2], attention_mask=mask[:, : CHUNK + 2], max_new_tokens=1)


def test_a_cache_selects_repeats_copies_and_forgets():
    model = MODELS["hidden"]
    ids, mask, positions = padded(tokens(LENGTH, CHUNK + 1), "left")
    with torch.no_grad():
        whole, _ = grown(model, ids, mask, positions, [LENGTH])
        _, cache = grown(model, ids, mask, positions, [LENGTH - 4])
        before = copy.deepcopy(cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        flipped = [x.flip(0) for x in (ids, mask, positions)]
        rest = model(flipped[0][:, -4:], attention_mask=flipped[1], position_ids=flipped[2][:, -4:], **{CACHE: cache}).logits
        close(rest, whole.flip(0)[:, -4:])
        # what was copied before has not moved
        rest = model(ids[:, -4:], attention_mask=mask, position_ids=positions[:, -4:], **{CACHE: before}).logits
        close(rest, whole[:, -4:])
        cache.reset()
        close(grown(model, ids, mask, positions, [LENGTH], cache)[0], whole)
    assert all(state.written.dtype == torch.float64 for state in cache.states.values())
    assert not cache.is_croppable
    assert not cache.is_compileable
    with pytest.raises(ValueError, match="InPlaceCache cannot be cropped"):
        cache.crop(1)


def test_pending_tokens_do_not_outgrow_a_chunk():
    model = small(chunk=200)
    ids = torch.stack(tokens(150, 150))
    with torch.no_grad():
        _, cache = grown(model, ids, torch.ones_like(ids), torch.arange(150).expand(2, -1), [1] * 150)
    (features, source) = cache.states[0].pending.joined()
    assert features.shape == (2, 150, 24)
    assert source.shape == (2, 150, 16)
    assert len(cache.states[0].pending.pieces) < 70
    assert cache.states[0].written is None


# training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("values", ["hidden", "embeddings"])
def test_recomputed_layers_have_the_same_gradients(values, reentrant):
    rows = [padded(tokens(LENGTH, CHUNK + 2, seed=seed), "left") for seed in (0, 1)]
    found = []
    for recompute in (False, True):
        model = small(values=values).train()
        if recompute:
            enable_checkpointing(model, use_reentrant=reentrant)
        if recompute and reentrant and values == "embeddings":
            with pytest.raises(ValueError, match="use_reentrant=False where values are made of embeddings"):
                model(rows[0][0])
            return
        # two calls before one backward pass: each is recomputed as what it was
        losses = [model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss for ids, mask, _ in rows]
        sum(losses).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        close(found[1][name], gradient, atol=1e-12)


def test_training_in_low_precision_keeps_the_fast_state_in_float32():
    exact = small().train()
    ids = torch.stack(tokens(LENGTH, LENGTH))
    exact(ids, labels=ids).loss.backward()
    for mode in ("autocast", "bfloat16"):
        model = copy.deepcopy(exact).to(torch.bfloat16 if mode == "bfloat16" else torch.float32)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            model(ids, labels=ids).loss.backward()
            with torch.no_grad():
                _, cache = grown(
                    model.eval(), ids, torch.ones_like(ids), torch.arange(LENGTH).expand(2, -1), [7, 1, 1, 1, 8]
                )
        for state in cache.states.values():
            assert state.written.dtype == torch.float32
            assert state.pending.joined()[0].dtype == torch.bfloat16
        for name, parameter in exact.named_parameters():
            if "ttt_" in name:
                got, wanted = model.get_parameter(name).grad.double(), parameter.grad
                assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.95


def test_a_frozen_base_stays_and_the_rest_learns():
    model = InPlaceForCausalLM.from_base(plain(), layers=1, chunk=CHUNK, lr=LR, freeze_base=True).double().train()
    free = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(free) == 6
    assert all("ttt_conv" in name or "ttt_proj" in name for name in free)
    ids = torch.stack(tokens(LENGTH, LENGTH))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_gradients_reach_through_a_cache():
    model = small().train()
    ids = torch.stack(tokens(LENGTH, LENGTH))
    positions = torch.arange(LENGTH).expand(2, -1)
    model(ids, use_cache=False).logits.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    grown(model, ids, torch.ones_like(ids), positions, [4, 4, 1, 9])[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], atol=1e-8)


# what PEFT asks of transformers by a deprecated name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_peft_count():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"], modules_to_save=["ttt_conv", "ttt_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(small(), config)
    ids, mask, positions = padded(tokens(LENGTH, CHUNK + 2), "left")
    options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    output = model(ids, **options).logits
    output.square().sum().backward()
    trainable = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("down_proj.lora_A" in name for name in trainable)
    assert any("ttt_conv" in name for name in trainable)
    assert all(gradient is not None and gradient.any() for gradient in trainable.values())
    with torch.no_grad():
        close(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=CHUNK, do_sample=False), model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=CHUNK, do_sample=False, use_cache=False))  # fmt: skip
        merged = model.merge_and_unload()
        close(merged(ids, **options).logits, output, atol=1e-8)
        reference = reference_of(merged)
        expected = torch.cat(
            [reference_logits(merged, reference, row[keep.bool()]) for row, keep in zip(ids, mask, strict=True)]
        )
        close(output[mask.bool()], expected, atol=1e-8)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(small(), peft.LoraConfig(target_modules=["ttt_proj"]))


def test_hooks_on_the_mlps_layers_are_called_once_for_every_token():
    model, seen = small(), []
    mlp = model.fast_mlps[0]
    handles = [
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        for layer in (mlp.gate_proj, mlp.down_proj)
    ]
    ids = torch.stack(tokens(LENGTH, LENGTH))
    with torch.no_grad():
        grown(model, ids, torch.ones_like(ids), torch.arange(LENGTH).expand(2, -1), [CHUNK - 1, 1, LENGTH - CHUNK])
    assert seen == [CHUNK - 1, CHUNK - 1, 1, 1, LENGTH - CHUNK, LENGTH - CHUNK]
    for handle in handles:
        handle.remove()


def test_a_copied_model_is_one_of_its_own():
    model = small()
    other = copy.deepcopy(model)
    ids = torch.stack(tokens(LENGTH))
    with torch.no_grad():
        expected = model(ids).logits
        for mlp in model.fast_mlps:
            mlp.ttt_conv.weight.zero_()
        close(other(ids).logits, expected, atol=0)
        assert (model(ids).logits - expected).abs().max() > 1e-3


# files


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back(tmp_path, kind, fields):
    model = trained(plain(kind, **fields), values="embeddings", conv_width=3)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path)
    ids = torch.stack(tokens(LENGTH))
    for found in (AutoModelForCausalLM.from_pretrained(tmp_path), InPlaceForCausalLM.from_pretrained(tmp_path)):
        assert type(found) is InPlaceForCausalLM
        assert found.dtype == torch.float64
        assert found.generation_config.repetition_penalty == 1.5
        close(found(ids).logits, model(ids).logits, atol=1e-12)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is InPlaceConfig
    assert (config.layers, config.chunk, config.lr, config.values, config.conv_width) == (2, CHUNK, LR, "embeddings", 3)
    assert type(config.text_config) is type(model.config.text_config)
    assert config.get_text_config().num_hidden_layers == 3
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["model_type"] == kind
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_released_checkpoints_have_these_names(tmp_path, kind):
    """Of ByteDance-Seed/In-Place-TTT: a Llama or Qwen3 with `ttt_` fields, and two more parameters in a fast MLP."""
    model = small(kind, values="embeddings")
    names = {name.removeprefix("base."): x.contiguous() for name, x in model.state_dict().items()}
    assert names["model.layers.0.mlp.ttt_conv.weight"].shape == (16, 1, 5)
    assert names["model.layers.2.mlp.ttt_proj.weight"].shape == (16, 16)
    save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = {
        **model.config.text_config.to_dict(),
        "ttt_mode": True,
        "ttt_layers": [0, 2, 6, 12],
        "ttt_lr": LR,
        "ttt_chunk": CHUNK,
        "ttt_target": "input_embed",
        "ttt_proj": True,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]],
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = InPlaceForCausalLM.from_released(str(tmp_path), dtype=torch.float64)
    assert found.config.fast_layers == (0, 2)
    ids = torch.stack(tokens(LENGTH))
    close(found(ids).logits, model(ids).logits)

    defaults = InPlaceConfig.from_released_config({"model_type": kind, "num_hidden_layers": 36, "ttt_layers": [0, 36]})
    assert (defaults.layers, defaults.chunk, defaults.lr, defaults.values) == ([0], 8192, 0.3, "hidden")
    for broken, message in (
        ({"model_type": kind}, "fields must be of a released In-Place TTT model"),
        ({"model_type": kind, "ttt_mode": False}, "ttt_mode must be true"),
        ({"model_type": kind, "ttt_target": "logits"}, "ttt_target must be"),
        ({"model_type": kind, "ttt_rank": 3}, "no ttt_ field but"),
        ({"ttt_mode": True}, "model_type of a model of transformers"),
    ):
        with pytest.raises(ValueError, match=message):
            InPlaceConfig.from_released_config(broken)


def test_saved_files_hold_every_parameter_once(tmp_path):
    model = trained(plain(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() == {name for name, _ in model.named_parameters()}


def test_the_command_makes_a_folder_of_a_folder(tmp_path, capsys):
    plain("qwen3").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    options = {"layers": "0,2", "chunk": "5", "values": "embeddings"}
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["in-place", str(tmp_path / "base"), str(tmp_path / "mine"), *(f"--{x}={y}" for x, y in options.items())])
    assert f"wrote {tmp_path / 'mine'}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert (model.config.layers, model.config.chunk, model.config.lr, model.config.values) == ([0, 2], 5, 3.0, "embeddings")
    ids = torch.stack(tokens(LENGTH))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    assert (tmp_path / "mine" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="has them already"):
        in_place(tmp_path / "mine", tmp_path / "again")
    (tmp_path / "lact").mkdir()
    (tmp_path / "lact" / "config.json").write_text('{"model_type": "lact_swiglu", "inner": {}}')
    with pytest.raises(ValueError, match="has fast weights beside its MLPs already"):
        in_place(tmp_path / "lact", tmp_path / "again")
    with pytest.raises(ValueError, match="target must be a folder apart"):
        in_place(tmp_path / "base", tmp_path / "base")
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields | {"ttt_layers": [1], "ttt_chunk": 4}))
    with pytest.raises(ValueError, match="lr must be left out"):
        in_place(tmp_path / "base", tmp_path / "again", lr=0.1)
    # with the new parameters missing, which then start as they do
    released = AutoModelForCausalLM.from_pretrained(in_place(tmp_path / "base", tmp_path / "again"))
    assert (released.config.fast_layers, released.config.chunk) == ((1,), 4)
    assert released.fast_mlps[0].ttt_proj.weight.diagonal().all()
    torch.testing.assert_close(released(ids).logits, expected)


def test_the_command_says_what_it_made_and_that_model_writes(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain("llama", vocab_size=256).save_pretrained("base")
    code, out, errors = run("in-place", "base", "mine", "--layers", "2", "--chunk", "5")
    assert (code, errors) == (0, "")
    assert out.splitlines() == [
        "wrote mine",
        "a llama of 3 layers; the MLPs of layers 0, 2 are fast weights (In-Place TTT), written every 5 tokens",
        'next: kvbind generate mine --prompt "The "',
        "in Python: kvbind.models.InPlaceForCausalLM.from_pretrained('mine'), to train it",
    ]
    Bytes().for_transformers().save_pretrained("mine")
    code, out, errors = run("generate", "mine", "--prompt", "The ", "--tokens", "12", "--seed", "3")
    assert (code, errors) == (0, "")
    assert out.startswith("The ")
    # what came before is read back as the model has it
    model = InPlaceForCausalLM.from_pretrained("mine")
    ids = torch.tensor([list(b"The ")])
    torch.manual_seed(3)
    written = model.generate(ids, max_new_tokens=12, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, pad_token_id=0,
                             eos_token_id=0)  # fmt: skip
    assert out == visible(Bytes().decode(written[0].tolist())) + "\n"


def test_folders_that_generate_cannot_read_say_what_can(tmp_path, run):
    plain("llama").save_pretrained(tmp_path / "base")
    code, _, errors = run("generate", str(tmp_path / "base"))
    assert code == 2
    assert "holds a 'llama' of transformers, of which kvbind in-place makes one with fast weights" in errors
    mine = in_place(tmp_path / "base", tmp_path / "mine", chunk=5)
    weights = load_file(mine / "model.safetensors")
    for change, message in (
        ({"base.model.norm.weight": None}, "missing ['base.model.norm.weight']"),
        ({"further": torch.zeros(1)}, "unexpected ['further']"),
        ({"base.model.norm.weight": torch.zeros(3)}, "those of its configuration; it is not"),
    ):
        changed = {name: x for name, x in (weights | change).items() if x is not None}
        save_file(changed, mine / "model.safetensors", metadata={"format": "pt"})
        code, _, errors = run("generate", str(mine), "--tokenizer", "bytes")
        assert code == 2
        assert message in errors
    code, _, errors = run("convert", str(mine), str(tmp_path / "other"))
    assert code == 2
    assert "kvbind in-place" in errors


def test_a_chunk_that_no_token_is_behind_is_said(caplog):
    InPlaceForCausalLM.from_base(plain("llama", max_position_embeddings=64), chunk=63)
    assert not caplog.records
    InPlaceForCausalLM.from_base(plain("llama", max_position_embeddings=64), chunk=64)
    assert "chunk is 64, and the model inside knows 64 positions: within those, no token reads an update" in caplog.text
    assert "a chunk of at most 16 would let some" in caplog.text


def test_the_documented_lines_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "in-place.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    monkeypatch.chdir(tmp_path)
    base = plain("qwen3")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: base)
    exec(compile(code, "in-place.md", "exec"), {"input_ids": torch.stack(tokens(LENGTH))})
    assert InPlaceForCausalLM.from_pretrained("mine").config.layers == 6


# what is refused


def test_models_of_another_build_are_refused():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    for config, message in (
        (Phi3Config(**sizes, **heads), "Phi3MLP has no gate_proj"),
        (SeedOssConfig(**sizes, **heads, head_dim=8, residual_dropout=0.5), "SeedOssMLP computes something else"),
    ):
        with pytest.raises(ValueError, match=message):
            InPlaceForCausalLM.from_base(AutoModelForCausalLM.from_config(config), layers=1, chunk=CHUNK)
    with pytest.raises(TypeError, match="base must be a causal language model"):
        InPlaceForCausalLM.from_base(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has them already"):
        InPlaceForCausalLM.from_base(small().base)
    deaf = InPlaceForCausalLM.from_base(
        AutoModelForCausalLM.from_config(StableLmConfig(**sizes, **heads)), layers=1, chunk=CHUNK
    )
    with pytest.raises(RuntimeError, match="does not hand keyword arguments on to its layers' self_attn"):
        deaf(torch.stack(tokens(3)))
    # what has no dropout at the moment is as it says
    fine = SeedOssConfig(**sizes, **heads, head_dim=8, residual_dropout=0.0)
    InPlaceForCausalLM.from_base(AutoModelForCausalLM.from_config(fine), layers=1, chunk=CHUNK)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layers": [3]}, ValueError, "layers must be an int.* from 0 to 2; got \\[3\\]"),
        ({"layers": [0, 0]}, ValueError, "layers must be"),
        ({"layers": 0}, ValueError, "layers"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"values": "logits"}, ValueError, "values must be"),
        ({"conv_width": 4}, ValueError, "conv_width must be odd"),
        ({"projection": 1}, TypeError, "projection"),
        ({"ttt_form": "fast"}, ValueError, "ttt_form must be"),
        ({"text_config": 3}, TypeError, "text_config must be"),
        ({"output_hidden_states": True}, ValueError, "set it in text_config"),
        ({"chunks": 3}, ValueError, "chunks is no field"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        InPlaceConfig(**{"text_config": {"model_type": "llama", "num_hidden_layers": 3}, **fields})


def test_calls_that_do_not_fit_are_refused():
    model = MODELS["hidden"]
    ids = torch.stack(tokens(4, 4))
    with pytest.raises(TypeError, match="must be a kvbind InPlaceCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] with at least one sequence; got shape \[4\]"):
        model(ids[0])
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 1, 4, 4))
    cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="cache must hold 1 sequences"):
        model(ids[:1], **{CACHE: cache})
    with pytest.raises(ValueError, match="use_cache must not be False beside a cache"):
        model(ids, use_cache=False, **{CACHE: cache})
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        model.generate(ids, cache_implementation="static", max_new_tokens=1)
    with pytest.raises(RuntimeError, match="by InPlaceForCausalLM alone: call that"):
        model.base(ids)
    recomputing = small().train()
    enable_checkpointing(recomputing)
    with pytest.raises(ValueError, match="use_cache must be False under gradient checkpointing"):
        recomputing(ids, use_cache=True)
    biased = InPlaceForCausalLM.from_base(plain(mlp_bias=True), layers=1, chunk=CHUNK)
    with pytest.raises(ValueError, match="plain linear layer without a bias"):
        biased.fast_mlps[0].start_weights()
    with pytest.raises(ValueError, match="conv_width must be odd"):
        InPlaceMLP(plain().model.layers[0].mlp, 0, chunk=CHUNK, lr=LR, conv_width=2)
