"""In place of a training set: random latents under five captions."""

import torch

from snapgen_core.text import drop_encoders, fuse

CAPTIONS = ["a red car", "a dog", "two apples", "a dog left of a cat", "a green book"]


class FewScenes:
    """What the stages ask of `TrainingSet`. It is its own store of embeddings, too."""

    def __init__(self, encoders):
        self.captions = ["", *CAPTIONS]
        self.parts, self.rows = encoders.encode_parts(self.captions), encoders.pooled(self.captions)
        self.embeddings = self

    def pick(self, count, generator):
        rows = torch.randint(len(CAPTIONS), (count,), generator=generator).tolist()
        return torch.randn(count, 16, 8, 8, generator=generator), [CAPTIONS[row] for row in rows]

    def draw(self, count, generator):
        latents, captions = self.pick(count, generator)
        return latents, fuse(*drop_encoders(self.gather(captions), generator=generator)), captions

    def gather(self, captions):
        return tuple(part[self._find(captions)] for part in self.parts)

    def pooled(self, captions):
        return self.rows[self._find(captions)]

    def _find(self, captions):
        return [self.captions.index(caption) for caption in captions]
