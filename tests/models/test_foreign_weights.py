"""Models whose modules or weights others have put something in place of: hooks, adapters, quantizers, offloaders, FSDP."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lact_small import LADDER, small_model, tokens
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations

import kvbind
from checkpointing import enable_checkpointing
from kvbind.models import vittt
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig

GATED = LADDER["rung0"].replace(retention=True)
CAMERAS = (torch.eye(4).expand(1, 2, 4, 4), torch.tensor([8.0, 8, 4, 4]).expand(1, 2, 4))
PICTURES = torch.rand(1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = tokens(2, 21)


def language(inner=GATED):
    # in double precision, as orthogonalization makes much of roundings
    return small_model(inner, attn_qk_norm=True).double()


def plain():
    torch.manual_seed(0)
    return vittt.Vittt(8, 1, 2, 4, num_classes=2, initializer_range=0.3).eval()


def hierarchical():
    torch.manual_seed(0)
    return vittt.HierarchicalVittt((8, 16), (1, 1), (2, 2), num_classes=2, initializer_range=0.3).eval()


def classifier():
    torch.manual_seed(0)
    config = vittt.VitttConfig(8, 1, 2, 4, num_labels=2, initializer_range=0.3)
    return vittt.VitttForImageClassification(config).eval()


def views():
    torch.manual_seed(0)
    return LactNvs(LactNvsConfig(dim=16, layers=1, patch_size=4, head_dim=8, fast_head_dim=16)).eval()


def run(model):
    """What a model computes."""
    if isinstance(model, LactNvs):
        return model(PICTURES, *CAMERAS, *CAMERAS)
    if hasattr(model, "lm_head"):
        return model(input_ids=IDS).logits
    output = model(PICTURES[0])
    return output if isinstance(output, torch.Tensor) else output.logits


FAMILIES = {f.__name__: f for f in (language, plain, hierarchical, classifier, views)}


def loss_of_logits(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) / 4)
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) / 4)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_on_any_module_sees_its_calls_and_changes_nothing_by_looking(family):
    model = FAMILIES[family]()
    expected, seen = run(model), set()
    # a list or dict of modules is never called
    called = {name: m for name, m in model.named_modules() if not isinstance(m, nn.ModuleList | nn.ModuleDict)}
    for name, module in called.items():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    torch.testing.assert_close(run(model), expected)
    assert seen == called.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_on_a_single_module_is_heeded(family):
    model = FAMILIES[family]()
    expected = run(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue

        def changed(_, args, output):
            return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: 0.5 * x if x.is_floating_point() else x, output)

        handle = module.register_forward_hook(changed)
        assert not torch.equal(run(model), expected), name
        handle.remove()
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_any_linear_layer_is_heeded_and_trained(family):
    model = FAMILIES[family]()
    expected = run(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, Adapted(module))
    found = run(model)
    assert (found - expected).abs().max() > 1e-3
    if family == "language":
        loss = model(IDS, labels=IDS).loss
        torch.testing.assert_close(loss, loss_of_logits(found))
    else:
        loss = found.square().mean()
    loss.backward()
    assert all(m.a.grad is not None and m.a.grad.any() for m in model.modules() if isinstance(m, Adapted))


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_that_of_the_logits_which_a_hook_changed_and_calls_it_once(training):
    model, calls = language().train(training), []

    def doubled(_, args, output):
        calls.append(tuple(output.shape))
        return 2 * output

    model.lm_head.register_forward_hook(doubled)
    output = model(IDS, labels=IDS, logits_to_keep=0)
    assert calls == [(2, 21, 61)]
    torch.testing.assert_close(output.loss, loss_of_logits(output.logits))
    kept = model(IDS, labels=IDS, logits_to_keep=3)
    torch.testing.assert_close(kept.logits, output.logits[:, -3:])
    torch.testing.assert_close(kept.loss, output.loss)


def test_a_bias_of_the_vocabulary_is_part_of_the_loss():
    model = small_model()
    model.lm_head = nn.Linear(32, 61)
    output = model(IDS, labels=IDS)
    torch.testing.assert_close(output.loss, loss_of_logits(output.logits))
    output.loss.backward()
    assert model.lm_head.bias.grad.any()


def test_a_gate_that_is_replaced_gives_its_gates_themselves():
    model = small_model(GATED)
    layer = model.model.layers[0].attn
    # gates of exactly 0 have no logits
    layer.momentum_proj.register_forward_hook(lambda _, args, gates: torch.zeros_like(gates))
    still = small_model(GATED.replace(momentum=False)).model.layers[0].attn
    still.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(1, 21, 32)
    torch.testing.assert_close(layer(x)[0], still(x)[0])


def test_a_hook_that_comes_between_two_calls_leaves_what_waits_as_it_was():
    layer = small_model(kvbind.systems.lact_llm(chunk=32).replace(orthogonalize=None)).model.layers[0].attn.double()
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, _ = layer(x)
        first, state = layer(x[:, :5], return_state=True)
        second, state = layer(x[:, 5:6], state=state, return_state=True)
        layer.momentum_proj.register_forward_hook(lambda *_: None)
        third, state = layer(x[:, 6:7], state=state, return_state=True)
        fourth, state = layer(x[:, 7:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat((first, second, third, fourth), 1), expected)
    assert state.fast.pending_lengths == (12,)


# what PEFT asks of transformers by a deprecated name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_low_rank_adapters_of_peft_train_with_the_loss_of_their_logits():
    peft = pytest.importorskip("peft")
    targets = ["qkv", "o_proj", "lr_proj", "momentum_proj.0", "ttt_scale_proj", "down_proj", "lm_head"]
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(language(), config)
    output = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(output.loss, loss_of_logits(output.logits))
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        torch.testing.assert_close(run(model.get_base_model()), run(language()))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(run(merged), output.logits, rtol=1e-4, atol=1e-4)


# what PEFT asks of transformers by a deprecated name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("family", ["language", "classifier"])
def test_low_rank_adapters_on_every_linear_layer_train_alike_under_both_kinds_of_checkpointing(family):
    peft = pytest.importorskip("peft")
    base = FAMILIES[family]()
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    assert {"lm_head", "vittt.head"} & set(targets)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
    given = (
        {"input_ids": IDS, "labels": IDS}
        if family == "language"
        else {"pixel_values": PICTURES[0], "labels": IDS[0, :2] % 2}
    )

    def gradients():
        model.zero_grad()
        model(**given).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    assert len(expected) == 2 * len(targets)
    assert all(bool(x.any()) for x in expected.values())
    # without it nothing that enters a recomputed block would ask for gradients
    model.enable_input_require_grads()
    for reentrant in (False, True):
        enable_checkpointing(base, use_reentrant=reentrant)
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-8)


# what PEFT asks of transformers by a deprecated name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_peft_on_fast_weights_is_heeded():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["attn.w1"], init_lora_weights=False)
    model = peft.get_peft_model(language(), config)
    output = model(input_ids=IDS, labels=IDS)
    assert not torch.allclose(output.logits, run(language()))
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_weights_that_lie_on_the_cpu_or_the_disk_compute_as_they_did(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model = language()
    model.save_pretrained(tmp_path / "model")
    places = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "disk"}
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "disk"}
    apart = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "rest", dtype=torch.float64
    )
    assert apart.lm_head.weight.is_meta
    output, expected = apart(IDS, labels=IDS), model(IDS, labels=IDS)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


def test_a_classifiers_weights_that_lie_on_the_disk_compute_as_they_did(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForImageClassification

    model = classifier()
    model.save_pretrained(tmp_path / "model")
    places = {f"vittt.{name}": "disk" if name == "blocks" else "cpu" for name, _ in model.vittt.named_children()}
    apart = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "rest"
    )
    assert apart.vittt.blocks[0].mlp.fc1.weight.is_meta
    torch.testing.assert_close(run(apart), run(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_weights_compute_as_they_did(family):
    accelerate = pytest.importorskip("accelerate")
    model = FAMILIES[family]()
    expected = run(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(run(model), expected)


def test_scenes_belong_to_the_weights_whatever_holds_them():
    accelerate = pytest.importorskip("accelerate")
    model = views()
    scene = model.reconstruct(PICTURES, *CAMERAS)
    expected = model.render(scene, *CAMERAS)
    apart = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    torch.testing.assert_close(apart.render(scene, *CAMERAS), expected)
    torch.testing.assert_close(model.render(apart.reconstruct(PICTURES, *CAMERAS), *CAMERAS), expected)
    adapted = copy.deepcopy(model)
    adapted.mixers[0].to_qkv = Adapted(adapted.mixers[0].to_qkv)
    with pytest.raises(ValueError, match="other weights"):
        adapted.render(scene, *CAMERAS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_layers_compute_near_what_they_did(family):
    model = FAMILIES[family]().float()
    expected = run(model)
    try:
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    except RuntimeError as error:
        pytest.skip(f"no quantized engine: {error}")
    found = run(quantized)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    if family == "language":
        torch.testing.assert_close(quantized(IDS, labels=IDS).loss, loss_of_logits(found))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_given_for_one_call_are_used(family):
    model = FAMILIES[family]()
    own = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Runs(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return run(self.model)

    def call(weights):
        return torch.func.functional_call(Runs(), {f"model.{name}": x for name, x in weights.items()}, ())

    torch.testing.assert_close(call(own), run(model), rtol=0, atol=0)
    other = {name: 1.5 * x for name, x in own.items()}
    assert not torch.allclose(call(other), run(model))


def fast_weights(model):
    """Every fast weight: its module and name."""
    kinds = ("LactLayer", "VitttLayer", "LactNvsLayer", "LowRankMatrix")
    return [
        (m, name)
        for m in model.modules()
        if type(m).__name__ in kinds
        for name, _ in list(m.named_parameters(recurse=False))
        if name.startswith("w")
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_parametrized_weights_are_used_and_trained(family):
    model = FAMILIES[family]()
    expected = run(model)
    for module, name in fast_weights(model):
        parametrizations.weight_norm(module, name)
    torch.testing.assert_close(run(model), expected, rtol=1e-3, atol=1e-5)
    run(model).square().mean().backward()
    originals = [p for name, p in model.named_parameters() if "parametrizations" in name]
    assert originals
    assert all(p.grad is not None for p in originals)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_of_the_first_kind_computes_and_trains_as_the_model_alone(family, original, one_process):
    model = FAMILIES[family]()
    expected = run(model)
    expected.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    sharded = FullyShardedDataParallel(FAMILIES[family](), use_orig_params=original, device_id=torch.device("cpu"))
    if isinstance(model, LactNvs):
        found = sharded(PICTURES, *CAMERAS, *CAMERAS)
    elif family == "language":
        found = sharded(input_ids=IDS, labels=IDS)
        torch.testing.assert_close(found.loss, loss_of_logits(found.logits))
        found = found.logits
    else:
        found = sharded(PICTURES[0])
        found = found if isinstance(found, torch.Tensor) else found.logits
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    found_gradient = torch.cat([p.grad.flatten() for p in sharded.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-6)
