"""Packed towers where people use them: inside a vision-language model that generates, saved, and loaded again."""

from __future__ import annotations

from typing import Any

import packed
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import scale, tensors

import testreg
from testreg import RegisterPlan, active, patch
from testreg.runtime.towers import find_tower

KINDS = {
    "Qwen2-VL": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", "hidden_size"),
    "Qwen2.5-VL": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "out_hidden_size"),
    "Qwen3-VL": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", "out_hidden_size"),
}
EVERY = pytest.mark.parametrize("kind", list(KINDS))
IMAGE, VIDEO, BEGIN, END = 60, 61, 58, 59
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "head_dim": 8, "max_window_layers": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}  # fmt: skip
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
Prompt = list[tuple[str, packed.Grid]]
BOTH: tuple[Prompt, Prompt] = (
    [("image", (1, 4, 8)), ("image", (1, 8, 4))],
    [("video", (2, 4, 4)), ("image", (1, 4, 4))],
)


def build(kind: str) -> Any:
    model, config, width = KINDS[kind]
    known = packed.build(kind).config.to_dict()
    vision = {key: value for key, value in packed.SIZES.items() if key in known}
    vision = {**vision, **packed.ROWS[kind].settings, width: 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = getattr(hf, model)(getattr(hf, config)(text_config=TEXT, vision_config=vision, **TOKENS)).eval()
        scale(built)
    return built


def prompt(kind: str, prompts: list[Prompt], length: int) -> dict[str, Tensor]:
    """Prompts of so many tokens, padded on the left, with images and videos in them."""
    rows, pixels = [], {"image": [], "video": []}
    grids: dict[str, list[packed.Grid]] = {"image": [], "video": []}
    for given in prompts:
        row = [5]
        for what, (frames, height, width) in given:
            token = IMAGE if what == "image" else VIDEO
            if kind == "Qwen3-VL":  # its videos come frame by frame
                row += [part for _ in range(frames) for part in (BEGIN, *[token] * (height * width // 4), END)]
            else:
                row += [BEGIN, *[token] * (frames * height * width // 4), END]
            pixels[what].append(next(iter(packed.inputs(kind, [(frames, height, width)]).values())))
            grids[what].append((frames, height, width))
        rows.append([0] * (length - len(row) - 2) + row + [7, 9])
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    for what, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[what]:
            inputs[name] = torch.cat(pixels[what])
            inputs[f"{what}_grid_thw"] = torch.tensor(grids[what])
    return inputs


def plan(model: nn.Module) -> RegisterPlan:
    tower = find_tower(model)
    state = torch.randn(len(tower.blocks) - 1, 3, tower.channels, generator=torch.Generator().manual_seed(2))
    return RegisterPlan(
        {0: (1, 5), 2: (0, 31)}, registers=3, entry=1, state=state, rest={0: (0.5, -1.0), 2: (0.0, 2.0)}
    )


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


@EVERY
def test_a_model_generates_with_images_and_videos_as_each_prompt_alone(kind):
    model = build(kind)
    together = prompt(kind, list(BOTH), 32)
    before = logits(model, together)
    greedy = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with patch(model.model.visual, plan(model)):
        assert active(model) is not None
        found = model.generate(**together, **greedy)
        for index, one in enumerate(BOTH):
            alone = model.generate(**prompt(kind, [one], 32), **greedy)
            assert torch.equal(found.sequences[index], alone.sequences[0])
            for mine, theirs in zip(found.scores, alone.scores, strict=True):
                torch.testing.assert_close(mine[index], theirs[0], rtol=1e-4, atol=1e-4)
        patched = logits(model, together)
    assert (patched - before).abs().amax(1).min() > 1e-3  # registers act on either prompt
    assert torch.equal(logits(model, together), before)


@EVERY
def test_a_whole_model_and_its_tower_are_saved_and_come_back(kind, tmp_path):
    model, inputs = build(kind), prompt(kind, list(BOTH), 32)
    patch(model, plan(model))
    wanted = logits(model, inputs)
    loaded = testreg.load(testreg.save(model, tmp_path / "whole"))
    assert type(loaded) is type(model)
    assert active(loaded).plan == active(model).plan
    assert torch.equal(logits(loaded, inputs), wanted)


@pytest.mark.parametrize("name", list(packed.ROWS))
def test_a_tower_alone_is_saved_and_comes_back(name, tmp_path):
    model, given = packed.build(name), packed.inputs(name, packed.grids(name))
    patch(model, plan(model))
    with torch.no_grad():
        wanted = tensors(model(**given))
        loaded = testreg.load(testreg.save(model, tmp_path / "tower"))
        found = tensors(loaded(**given))
    assert type(loaded) is type(model)
    for path, tensor in wanted.items():
        torch.testing.assert_close(found[path], tensor, rtol=0, atol=0)
