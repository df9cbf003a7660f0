"""`torch.export` of every family, for any batch and length; ONNX where its packages are; and what cannot be exported."""

import pytest
import torch
from lact_small import small_model, tokens
from torch.export import Dim, export

import kvbind
from kvbind.models import vittt
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig


def sizes(name, most=64, least=1):
    return Dim(name, min=least, max=most)


def pictures(batch, height, width):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def cameras(batch, views):
    poses = torch.eye(4).repeat(batch, views, 1, 1)
    poses[..., 0, 3] = torch.arange(views) / 4
    return poses, torch.tensor([8.0, 8, 4, 4]).repeat(batch, views, 1)


def scene(batch, views, targets):
    image = torch.rand(batch, views, 3, 8, 8, generator=torch.Generator().manual_seed(views))
    return (image, *cameras(batch, views), *cameras(batch, targets))


def language():
    batch, length = sizes("batch"), sizes("length", 4096, least=2)
    # shorter than a chunk and the window, and longer than several
    return small_model(), (tokens(2, 21),), ({0: batch, 1: length},), [(tokens(1, 3),), (tokens(3, 45),)]


def plain():
    torch.manual_seed(0)
    model = vittt.Vittt(8, 1, 2, 4, num_classes=2, initializer_range=0.3).eval()
    shapes = {0: sizes("batch"), 2: 4 * sizes("rows", least=2), 3: 4 * sizes("columns", least=2)}
    return model, (pictures(2, 8, 12),), (shapes,), [(pictures(1, 16, 8),), (pictures(3, 12, 20),)]


def hierarchical():
    torch.manual_seed(0)
    model = vittt.HierarchicalVittt((8, 16), (1, 1), (2, 2), num_classes=2, initializer_range=0.3).eval()
    shapes = {0: sizes("batch"), 2: 8 * sizes("rows", least=2), 3: 8 * sizes("columns", least=2)}
    return model, (pictures(2, 32, 48),), (shapes,), [(pictures(1, 16, 32),), (pictures(3, 64, 16),)]


def classifier():
    torch.manual_seed(0)
    model = vittt.VitttForImageClassification(vittt.VitttConfig(8, 1, 2, 4, num_labels=2, initializer_range=0.3)).eval()
    return model, (pictures(2, 8, 8),), ({0: sizes("batch")},), [(pictures(1, 8, 8),), (pictures(5, 8, 8),)]


def views():
    torch.manual_seed(0)
    model = LactNvs(LactNvsConfig(dim=16, layers=1, patch_size=4, head_dim=8, fast_head_dim=16)).eval()
    batch, seen, wanted = sizes("batch"), sizes("views"), sizes("targets")
    shapes = (*({0: batch, 1: seen},) * 3, *({0: batch, 1: wanted},) * 2)
    return model, scene(2, 3, 2), shapes, [scene(1, 2, 4), scene(3, 5, 1)]


FAMILIES = {f.__name__: f for f in (language, plain, hierarchical, classifier, views)}


def values(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_exported_program_computes_what_the_model_does_at_every_size(family, tmp_path):
    model, args, shapes, others = FAMILIES[family]()
    model.double()
    wide = lambda given: tuple(x.double() if x.is_floating_point() else x for x in given)  # noqa: E731
    program = export(model, wide(args), dynamic_shapes=shapes, strict=False)
    if family == "language":
        torch.export.save(program, tmp_path / "model.pt2")
        program = torch.export.load(tmp_path / "model.pt2")
    for given in (args, *others):
        expected = values(model(*wide(given)))
        # learning rates over a length that is a symbol are divided in float32
        torch.testing.assert_close(values(program.module()(*wide(given))), expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_call_of_ttt_is_exported_with_its_state():
    spec = kvbind.systems.lact_llm(chunk=4)

    class Mixer(torch.nn.Module):
        def forward(self, weights, q, k, v, lr, momentum):
            return kvbind.ttt(spec, weights, q, k, v, lr=lr, momentum=momentum)

    weights = spec.network.initial(heads=2, key_width=8, value_width=8)

    def operands(batch):
        generator = torch.Generator().manual_seed(batch)
        q, k, v = (torch.randn(batch, 10, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
        return weights, q, k, v, q[..., 0].sigmoid(), q[..., 1].sigmoid()

    shapes = (dict.fromkeys(weights), *({0: sizes("batch")},) * 5)
    program = export(Mixer(), operands(2), strict=False, dynamic_shapes=shapes)
    (y, state), (expected, after) = program.module()(*operands(3)), Mixer()(*operands(3))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert state.pending_lengths == after.pending_lengths
    torch.testing.assert_close(dict(state.tensors), dict(after.tensors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_onnx_computes_what_the_model_does(family, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, args, shapes, others = FAMILIES[family]()
    if family == "language":
        # chunks are written out, so the length is one: shorter rows end in padding, which they do not see
        shapes = ({0: shapes[0][0]},)
        others = [(torch.cat((ids, tokens(len(ids), 21 - ids.shape[1])), 1),) for ids in (tokens(1, 3), tokens(4, 20))]
    if family == "views":
        # ONNX Runtime has no bfloat16 on CPUs
        model.inner = model.inner.replace(orthogonalize=model.inner.orthogonalize.replace(dtype=torch.float32))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, args, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for given in others:
        named = dict(zip((x.name for x in session.get_inputs()), (x.numpy() for x in given), strict=True))
        found = torch.from_numpy(session.run(None, named)[0])
        torch.testing.assert_close(found, values(model(*given)), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_exported_says_what_can(monkeypatch):
    model, (ids,), _, _ = language()
    for name, x in {
        "attention_mask": torch.ones(2, 21),
        "position_ids": torch.arange(21)[None],
        "cu_seqlens": [0, 42],
    }.items():
        with pytest.raises(ValueError, match=rf"{name} must be None in torch.export.*put padding behind"):
            export(model, (ids,), {name: x}, strict=False)
    with pytest.raises(ValueError, match=r"use_cache must be False in torch.export"):
        export(model, (ids,), {"use_cache": True}, strict=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ValueError, match=r"input_ids must have one length in ONNX.*torch.export takes any length"):
        export(model, (ids,), dynamic_shapes=({1: sizes("length", 4096, least=2)},), strict=False)
