"""Where in the picture the student reads each word: its cross-attention, over image positions.

Names in shapes as in `unet/attention.py`: B batch, S image tokens, L context tokens, N heads, K key/value heads, E head
width.
"""

import re
from collections.abc import Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .text import ENCODERS, TextEncoders
from .unet.attention import Attention


def attention_weights(attention: Attention, q: Tensor, context: Tensor) -> Tensor:
    """softmax(q k / sqrt(E)) averaged over heads: normed queries q (B, S, N, E), context (B, L, D) -> (B, S, L)."""
    k, _ = attention.keys_and_values(context)
    grouped = q.unflatten(2, (k.shape[2], -1))  # (B, S, K, N / K, E)
    scores = torch.einsum("bskge,blke->bskgl", grouped, k) / attention.head_dim**0.5
    return scores.softmax(dim=-1).mean(dim=(2, 3))


def word_rows(text: TextEncoders, prompt: str) -> dict[str, list[int]]:
    """Rows of the fused context that belong to each word of `prompt`: of the CLIPs, then of the language model.

    A word that comes twice has the rows of both; words beyond an encoder's length have none of its rows.
    """
    rows: dict[str, list[int]] = {match[0]: [] for match in re.finditer(r"\w+", prompt)}
    # Both CLIPs share their tokens, and so their rows.
    for name, first in ((ENCODERS[0], 0), (ENCODERS[2], text.shape.clip_tokens)):
        limit = text.shape.of(ENCODERS.index(name))[0]
        spans = text.tokenizers[name](prompt, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
        for word in re.finditer(r"\w+", prompt):
            rows[word[0]] += [first + i for i, (start, end) in enumerate(spans) if start < word.end() and end > word.start()]
    return rows


class WordReader:
    """Adds up, while `pipe` draws `prompt`, how much of the attention each place gives to each row of the context.

    A context manager; `add_up` is to be called after each step.
    """

    def __init__(self, pipe, prompt: str, encoders: Iterable[str] = ENCODERS):
        self.context = pipe.text.encode([prompt], encoders)
        self._rows = word_rows(pipe.text, prompt)
        self._side = pipe.config.image_size // 8
        self._total = torch.zeros(self._side, self._side, self.context.shape[1], device=self.context.device)
        self._layers, self._unet = 0, pipe.unet
        self._calls: list[tuple[Attention, Tensor]] = []  # (module, its normed queries)

    def __enter__(self) -> Self:
        self._hooks = [
            module.norm_q.register_forward_hook(lambda _, args, q, module=module: self._calls.append((module, q)))
            for name, module in self._unet.named_modules()
            if name.endswith("cross_attention")
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def add_up(self, *_) -> None:
        for module, q in self._calls:
            weights = attention_weights(module, q[-1:], self.context.to(q.dtype))[0]  # the last one reads the prompt
            size = round(len(weights) ** 0.5)
            grid = weights.T.reshape(1, -1, size, size).float()
            self._total += F.interpolate(grid, size=(self._side, self._side), mode="bilinear")[0].permute(1, 2, 0)
            self._layers += 1
        self._calls.clear()

    def maps(self) -> dict[str, Tensor]:
        """For each word of the prompt the share of attention it got, [h, w]."""
        return {word: (self._total[..., places].sum(dim=-1) / self._layers).cpu() for word, places in self._rows.items()}


def word_maps(pipe, prompt: str, seed: int = 0, steps: int = 28, guidance: float = 4.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw `prompt` and return the picture [3, H, W] and for each of its words the share of attention it got, [h, w].

    h and w are those of the latent. Averaged over sampling steps, heads and all cross-attention layers; coarser layers
    are scaled up. The shares of one position over all context tokens, padding included, add up to 1.
    """
    with WordReader(pipe, prompt) as reader:
        generator = torch.Generator().manual_seed(seed)
        picture = pipe(prompt, steps, guidance, generator, output_type="pt", on_step=reader.add_up).images[0]
    return picture.cpu(), reader.maps()
