"""The kernels of the chunkwise parallel form compile for GPUs that are not there, at LaCT's real width, and fit them.

They do so in a process of its own: whether kernels are compiled or interpreted is settled when they are imported.
"""

import json
import sys
from dataclasses import asdict

import pytest

from uninterpreted import printed_by

pytest.importorskip("triton")

WIDTH, CHUNK, TOKENS, MATRICES = 384, 256, 512, 64
SHARED = {90: 227 << 10, 80: 163 << 10, 100: 227 << 10}
"""Bytes of shared memory that a block may have, by compute capability."""
LENGTHS = (90, 80)
"""Compute capabilities for which the kernels of sequences of any lengths are compiled."""
REGISTERS = 64 << 10
"""Of a multiprocessor."""
STACK = 64
"""Bytes of stack per thread, beyond which a kernel spills in earnest."""
NEWTON_SCHULZ = {"_products_forward", "_products_backward"}
FETCHING = {90: "wgmma", 100: "tcgen05"}
"""Matrix units, by compute capability, of devices that fetch the operands of products of equal chunks."""
PRODUCTS = {"_product_kernel", "_features_kernel", "_features_backward_kernel", "_write_kernel", *NEWTON_SCHULZ}
OTHERS = {"_forward_kernel", "_backward_kernel", "_cast", "_undo_norm"}


def fits(kernel, capability):
    """Whether a device can run a kernel, and without spilling."""
    return kernel.stack <= STACK and kernel.shared <= SHARED[capability]


def compile_for(capability):
    """What the launches of a forward and a backward call compile to; of configurations, those up to one that fits.

    With them, for Hopper, the products of Newton-Schulz for many matrices.
    """
    import torch
    from compiling import compiling

    from kvbind import NewtonSchulz
    from kvbind.kernels.chunked.operator import chunked
    from kvbind.kernels.chunked.span_tables import chunked_layout
    from kvbind.kernels.newton_schulz.operator import newton_schulz

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    q, k, v = (zeros(TOKENS, 1, WIDTH, dtype=torch.bfloat16) for _ in range(3))
    layout = chunked_layout((TOKENS,), (0,), (TOKENS,), CHUNK, False, True, 9, q.device)
    with compiling(capability, lambda kernel: fits(kernel, capability)) as found:
        output, *_ = chunked(
            q, k, v, layout, zeros(1, 1, WIDTH, WIDTH), theta=zeros(2, 1, 1, WIDTH, WIDTH), activation="silu",
            rates=zeros(TOKENS, 1), momentum=zeros(TOKENS // CHUNK, 1), velocity=zeros(1, 1, WIDTH, WIDTH),
            coefficients=NewtonSchulz().coefficients,
        )  # fmt: skip
        output.sum().backward()
    if capability == 90:
        # enough matrices for large tiles
        with compiling(capability) as many:
            newton_schulz(zeros(MATRICES, WIDTH, WIDTH), NewtonSchulz().coefficients).sum().backward()
        found += [kernel for kernel in many if kernel.name in NEWTON_SCHULZ]
    return found


def compile_equal_chunks_for(capability):
    """What forward and backward calls on equal chunks compile to: features of both kinds, rates, every scan."""
    import torch
    from compiling import compiling

    from kvbind import NewtonSchulz
    from kvbind.kernels.equal_chunks.call_shapes import CallShapes
    from kvbind.kernels.equal_chunks.operator import LaunchPlan
    from kvbind.kernels.equal_chunks.tma_products import Theta, TokenRows

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    found = []
    rule, low = NewtonSchulz().coefficients, torch.bfloat16
    for chunk, theta, rated, momentum, coefficients in (
        (CHUNK, Theta(2, 1, WIDTH, "silu"), True, True, rule),
        (CHUNK, None, True, True, ()),
        (64, None, True, False, ()),
    ):
        q, k, v = (zeros(1, TOKENS, 1, WIDTH, dtype=low) for _ in range(3))
        gate, start = zeros(1, TOKENS, 1), zeros(1, WIDTH, WIDTH)
        matrices = [] if theta is None else [zeros(1, WIDTH, WIDTH) for _ in range(theta.factors)]
        rows = [TokenRows.of(x) for x in (q, k, v)]
        shapes = CallShapes(
            *rows, chunk, False, 1.0, theta, (0, WIDTH**2), gate.stride() if rated else None, momentum, momentum,
            coefficients, low,
        )  # fmt: skip
        with compiling(capability) as compiled:
            gates = [gate if there else None for there in (rated, momentum, momentum)]
            output, end, _ = LaunchPlan(shapes, q).run(q, k, v, *gates, start, matrices)
            (output.sum() + end.sum()).backward()
        found += [kernel for kernel in compiled if kernel.name not in NEWTON_SCHULZ | {"_cast", "_undo_norm"}]
    return found


@pytest.fixture(scope="module")
def every():
    """By compute capability, every kernel that was compiled: of sequences of any lengths, and of equal chunks."""
    return {name: {int(n): x for n, x in kernels.items()} for name, kernels in printed_by(__file__).items()}


@pytest.fixture(scope="module")
def compiled(every):
    """Those of sequences of any lengths."""
    return every["any"]


@pytest.mark.parametrize("capability", FETCHING)
def test_equal_chunks_fit_where_their_operands_are_fetched_without_a_spill(every, capability):
    kernels = every["equal"][capability]
    products = {"_product_kernel", "_write_kernel", "_features_kernel", "_features_backward_kernel"}
    assert {kernel["name"] for kernel in kernels} == {*products, "_rated_kernel", "_forward_kernel", "_backward_kernel"}
    for kernel in kernels:
        assert kernel["fits"], kernel
        if kernel["name"] in products:
            assert (kernel["stack"], kernel["tensor_cores"]) == (0, FETCHING[capability]), kernel


@pytest.mark.parametrize("capability", LENGTHS)
def test_every_kernel_has_a_configuration_that_fits_without_spilling(compiled, capability):
    best = {}
    for kernel in compiled[capability]:
        tiling = ("BM", "BN", "BK", "TILE", "num_warps", "num_stages", "num_ctas")
        work = kernel["name"], *sorted((n, str(x)) for n, x in kernel["options"].items() if n not in tiling)
        best[work] = best.get(work, False) or kernel["fits"]
    assert {work[0] for work in best} == PRODUCTS | OTHERS
    assert [work for work, found in best.items() if not found] == []


@pytest.mark.parametrize(("capability", "units"), [(90, "wgmma"), (80, "mma")])
def test_products_of_bfloat16_are_on_tensor_cores(compiled, capability, units):
    assert {kernel["tensor_cores"] for kernel in compiled[capability] if kernel["name"] in PRODUCTS} == {units}


@pytest.mark.parametrize("tile", [64, 128])
def test_a_program_of_newton_schulz_waits_while_others_of_its_multiprocessor_compute(compiled, tile):
    kernels = [x for x in compiled[90] if x["name"] in NEWTON_SCHULZ and x["options"]["TILE"] == tile]
    assert {x["name"] for x in kernels} == NEWTON_SCHULZ
    for kernel in kernels:
        threads = 32 * kernel["options"]["num_warps"]
        assert min(REGISTERS // (kernel["registers"] * threads), SHARED[90] // kernel["shared"]) >= 2
        assert kernel["fits"]


def written(kernels, capability):
    return [asdict(kernel) | {"fits": fits(kernel, capability)} for kernel in kernels]


if __name__ == "__main__":
    lengths = {n: written(compile_for(n), n) for n in LENGTHS}
    json.dump({"any": lengths, "equal": {n: written(compile_equal_chunks_for(n), n) for n in FETCHING}}, sys.stdout)
