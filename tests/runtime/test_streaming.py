"""Text without end, held against one forward pass under a mask that shows every token its window alone."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from speakers import FAMILIES, GROUPED, PAD, SHAPE, built, start_plan, text
from transformers import DynamicCache

import testreg
from testreg import StreamingCache
from testreg.runtime.decoders import find_decoder
from testreg.runtime.turning import turnings

WINDOW = 8
LEARNED = ("gpt2", "opt")  # their positions are a table


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits


def banded(model, ids, window=WINDOW, shift=0):
    """Logits where every token sees the last `window` ones, positions counted from `-shift` on."""
    at = torch.arange(ids.shape[1])
    near = (at[:, None] >= at) & (at[:, None] - at < window)
    near, where = near[None, None].expand(len(ids), 1, -1, -1), (at - shift).expand(len(ids), -1)
    if model.config._attn_implementation == "eager":
        near = torch.zeros(near.shape).masked_fill(~near, torch.finfo(torch.float32).min)
    return logits(model, ids, attention_mask=near, position_ids=where, use_cache=False)


def late(model):
    """A plan whose register is in the last block alone, so that one pass tells what any token makes of its distance."""
    return start_plan(model, entry=len(find_decoder(model).blocks) - 1)


class Spied(StreamingCache):
    """Tells where the tokens were put, `where` `(batch, tokens)`, and how often keys were turned."""

    turns, where = 0, None

    def enter(self, *args):
        positions, visible = super().enter(*args)
        self.where = positions if self.where is None else torch.cat([self.where, positions], dim=1)
        return positions, visible

    def _turn(self):
        self.turns += 1
        super()._turn()


def as_spied(model, ids, cache, row=0, pads=0):
    """Logits of texts without their padding, by one pass for each distance that the register had."""
    where = cache.where[row, pads:]
    shifts = torch.arange(len(where)) - where
    whole = {shift: banded(model, ids, cache.window, shift) for shift in set(shifts.tolist())}
    return torch.stack([whole[shift][:, at] for at, shift in enumerate(shifts.tolist())], dim=1)


def one_block(**more):
    """A model whose answer depends on what the last token sees alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1, **more})).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def in_pieces(model, ids, sizes, **more):
    return read_into(Spied(model, window=WINDOW, **more), model, ids, sizes)


def read_into(cache, model, ids, sizes):
    return torch.cat([logits(model, piece, past_key_values=cache) for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LEARNED])
def test_every_family_reads_on(name):
    model, ids = built(name), text(tokens=90)
    alone = in_pieces(model, ids, [20, 1, 1, 5, 40, 1, 22], keep=0)
    assert alone == pytest.approx(banded(model, ids), abs=2e-4)
    with testreg.patch(model, late(model)):
        cache = Spied(model, window=WINDOW)
        found = read_into(cache, model, ids, [20, 1, 1, 5, 40, 1, 22])
        assert cache.turns >= 2
        assert found == pytest.approx(as_spied(model, ids, cache), abs=2e-4)
    assert (found - alone).abs().max() > 0.05


def test_queries_go_where_the_keys_have_gone():
    """The retired cache left the query at its old position, a gap behind the last key."""
    model, ids = built("llama"), text(tokens=200)
    with testreg.patch(model, late(model)):
        cache = Spied(model, window=WINDOW)
        found = read_into(cache, model, ids, [1] * 200)
        assert cache.turns > 5
        assert found == pytest.approx(as_spied(model, ids, cache), abs=2e-4)
    steps = cache.where.diff()
    assert ((steps == 1) | (steps < -WINDOW)).all()


@pytest.mark.parametrize("sizes", [[100], [3, 97], [8, 8, 84], [1] * 100, [50, 1, 49]])
def test_prompts_longer_and_shorter_than_the_window(sizes):
    model, ids = built("llama"), text(tokens=100)
    with testreg.patch(model, late(model)):
        cache = Spied(model, window=WINDOW)
        found = read_into(cache, model, ids, sizes)
        assert found == pytest.approx(as_spied(model, ids, cache), abs=2e-4)
    assert cache.turns > 1


@pytest.mark.parametrize("sizes", [[2, 1, 57], [1] * 60, [60], [3, 3, 54]])
def test_a_prompt_shorter_than_what_stays(sizes):
    """Up to as many tokens as fit, all is as without a window."""
    model, ids = built("llama"), text(tokens=60)
    found = in_pieces(model, ids, sizes, keep=4)
    assert found[:, :WINDOW] == pytest.approx(logits(model, ids)[:, :WINDOW], abs=2e-4)
    assert found.isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_are_as_long_as_the_keys(attention):
    model, ids = built("llama"), text(tokens=60)
    plan = late(model)
    plan = testreg.RegisterPlan({}, 2, plan.entry, plan.state.expand(-1, 2, -1), positions="before")
    model.set_attn_implementation(attention)
    with testreg.patch(model, plan):
        cache = Spied(model, window=WINDOW)
        at, found = 0, []
        for size in (5, 1, 30, 1, 23):
            given = torch.ones(2, at + size, dtype=torch.long)  # as long as the text, as generate gives it
            found.append(logits(model, ids[:, at : at + size], attention_mask=given, past_key_values=cache))
            at += size
        model.set_attn_implementation("sdpa")
        assert torch.cat(found, 1) == pytest.approx(as_spied(model, ids, cache), abs=2e-4)


def test_half_precision_over_ten_thousand_turns():
    """Keys that are turned to and fro for ever drift; these live for a window, whatever came before."""
    model = one_block().to(torch.bfloat16)
    last = torch.randint(0, 60, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 60, (1, 10_000 * WINDOW), generator=torch.Generator().manual_seed(1))
    with testreg.patch(model, start_plan(model)), torch.no_grad():
        caches = [Spied(model, window=WINDOW) for _ in range(2)]
        states = []
        for cache, text_ in zip(
            caches, (torch.cat([ids, last], 1), torch.cat([ids[:, : 8 * WINDOW], last], 1)), strict=True
        ):
            cache.limit = 2 * WINDOW  # every piece turns
            states.append(model.model(input_ids=text_, past_key_values=cache).last_hidden_state[:, -WINDOW:])
    assert caches[0].turns > 10_000
    assert caches[1].turns < 12
    assert states[0].isfinite().all()
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("padded", [False, True])
def test_a_chat_goes_on_from_a_filled_cache(padded):
    model = built("llama")
    more = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    with testreg.patch(model, late(model)):
        cache = Spied(model, window=WINDOW)
        ids, mask = text(2, 6), torch.ones(2, 6, dtype=torch.long)
        if padded:
            ids[0, :2], mask[0, :2] = PAD, 0
        for turn in range(6):
            said = model.generate(ids, attention_mask=mask, past_key_values=cache, **more)
            mask = torch.cat([mask, torch.ones(2, said.shape[1] - mask.shape[1], dtype=torch.long)], 1)
            for row, pads in ((0, 2 if padded else 0), (1, 0)):
                wanted = as_spied(model, said[row : row + 1, pads:-1], cache, row, pads).argmax(-1)
                assert torch.equal(wanted[:, -7:], said[row : row + 1, -7:])
            ids = torch.cat([said, text(2, 5, seed=turn + 1)], 1)
            mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        assert cache.turns


@pytest.mark.parametrize("keep", [None, 0, 4])
def test_padding_on_the_left_is_seen_by_nobody(keep):
    model, ids = built("llama") if keep != 4 else one_block(), text(3, 60)
    mask, padding = torch.ones_like(ids), (0, 7, 31)
    for row, pads in enumerate(padding):
        ids[row, :pads], mask[row, :pads] = PAD, 0
    with testreg.patch(model, late(model)) if keep is None else nullcontext():
        cache = Spied(model, window=WINDOW, keep=keep)
        found = [logits(model, ids[:, :45], attention_mask=mask[:, :45], past_key_values=cache)]
        found += [
            logits(model, ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache)
            for at in range(45, 60)
        ]
        found = torch.cat(found, 1)
        for row, pads in enumerate(padding):
            if keep == 4:  # right before the window, in each text alone
                seen = torch.cat([ids[row, pads : pads + 4], ids[row, 60 - WINDOW :]])[None]
                assert found[row, -1] == pytest.approx(logits(model, seen)[0, -1], abs=2e-4)
                continue
            wanted = as_spied(model, ids[row : row + 1, pads:], cache, row, pads)[0]
            assert found[row, pads:] == pytest.approx(wanted, abs=2e-4)
    assert found.isfinite().all()


@pytest.mark.parametrize("size", [1, 3, WINDOW])
def test_what_stays_of_a_text_far_shorter_than_the_others(size):
    """Its first tokens come when the others have had theirs long ago, and not all at once."""
    model, ids, mask = built("llama"), text(3, 120), torch.ones(3, 120, dtype=torch.long)
    padding = (0, 98, 110)
    for row, pads in enumerate(padding):
        ids[row, :pads], mask[row, :pads] = PAD, 0
    cache, found = StreamingCache(model, window=WINDOW, keep=4), []
    for at, piece in zip(range(size, 121, size), ids.split(size, dim=1), strict=True):
        found.append(logits(model, piece, attention_mask=mask[:, :at], past_key_values=cache))
    found = torch.cat(found, 1)
    for row, pads in enumerate(padding):  # as each alone, in the same pieces
        sizes = [piece.shape[1] for piece in torch.arange(120)[None].split(size, dim=1) if piece[0, -1] >= pads]
        sizes[0] -= pads % size
        alone = read_into(StreamingCache(model, window=WINDOW, keep=4), model, ids[row : row + 1, pads:], sizes)
        assert found[row, pads:] == pytest.approx(alone[0], abs=2e-4)
    assert found[2, 110:] == pytest.approx(logits(model, ids[2:, 110:])[0], abs=2e-4)  # ten tokens are all seen


def test_beams():
    model, ids = built("llama"), text(2, 6)
    more = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 3, "do_sample": False}
    with testreg.patch(model, start_plan(model)):
        wanted = model.generate(ids, past_key_values=DynamicCache(config=model.config), **more)
        assert torch.equal(model.generate(ids, past_key_values=StreamingCache(model, window=60), **more), wanted)
        near = model.generate(ids, past_key_values=StreamingCache(model, window=WINDOW), **more)
        assert near.shape == wanted.shape
        cache = StreamingCache(model, window=WINDOW)
        ids = text(3, 40)
        logits(model, ids[:, :30], past_key_values=cache)
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        found = logits(model, ids[order, 30:], past_key_values=cache)
        fresh = StreamingCache(model, window=WINDOW)
        logits(model, ids[order, :30], past_key_values=fresh)
        assert found == pytest.approx(logits(model, ids[order, 30:], past_key_values=fresh), abs=1e-5)


def test_beyond_the_trained_length():
    model, ids = built("llama"), text(1, 300)
    model.config.max_position_embeddings = 40
    with testreg.patch(model, late(model)):
        cache = Spied(model, window=WINDOW)
        found = read_into(cache, model, ids, 7)
        assert cache.where.max() < 40
        assert found == pytest.approx(as_spied(model, ids, cache), abs=2e-4)


def test_at_a_position_of_four_millions():
    model, ids = built("llama"), text(1, 120)
    with testreg.patch(model, start_plan(model)):
        cache, same = StreamingCache(model, window=WINDOW), StreamingCache(model, window=WINDOW)
        logits(model, ids[:, :50], past_key_values=cache), logits(model, ids[:, :50], past_key_values=same)
        cache.seen = 4_000_000
        found = logits(model, ids[:, 50:], past_key_values=cache)
        assert cache.get_seq_length() == 4_000_070
        assert torch.equal(found, logits(model, ids[:, 50:], past_key_values=same))


def held(cache):
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values, layer.first_keys, layer.first_values)
        if tensor is not None
    )


@pytest.mark.parametrize("keep", [None, 4])
def test_memory_does_not_grow(keep):
    model, ids = built("llama"), text(2, 400)
    with testreg.patch(model, start_plan(model)):
        cache = StreamingCache(model, window=WINDOW, keep=keep)
        sizes = []
        for piece in ids.split([100, 1, 1, 200, 1, 97], dim=1):
            logits(model, piece, past_key_values=cache)
            sizes.append(held(cache))
    tokens = WINDOW - 1 + (keep or 0)
    assert sizes[1:] == [3 * 2 * 2 * tokens * 16 * 4] * 5 or len(set(sizes)) == 1


def test_streaming_llm_as_published():
    """The first tokens stay right before the window, wherever it is; against text with what lies between cut out."""
    model, ids = one_block(), text(1, 120)
    found = in_pieces(model, ids, [1] * 120, keep=4)
    for at in (30, 60, 119):
        seen = torch.cat([ids[:, :4], ids[:, at - WINDOW + 1 : at + 1]], dim=1)
        assert found[:, at] == pytest.approx(logits(model, seen)[:, -1], abs=2e-4)


def test_a_window_alone():
    model, ids = built("llama"), text(2, 60)
    assert in_pieces(model, ids, [13, 1, 46], keep=0) == pytest.approx(banded(model, ids), abs=2e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built("gpt2"), r"GPT2Model \(rope type: none\) cannot be turned"),
        (lambda: built("opt"), r"OPTDecoder \(rope type: none\) cannot be turned"),
    ],
)
def test_models_without_rotary_positions_are_refused(make, message):
    model = make()
    with pytest.raises(testreg.UnsupportedModel, match=message):
        StreamingCache(model, window=WINDOW, keep=0)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic", "longrope"])
def test_rope_types(kind):
    settings = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    if kind in ("yarn", "dynamic", "longrope"):
        settings |= {"original_max_position_embeddings": 64}
    if kind == "longrope":
        settings |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = hf.LlamaConfig(**SHAPE, rope_parameters=settings)
    model, ids = hf.LlamaForCausalLM(config).eval(), text(1, 60)
    found = in_pieces(model, ids, [20, 40], keep=0)
    assert found == pytest.approx(banded(model, ids), abs=2e-4)


def test_keys_that_do_not_turn_evenly_are_refused():
    model = built("llama")
    rotary = model.model.rotary_emb
    before = rotary.forward
    rotary.forward = lambda x, position_ids: before(x, position_ids**2)
    with pytest.raises(testreg.UnsupportedModel, match=r"rope type: default.*as rotary ones do"):
        StreamingCache(model, window=WINDOW, keep=0)


def test_what_cannot_be():
    model, ids = built("llama"), text()
    with pytest.raises(testreg.TestregError, match="no registers that could stay"):
        StreamingCache(model, window=WINDOW)
    for window in (1, 0, -3, 129, 2.5, True, None):
        with pytest.raises(testreg.TestregError, match="window must be a whole number from 2"):
            StreamingCache(model, window=window, keep=0)
    plan = start_plan(model)
    many = testreg.RegisterPlan({}, 6, 0, plan.state.expand(-1, 6, -1), positions="before")
    with (
        testreg.patch(model, many),
        pytest.raises(testreg.TestregError, match=r"from 6 .no fewer tokens than there are"),
    ):
        StreamingCache(model, window=5)
    with testreg.patch(model, plan):
        cache = StreamingCache(model, window=WINDOW)
        with testreg.patch(model, many), pytest.raises(testreg.TestregError, match="other registers now"):
            logits(model, ids, past_key_values=cache)
        logits(model, ids, past_key_values=cache)
        with pytest.raises(testreg.TestregError, match="holds 2 texts, but 1 were given"):
            logits(model, ids[:1], past_key_values=cache)
        with pytest.raises(testreg.TestregError, match="cannot take tokens back"):
            cache.crop(1)
    with pytest.raises(testreg.TestregError, match="other registers now"):
        logits(model, ids, past_key_values=cache)
    assert logits(model, ids).isfinite().all()


def test_a_branch_of_a_chat_is_its_own():
    model, ids = built("llama"), text(2, 60)
    with testreg.patch(model, start_plan(model)):
        cache = StreamingCache(model, window=WINDOW)
        logits(model, ids[:, :30], past_key_values=cache)
        branch = copy.deepcopy(cache)
        wanted = logits(model, ids[:, 30:], past_key_values=cache)
        assert torch.equal(logits(model, ids[:, 30:], past_key_values=branch), wanted)
        cache.reset()
        again = logits(model, ids[:, :30], past_key_values=cache)
        assert torch.equal(again, logits(model, ids[:, :30], past_key_values=StreamingCache(model, window=WINDOW)))


def test_turnings_are_those_of_the_model():
    model = built("glm")
    found = turnings(find_decoder(model), 256)
    assert {turning.layout.halves for turning in found} == {False}  # GLM pairs neighbours
    assert {turning.layout.halves for turning in turnings(find_decoder(built("llama")), 256)} == {True}
