"""How well does a picture show what its caption asks for? SceneEval: GenEval's six tasks on emoji scenes."""

from .report import Report, Score, bootstrap_interval, paired_difference
from .rules import COUNTING_THRESHOLD, explain, judge, relative_position
from .sceneeval import (
    evaluate_stage,
    evaluate_unet,
    load_detector,
    pipeline_generator,
    scene_eval,
    scene_prompts,
    teacher_generator,
)
from .truth import near_misses, true_detections, validate_detector
from .validation import validation_batch, validation_losses

__all__ = [
    "COUNTING_THRESHOLD",
    "Report",
    "Score",
    "bootstrap_interval",
    "evaluate_stage",
    "evaluate_unet",
    "explain",
    "judge",
    "load_detector",
    "near_misses",
    "paired_difference",
    "pipeline_generator",
    "relative_position",
    "scene_eval",
    "scene_prompts",
    "teacher_generator",
    "true_detections",
    "validate_detector",
    "validation_batch",
    "validation_losses",
]
