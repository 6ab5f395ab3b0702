"""Stage `text`: the two tiny CLIP text models, trained with a small image tower on emoji scenes (Sec. 4's CLIP roles).

CLIP's recipe [Radford et al. 2021] made small: symmetric InfoNCE with a learned temperature, for each text model
against the same image tower. Half of the scenes come with a counterpart that differs in one thing only (the relation,
the colours' order, the count): without it, the objects alone would tell all captions of a batch apart, and the text
models would have no reason to read the rest.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import UserError
from ..files import atomic_write
from ..scales import get_scale
from ..scenes import COLOURS, TASKS, TRAIN_MIX, Prompt, draw_prompt, emoji_table, is_held_out, render
from ..text import clip_files, until_end
from ..train import TrainSettings
from ..weights import save_half

# Plain emoji, with their names and keywords, teach words that the 32 classes of the scenes do not have.
MIX = {**TRAIN_MIX, "plain": 0.35}
VOCABULARY = 4096
PROJECTION = 128
# As in the originals, CLIP-L is the smaller one with quick_gelu, CLIP-G the larger one with gelu.
TOWERS = {
    "l": dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, hidden_act="quick_gelu"),
    "g": dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=768, hidden_act="gelu"),
}


# ------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(size: int = VOCABULARY) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE in CLIP's format: (token -> id, merges in order). A pure function of the emoji table.

    As in CLIP, ids are the 256 bytes, the 256 bytes that end a word, the merges, <|startoftext|>, <|endoftext|>.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    single = CLIPTokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [letter + "</w>" for letter in alphabet]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = single.backend_tokenizer.normalizer, single.backend_tokenizer.pre_tokenizer
    # As special tokens the single bytes get fixed ids, by which equally frequent pairs are ordered: same merges always.
    trainer = trainers.BpeTrainer(vocab_size=size - 2, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(_corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*symbols, *("".join(pair) for pair in merges), single.bos_token, single.eos_token]
    return {token: i for i, token in enumerate(tokens)}, merges


def _corpus() -> list[str]:
    """Captions of scenes, names (these count most, scenes are made of few words) and keywords of all emoji."""
    captions = [draw_prompt(0, i).text for i in range(4000)]
    names = [name for name in emoji_table() for _ in range(4)]
    return captions + names + [row["keywords"] for row in emoji_table().values()]


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    vocabulary, merges = train_tokenizer()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json, merges.txt (CLIP's two files) and tokenizer_config.json."""
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length}
    for name, text in (clip_files(tokenizer) | {"tokenizer_config.json": json.dumps(config, indent=1)}).items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------- models and loss


class ImageTower(nn.Module):
    """Images [B, 3, 64, 64] to embeddings [B, PROJECTION]: four strides of 2 with little work at high resolution.

    The last 4x4 map is flattened and not averaged, or "left of" and "right of" would look the same.
    """

    def __init__(self, size: int = 64, widths: tuple[int, ...] = (48, 96, 192)):
        super().__init__()
        first, *others = widths
        layers: list[nn.Module] = [nn.Conv2d(3, first, 6, stride=4, padding=1), nn.GroupNorm(8, first), nn.SiLU()]
        layers += self._convolution(first, first)
        for before, width in zip(widths, others):
            layers += self._convolution(before, width, stride=2) + self._convolution(width, width)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * (size // 16) ** 2, PROJECTION)

    @staticmethod
    def _convolution(before: int, after: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.GroupNorm(8, after), nn.SiLU()]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.layers(image).flatten(1))


class TextTraining(nn.Module):
    """forward(image [B,3,S,S], input_ids [B,T], same [B,B]) -> (InfoNCE of both text models, figures)."""

    def __init__(self, size: int, vocabulary: int, tokens: int):
        super().__init__()
        ids = dict(vocab_size=vocabulary, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
        configs = {name: CLIPTextConfig(**tower, **ids, max_position_embeddings=tokens, projection_dim=PROJECTION) for name, tower in TOWERS.items()}
        self.texts = nn.ModuleDict({name: CLIPTextModelWithProjection(config) for name, config in configs.items()})
        self.image = ImageTower(size)
        self.log_scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for name in TOWERS})

    def forward(self, image: Tensor, input_ids: Tensor, same: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen = F.normalize(self.image(image).float(), dim=1)
        figures, losses = {}, []
        for name, text in self.texts.items():
            read = F.normalize(text(input_ids=input_ids).text_embeds.float(), dim=1)
            with torch.autocast(image.device.type, enabled=False):  # logits go up to 100: bf16 would round them to halves
                logits = read @ seen.T * self.log_scales[name].clamp(max=math.log(100)).exp()  # (B, B)
                losses.append(info_nce(logits, same))
            figures[f"loss_{name}"] = losses[-1].detach()
            figures[f"top1_{name}"] = (logits.argmax(dim=1) == torch.arange(len(logits), device=logits.device)).float().mean()
        return sum(losses), figures


def info_nce(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE of logits [B, B] whose diagonal is true. Pairs in `same` [B, B] mean the same scene in words:
    they are not one another's negatives."""
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(others, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ------------------------------------------------------------------------------------------------- captions


def meaning(prompt: Prompt) -> tuple:
    """What a caption asks for, whatever its wording: "a cat left of a dog" means what "a dog right of a cat" does."""
    wanted, relation = prompt.wanted, prompt.relation
    if relation in ("right of", "below"):
        wanted, relation = wanted[::-1], {"right of": "left of", "below": "above"}[relation]
    return (relation, wanted) if relation else (None, frozenset(Counter(wanted).items()))


def caption_of(prompt: Prompt, rng: np.random.Generator) -> str:
    """The prompt's text; for a plain emoji also its name with keywords, or keywords alone, so that synonyms are read."""
    if prompt.task != "plain":
        return prompt.text
    keywords = [word for word in emoji_table()[prompt.wanted[0].name]["keywords"].split(", ") if word not in prompt.text]
    form = rng.random()
    if form < 0.4 or not keywords:
        return prompt.text
    some = " ".join(rng.permutation(keywords)[: rng.integers(1, 4)].tolist())
    return f"{prompt.text}, {some}" if form < 0.75 else some


_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "over": "under", "under": "over"}
_NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}


def counterpart(prompt: Prompt, rng: np.random.Generator) -> Prompt | None:
    """The prompt with one thing changed: the opposite relation, colours exchanged, another colour, another number.

    None where there is no such thing, or where training must not see the result.
    """
    wanted, swap = prompt.wanted, {}
    relation = prompt.relation
    if relation:
        swap = _OPPOSITE
        relation = " ".join(_OPPOSITE.get(word, word) for word in relation.split())
    elif prompt.task == "color_attr":
        first, second = wanted
        swap = {first.colour: second.colour, second.colour: first.colour}
        wanted = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    elif prompt.task == "colors":
        colour = str(rng.choice([c for c in COLOURS if c != wanted[0].colour]))
        swap = {wanted[0].colour: colour}
        wanted = (replace(wanted[0], colour=colour),)
    elif prompt.task == "counting" and wanted[0].count > 1:
        count = int(rng.choice([n for n in _NUMBERS if n != wanted[0].count]))
        swap = dict(zip(_NUMBERS[wanted[0].count], _NUMBERS[count]))
        wanted = (replace(wanted[0], count=count),)
    if not swap or is_held_out(wanted):
        return None
    return replace(prompt, text=_swap_words(prompt.text, swap), wanted=wanted, relation=relation)


def _swap_words(text: str, swap: dict[str, str]) -> str:
    swapped = " ".join(swap.get(word, word) for word in text.split(" "))
    return re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", swapped)


# ------------------------------------------------------------------------------------------------- stage


class TextStage:
    """See `snapgen_core.train.Stage`."""

    name = "text"
    options: dict[str, str] = {}

    def __init__(self, scale: str, seed: int):
        self.scale, self.seed = scale, seed
        config = get_scale(scale)
        if config.hub is not None:
            raise UserError(f"scale {scale} uses pretrained text encoders from the hub: there is nothing to train")
        self.size = config.image_size
        self.tokenizer = clip_tokenizer(config.clip_tokens)
        torch.manual_seed(seed)
        self.module = TextTraining(self.size, len(self.tokenizer), config.clip_tokens).to(memory_format=torch.channels_last)
        self.settings = TrainSettings(batch_size=128, learning_rate=1e-3, betas=(0.9, 0.98), weight_decay=0.05, steps=3000)

    def prepare(self) -> None:
        pass  # scenes are drawn as they are needed

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """Scenes 2k, and 2k + 1: the counterpart of 2k where it has one, else another scene."""
        share = self.settings.batch_size // world
        first = step * self.settings.batch_size + rank * share
        prompts, captions, images = [], [], []
        for index in range(first, first + share):
            rng = np.random.default_rng([7, self.seed, index])
            prompt = counterpart(prompts[-1], rng) if index % 2 and prompts else None
            prompt = prompt or draw_training_prompt(self.seed, index, rng)
            prompts.append(prompt)
            captions.append(caption_of(prompt, rng))
            images.append(render(rng, prompt, self.size).image)
        image = torch.stack(images).contiguous(memory_format=torch.channels_last)
        return {"image": image, "input_ids": self._tokenize(captions), "same": same_meaning(prompts)}

    def _tokenize(self, captions: Sequence[str]) -> Tensor:
        limit = self.tokenizer.model_max_length
        return self.tokenizer(list(captions), padding="longest", truncation=True, max_length=limit, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Shares, over unseen scenes, of captions that find their image among 64 (1/64 is chance), for all tasks mixed
        and for each alone, and that prefer it to their counterpart's (1/2 is chance); RMS of what the encoders give."""
        scores = {}
        for label, tasks in {"mixed": (None,), **{task: (task,) for task in TASKS}}.items():
            prompts = [draw_prompt(self.seed, i, "seen", tasks[0]) for i in range(64)]
            for name, similarity in self._similarities(prompts, prompts).items():
                found = same_meaning(prompts)[torch.arange(64), similarity.argmax(dim=1)]
                scores[f"{name}_retrieval_{label}"] = found.float().mean().item()
        prompts = [draw_prompt(self.seed, i, "seen") for i in range(256)]
        others = [counterpart(prompt, np.random.default_rng(i)) for i, prompt in enumerate(prompts)]
        prompts, others = zip(*((prompt, other) for prompt, other in zip(prompts, others) if other))
        true, false = self._similarities(prompts, prompts), self._similarities(prompts, others)
        for name in TOWERS:
            scores[f"{name}_over_counterpart"] = (true[name].diag() > false[name].diag()).float().mean().item()
            scores[f"{name}_rms_before_shipping"] = self._penultimate_rms(name)
        return scores

    def _similarities(self, captioned: Sequence[Prompt], drawn: Sequence[Prompt]) -> dict[str, Tensor]:
        """Cosines [captions, images] for each text model."""
        device = next(self.module.parameters()).device
        images = torch.stack([render(np.random.default_rng([8, self.seed, i]), p, self.size).image for i, p in enumerate(drawn)])
        seen = F.normalize(self.module.image(images.to(device)), dim=1)
        ids = self._tokenize([p.text for p in captioned]).to(device)
        return {name: (F.normalize(text(input_ids=ids).text_embeds, dim=1) @ seen.T).cpu() for name, text in self.module.texts.items()}

    @torch.no_grad()
    def _penultimate_rms(self, name: str) -> float:
        """RMS of the penultimate layer over the tokens of 1,024 training captions."""
        model = self.module.texts[name]
        ids = self._tokenize([draw_prompt(self.seed, i).text for i in range(1024)]).to(model.device)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        return states[until_end(ids, self.tokenizer.eos_token_id)].square().mean().sqrt().item()

    def save(self, root: Path) -> list[Path]:
        """Ships both text models in fp16, their penultimate layers scaled to unit RMS, each with the tokenizer."""
        folders = []
        for name, text in self.module.texts.items():
            shipped = copy.deepcopy(text)
            rescale_residual(shipped, 1 / self._penultimate_rms(name))
            folder = root / f"text_{name}"
            save_half(shipped, folder)
            save_tokenizer(self.tokenizer, folder)
            folders.append(folder)
        return folders

    def load(self, root: Path) -> None:
        raise UserError("the text encoders cannot start warm: their image tower is not shipped")


def draw_training_prompt(seed: int, index: int, rng: np.random.Generator) -> Prompt:
    """A prompt of the training split by the shares in MIX."""
    shares = np.array(list(MIX.values()))
    return draw_prompt(seed, index, task=str(rng.choice(list(MIX), p=shares / shares.sum())))


def same_meaning(prompts: Sequence[Prompt]) -> Tensor:
    """[B, B], true where two prompts ask for the same."""
    numbers: dict[tuple, int] = {}
    ids = torch.tensor([numbers.setdefault(meaning(p), len(numbers)) for p in prompts])
    return ids[:, None] == ids


@torch.no_grad()
def rescale_residual(model: CLIPTextModelWithProjection, factor: float) -> None:
    """Multiply every hidden state by `factor` and leave the output as it is (up to the norms' epsilon): in a pre-norm
    transformer everything that reads the residual stream normalises it first, so its scale is free."""
    text = model.text_model
    writers = [text.embeddings.token_embedding, text.embeddings.position_embedding]
    for layer in text.encoder.layers:
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    for writer in writers:
        for parameter in writer.parameters():
            parameter.mul_(factor)
