import math

import pytest
import torch
from lact_small import LADDER, small_model, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kvbind
from kvbind.forms.explained.costs import Shapes, training_flops, work
from kvbind.layers.attention.window_attention import window_attention
from kvbind.layers.lact import layer as lact_layer
from kvbind.models.flops import in_place_flops, lact_flops, lact_nvs_flops, llama_flops, vittt_flops, window_pairs
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig
from kvbind.models.lact_nvs.config import INNER_LOOPS as VIEWS_LOOPS
from kvbind.models.peers import in_place_llama, llama
from kvbind.models.vittt import VitttConfig, VitttForImageClassification
from kvbind.models.vittt.released import INNER_LOOPS as IMAGE_LOOPS
from kvbind.tasks.flops import flops_per_unit
from kvbind.tasks.images.config import ImagesDataConfig as ImageData
from kvbind.tasks.language.config import LanguageDataConfig as LanguageData
from kvbind.tasks.views.config import ViewsDataConfig as ViewData
from published import SYSTEMS

LENGTH, CHUNK = 64, 8


@pytest.fixture(autouse=True)
def _pytorch_forms(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "0")


def convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed, more, groups, mask, **kwargs):
    """PyTorch's own formula takes the weight's gradient of a grouped convolution for that of a full one."""
    forward = 2 * math.prod(weight) * math.prod(grad) // grad[1]
    return forward * sum(mask[:2])


def counted(step):
    """What PyTorch's counter counts, by operator."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    ) as counter:
        step().backward()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


CASES = [
    *((name, "recurrent") for name in LADDER),
    *((name, "parallel") for name, rung in LADDER.items() if kvbind.explain(rung).parallel),
]


@pytest.mark.parametrize(("rung", "form"), [case for case in CASES if case != ("rung6", "parallel")])
def test_the_language_models_flops_are_those_that_pytorch_counts(rung, form, monkeypatch):
    # the counter takes masked attention for full: see the test of attention
    monkeypatch.setattr(lact_layer, "window_attention", lambda q, k, v, *args, **kwargs: q * k * v)
    inner = LADDER[rung]
    model = small_model(inner, ttt_form=form).train()
    config, ids = model.config, tokens(1, LENGTH)
    ours = lact_flops(config, LENGTH)
    operators = counted(lambda: model(ids, labels=ids).loss)

    parts = work(inner, Shapes(2, 16, 16, 16, LENGTH))
    last = config.num_hidden_layers * (CHUNK * parts.write + parts.orthogonalize)
    # the last chunk's update, which no token sees: the recurrent form makes it, the parallel form differentiates it too
    unseen = last if form == "recurrent" else 3 * last
    if form == "parallel" and inner.momentum:
        # its scan over chunks, as a product on a CPU: two per pair of chunks and entry of a fast matrix
        unseen += 3 * config.num_hidden_layers * 2 * (LENGTH // CHUNK) ** 2 * 2 * 16 * 16
    needed = sum(ours.values()) - ours["attention"]
    assert sum(operators.values()) == pytest.approx(needed + unseen, rel=1e-9)


@pytest.mark.parametrize(("make", "flops"), [(llama, llama_flops), (in_place_llama, in_place_flops)])
def test_the_flops_of_peers_are_those_that_pytorch_counts(make, flops):
    model = make(small_model(LADDER["rung2"]).config).train()
    inside = getattr(model.config, "text_config", model.config)
    for mlp in getattr(model, "fast_mlps", ()):
        mlp.form = "recurrent"
    ids, ours = tokens(1, LENGTH), flops(model.config, LENGTH)
    with sdpa_kernel(SDPBackend.MATH):
        operators = counted(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    # PyTorch counts what lies behind a token too
    ours["attention"] = inside.num_hidden_layers * 3 * 4 * inside.hidden_size * LENGTH**2
    needed = sum(ours.values())
    # behind the first chunk, what was written is read by itself, where one product with the sum would do
    again = 3 * 2 * inside.hidden_size * inside.intermediate_size * (LENGTH - CHUNK) * (flops is in_place_flops)
    # transformers 5.16 makes the angles of positions by a product
    assert 0 <= sum(operators.values()) - (needed + again) <= 1e-4 * needed
    if flops is in_place_flops:
        assert (
            flops_per_unit(model.config, LanguageData(length=LENGTH)) == sum(flops(model.config, LENGTH).values()) / LENGTH
        )


def test_blocks_of_tokens_cost_more_than_the_definition_where_chunks_are_short():
    inner = LADDER["rung6"]
    model = small_model(inner, ttt_form="parallel").train()
    ids = tokens(1, LENGTH)
    with sdpa_kernel(SDPBackend.MATH):
        operators = counted(lambda: model(ids, labels=ids).loss)
    assert sum(operators.values()) > sum(lact_flops(model.config, LENGTH).values())


def test_counted_and_modelled_flops_of_a_long_sequence_agree_within_three_percent(monkeypatch):
    monkeypatch.setattr(lact_layer, "window_attention", lambda q, k, v, *args, **kwargs: q * k * v)
    length = 1024
    model = small_model(LADDER["rung2"].replace(chunk=64), ttt_form="parallel").train()
    ids = tokens(1, length)
    ours = lact_flops(model.config, length)
    operators = counted(lambda: model(ids, labels=ids).loss)
    assert sum(operators.values()) == pytest.approx(sum(ours.values()) - ours["attention"], rel=0.03)


@pytest.mark.parametrize(("length", "window"), [(1, 1), (5, 9), (9, 5), (40, 7), (16, 16)])
def test_window_pairs_are_those_that_the_mask_lets_through(length, window):
    row, column = torch.arange(length)[:, None], torch.arange(length)
    assert window_pairs(length, window) == int(((column <= row) & (row - column < window)).sum())


def test_attention_is_counted_by_pairs_where_pytorch_counts_whole_blocks():
    length, heads, width = 32, 2, 8
    q, k, v = (torch.randn(1, length, heads, width, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        operators = counted(lambda: window_attention(q, k, v, length).sum())
    # of length x length scores, those on and below the diagonal are needed
    ours = 3 * 4 * heads * width * window_pairs(length, length)
    assert sum(operators.values()) / ours == pytest.approx(2 * length / (length + 1))


@pytest.mark.parametrize("row", ["full", "key", "rung1", "rung3", "rung6", "steps2"])
def test_view_synthesis_flops_are_those_that_pytorch_counts(row):
    inner = VIEWS_LOOPS[row]
    if inner.orthogonalize is not None:
        inner = inner.replace(orthogonalize=inner.orthogonalize.replace(dtype=torch.float32))
    config = LactNvsConfig(dim=32, layers=2, patch_size=4, head_dim=8, fast_head_dim=16, inner=inner)
    model, size, inputs, targets = LactNvs(config).train(), (8, 12), 3, 2
    poses = torch.eye(4).expand(1, inputs + targets, 4, 4)
    lenses = torch.tensor([10.0, 10, 6, 4]).expand(1, inputs + targets, 4)
    image = torch.rand(1, inputs, 3, *size)

    def step():
        views = (poses[:, :inputs], lenses[:, :inputs], poses[:, inputs:], lenses[:, inputs:])
        return model(image, *views).square().mean()

    with sdpa_kernel(SDPBackend.MATH):
        operators = counted(step)
    # cameras' rays are the difference
    assert sum(operators.values()) == pytest.approx(sum(lact_nvs_flops(config, size, inputs, targets).values()), rel=1e-4)


IMAGE_SIZES = {
    "plain": {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4},
    "oblong": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": (2, 8), "in_chans": 1},
    "hierarchical": {"embed_dim": [8, 16], "depth": [1, 2], "num_heads": [2, 2]},
}


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("row", ["full", "rung1", "rung3", "rung6"])
def test_image_flops_are_those_that_pytorch_counts(size, row):
    inner, inner_conv = IMAGE_LOOPS[row]
    config = VitttConfig(**IMAGE_SIZES[size], inner=inner, inner_conv=inner_conv, num_labels=7)
    model, images = VitttForImageClassification(config).train(), torch.rand(2, config.in_chans, 32, 48)
    operators = counted(lambda: model(images, labels=torch.zeros(2, dtype=torch.long)).loss)

    # the fast convolution's products are elementwise, which the counter leaves out
    grids = {"plain": [(96, 48, 2)], "oblong": [(96, 16, 1)], "hierarchical": [(96, 8, 1), (24, 16, 2)]}[size]
    heads = config.num_heads if isinstance(config.num_heads, list) else [config.num_heads]
    elementwise = sum(
        depth * training_flops(inner_conv, Shapes(1, dim // of, dim // of, dim // of, length))
        for (length, dim, depth), of in zip(grids, heads, strict=True)
    )
    needed = sum(vittt_flops(config, (32, 48)).values()) - elementwise
    assert sum(operators.values()) / 2 == pytest.approx(needed, rel=1e-9)


def test_inner_loops_count_what_their_outputs_need():
    past = LADDER["rung0"]
    shapes = Shapes(heads=2, key_width=4, value_width=6, hidden=5, tokens=3 * CHUNK)
    parts = work(past, shapes)
    assert training_flops(past, shapes) == 3 * (24 * parts.read + 16 * parts.write + 2 * parts.orthogonalize)
    assert training_flops(past, shapes.replace(tokens=CHUNK)) == 3 * CHUNK * parts.read
    after = past.replace(visibility="chunk")
    assert training_flops(after, shapes) == 3 * (24 * (parts.read + parts.write) + 3 * parts.orthogonalize)
    full = past.replace(visibility="full", chunk=None)
    assert training_flops(full, shapes, 10) == 3 * (24 * parts.read + 10 * parts.write + parts.orthogonalize)
    assert training_flops(full, shapes, 0) == 3 * 24 * parts.read


def test_a_task_counts_flops_per_token_image_or_view():
    language = small_model().config
    assert flops_per_unit(language, LanguageData(length=LENGTH)) == sum(lact_flops(language, LENGTH).values()) / LENGTH
    image = VitttConfig()
    assert flops_per_unit(image, ImageData(size=32)) == sum(vittt_flops(image, (32, 32)).values())
    views = LactNvsConfig()
    scene = sum(lact_nvs_flops(views, (16, 32), 3, 2).values())
    assert flops_per_unit(views, ViewData(size=(16, 32), inputs=3, targets=2)) == scene / 5
    with pytest.raises(TypeError, match="model must be a LactConfig, InPlaceConfig, VitttConfig or LactNvsConfig; got dict"):
        flops_per_unit({}, LanguageData())


def test_what_does_not_fit_is_refused_by_name():
    shapes = Shapes(tokens=8)
    with pytest.raises(ValueError, match="written must be None unless visibility is 'full'; got 3 under 'past'"):
        training_flops(LADDER["rung0"], shapes, 3)
    with pytest.raises(ValueError, match="written must be from 0 to the number of tokens, 8; got 9"):
        training_flops(kvbind.systems.lact_nvs(), shapes, 9)
    with pytest.raises(ValueError, match="length must be an int of at least 1; got 0"):
        lact_flops(small_model().config, 0)
    with pytest.raises(ValueError, match="size must be multiples of the patches' side, 8; got 12 x 16"):
        lact_nvs_flops(LactNvsConfig(), (12, 16), 1, 1)
    with pytest.raises(ValueError, match="size must be multiples of the patch's, 16 x 16; got 24 x 32"):
        vittt_flops(VitttConfig(), (24, 32))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if not SYSTEMS[name].refresh])
def test_flops_of_published_systems_are_those_that_pytorch_counts(name):
    """Of linear recurrences; the others are counted forward, in the tests of `explain`, as they take minutes backward."""
    model = small_model(SYSTEMS[name], projections=name, ttt_form="recurrent").train()
    ids = tokens(1, LENGTH)
    operators = counted(lambda: model(ids, labels=ids).loss)
    # of the first token's read of zero weights, which are no parameters, no gradient is made
    assert sum(operators.values()) == pytest.approx(sum(lact_flops(model.config, LENGTH).values()), rel=1e-3)
