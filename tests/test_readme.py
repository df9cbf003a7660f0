import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_example_of_the_readme_runs(capsys):
    code = re.search(r"```python\n(.*?)```", PAGES[0].read_text(), re.S).group(1)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "parallel: no, because" in printed
    assert "torch.Size([2, 4, 128, 128])" in printed


def test_the_network_of_ones_own_runs_and_has_the_gradients_it_says(capsys):
    code = re.search(r"A network of your own.*?```python\n(.*?)```", (ROOT / "docs" / "forms.md").read_text(), re.S).group(1)
    names: dict[str, Any] = {}
    exec(compile(code, "forms.md", "exec"), names)
    assert "parallel: yes, " in capsys.readouterr().out
    network, one = names["spec"].network, dict.fromkeys(("in", "out"), 1.0)
    weights = {name: x[0].double() for name, x in names["weights"].items()}
    k, v = (names[name][0, :, 0].double() for name in "kv")
    expected = torch.func.grad(lambda weights: (network.apply(weights, k) * v).sum())(weights)
    found = network.gradients(weights, k, v, one, ("in", "out"))
    assert all(torch.allclose(found[name], expected[name]) for name in one)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
