"""Live bytes against sums by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from scaling.profile.live import LiveBytes

CPU = torch.device("cpu")
FLOAT = 4


@pytest.fixture
def live():
    with LiveBytes(CPU, rounding=1) as counting:
        yield counting


def test_views_cost_nothing_and_what_is_dropped_is_gone(live):
    a = torch.empty(100)
    b = a.view(10, 10)[2:].t()
    assert live.live == {"other": 400}
    c = b.contiguous()
    assert live.live == {"other": 400 + 320}
    del a
    assert live.live == {"other": 720}, "the view still holds it"
    del b
    assert live.live == {"other": 320}
    c.mul_(2)
    del c
    assert live.live == {} and live.peak.bytes == 720


def test_blocks_are_rounded_up_as_cuda_does():
    with LiveBytes(CPU) as live:
        keep = [torch.empty(1), torch.empty(128), torch.empty(129)]
        assert live.live == {"other": 512 + 512 + 1024}
        del keep


def test_labels_move_bytes_between_categories(live):
    weight = torch.empty(50)
    with live.category("communication"):
        buffer = torch.empty(25)
    live.label("parameters", [weight])
    assert live.live == {"parameters": 200, "communication": 100}
    assert live.peak.parts == {"parameters": 200, "communication": 100}
    del buffer


def test_what_was_there_before_counts_once_it_is_labelled():
    weight = nn.Parameter(torch.empty(50))
    with LiveBytes(CPU, rounding=1) as live:
        assert live.live == {}
        live.label("parameters", [weight, weight.data])
        assert live.live == {"parameters": 200}


def test_a_storage_that_is_resized_changes_what_it_costs(live):
    gathered = torch.empty(1000)
    gathered.untyped_storage().resize_(0)
    assert live.live == {}
    gathered.untyped_storage().resize_(400)
    assert live.live == {"other": 400}
    assert live.peak.bytes == 4000


def test_other_devices_do_not_count(live):
    keep = torch.empty(1000, device="meta")
    assert live.live == {} and len(keep) == 1000


def test_fake_tensors_count_as_what_they_stand_for():
    with FakeTensorMode(), LiveBytes(CPU, rounding=1) as live:
        weight, elsewhere = torch.empty(1000, 1000), torch.empty(1000, device="meta")
        del elsewhere
        product = weight @ weight
        assert live.live == {"other": 2 * 4_000_000} and live.peak.bytes == 8_000_000
        del product
        weight.untyped_storage().resize_(0)
        assert live.live == {}


def mlp(width):
    first, second = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
    return first, second


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_autograd_keeps_is_alive_until_the_backward_pass(live, checkpointed):
    width, rows = 16, 1000
    first, second = mlp(width)
    live.label("parameters", [first.weight, second.weight])
    inputs = torch.empty(rows, width)
    live.label("inputs", [inputs])

    def forward(x):
        return second(F.relu(first(x)))

    with live.phase("forward"):
        output = checkpoint(forward, inputs, use_reentrant=False) if checkpointed else forward(inputs)
    # relu's result alone is kept, besides the output: its mask is its sign, and the input is there anyway.
    kept = 0 if checkpointed else 4 * rows * width * FLOAT
    assert live.live["other"] == rows * width * FLOAT + kept
    loss = output.sum()
    del output
    with live.phase("backward"):
        loss.backward()
    del loss
    gradients = [first.weight.grad, second.weight.grad]
    live.label("gradients", gradients)
    assert live.live == {
        "parameters": 8 * width * width * FLOAT,
        "gradients": 8 * width * width * FLOAT,
        "inputs": rows * width * FLOAT,
    }
    assert live.peaks["backward"].bytes >= live.live["inputs"] + 4 * rows * width * FLOAT
    assert live.peak == live.peaks[live.peak.phase]


def test_parts_add_up_to_the_peak(live):
    live.label("parameters", list(mlp(8)[0].parameters()))
    for size in (10, 1000, 100):
        with live.phase(str(size)), live.category("workspace"):
            torch.empty(size).exp()
    assert live.peak.phase == "1000" and sum(live.peak.parts.values()) == live.peak.bytes
