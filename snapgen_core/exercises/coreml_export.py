"""Notebook 06: the checkers of its exercises."""

from collections.abc import Callable

import torch
from torch import Tensor

from .verdict import Verdict, call, number, right, wrong


def check_megabytes(answer: float) -> Verdict:
    """06, exercise 1: megabytes (10^6 bytes) of 379 million weights at 4.3 bits."""
    value, failed = number(answer, "one number, please.")
    if failed is not None:
        return failed
    expected = 379e6 * 4.3 / 8 / 1e6
    for factor, hint in ((8, "that are megabits: a byte has eight bits."), (1e6, "that are bytes. A megabyte has a million."), (16 / 4.3, "that is their size in 16 bits."), (1e6 / 2**20, "that are mebibytes, of 2^20 bytes. Megabytes have 10^6.")):
        if abs(value / (expected * factor) - 1) < 0.01:
            return wrong(hint)
    if not abs(value / expected - 1) < 0.01:
        return wrong("not that many. Weights times bits are bits; eight of them are a byte.")
    return right(f"{expected:.0f} MB, where 16 bits take 758. A few more for the palettes and what has none.")


def check_nearest(answer: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """06, exercise 2: answer(weights [N], palette [K]) is the index of the nearest palette value of each weight, [N]."""
    generator = torch.Generator().manual_seed(0)
    for count in (2, 16, 5):
        weights = 1.5 * torch.randn(1000, generator=generator)
        palette = torch.randn(count, generator=generator).sort().values
        value, failed = call(answer, weights.clone(), palette.clone())
        if failed is not None:
            return failed
        if not isinstance(value, Tensor) or value.shape != (1000,):
            return wrong("return an index for each weight, [N].")
        if value.is_floating_point():
            return wrong("indices are whole numbers; those look like values of the palette.")
        if value.min() < 0 or value.max() >= count:
            return wrong(f"a palette of {count} has the indices 0 to {count - 1}.")
        expected = (weights[:, None] - palette).abs().argmin(dim=1)
        if torch.equal(value, torch.searchsorted(palette, weights).clamp(max=count - 1)) and not torch.equal(value, expected):
            return wrong("that is the next larger entry. The nearest changes halfway between two entries.")
        if not torch.equal(value, expected):
            return wrong("some weights get an entry that is not their nearest.")
    return right("a search among the borders takes log K steps a weight: that is why 379 million weights take a minute.")


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes whether anything was computed in another float than fp16."""

    wide = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float16:
                self.wide = True
        return result


def check_safe_rms(answer: Callable[[Tensor], Tensor]) -> Verdict:
    """06, exercise 3: answer(x [B, C] in fp16) is the root mean square over C, [B, 1], computed in fp16 without overflow."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(4, 64, generator=generator) - 0.5) * torch.tensor([[1.0], [100.0], [4000.0], [120_000.0]])
    x = torch.cat([x, torch.zeros(1, 64)]).half()
    with _Watch() as watch:
        value, failed = call(answer, x.clone())
    if failed is not None:
        return failed
    if not isinstance(value, Tensor) or value.shape != (5, 1):
        return wrong("return [B, 1].")
    if watch.wide or value.dtype != torch.float16:
        return wrong("somewhere it leaves 16 bits. The engine has no others.")
    expected = x.double().square().mean(dim=1, keepdim=True).sqrt()
    if value[:4].isinf().any():
        return wrong("a square overflows. Divide by the largest value first, and multiply in the end.")
    if value.isnan().any():
        return wrong("a row of zeros gives NaN: its largest value is zero, and you divide by it.")
    if (value.double() - expected).abs().max() > 0.02 * expected.max() or ((value.double() / expected)[:4] - 1).abs().max() > 0.02:
        return wrong("no overflow, but not the root of the mean of the squares either.")
    return right("and no value above 1 was ever squared.")
