"""Which steps are captured, on a stand-in for CUDA whose graphs call what they captured."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from kvbind.kernels.launching import cuda_graphs

DEVICE = torch.device("cuda", 0)


class Graph:
    def __init__(self):
        self.captured = None

    def replay(self):
        self.captured()


@pytest.fixture
def cuda(monkeypatch):
    """A `torch.cuda` whose graphs record, instead of running, the step that runs while they capture."""
    state = SimpleNamespace(capturing=None, outer=False, log=[])

    @contextlib.contextmanager
    def capture(graph, **_):
        state.capturing = graph
        yield
        state.capturing = None
        state.log.append("captured")

    fake = SimpleNamespace(
        CUDAGraph=Graph,
        Event=lambda: SimpleNamespace(
            record=lambda stream: state.log.append("recorded"), synchronize=lambda: state.log.append("finished")
        ),
        Stream=object,
        current_stream=lambda: SimpleNamespace(wait_event=lambda event: state.log.append("waited")),
        device=lambda _: contextlib.nullcontext(),
        graph=capture,
        is_current_stream_capturing=lambda: state.outer,
        is_initialized=lambda: True,
    )
    monkeypatch.setattr(
        cuda_graphs, "torch", SimpleNamespace(cuda=fake, device=torch.device, inference_mode=torch.inference_mode)
    )
    monkeypatch.delenv("KVBIND_GRAPHS", raising=False)
    cuda_graphs.clear()
    yield state
    cuda_graphs.clear()


class Step:
    def __init__(self, state):
        self.state, self.runs = state, 0

    def run(self):
        if self.state.capturing is not None:
            self.state.capturing.captured = self.count
        else:
            self.count()

    def count(self):
        self.runs += 1


def use(cuda, key, times=1):
    with cuda_graphs.repeated(key, DEVICE, lambda: Step(cuda)) as (step, run):
        before = step.runs
        for _ in range(times):
            run()
        assert step.runs == before + times
        return step


def test_the_first_use_launches_and_later_ones_replay(cuda):
    first = use(cuda, "a", 3)
    assert cuda.log == []
    second = use(cuda, "a", 3)
    assert cuda.log == ["waited", "captured", "recorded"]
    assert use(cuda, "a") is second is not first
    assert cuda.log == ["waited", "captured", "recorded", "waited", "recorded"]


def test_keys_have_graphs_of_their_own_and_the_oldest_goes(cuda):
    steps = {}
    for key in range(cuda_graphs.CAPACITY + 1):
        use(cuda, key)
        steps[key] = use(cuda, key)
        assert use(cuda, 0) is steps[0]
    assert use(cuda, cuda_graphs.CAPACITY) is steps[cuda_graphs.CAPACITY]
    assert cuda.log.count("finished") == 1
    assert use(cuda, 1) is not steps[1]
    assert cuda.log.count("captured") == cuda_graphs.CAPACITY + 2
    # what is dropped may be at work on another stream
    assert cuda.log.count("finished") == 2


@pytest.mark.parametrize("why", ["switched off", "inside another capture", "not CUDA"])
def test_nothing_is_captured_where_it_cannot_or_must_not_be(cuda, monkeypatch, why):
    device = DEVICE
    if why == "switched off":
        monkeypatch.setenv("KVBIND_GRAPHS", "0")
    elif why == "inside another capture":
        cuda.outer = True
    else:
        device = torch.device("cpu")
    steps = []
    for _ in range(3):
        with cuda_graphs.repeated("a", device, lambda: Step(cuda)) as (step, run):
            run()
            steps.append(step)
    assert [step.runs for step in steps] == [1, 1, 1]
    assert len({id(step) for step in steps}) == 3
    assert cuda.log == []


def test_buffers_made_for_inference_serve_training(cuda):
    made = []

    def make():
        made.append(torch.zeros(2))
        return Step(cuda)

    with torch.inference_mode():
        for _ in range(2):
            with cuda_graphs.repeated("a", DEVICE, make) as (_, run):
                run()
    assert [x.is_inference() for x in made] == [True, False]


def test_a_step_is_free_again_after_an_error(cuda):
    for _ in range(3):
        with pytest.raises(RuntimeError, match="meant"), cuda_graphs.repeated("a", DEVICE, lambda: Step(cuda)):
            raise RuntimeError("meant")
    use(cuda, "a")
