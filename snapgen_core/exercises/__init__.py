"""Checkers of the notebooks' exercises: each says what is wrong with an answer and where to look, or that it is right."""

from .coreml_export import check_megabytes, check_nearest, check_safe_rms
from .efficient_unet import check_design, check_layer_macs, check_separable
from .flow_matching import check_endpoints, check_heun, check_share_above
from .generate import check_admit, check_arc, check_calls
from .knowledge_distillation import check_binned_ratio, check_half_weight, check_teachers_share
from .start_here import check_fusion, check_judge, check_numbers
from .step_distillation import check_penalty, check_straight_loss, check_three_levels
from .tiny_decoder import check_decoder_design, check_reach, check_residual
from .verdict import Verdict

__all__ = [
    "Verdict",
    "check_admit",
    "check_arc",
    "check_binned_ratio",
    "check_calls",
    "check_decoder_design",
    "check_design",
    "check_endpoints",
    "check_fusion",
    "check_half_weight",
    "check_heun",
    "check_judge",
    "check_layer_macs",
    "check_megabytes",
    "check_nearest",
    "check_numbers",
    "check_penalty",
    "check_reach",
    "check_residual",
    "check_safe_rms",
    "check_separable",
    "check_share_above",
    "check_straight_loss",
    "check_teachers_share",
    "check_three_levels",
]
