"""What a network costs: parameters and multiply-accumulates."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_parameters(module: nn.Module) -> int:
    """Trainable or not, each tensor once. Works on meta tensors."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *args, **kwargs) -> int:
    """Multiply-accumulates of one call `module(*args, **kwargs)`, which the paper's tables call FLOPs.

    Counts convolutions, linear layers and the two products of attention; norms, activations and other element-wise
    work are left out. Runs one forward pass without gradients: build module and inputs under `torch.device("meta")`,
    and it costs neither time nor memory, and gives the same number.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops() // 2


def _attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# torch's counter knows the attention kernels of GPUs, and on meta tensors the plain products, but not this one.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
