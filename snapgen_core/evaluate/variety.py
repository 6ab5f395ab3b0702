"""Are a model's pictures as varied as they should be, and do they look like true ones? Diversity and kernel distance.

Both look through EfficientNet-Lite0, whose weights come with a package. So their numbers compare models here, and are neither
LPIPS nor the FID or KID of other papers, which look through other networks.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..perceptual import Lite0Distance, lite0_features
from ..scenes import TASKS, Scene, draw_scene
from .sceneeval import Generate, picture_seed

BATCH = 32


def diversity(pictures: Tensor) -> Tensor:
    """How different the pictures of a prompt are: [P, K, 3, H, W] -> [P], the mean Lite0 distance of its K (K - 1) / 2 pairs."""
    count = pictures.shape[1]
    pairs = torch.combinations(torch.arange(count))
    distance = Lite0Distance()
    found = [distance(prompt[pairs[:, 0]], prompt[pairs[:, 1]]).mean() for prompt in pictures]
    return torch.stack(found)


def kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of features [N, D] and [M, D], without bias, with the kernel (x.y / D + 1)^3
    [Binkowski et al. 2018]. Around zero, also below, where both come from one distribution."""
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def without_itself(x: Tensor) -> Tensor:
        among = kernel(x, x)
        return (among.sum() - among.diagonal().sum()) / (len(x) * (len(x) - 1))

    return without_itself(a) + without_itself(b) - 2 * kernel(a, b).mean()


@torch.no_grad()
def measure(generate: Generate, size: int, per_task: int = 40, prompts: int = 24, seed: int = 0, progress: bool = True) -> dict[str, float]:
    """Diversity and kernel distance of a generator.

    Args:
        size: pixels of the true scenes.
        per_task: scenes of each of the six tasks, one picture of each caption, for the kernel distance.
        prompts: captions of which four pictures are drawn, for the diversity.

    Returns: "kernel_distance" of pictures to the true scenes of their captions, and as a yardstick "kernel_distance_of_truth",
    that of other true scenes; "diversity", and "diversity_spread", its standard deviation over captions.
    """
    def true_scenes(first: int) -> list[Scene]:
        return [draw_scene(seed, TASKS.index(task) + len(TASKS) * i, "seen", task, size=size) for task in TASKS for i in range(first, first + per_task)]

    scenes, others = true_scenes(0), true_scenes(per_task)
    captions = [scene.prompt.text for scene in scenes]
    several = captions[:: max(1, len(captions) // prompts)][:prompts]
    jobs = [(caption, 0) for caption in captions] + [(caption, number) for caption in several for number in range(1, 5)]
    pictures = []
    for first in tqdm(range(0, len(jobs), BATCH), desc="variety", unit="batch", dynamic_ncols=True, disable=not progress):
        batch = jobs[first : first + BATCH]
        pictures.append(generate([caption for caption, _ in batch], [picture_seed(seed, *job) for job in batch]).cpu())
    pictures = torch.cat(pictures)
    truth, other_truth = (lite0_features(torch.stack([scene.image for scene in some])) for some in (scenes, others))
    varied = diversity(pictures[len(captions) :].unflatten(0, (-1, 4)))
    return {
        "kernel_distance": kernel_distance(lite0_features(pictures[: len(captions)]), truth).item(),
        "kernel_distance_of_truth": kernel_distance(other_truth, truth).item(),
        "diversity": varied.mean().item(),
        "diversity_spread": varied.std().item(),
    }
