"""`snapgen prepare`: the training scenes' latents and text embeddings, computed once and kept."""

import argparse

from ..paths import cache_dir
from .common import quiet_libraries


def prepare(args: argparse.Namespace) -> int:
    """Fill the cache; what is there already is kept, so an interrupted call goes on where it stood."""
    quiet_libraries(args.scale)

    from ..stages.base import SCENES, TrainingSet

    data = TrainingSet(args.scale, args.seed, args.images or SCENES)
    print(f"{len(data.scenes.captions)} scenes and {len(data.embeddings)} captions in {cache_dir(args.scale)}")
    return 0
