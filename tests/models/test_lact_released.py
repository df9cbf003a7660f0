"""Released checkpoints and configurations of the LaCT language model."""

import json

import lact_reference
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import kvbind
from kvbind import NewtonSchulz
from kvbind.models import LactConfig, LactForCausalLM, LactModel
from kvbind.models.convert import convert
from released import released, weights_of

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "vocab_size": 53,
    "lact_chunk_size": 8,
    "window_size": 8,
    "use_muon": True,
    "w0_w2_low_rank": 4,
    "intermediate_size": 48,
    "rope_theta": 1000.0,
}

VARIANTS = {
    "as published": {},
    "bias": {"qkv_bias": True},
    "query and key norms": {"attn_qk_norm": True},
    "values without silu": {"no_v_silu": True},
    "no silu at all": {"qkv_silu": False},
    "no positions in the fast weights": {"ttt_nope": True},
    "full-rank fast weights": {"w0_w2_low_rank": -1},
    "one fast head": {"num_lact_heads": 1},
    "fast heads narrower than attention heads": {"num_attn_heads": 2, "num_lact_heads": 4},
    "hidden multiplier 2": {"inter_multi": 2},
    "chunk shorter than window": {"lact_chunk_size": 6, "window_size": 11},
    "chunk longer than window": {"lact_chunk_size": 11, "window_size": 5},
    "no Muon": {"use_muon": False},
    "no momentum": {"use_momentum": False},
    "no output scale": {"learnable_ttt_scale": False},
    "normalized on reading": {"ttt_prenorm": True},
    "normalized on reading, no Muon": {"ttt_prenorm": True, "use_muon": False},
}


def in_full_precision(model):
    for layer in model.model.layers:
        if layer.inner.orthogonalize is not None:
            layer.inner = layer.inner.replace(orthogonalize=layer.inner.orthogonalize.replace(dtype=torch.float32))
    return model.eval()


def scrambled(model):
    """Every parameter drawn anew, large enough to matter: no scale of 1, no bias of 0, inner learning rates near 0.1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data = noise * (0.2 if parameter.dim() > 1 else 0.5)
    for layer in model.model.layers:
        layer.attn.lr_proj.bias.data += 5
    return model


@pytest.mark.parametrize("form", ["recurrent", "auto"])
def test_released_weights_give_the_released_logits(form):
    config, tensors = released("lact_llm")
    model = LactForCausalLM.from_released_config(config)
    model.load_state_dict(weights_of(tensors))
    in_full_precision(model)
    for layer in model.model.layers:
        layer.attn.form = form
    with torch.no_grad():
        logits = model(tensors["input_ids"]).logits
    expected = tensors["logits"]
    # tokens that read the starting weights alone
    torch.testing.assert_close(logits[:, :16], expected[:, :16], rtol=0, atol=2e-6)
    # orthogonalization magnifies the rounding of rank-deficient updates about 500 times: the released code itself is
    # this far from its own output on another machine, and from its output in float64
    assert (logits - expected).norm() / expected.norm() < 2e-5
    torch.testing.assert_close(logits, expected, rtol=0, atol=6e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_released_configuration_computes_what_the_specification_says(variant):
    config = {**SMALL, **VARIANTS[variant]}
    model = scrambled(LactForCausalLM.from_released_config(config).double())
    in_full_precision(model)
    ids = torch.randint(0, 53, (2, 29), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    for row, got in zip(ids, logits, strict=True):
        expected = lact_reference.logits(model.state_dict(), config, row)
        assert expected.abs().max() > 0.1
        # rotary angles are float32
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 if config["use_muon"] else 1e-6)


def test_the_variants_differ_from_one_another():
    outputs = []
    ids = torch.randint(0, 53, (1, 29), generator=torch.Generator().manual_seed(1))
    for fields in VARIANTS.values():
        model = in_full_precision(scrambled(LactForCausalLM.from_released_config({**SMALL, **fields}).double()))
        with torch.no_grad():
            outputs.append(model(ids).logits)
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-3


def test_released_fields_become_the_inner_loop():
    config = LactConfig.from_released_config({**SMALL, "lact_chunk_size": 64})
    assert config.inner == kvbind.systems.lact_llm(chunk=64)
    plain = LactConfig.from_released_config({**SMALL, "use_muon": False, "use_momentum": False, "ttt_prenorm": True})
    assert plain.inner.orthogonalize is None
    assert not plain.inner.momentum
    assert plain.inner.normalize == "read"
    assert config.inner.orthogonalize == NewtonSchulz(dtype=torch.bfloat16)


def test_what_a_released_configuration_leaves_out_takes_the_released_default():
    config = LactConfig.from_released_config({"hidden_size": 128, "num_attn_heads": 2})
    assert (config.num_hidden_layers, config.num_lact_heads, config.window_size) == (24, 4, 2048)
    assert (config.rope_theta, config.w0_w2_low_rank, config.initializer_range) == (10000.0, -1, 0.006)
    assert config.inner.orthogonalize is None
    assert LactConfig().inner.orthogonalize is not None


def test_released_json_files_load_through_the_auto_classes(tmp_path):
    # the published 760M file's fields, at a size for tests
    fields = {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "fuse_cross_entropy": True,
        "fuse_norm": True,
        "hidden_act": "swish",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "lact_swiglu",
        "qkv_bias": False,
        "qkv_silu": True,
        "lr_dim": 1,
        "lr_parameterization": "mamba",
        "learnable_ttt_scale": True,
        "fw_init_gain": 0.5,
        "use_momentum": True,
        "use_fused_kernel": True,
        "fp32_states": True,
        "norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_cache": True,
        **SMALL,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LactConfig)
    assert config.inner == kvbind.systems.lact_llm(chunk=8)

    original = LactForCausalLM(config)
    save_file(original.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LactForCausalLM)
    for name, x in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr_dim", 16),
        ("lr_parameterization", "linear"),
        ("ttt_loss_type", "l2"),
        ("hidden_act", "gelu"),
        ("use_conv", True),
        ("conv_size", 4),
    ],
)
def test_released_fields_that_change_the_computation_and_are_not_supported_raise(field, value):
    with pytest.raises(ValueError, match=field):
        LactConfig.from_released_config({**SMALL, field: value})


def test_a_released_configuration_has_no_inner_loop_of_its_own():
    with pytest.raises(ValueError, match="inner"):
        LactConfig.from_released_config(LactConfig(**{**SMALL, "vocab_size": 9}).to_dict())


def test_from_released_config_builds_both_models():
    assert isinstance(LactModel.from_released_config(SMALL), LactModel)
    assert isinstance(LactForCausalLM.from_released_config(SMALL), LactForCausalLM)


def released_folder(folder, *, weights, **fields):
    """A released checkpoint as its training code leaves it."""
    folder.mkdir()
    config = {**SMALL, "model_type": "lact_swiglu", "architectures": ["LaCTForCausalLM"], **fields}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    state = scrambled(LactForCausalLM.from_released_config(config)).state_dict()
    if fields.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    if weights == "model.safetensors":
        save_file(state, folder / weights, metadata={"format": "pt"})
    elif weights == "model.pt":
        torch.save({"model": {f"_orig_mod.{name}": x for name, x in state.items()}, "step": 7}, folder / weights)
    elif weights == "pytorch_model.bin":
        torch.save(state, folder / weights)
    else:
        names = list(state)
        parts = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
        for part in set(parts.values()):
            save_file({name: state[name] for name in names if parts[name] == part}, folder / part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return state


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model.pt", "several files"])
def test_convert_turns_a_released_checkpoint_into_one_that_loads(tmp_path, weights):
    state = released_folder(tmp_path / "released", weights=weights)
    target = convert(tmp_path / "released", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.inner == kvbind.systems.lact_llm(chunk=8)
    assert (target / "tokenizer.json").exists()
    for name, x in state.items():
        assert torch.equal(model.state_dict()[name], x)


def test_convert_takes_a_single_file_with_its_configuration_beside_it(tmp_path):
    state = released_folder(tmp_path / "released", weights="model.pt")
    model = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "released" / "model.pt", tmp_path / "ours"))
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize(
    "fields", [{}, {"ttt_prenorm": True, "qkv_bias": True, "use_muon": False}, {"tie_word_embeddings": True}]
)
def test_convert_there_and_back_gives_the_released_checkpoint_again(tmp_path, fields):
    state = released_folder(tmp_path / "released", weights="model.safetensors", **fields)
    convert(tmp_path / "released", tmp_path / "ours")
    back = convert(tmp_path / "ours", tmp_path / "back", to="released")
    config = json.loads((back / "config.json").read_text())
    assert "inner" not in config
    for name, value in {**SMALL, **fields}.items():
        assert config[name] == value
    assert config["architectures"] == ["LaCTForCausalLM"]
    again = load_file(back / "model.safetensors")
    assert again.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(again[name], x)


def test_convert_keeps_the_dtype_of_the_weights(tmp_path):
    released_folder(tmp_path / "released", weights="model.safetensors")
    path = tmp_path / "released" / "model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path)
    target = convert(tmp_path / "released", tmp_path / "ours")
    assert {x.dtype for x in load_file(target / "model.safetensors").values()} == {torch.bfloat16}


def test_convert_says_what_the_release_has_no_words_for(tmp_path):
    inner = kvbind.systems.lact_llm(chunk=8).replace(update="last")
    LactForCausalLM(LactConfig(**{**small_ours(), "inner": inner})).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="update='last'"):
        convert(tmp_path / "ours", tmp_path / "back", to="released")
    assert not (tmp_path / "back").exists()


def small_ours():
    return {name: x for name, x in SMALL.items() if name not in ("lact_chunk_size", "use_muon")}


def test_convert_refuses_what_is_converted_already_missing_or_misfit(tmp_path):
    released_folder(tmp_path / "released", weights="model.safetensors")
    convert(tmp_path / "released", tmp_path / "ours")
    with pytest.raises(ValueError, match="source must be a released checkpoint"):
        convert(tmp_path / "ours", tmp_path / "other")
    with pytest.raises(ValueError, match="source must be a kvbind checkpoint"):
        convert(tmp_path / "released", tmp_path / "other", to="released")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert(tmp_path / "empty", tmp_path / "other")
    path = tmp_path / "released" / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"missing \['lm_head\.weight'\]"):
        convert(tmp_path / "released", tmp_path / "other")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="weights"):
        convert(tmp_path / "released", tmp_path / "other")
