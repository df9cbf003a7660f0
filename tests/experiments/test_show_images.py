import pytest
import torch
from PIL import Image

from kvbind.cli import main
from kvbind.experiments.saved_models.attention_maps import read_place, show, spread
from kvbind.experiments.training.runs import train_run
from kvbind.models import vittt
from kvbind.tasks import images
from kvbind.tasks.images.attention import effective_attention
from kvbind.train.config import read_config

SMALL = ["model.fields.embed_dim=16", "model.fields.depth=3", "model.fields.num_heads=2", "model.fields.patch_size=2",
         "train.steps=2", "train.warmup=1", "train.device=cpu", "data.batch=16"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = images.resolve(read_config(images.Config, images.PRESETS, "digits", SMALL))
    return train_run("images", config, folder).folder


def drawn(path):
    with Image.open(path) as picture:
        return picture.size, len(picture.convert("RGB").getcolors(2**20))


def test_the_picture_shows_the_layers_and_queries_asked_for(run, tmp_path):
    answer = show(run, tmp_path / "all.png")
    assert answer["layers"] == [0, 1, 2]
    assert answer["queries"] == [(1, 2), (2, 2), (3, 2)]
    few = show(run, tmp_path / "few.png", image=5, places=[(0.0, 0.99)], layers=[2])
    assert (few["layers"], few["queries"]) == ([2], [(0, 3)])
    (wide, high), colours = drawn(tmp_path / "all.png")
    (narrow, low), _ = drawn(tmp_path / "few.png")
    assert wide > 2 * narrow
    assert high > 1.5 * low
    assert colours > 100


def test_the_command_draws_and_says_what_the_model_saw(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["show", "images", str(run), "--out", str(tmp_path / "x.png"), "--at", "0.5,0.5", "--layer", "1"])
    assert not caught.value.code
    assert "class " in capsys.readouterr().out
    assert drawn(tmp_path / "x.png")[1] > 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": 359}, "image must be from 0 to 358, the held-out images; got 359"),
        ({"layers": [3]}, "layers must be from 0 to 2; got 3"),
        (
            {"places": [(0.5, 1.0)]},
            r"places must be fractions of the height and the width, from 0 and below 1; got \(0.5, 1.0\)",
        ),
    ],
)
def test_what_does_not_exist_is_refused(run, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        show(run, tmp_path / "x.png", **fields)
    assert not (tmp_path / "x.png").exists()


def test_places_are_read_from_text():
    assert read_place("0.25,0.5") == (0.25, 0.5)
    for text in ("0.5", "a,b", "1,2,3"):
        with pytest.raises(ValueError, match="at must be two fractions"):
            read_place(text)


def test_layers_are_spread_over_the_depth():
    assert (spread(12, 4), spread(3, 4), spread(1, 4)) == ([0, 4, 7, 11], [0, 1, 2], [0])


def test_the_weights_are_those_by_which_the_layers_outputs_hold_their_values():
    torch.manual_seed(0)
    # one head of one channel and one channel of convolution: no mean over channels hides anything
    model = vittt.Vittt(embed_dim=1, depth=2, num_heads=1, patch_size=2, num_classes=3, initializer_range=0.8).double()
    for block in model.blocks:
        block.norm1 = block.norm2 = torch.nn.Identity()  # which would leave nothing of a single channel
    seen = {}

    def look(mixer, arguments):
        seen["calls"] = mixer.calls(*arguments)

    with model.mixers[1].register_forward_pre_hook(look):
        (found,) = effective_attention(model, 4 * torch.randn(3, 4, 6).double(), [1])
    assert (found.layer, found.grid) == (1, (2, 3))
    for branch, call in zip(("heads", "conv"), seen["calls"], strict=True):
        attention = call.linearize()
        held = getattr(found, branch).double() @ attention.v[0, :, 0]
        expected = call.run()[0].reshape(6, 1) - attention.initial_output()[0, :, 0]
        # the picture's weights are float32
        torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-9)
        assert found.of(branch, 4).shape == (2, 3)
        assert float(expected.detach().abs().max()) > 1e-6


def test_looking_leaves_the_model_as_it_was():
    model = vittt.Vittt(embed_dim=8, depth=2, num_heads=2, patch_size=2, num_classes=3, drop_path_rate=0.5).train()
    effective_attention(model, torch.randn(3, 4, 4), [0, 1])
    assert model.training
    assert not any(mixer._forward_pre_hooks for mixer in model.mixers)
