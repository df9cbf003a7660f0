"""The kernel of cross-entropy against its reference."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import kvbind.kernels.elementwise.cross_entropy_kernels as kernels
from kvbind.kernels.elementwise.cross_entropy import cross_entropy_, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -7


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")


def make(rows, vocabulary, dtype=torch.float32, spread=3.0):
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::3] = IGNORED
    return logits.to(DEVICE), labels.to(DEVICE)


def compare(logits, labels, bound):
    gradient, exact = logits.clone(), logits.double()
    losses = cross_entropy_(gradient, labels, IGNORED, gradient=True)
    expected = reference(exact, labels, IGNORED, gradient=True)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert (gradient.double() - exact).norm() <= bound * exact.norm()
    kept = logits.clone()
    torch.testing.assert_close(cross_entropy_(kept, labels, IGNORED, gradient=False), losses, rtol=0, atol=0)
    torch.testing.assert_close(kept, logits, rtol=0, atol=0)


@given(st.integers(1, 5), st.integers(1, 70))
@settings(max_examples=15)
def test_losses_and_gradients_for_any_vocabulary(rows, vocabulary):
    compare(*make(rows, vocabulary), 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_a_row_of_several_blocks(monkeypatch, dtype, bound):
    monkeypatch.setattr(kernels, "BLOCK", 32)
    compare(*make(7, 150, dtype), bound)


def test_logits_of_any_size_neither_overflow_nor_hide():
    logits, labels = make(6, 40, spread=3e4)
    logits[1, 5], logits[2, :] = float("-inf"), 1e4
    labels[1:3] = 7
    compare(logits, labels, 1e-5)


def test_a_label_outside_of_the_vocabulary_shows_in_the_loss():
    logits, labels = make(4, 10)
    labels[1:3] = torch.tensor([10, -1])
    losses = cross_entropy_(logits, labels, IGNORED, gradient=True)
    assert losses.isnan().tolist() == [False, True, True, False]


def test_rows_of_no_tokens_and_ignored_ones_have_no_loss():
    logits, labels = make(3, 10)
    assert cross_entropy_(logits[:0], labels[:0], IGNORED, gradient=True).shape == (0,)
    assert cross_entropy_(logits, labels.fill_(IGNORED), IGNORED, gradient=True).eq(0).all()
    assert logits.eq(0).all()


def test_what_ignored_rows_hold_does_not_matter():
    logits, labels = make(4, 10)
    logits[0, 2], logits[3] = float("inf"), float("nan")
    losses = cross_entropy_(logits, labels, IGNORED, gradient=True)
    assert losses.isfinite().all()
    assert logits.isfinite().all()
    assert logits[0].eq(0).all()
    assert logits[3].eq(0).all()


def test_strided_logits_are_refused():
    logits, labels = make(4, 10)
    with pytest.raises(ValueError, match="logits must be contiguous; got strides"):
        cross_entropy_(logits.T.contiguous().T, labels, IGNORED, gradient=False)


def test_is_an_operator_that_pytorch_can_trace():
    torch.library.opcheck(torch.ops.kvbind.cross_entropy_.default, (*make(3, 9), IGNORED, True))
