"""Softmax attention in the place of fast weights: against attention written out, in pieces, and inside the three models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.bench.models.views import FullAttentionNvs
from kvbind.layers.attention.modules import FullAttention, WindowAttention, grid_positions
from kvbind.layers.layout import Layout
from kvbind.layers.rotary import rotary_tables, rotate
from kvbind.models import LactConfig, LactForCausalLM
from kvbind.models.flops import lact_flops, lact_nvs_flops, vittt_flops
from kvbind.models.lact.config import LactConfig as Config
from kvbind.models.lact.decoding import obstacle
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig
from kvbind.models.vittt import VitttConfig, VitttForImageClassification
from kvbind.tasks.views.procedural import Cameras, make_cameras

DOUBLE = {"rtol": 1e-10, "atol": 1e-12}


def written_out(layer, x, first):
    """Each token's softmax over the keys from `first[t]` to its own, head by head."""
    batch, length, width = x.shape
    q, k, v = (part.reshape(batch, length, layer.heads, -1) for part in layer.qkv(x).chunk(3, dim=-1))
    tables = rotary_tables(torch.arange(length)[None], width // layer.heads, layer.rope_theta)
    q, k = rotate(q, tables), rotate(k, tables)
    rows = []
    for t in range(length):
        keys, values = k[:, first[t] : t + 1], v[:, first[t] : t + 1]
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], keys) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), values).flatten(1))
    return layer.o_proj(torch.stack(rows, dim=1))


@pytest.mark.parametrize("window", [1, 3, 64])
def test_a_token_attends_to_its_window_forward_and_backward(window):
    torch.manual_seed(0)
    layer = WindowAttention(16, 2, window).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    output, state = layer(x)
    expected = written_out(layer, x, [max(t - window + 1, 0) for t in range(9)])
    assert state is None
    torch.testing.assert_close(output, expected, **DOUBLE)
    wanted = torch.randn_like(output)
    own = torch.autograd.grad(output, [x, *layer.parameters()], wanted)
    other = torch.autograd.grad(expected, [x, *layer.parameters()], wanted)
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, **DOUBLE)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 12))
def test_reading_in_pieces_is_reading_at_once(pieces, window):
    torch.manual_seed(1)
    layer = WindowAttention(16, 2, window, qk_norm=True, qkv_bias=True).double()
    x = torch.randn(2, sum(pieces), 16, dtype=torch.float64)
    whole, last = layer(x, return_state=True)
    state, parts = None, []
    for piece in x.split(pieces, dim=1):
        part, state = layer(piece, state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **DOUBLE)
    assert state.seen == last.seen == (sum(pieces),) * 2
    swapped = state.select(torch.tensor([1, 0]))
    more = torch.randn(1, 2, 16, dtype=torch.float64).expand(2, 2, 16)
    torch.testing.assert_close(layer(more, state=swapped)[0].flip(0), layer(more, state=state)[0], **DOUBLE)


def test_packed_documents_do_not_see_each_other():
    torch.manual_seed(2)
    layer = WindowAttention(16, 2, 8).double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    packed, _ = layer(x, Layout.packed([0, 5, 12], 1, 12, x.device))
    alone = torch.cat([layer(part)[0] for part in x.split([5, 7], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, **DOUBLE)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"heads must leave an even width of hidden_size = 16; got 3"):
        WindowAttention(16, 3, 4)
    with pytest.raises(TypeError, match=r"state must be an AttentionState, .*got dict"):
        WindowAttention(16, 2, 4)(torch.zeros(1, 1, 16), state={})
    with pytest.raises(ValueError, match="head_dim must divide dim = 16; got 3"):
        FullAttention(16, 3)
    with pytest.raises(ValueError, match="dim must be a multiple of 4"):
        grid_positions((2, 2), 6)


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attn_heads": 2, "num_lact_heads": 1,
    "window_size": 4, "intermediate_size": 32, "lact_chunk_size": 4, "bos_token_id": None, "eos_token_id": None,
    "fast_weights": False,
}  # fmt: skip


def test_a_language_model_without_fast_weights_is_saved_opened_and_generates_with_a_cache(tmp_path):
    torch.manual_seed(0)
    model = LactForCausalLM(LactConfig(**SMALL)).eval()
    assert not [name for name, _ in model.named_parameters() if "w0" in name or "ttt" in name or "lr_proj" in name]
    ids = torch.randint(32, (2, 11))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(tokens, plain)
    assert "WindowAttention" in obstacle(model)
    model.save_pretrained(tmp_path)
    opened = LactForCausalLM.from_pretrained(tmp_path).eval()
    assert opened.config.fast_weights is False
    torch.testing.assert_close(opened(input_ids=ids, use_cache=False).logits, logits)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_long_window_is_full_attention():
    torch.manual_seed(0)
    short, long = (LactForCausalLM(LactConfig(**SMALL | {"window_size": w})).eval() for w in (4, 64))
    long.load_state_dict(short.state_dict())
    ids = torch.randint(32, (1, 12))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 32
    with torch.no_grad():
        # two layers over a window of four reach seven tokens back
        changed = [not torch.equal(m(input_ids=ids).logits[0, -1], m(input_ids=other).logits[0, -1]) for m in (short, long)]
    assert changed == [False, True]


def test_configurations_without_fast_weights_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="fast_weights must be True with projections"):
        Config(**SMALL | {"projections": "gdn2"})
    with pytest.raises(TypeError, match="fast_weights must be True or False; got 'no'"):
        Config(**SMALL | {"fast_weights": "no"})
    with pytest.raises(ValueError, match="fast_weights must be True in a released configuration"):
        Config(**SMALL).to_released_config()
    with pytest.raises(ValueError, match="fast_weights must be True in the hierarchical model"):
        VitttConfig(embed_dim=[8, 8], depth=[1, 1], num_heads=[1, 1], fast_weights=False)


def test_flops_of_models_without_fast_weights_have_no_such_part():
    full = lact_flops(Config(**SMALL | {"fast_weights": True}), 16)
    parts = lact_flops(Config(**SMALL), 16)
    assert set(full) - set(parts) == {"fast weights"}
    assert parts["projections"] == 2 * 3 * 2 * 16 * 4 * 16 * 16  # layers, trained, multiply-add, d x 4 d, tokens
    views = LactNvsConfig(dim=32, layers=1, head_dim=16, fast_head_dim=32)
    own, other = (lact_nvs_flops(views.replace(fast_weights=x), (16, 16), 3, 2) for x in (True, False))
    assert set(own) - set(other) == {"fast weights"}
    assert other["attention"] == 3 * 4 * 32 * (4 + 12) * 20  # trained, d, keys of its image and of all inputs, tokens
    plain = vittt_flops(VitttConfig(embed_dim=16, depth=1, num_heads=2, patch_size=4, fast_weights=False), (16, 16))
    assert plain["attention"] == 3 * 4 * 16 * 16 * 16


def scene(dtype=torch.float64, views=5, inputs=3, size=(16, 16)):
    poses, intrinsics = make_cameras("train", 1, views, size, Cameras(sector=180))
    image = torch.rand(1, inputs, 3, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)
    poses, intrinsics = poses.to(dtype), intrinsics.to(dtype)
    return image, poses[:, :inputs], intrinsics[:, :inputs], poses[:, inputs:], intrinsics[:, inputs:]


def test_view_synthesis_with_attention_renders_in_one_pass_what_it_renders_from_kept_keys(tmp_path):
    torch.manual_seed(0)
    config = LactNvsConfig(dim=32, layers=2, head_dim=16, fast_head_dim=32, fast_weights=False)
    model = LactNvs(config).double().eval()
    apart = FullAttentionNvs(config).double().eval()
    apart.load_state_dict(model.state_dict())
    inputs = scene()
    torch.testing.assert_close(model(*inputs), apart(*inputs), **DOUBLE)
    # targets write nothing: one more does not change the others
    fewer = (*inputs[:3], inputs[3][:, :1], inputs[4][:, :1])
    torch.testing.assert_close(model(*fewer), model(*inputs)[:, :1], **DOUBLE)
    assert model.mixers == ()
    with pytest.raises(ValueError, match="fast_weights=True for scenes to be reconstructed"):
        model.reconstruct(*inputs[:3])
    model.float().save_pretrained(tmp_path)
    opened = LactNvs.from_pretrained(tmp_path)
    assert opened.config == config
    torch.testing.assert_close(opened(*scene(torch.float32)), model(*scene(torch.float32)))


def test_a_plain_vision_transformer_has_fixed_positions_and_no_convolutions(tmp_path):
    torch.manual_seed(0)
    config = VitttConfig(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, in_chans=1, num_labels=3,
                         fast_weights=False)  # fmt: skip
    model = VitttForImageClassification(config).eval()
    assert not [name for name, _ in model.named_parameters() if "cpe" in name or name.endswith((".w1", ".w2", ".w3"))]
    x = torch.rand(2, 1, 16, 16)
    logits = model(x).logits
    moved = model(x.roll(4, dims=-1)).logits
    assert (logits - moved).abs().max() > 1e-6  # patches elsewhere are something else
    bare = model.vittt
    tokens, grid = bare.embed(x)
    torch.testing.assert_close(tokens - bare.patch_embed(x).flatten(2).mT, grid_positions(grid, 16).expand(2, -1, -1))
    assert model(torch.rand(1, 1, 8, 12)).logits.shape == (1, 3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(VitttForImageClassification.from_pretrained(tmp_path)(x).logits, logits)


def test_positions_on_a_grid_tell_all_places_apart_and_shift_alike():
    places = grid_positions((5, 7), 32)
    assert places.shape == (35, 32)
    distances = torch.cdist(places.double(), places.double()) + torch.eye(35)
    assert distances.min() > 0.1
    grid = places.reshape(5, 7, 32)
    one, other = (grid[0, 0] @ grid[2, 3], grid[1, 2] @ grid[3, 5])
    torch.testing.assert_close(one, other)
