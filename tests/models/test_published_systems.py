"""The language model with the layers of published systems: generation, padding, recomputation, files, training."""

import json

import pytest
import torch
from lact_small import LADDER, cache_of, small_config, small_model, tokens
from torch.utils import _pytree as pytree

from checkpointing import enable_checkpointing
from kvbind import InnerLoop, Linear
from kvbind.inner.projections import DEFAULTS, Constant, Projections
from kvbind.inner.systems import PROJECTIONS
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.models import LactConfig, LactForCausalLM
from kvbind.models.flops import lact_flops
from kvbind.models.lact.decoding import obstacle
from published import SPAN, SYSTEMS


def model_of(name, **fields):
    return small_model(SYSTEMS[name], projections=name, **fields).double()


@pytest.mark.parametrize("name", SYSTEMS)
def test_generation_with_a_cache_is_recomputation(name):
    model, ids = model_of(name), tokens(2, 2 * SPAN + 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    cached, whole = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-9, atol=1e-9)
    # a sequence that starts elsewhere in its row is the same sequence
    alone = model.generate(ids[:1, 3:], **options | {"attention_mask": mask[:1, 3:]})
    torch.testing.assert_close(torch.stack(alone.logits)[:, 0], torch.stack(cached.logits)[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gdn2", "rwkv7", "ttt_linear"])
def test_beams_carry_their_own_states(name):
    model, ids = model_of(name), tokens(2, 7)
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_parameter_learns_and_recomputed_blocks_change_no_gradient(name):
    model, ids = model_of(name).train(), tokens(2, 2 * SPAN + 1)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    first = gradients()
    assert [key for key, grad in first.items() if not bool(grad.abs().sum() > 0)] == []
    enable_checkpointing(model, use_reentrant=False)
    for key, grad in gradients().items():
        torch.testing.assert_close(grad, first[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_saved_model_is_the_same_model(name, tmp_path):
    model, ids = model_of(name).float(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    read = LactForCausalLM.from_pretrained(tmp_path)
    assert read.config.inner == SYSTEMS[name]
    assert read.config.projections == PROJECTIONS[name]
    held = dict(read.named_parameters())
    for key, parameter in model.named_parameters():
        assert torch.equal(held[key], parameter), key
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)


def test_packed_documents_are_apart():
    for name in ("mamba2", "kda", "ttt_mlp"):
        model, ids = model_of(name), tokens(1, 14)
        with torch.no_grad():
            packed = model(ids, cu_seqlens=torch.tensor([0, 5, 14])).logits
            alone = [model(part).logits for part in ids.split([5, 9], dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)


def test_positions_that_start_elsewhere_do_not_move_spans():
    model, ids = model_of("ttt_linear"), tokens(1, 9)
    with torch.no_grad():
        moved = model(ids, position_ids=torch.arange(3, 12)[None]).logits
        torch.testing.assert_close(moved, model(ids).logits)


def test_a_model_learns():
    for name in ("gated_delta_net", "ttt_linear"):
        model, ids = small_model(SYSTEMS[name], projections=name, num_hidden_layers=1).train(), tokens(4, 12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


def test_configurations_without_projections_read_as_before():
    config = small_config()
    assert config.projections is None
    assert "projections" not in json.loads(config.to_json_string())
    assert not any("projections" in key for key in json.loads(config.to_json_string(use_diff=False)))


def test_projections_are_a_value_its_dict_or_the_name_of_a_system():
    made = PROJECTIONS["gla"]
    for given in (made, made.to_dict(), "gla"):
        config = small_config(SYSTEMS["gla"], projections=given)
        assert config.projections == made
        assert LactConfig.from_dict(json.loads(config.to_json_string())).projections == made
    with pytest.raises(ValueError, match="did you mean 'gla'"):
        small_config(projections="glaa")
    with pytest.raises(TypeError, match="projections must be a kvbind Projections"):
        small_config(projections=3)
    with pytest.raises(ValueError, match="projections must be None in a released configuration"):
        small_config(SYSTEMS["gla"], projections=made).to_released_config()


def test_an_inner_loop_that_attention_has_no_layer_for_has_one_of_its_own():
    inner = InnerLoop(Linear(), loss="squared", erase=True, chunk=4, visibility="token")
    config = small_config(inner)
    assert config.projections == DEFAULTS
    assert "projections" not in config.to_dict()
    model = LactForCausalLM(config)
    assert all(isinstance(block.attn, FastWeightLayer) for block in model.model.layers)
    assert "FastWeightLayers" in obstacle(model)
    config.inner = LADDER["rung0"]
    assert config.projections is None


def test_a_cache_of_another_kind_of_layer_is_refused():
    ids = tokens(1, 5)
    with torch.no_grad():
        own, other = small_model(), model_of("gla").float()
        for model, cache in ((own, cache_of(other(ids))), (other, cache_of(own(ids)))):
            with pytest.raises(TypeError, match="state must be a"):
                model(ids, past_key_values=cache)


def test_flops_count_the_matrices_that_there_are():
    config = small_config(SYSTEMS["gla"], projections=Projections(start="zero", key_width=0.5, output_gate="silu"))
    d, length, key = 32, 10, 16
    parts = lact_flops(config, length)
    # q and k of half the width, v, gate and output, decays per key channel
    assert parts["projections"] == 2 * 3 * 2 * d * (2 * key + 3 * d + key) * length
    assert "attention" not in parts
    assert parts["fast weights"] > 0


def test_what_a_layer_makes_is_not_overruled_by_constant_rates():
    for name, inner in SYSTEMS.items():
        assert inner.token_lr or PROJECTIONS[name].rate == Constant(), name


def test_a_state_is_a_pytree():
    _, state = model_of("ttt_linear").model.layers[0].attn(torch.randn(2, 5, 32).double(), return_state=True)
    leaves, spec = pytree.tree_flatten(state)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.seen == state.seen
    for ours, theirs in zip(again.tensors(), state.tensors(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["mamba2", "rwkv7", "ttt_linear"])
def test_a_model_compiles_as_one_graph_and_trains_in_mixed_precision(name):
    model, ids = model_of(name).float().train(), tokens(2, 9)
    want = model(ids, labels=ids).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, labels=ids).loss, want, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert (loss - want).abs() < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
