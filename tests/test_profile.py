"""Counts against numbers worked out by hand."""

import re
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snapgen_core.profile import cost, count_macs, count_parameters, macs_by_module, peak_memory


class SelfAttention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_parameters_count_shared_tensors_once():
    first, second = nn.Linear(3, 5), nn.Linear(3, 5)
    assert count_parameters(nn.Sequential(first, second)) == 40
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 25
    assert count_parameters(first.requires_grad_(False)) == 20


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "module, shape, macs",
    [
        (nn.Linear(3, 5), (7, 3), 7 * 3 * 5),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 10), 2 * 80 * 9 * 4 * 6),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (1, 4, 8, 8), 16 * 9 * 4 * 6),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 8, 8), 64 * 9 * 4),
        (SelfAttention(), (2, 3, 11, 8), 2 * (2 * 3 * 11 * 11 * 8)),
        (nn.GroupNorm(2, 4), (1, 4, 8, 8), 0),
    ],
)
def test_macs(module, shape, macs, device):
    assert count_macs(module.to(device), torch.zeros(shape, device=device)) == macs


def test_macs_of_each_module_add_up():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Sequential(nn.SiLU(), nn.Conv2d(6, 2, 1)))
    macs = macs_by_module(model, torch.zeros(2, 4, 8, 8))
    assert macs == {"": 2 * 64 * (216 + 12), "0": 2 * 64 * 216, "1": 2 * 64 * 12, "1.1": 2 * 64 * 12}


def test_macs_takes_keyword_arguments_and_leaves_no_gradients():
    layer = nn.Linear(3, 5)
    assert count_macs(layer, input=torch.zeros(2, 3)) == 30
    assert layer.weight.grad is None


def test_peak_memory_is_kept_after_the_memory_is_given_back():
    """In a process of its own: here the tests before this one may have held more. What its parent held is not counted."""
    held = torch.ones(2**28)
    code = "import psutil, torch; from snapgen_core.profile import peak_memory; now = psutil.Process().memory_info().rss / 2**30; torch.ones(2**27); print(peak_memory() - now)"
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.45 < float(grown) < 0.6  # half a GiB
    assert peak_memory() > 1 and held[-1] == 1
    assert re.fullmatch(r"this run took 2\.0 minutes and at most [\d.]+ GB of memory, with \d+ threads?", cost(time.perf_counter() - 120))
