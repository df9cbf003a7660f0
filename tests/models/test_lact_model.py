"""The LaCT language model as a transformers model: training, packing, padding, saving, compiling."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lact_small import LADDER, VOCAB, cache_of, small_config, small_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM

import kvbind
from checkpointing import enable_checkpointing
from kvbind import MLP, InnerLoop, Linear
from kvbind.models import PRESETS, LactCache, LactConfig, LactForCausalLM, LactModel
from kvbind.models.lact import loss
from kvbind.models.lact.blocks import LactBlock
from kvbind.models.lact.loss import linear_cross_entropy
from kvbind.sequence.boundaries import Boundaries, with_room

LENGTHS = (13, 1, 0, 30, 8)
BOUNDS = (0, 13, 14, 14, 44, 52)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def plain_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("form", ["recurrent", "auto"])
@pytest.mark.parametrize("rung", LADDER)
def test_every_rung_trains(rung, form):
    model = small_model(LADDER[rung], ttt_form=form).train()
    ids = tokens(2, 29)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    "inner",
    [
        LADDER["rung0"].replace(direction="ascent"),
        LADDER["rung2"].replace(query="key"),
        kvbind.systems.titans(chunk=8),
        kvbind.systems.gated_delta_net(chunk=1),
        InnerLoop(network=MLP(depth=2), chunk=4, momentum=True, retention=True),
        InnerLoop(network=kvbind.GLU(), chunk=4),
        InnerLoop(network=Linear(), chunk=1, visibility="chunk", token_lr=False),
    ],
    ids=["ascent", "key for query", "Titans", "Gated DeltaNet", "deep MLP", "GLU", "after the token"],
)
def test_any_causal_inner_loop_is_a_config_edit(inner, tmp_path):
    model = small_model(inner, base_lr=0.01)
    ids = tokens(1, 21)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.inner == inner
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        # causal: a later token changes nothing before it
        changed = ids.clone()
        changed[0, 15] = ids[0, 15] % (VOCAB - 1) + 1
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


def test_loss_is_the_cross_entropy_of_the_logits():
    model = small_model()
    ids = tokens(2, 29)
    labels = ids.clone()
    labels[0, 5:9] = -100
    output = model(ids, labels=labels)
    expected = plain_loss(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    got = gradients(model)
    model.zero_grad()
    plain_loss(model(ids).logits, labels).backward()
    assert_same_gradients(got, gradients(model), rtol=1e-4, atol=5e-6)


class LargestFloat32(TorchDispatchMode):
    """Notes the largest float32 tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.numel = max(self.numel, x.numel())
        return out


def test_training_never_holds_all_logits_in_float32():
    vocab, length = 4096, 5000
    model = small_model(LADDER["rung0"].replace(chunk=500), vocab_size=vocab, num_hidden_layers=1).train()
    ids = tokens(1, length)
    with LargestFloat32() as seen:
        output = model(ids, labels=ids)
        output.loss.backward()
    assert output.logits is None
    assert seen.numel < length * vocab / 2


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_pieces_of_the_loss_add_up(reduction):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[1, 2:5] = -100
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction=reduction)
    got = linear_cross_entropy(hidden, weight, labels, reduction, piece=4)
    torch.testing.assert_close(got.flatten(), expected.flatten())
    expected_gradients = torch.autograd.grad(expected.square().sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (hidden, weight)), expected_gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_has_gradients_in_the_dtypes_of_its_operands(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (2, 40), generator=generator)
    exact = F.cross_entropy((hidden.double() @ weight.double().T).flatten(0, 1), labels.flatten(), reduction="sum")
    with torch.autocast("cpu", dtype=dtype):
        got = linear_cross_entropy(hidden, weight, labels, piece=30)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=0)
    expected = torch.autograd.grad(exact / 80, (hidden, weight))
    for x, y in zip(torch.autograd.grad(got / 80, (hidden, weight)), expected, strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() < 1e-2 * y.norm()


def test_loss_without_gradients_makes_none(monkeypatch):
    wanted = []
    monkeypatch.setattr(loss, "cross_entropy_", lambda x, y, ignored, gradient: wanted.append(gradient) or x.sum(-1))
    model = small_model()
    with torch.no_grad():
        model(tokens(1, 9), labels=tokens(1, 9))
    model(tokens(1, 9), labels=tokens(1, 9))
    assert wanted == [False, True]


def test_loss_refuses_second_derivatives_and_labels_of_another_number():
    hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (3, 5))
    total = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(total, weight, create_graph=True)
    for labels in (torch.tensor([1]), torch.tensor([0, 1, 2, 3])):
        with pytest.raises(ValueError, match=r"labels must be \[3\], one for each token; got"):
            linear_cross_entropy(hidden, weight, labels, piece=3)


def test_loss_counts_the_tokens_that_the_caller_says():
    model = small_model()
    ids = tokens(2, 9)
    total = model(ids, labels=ids).loss * 16
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss, total / 40)


def test_logits_to_keep():
    model = small_model()
    ids = tokens(2, 19)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=0).logits, full)
    chosen = torch.tensor([2, 11])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, full[:, chosen])
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, logits_to_keep=1).logits.shape == (2, 1, VOCAB)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("rung", ["rung0", "rung2", "rung6"])
def test_packed_documents_train_as_each_alone(rung, read):
    model = small_model(LADDER[rung]).double().train()
    ids, bounds = tokens(1, BOUNDS[-1]), torch.tensor(BOUNDS)
    model(ids, labels=ids, cu_seqlens=bounds if read else Boundaries(with_room(bounds), BOUNDS[-1])).loss.backward()
    packed = gradients(model)
    model.zero_grad()

    predicted = sum(max(n - 1, 0) for n in LENGTHS)
    total = 0
    for part in ids.split(LENGTHS, dim=1):
        if part.shape[1] > 1:
            loss = model(part, labels=part, num_items_in_batch=predicted).loss
            loss.backward()
            total = total + loss.item()
    assert_same_gradients(packed, gradients(model), rtol=1e-6, atol=1e-10)
    assert model(ids, labels=ids, cu_seqlens=BOUNDS).loss.item() == pytest.approx(total, rel=1e-10)


def test_packed_documents_give_the_logits_of_each_alone():
    model = small_model().double()
    ids = tokens(1, BOUNDS[-1])
    packed = model(ids, cu_seqlens=BOUNDS).logits
    alone = [model(part).logits for part in ids.split(LENGTHS, dim=1) if part.shape[1]]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-9)
    assert (packed - model(ids).logits).abs().max() > 1e-2


def test_position_ids_that_restart_start_documents():
    model = small_model().double()
    ids = tokens(2, 26)
    positions = torch.stack([torch.cat([torch.arange(10), torch.arange(16)]), torch.arange(26)])
    got = model(ids, position_ids=positions, labels=ids)
    expected = torch.cat([model(ids[:1, :10]).logits, model(ids[:1, 10:]).logits], dim=1)
    torch.testing.assert_close(got.logits[:1], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(got.logits[1:], model(ids[1:]).logits, rtol=0, atol=1e-9)
    assert cache_of(got) is None
    # 9 + 15 + 25 tokens are predicted, none of them across documents
    parts = [(ids[:1, :10], 9), (ids[:1, 10:], 15), (ids[1:], 25)]
    expected_loss = sum(model(part, labels=part).loss.item() * n for part, n in parts) / 49
    assert got.loss.item() == pytest.approx(expected_loss, rel=1e-9)


def test_what_transformers_collates_without_padding_trains_as_each_alone():
    transformers = pytest.importorskip("transformers")
    model = small_model().double()
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (12, 5, 20)]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": x} for x in documents])
    loss = model(**batch).loss.item()
    parts = [(torch.tensor([x]), len(x) - 1) for x in documents]
    expected = sum(model(x, labels=x).loss.item() * n for x, n in parts) / sum(n for _, n in parts)
    assert loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_is_neither_attended_to_nor_written(side):
    model = small_model().double()
    rows = [tokens(1, n, seed=n)[0] for n in (33, 20, 9)]
    ids, mask = torch.zeros(3, 33, dtype=torch.long), torch.zeros(3, 33, dtype=torch.long)
    for i, row in enumerate(rows):
        places = torch.arange(len(row))
        if side == "left":
            places = places + 33 - len(row)
        elif side == "inside":
            places = torch.randperm(33, generator=torch.Generator().manual_seed(i))[: len(row)].sort().values
        ids[i, places], mask[i, places] = row, 1
    labels = torch.where(mask.bool(), ids, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    for i, row in enumerate(rows):
        torch.testing.assert_close(output.logits[i, mask[i].bool()], model(row[None]).logits[0], rtol=0, atol=1e-9)
    if side != "inside":
        # what stands at padding counts for nothing, in the labels too
        other = model(ids.masked_fill(mask == 0, 7), attention_mask=mask, labels=ids.masked_fill(mask == 0, 7))
        torch.testing.assert_close(other.loss, output.loss, rtol=1e-9, atol=0)
        counts = [len(row) - 1 for row in rows]
        alone = [model(row[None], labels=row[None]).loss.item() for row in rows]
        mean = sum(loss * n for loss, n in zip(alone, counts, strict=True)) / sum(counts)
        assert output.loss.item() == pytest.approx(mean, rel=1e-9)


def test_gradient_checkpointing_changes_no_gradient():
    ids = tokens(2, 29)
    found = []
    for enabled in (False, True):
        model = small_model().train()
        if enabled:
            enable_checkpointing(model)
        calls = []
        model.model.layers[0].attn_norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 1 + enabled
        found.append(gradients(model))
    assert_same_gradients(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_gradients_through_a_state_are_right_under_checkpointing_or_it_is_refused():
    inner = kvbind.systems.linear_attention(4).replace(visibility="past", token_lr=True)
    ids = tokens(1, 12)

    def gradients(options):
        model = small_model(inner).double().train()
        if options is None:
            F.cross_entropy(model(ids, use_cache=False).logits[0, 8:11], ids[0, 9:]).backward()
        else:
            model._set_gradient_checkpointing(True, functools.partial(checkpoint, **options))
            first = model(ids[:, :8], use_cache=True)
            cache = next(value for value in first.values() if isinstance(value, LactCache))
            model(ids[:, 8:], None, None, cache, labels=ids[:, 8:]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    torch.testing.assert_close(gradients({"use_reentrant": False}), gradients(None))
    for options in ({"use_reentrant": True}, {}):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            gradients(options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpointing_without_a_cache_is_right():
    ids = tokens(1, 12)
    model = small_model(LADDER["rung2"]).double().train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    enable_checkpointing(model, use_reentrant=True)
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    with torch.no_grad():
        model(ids, use_cache=True)


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_keeps_everything(tmp_path, tied):
    model = small_model(LADDER["rung2"], tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LactForCausalLM)
    assert again.config.inner == LADDER["rung2"]
    assert again.config.to_dict()["inner"] == model.config.to_dict()["inner"]
    assert (again.lm_head.weight is again.model.embeddings.weight) == tied
    ids = tokens(2, 19)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        base = AutoModel.from_pretrained(tmp_path)
        assert isinstance(base, LactModel)
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(base(ids).last_hidden_state, hidden[-1])
    assert len(hidden) == 3


def test_missing_weights_are_drawn_as_in_a_new_model(tmp_path):
    model = small_model(kvbind.systems.titans(chunk=8))
    gate = model.model.layers[0].attn.retention_proj[0]
    assert torch.sigmoid(gate.bias).sub(0.99).abs().max() < 1e-6
    model.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[0].attn.retention_proj[0].bias, gate.bias)
    assert 0.05 < again.lm_head.weight.std() < 0.2


def test_configuration_holds_the_inner_loop_as_plain_data(tmp_path):
    config = small_config(LADDER["rung1"])
    config.save_pretrained(tmp_path)
    assert '"update": "last"' in (tmp_path / "config.json").read_text()
    assert LactConfig.from_pretrained(tmp_path).inner == LADDER["rung1"]
    assert LactConfig(**config.to_dict()).inner == LADDER["rung1"]
    config.inner = {"network": {"kind": "Linear"}, "chunk": 4}
    assert config.inner == InnerLoop(network=Linear(), chunk=4)


def test_what_decoding_reads_is_a_field_of_the_configuration(tmp_path):
    model = small_model()
    assert model.config.decode_dtype is None
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, decode_dtype="bfloat16")
    assert {layer.attn.decode_dtype for layer in model.model.layers} == {"bfloat16"}
    model.save_pretrained(tmp_path)
    assert LactConfig.from_pretrained(tmp_path).decode_dtype == "bfloat16"
    assert small_config(decode_dtype=torch.bfloat16).decode_dtype == "bfloat16"  # as `dtype` takes either
    with pytest.raises(ValueError, match=r"decode_dtype must be 'bfloat16' or None; got 'float16'$"):
        AutoModelForCausalLM.from_pretrained(tmp_path, decode_dtype="float16")
    for fields in ({"fast_weights": False}, {"projections": "gla"}):
        with pytest.raises(ValueError, match="decode_dtype must be None but for fast weights beside attention"):
            small_config(decode_dtype="bfloat16", **fields)


def test_a_saved_model_loads_with_another_inner_loop(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, inner=LADDER["rung0"].replace(steps=2), ttt_form="recurrent")
    assert model.config.inner.steps == 2
    assert {layer.inner.steps for layer in model.model.layers} == {2}
    assert {layer.attn.form for layer in model.model.layers} == {"recurrent"}


def test_the_vocabulary_can_grow_and_embeddings_can_be_given():
    model = small_model()
    ids = tokens(1, 13)
    expected = model(ids).logits
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert model(ids).logits.shape == (1, 13, VOCAB + 3)
    torch.testing.assert_close(model(ids).logits[..., :VOCAB], expected)


def test_configuration_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="inner says what use_muon"):
        LactConfig(inner=LADDER["rung0"], use_muon=False)
    with pytest.raises(TypeError, match="inner must be a kvbind"):
        LactConfig(inner="lact")
    with pytest.raises(ValueError, match="ttt_form"):
        LactConfig(ttt_form="fast")
    with pytest.raises(ValueError, match=r"num_atn_heads.*did you mean 'num_attn_heads'"):
        LactConfig(num_atn_heads=3)
    with pytest.raises(ValueError, match="num_lact_heads must divide"):
        LactForCausalLM(small_config(num_lact_heads=3))
    with pytest.raises(ValueError, match="visibility"):
        LactForCausalLM(small_config(kvbind.systems.lact_nvs()))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_name(name):
    config = LactConfig(**PRESETS[name])
    assert LactConfig(**config.to_dict()).inner == PRESETS[name]["inner"]
    with torch.device("meta"):
        model = LactForCausalLM(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    expected = {"tiny": 0.6, "30m": 30, "125m": 125, "760m": 790, "3b": 3000}[name]
    assert millions == pytest.approx(expected, rel=0.1)


def test_the_760m_preset_is_the_papers():
    config = LactConfig(**PRESETS["760m"])
    assert config.to_dict() == LactConfig().to_dict()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attn_heads, config.num_lact_heads) == (1536, 24, 24, 4)
    assert (config.window_size, config.inner.chunk, config.w0_w2_low_rank) == (2048, 2048, 32)
    assert (config.base_lr, config.vocab_size, config.rope_theta, config.mlp_width) == (1e-3, 32000, 1e6, 4096)


def test_a_cache_of_the_760m_preset_has_the_size_that_the_documentation_says():
    preset, found = PRESETS["760m"], []
    for rung in ("rung0", "rung2"):
        inner = kvbind.systems.ladder(preset["inner"])[rung]
        with torch.device("meta"), torch.no_grad():
            layer = LactBlock(LactConfig(**{**preset, "inner": inner})).attn.bfloat16()
            _, state = layer(torch.empty(1, 5000, layer.hidden_size, dtype=torch.bfloat16), return_state=True)
        found.append(round(preset["num_hidden_layers"] * sum(x.nbytes for x in state.tensors()) / 2**20))
    page = (Path(__file__).parents[2] / "docs" / "language-model.md").read_text()
    assert "takes {} MiB in bfloat16 at rung 0 and {} at rung 2".format(*found) in page


@pytest.mark.parametrize("rung", ["rung0", "rung2"])
def test_bfloat16_autocast_trains_near_float32(rung):
    model = small_model(LADDER[rung]).train()
    ids = tokens(2, 29)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_weights_keep_a_float32_state():
    model = small_model().bfloat16()
    output = model(tokens(1, 29))
    assert output.logits.dtype == torch.bfloat16
    assert cache_of(output).states[0].fast.weights["out"].dtype == torch.float32


@pytest.mark.parametrize("rung", ["rung0", "rung2"])
def test_forward_compiles_as_one_graph(rung):
    torch._dynamo.reset()
    model = small_model(LADDER[rung], num_hidden_layers=1).train()
    ids = tokens(2, 29)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss = compiled(ids, labels=ids).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    loss.backward()
    model.eval()
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_forward_is_deterministic():
    model = small_model()
    ids = tokens(2, 29)
    runs = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        runs.append(gradients(model))
    assert_same_gradients(*runs, rtol=0, atol=0)


def test_arguments_that_do_not_fit_raise():
    model = small_model()
    ids = tokens(2, 12)
    cases = [
        ({"input_ids": None}, ValueError, "input_ids"),
        ({"inputs_embeds": torch.zeros(2, 12, 32)}, ValueError, "input_ids"),
        ({"attention_mask": torch.ones(2, 11)}, ValueError, "attention_mask must be"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, ValueError, "attention_mask must be"),
        ({"position_ids": torch.zeros(2, 11)}, ValueError, "position_ids must be"),
        ({"cu_seqlens": [0, 12]}, ValueError, "batch must be 1"),
        ({"output_attentions": True}, ValueError, "output_attentions"),
        ({"past_key_values": []}, TypeError, "past_key_values must be a kvbind LactCache"),
        ({"token_type_ids": ids}, TypeError, "token_type_ids"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            model(**{"input_ids": ids, **arguments})
    one, mask = ids[:1], torch.ones(1, 12)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="cu_seqlens must be None beside an attention_mask"):
        model(one, cu_seqlens=[0, 5, 12], attention_mask=mask)
    with pytest.raises(ValueError, match="cu_seqlens must be None beside a cache"):
        model(one, cu_seqlens=[0, 5, 12], use_cache=True)
    with pytest.raises(ValueError, match="cu_seqlens must end"):
        model(one, cu_seqlens=[0, 5, 11])
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(ValueError, match="position_ids must rise"):
        model(one, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="position_ids must rise"):
        model(one, position_ids=positions, attention_mask=mask)


def test_importing_the_library_does_not_import_transformers():
    code = "import sys, kvbind, kvbind.models; kvbind.models.PRESETS; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tokens_of_another_shape_are_refused_by_name():
    model = small_model()
    for given, message in (
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids must be \[B, T\] with .*; got shape \[3\]"),
        ({"inputs_embeds": torch.zeros(3, 8)}, r"inputs_embeds must be \[B, T, d\] with .*; got shape \[3, 8\]"),
        ({}, "exactly one of input_ids and inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**given)
