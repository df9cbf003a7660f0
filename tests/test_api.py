"""The public names: there, typed (`typed_api.py`, under `mypy`), shipped with `py.typed`, and documented by what runs."""

import re
from pathlib import Path

import pytest
import torch

import kvbind
import kvbind.layers
import typed_api

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", [kvbind, kvbind.layers], ids=lambda module: module.__name__)
def test_every_public_name_is_there_and_used_by_the_typed_user(module):
    text = Path(typed_api.__file__).read_text()
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
        assert re.search(rf"\b{name}\b", text), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_typed_user_runs(alone, capsys):
    for spec in typed_api.inner_loops():
        y, state = typed_api.calls(spec)
        assert y.shape == (2, 8, 2, 4)
        assert state.batch == 1
    assert typed_api.rows(8)["input_ids"].shape == (1, 8)
    y, kept, state = typed_api.Mixed(16)(torch.randn(2, 8, 16))
    assert (y.shape, kept.seen, state.batch) == ((2, 8, 16), (8, 8), 2)
    mlp = torch.nn.Module()
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))
    mlp.act_fn = torch.nn.SiLU()
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert typed_api.fast_mlp(mlp, torch.randn(2, 9, 8)).shape == (2, 9, 8)
    assert "this one has none" in capsys.readouterr().out


def test_the_model_of_the_layers_page_learns_its_text():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/layers.md").read_text(), re.S)[1]
    names = {}
    torch.manual_seed(0)
    exec(compile(code, "docs/layers.md", "exec"), names)
    assert names["loss"] < 0.5
    # one token at a time is what all at once gives
    model, ids = names["model"], names["ids"][:, :60]
    with torch.no_grad():
        whole, _ = model(ids)
        parts, states = [], None
        for token in ids[:, :10].split(5, 1):
            logits, states = model(token, states)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :10], rtol=1e-3, atol=1e-3)
