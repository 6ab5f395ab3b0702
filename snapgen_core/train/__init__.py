"""Training: one loop for every stage, and the records that it keeps."""

from .checkpoints import Ema
from .loop import train
from .records import card, history, ship, trainings, trim_log
from .stage import Stage, TrainSettings, step_generator

__all__ = ["Ema", "Stage", "TrainSettings", "card", "history", "ship", "step_generator", "train", "trainings", "trim_log"]
