"""Memory that nothing has written holds NaN while kernels are tested on the CPU, so that what reads it is seen."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_no_number():
    # on GPUs operators that have no other way would refuse
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
