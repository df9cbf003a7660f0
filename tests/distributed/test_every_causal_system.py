"""Every causal system, as fast weights of a language model: packed, generated, written and read, cut over two ranks."""

import pytest
import torch
from jobs import distance, make_model, model_alone, model_over_ranks
from lact_small import tokens
from ranks import started

from kvbind import NewtonSchulz
from kvbind.inner.systems import PROJECTIONS
from kvbind.inner.systems.registry import SYSTEMS as REGISTERED
from kvbind.models import LactForCausalLM
from published import SYSTEMS as PUBLISHED

CHUNK = 8


def short(name):
    """The system with short chunks and spans, and products that float64 has digits for."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    inner = REGISTERED[name]()
    exact = inner.orthogonalize and NewtonSchulz(inner.orthogonalize.coefficients, dtype=torch.float64)
    return inner.replace(chunk=CHUNK, orthogonalize=exact)


CAUSAL = {name: short(name) for name, make in REGISTERED.items() if make().visibility in ("past", "token")}
"""What shows no token its future; lact_video's tokens see the end of their chunk."""


def fields(name):
    """The layer that was published with it, or that of the language model."""
    return {"projections": name} if name in PROJECTIONS else {}


def model_of(name):
    return make_model(CAUSAL[name], fields(name)).eval()


@pytest.fixture(scope="module")
def ranks():
    with started() as pool:
        yield pool


def test_there_are_as_many_as_are_listed():
    assert len(CAUSAL) > 15
    assert {"lact_llm", "in_place_ttt", "ttt_mlp", "titans", "atlas", "rwkv7", "delta_product"} < set(CAUSAL)


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_documents_are_as_if_apart(name):
    model, lengths = model_of(name), [5, 13, 1]
    ids = tokens(1, sum(lengths))
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, 5, 18, 19])).logits
        alone = [model(part).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_is_the_full_forward_pass_of_what_came_before(name):
    model, ids = model_of(name), tokens(2, CHUNK + 3)
    options = {"max_new_tokens": CHUNK, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, use_cache=True, **options)
    assert found.sequences.shape[1] == ids.shape[1] + CHUNK
    with torch.no_grad():
        for step, logits in enumerate(found.logits):
            whole = model(found.sequences[:, : ids.shape[1] + step], use_cache=False).logits[:, -1]
            # generate hands on logits in float32
            torch.testing.assert_close(logits, whole.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_that_is_read_back_goes_on_generating_the_same(name, tmp_path):
    model, ids = model_of(name).float(), tokens(1, CHUNK + 3)
    model.save_pretrained(tmp_path)
    read = LactForCausalLM.from_pretrained(tmp_path)
    assert read.config.inner == CAUSAL[name]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_two_ranks_are_one(name, ranks):
    # the second slice begins inside a span
    lengths = [CHUNK + 2, CHUNK + 1]
    ids = tokens(1, sum(lengths))
    batch = {"input_ids": ids, "labels": ids}
    loss, gradients = model_alone(CAUSAL[name], batch, fields(name))
    results = ranks.run(model_over_ranks, 2, CAUSAL[name], batch, lengths, "auto", fields(name), False)
    assert distance(sum(r[0] for r in results), loss) < 1e-9
    for parameter, want in gradients.items():
        assert distance(sum(r[1][parameter] for r in results), want) < 1e-9, parameter
    assert sum(results[1][2].values()) > 0
