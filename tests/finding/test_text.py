"""From text to a plan: known answers on planted models, refusals, and the same plan however the text is given."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from speakers import ENDS, GROUPED, built

import testreg
from testreg import BadText, NoOutliers, TestregError, UnsupportedModel
from testreg.demo.planted_text import MARKED, START, planted_text, text_for
from testreg.runtime.decoders import find_decoder
from testreg.text.streams import start_of


@pytest.fixture(scope="module")
def planted():
    return planted_text()


@pytest.fixture(scope="module")
def found(planted):
    return testreg.find(planted.model, text=text_for(30, 256))


@torch.no_grad()
def perplexity(model, ids):
    losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return float(losses.exp())


def largest(model, ids, first=1):
    """The largest norm over the median of its sequence, at any block's output from `first` on."""
    with torch.no_grad():
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states[first + 1 : -1]
    return max(
        float((norms / norms.median(-1, keepdim=True).values).max()) for norms in (s.norm(dim=-1) for s in states)
    )


def test_the_planted_neurons_are_found_and_no_decoy(planted, found):
    assert found.neurons == planted.neurons
    assert found.language
    assert found.form == "attention"
    assert found.state.shape[0] == 4 - found.entry
    assert not set(found.pairs) & set(planted.decoys)
    told = found.provenance
    assert [(row["block"], row["neuron"]) for row in told["candidates"][:2]] == [(1, 5), (1, 9)]
    assert told["artefact"]["block"] == planted.block
    assert told["first_token"] == 1.0
    assert told["base"]["class"] == "LlamaForCausalLM"
    json.dumps(told)


def test_real_tokens_stay_small_whichever_comes_first(planted, found):
    model, ids = planted.model, text_for(6, 200, seed=9)
    bare = ids[:, 1:]
    before = perplexity(model, ids)
    assert largest(model, ids) > 50
    with testreg.patch(model, found):
        for text in (ids, bare, ids[:, 100:]):
            assert largest(model, text) < 4
        assert perplexity(model, ids) < 1.02 * before
        assert perplexity(model, bare) < 1.02 * before
    assert perplexity(model, bare) > 5 * before  # a planted model needs its sink
    with testreg.patch(model, testreg.RegisterPlan(found.neurons, registers=0, positions="before")):
        assert perplexity(model, ids) > 5 * before  # neither the neurons alone
    assert perplexity(model, ids) == before


def test_what_the_guard_says_is_so(planted, found):
    told = found.provenance["guard"]
    assert told["sequences"] == 8
    assert told["as_given"]["left"] == 0
    assert told["as_given"]["perplexity"] <= 1.02 * told["as_given"]["unpatched"]
    assert told["begun_otherwise"]["unpatched"] > 5 * told["as_given"]["unpatched"]
    assert told["begun_otherwise"]["perplexity"] < 1.1 * told["as_given"]["perplexity"]
    assert told["received"]["unpatched"] > 10 * told["received"]["patched"]


def test_plans_are_tried_as_the_guard_judges_them(found):
    """On text begun as given and begun otherwise, by the one that changes more."""
    trials = [trial for trial in found.provenance["trials"] if trial["registers"]]
    assert len(trials) > 2
    for trial in trials:
        both = trial["as_given"], trial["begun_otherwise"]
        assert both[1]["unpatched"] > 5 * both[0]["unpatched"]  # without its start token the planted model is lost
        worst = max(math.log(one["perplexity"] / one["unpatched"]) for one in both)
        assert trial["drift"] == pytest.approx(max(1e-4, worst), abs=2e-6)
        assert trial["left"] == max(one["left"] for one in both)
    (chosen,) = (trial for trial in trials if trial["chosen"])
    assert chosen["drift"] <= 1.1 * min(trial["drift"] for trial in trials if not trial["left"]) + 5e-4


def test_a_start_token_row_that_harms_where_there_is_a_start_token_already(planted, monkeypatch):
    """A plan that is best in text as given alone is not chosen."""
    from testreg.finding.text_trial import OTHERWISE, TextBench

    scores = TextBench.scores

    def harmed(self, plan):
        seen = scores(self, plan)
        if plan.positions == "before":
            seen[OTHERWISE] = replace(seen[OTHERWISE], perplexity=2 * seen[OTHERWISE].unpatched)
        return seen

    monkeypatch.setattr(TextBench, "scores", harmed)
    assert testreg.find(planted.model, text=text_for(30, 256)).positions == "on"


def test_a_sink_that_follows_content():
    planted = planted_text(where="content")
    ids = text_for(30, 256)
    found = testreg.find(planted.model, text=ids)
    assert found.neurons == planted.neurons
    share = float((ids == MARKED).sum() / ((ids == MARKED).sum() + len(ids)))
    assert found.provenance["first_token"] == pytest.approx(1 - share, abs=0.05)


def test_the_same_plan_however_the_text_comes(planted, found, tmp_path):
    ids = text_for(30, 256)
    assert testreg.find(planted.model, text=ids.flip(0), batch_size=4) == found
    assert testreg.find(planted.model, text=ids.flatten(), batch_size=7) == found  # cut where it was joined


class Words:
    """A tokenizer that knows numbers, and begins every text with the start token."""

    bos_token_id = START

    def __call__(self, text):
        return {"input_ids": [START, *(int(word) for word in text.split() if word.isdecimal())]}


def test_files_folders_rows_and_texts_are_read_alike(planted, tmp_path):
    ids = text_for(12, 256, start=False)[:, 1:]
    texts = [" ".join(map(str, row.tolist())) for row in ids]
    for index, text in enumerate(texts):
        (tmp_path / f"{index:02}.txt").write_text(text)
    (tmp_path / "notes.bin").write_bytes(b"\xff\xfe")
    rows = [{"text": text, "label": 1} for text in texts]
    plans = [
        testreg.find(planted.model, text=given, tokenizer=Words())
        for given in (texts, tmp_path, [Path(tmp_path / f"{index:02}.txt") for index in range(12)], rows)
    ]
    assert plans[0].neurons == planted.neurons
    assert all(plan == plans[0] for plan in plans)
    assert plans[0].provenance["text"] == {**plans[1].provenance["text"]}


def test_a_long_text_is_read_in_pieces_as_it_is_whole(monkeypatch):
    from testreg.text import streams

    text = "\n".join(" ".join(map(str, row.tolist())) for row in text_for(9, 40, start=False))
    model = planted_text().model
    whole = list(streams.Texts(model, text, Words(), length=32))
    monkeypatch.setattr(streams, "PIECE", 50)
    pieces = list(streams.Texts(model, text, Words(), length=32))
    assert len(whole) > 8
    assert torch.equal(torch.stack(whole), torch.stack(pieces))
    assert all(sequence[0] == START for sequence in whole)


def test_nothing_to_do():
    with pytest.raises(NoOutliers, match=r"nothing to give a register to.*largest norm is \d"):
        testreg.find(planted_text(where="nowhere").model, text=text_for(30, 256))


def test_a_sink_that_is_no_massive_activation():
    with pytest.raises(NoOutliers, match=r"attention sinks, but none that is a massive activation"):
        testreg.find(planted_text(where="quiet").model, text=text_for(30, 256))


def test_massive_tokens_that_no_neuron_writes():
    with pytest.raises(testreg.Harmful, match=r"no MLP neuron of blocks 0 to 0"):
        testreg.find(planted_text(where="embedded").model, text=text_for(30, 256))


def test_gated_attention_is_refused_with_the_reason():
    config = hf.Qwen3NextConfig(
        **GROUPED, head_dim=8, num_experts=0, layer_types=["full_attention"] * 3, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    model = hf.Qwen3NextForCausalLM(config).eval()
    with pytest.raises(NoOutliers, match=r"Gated attention \(arXiv 2505.06708\)"):
        testreg.find(model, text=text_for(30, 256))


def test_sink_logits_are_refused_with_the_reason():
    with pytest.raises(NoOutliers, match=r"Sink logits: a learned term"):
        testreg.find(built("gpt-oss", std=0.02), text=text_for(30, 256))


def test_harm_is_refused_with_numbers_and_may_be_forced(planted, monkeypatch):
    from testreg.finding import text_search

    monkeypatch.setattr(text_search, "MOST_WORSE", 0.5)
    with pytest.raises(testreg.Harmful, match=r"does harm: perplexity \d"):
        testreg.find(planted.model, text=text_for(30, 256))
    assert testreg.find(planted.model, text=text_for(30, 256), force=True).neurons == planted.neurons


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.zeros(0, dtype=torch.long), BadText, "there is no text"),
        ([], BadText, "there is no text"),
        (torch.arange(60)[:40], BadText, "too short"),
        (text_for(3, 256), BadText, r"3 different sequences of 256 tokens are too few"),
        (text_for(30, 256) + 10, BadText, "its tokenizer is"),
        (text_for(30, 256).float(), BadText, "must be whole numbers"),
        (3, BadText, "not a int"),
        (Path("missing.txt"), BadText, "there is no file or folder .missing.txt. of text"),
        ("some text", BadText, "no usable tokenizer"),
    ],
)
def test_bad_text(planted, text, error, message):
    with pytest.raises(error, match=message):
        testreg.find(planted.model, text=text)


def test_sequences_of_which_some_begin_with_the_start_token(planted):
    ids = text_for(30, 256)
    ids[24:, 0] = 40
    plan = testreg.find(planted.model, text=ids, batch_size=4, force=True)
    assert "begun_otherwise" in json.dumps(plan.provenance["trials"])
    assert plan.neurons == planted.neurons


def test_the_start_token_is_that_of_a_named_tokenizer_too(planted, tmp_path, monkeypatch):
    own = Words()
    monkeypatch.setattr("testreg.text.streams.tokenizer_named", lambda name: own)
    monkeypatch.setattr(planted.model.config, "bos_token_id", None)
    monkeypatch.setattr(planted.model.generation_config, "bos_token_id", None)
    assert start_of(planted.model, None) is None
    assert start_of(planted.model, "name") == start_of(planted.model, own) == own.bos_token_id
    monkeypatch.setattr(planted.model, "tokenizer", own, raising=False)
    assert start_of(planted.model, None) == own.bos_token_id


def test_a_short_text_longer_than_a_file_name(planted):
    with pytest.raises(BadText, match="too short"):
        testreg.find(planted.model, text="word " * 90, tokenizer=Words())


def test_a_tokenizer_of_another_model(planted):
    class Foreign(Words):
        unk_token_id, unk_token = 63, "<unk>"

        def __call__(self, text):
            return {"input_ids": [START, *(63 for _ in text.split())]}

    with pytest.raises(BadText, match=r"does not know 100% of the text \(its token '<unk>'\)"):
        testreg.find(planted.model, text="w " * 3000, tokenizer=Foreign())
    with pytest.raises(BadText, match="no usable tokenizer with 'nowhere'"):
        testreg.find(planted.model, text="w " * 3000, tokenizer="nowhere")
    with pytest.raises(BadText, match=r"tokenizer must be one of transformers.*not a function"):
        testreg.find(planted.model, text="w " * 3000, tokenizer=lambda text: [1])


def test_a_name_of_a_file_is_told_from_a_text(planted, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("1 2 3")
    for given in (str(file), [str(file)]):
        with pytest.raises(BadText, match="is the name of a file"):
            testreg.find(planted.model, text=given, tokenizer=Words())


def test_bad_models(planted):
    ids = text_for(30, 256)
    with pytest.raises(UnsupportedModel, match="no head that gives the next token"):
        testreg.find(planted.model.model, text=ids)
    bert = hf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        testreg.find(hf.BertForMaskedLM(bert), text=ids)
    nothing = testreg.RegisterPlan({}, registers=0, positions="before")
    with testreg.patch(planted.model, nothing), pytest.raises(TestregError, match="patched already"):
        testreg.find(planted.model, text=ids)
    with pytest.raises(TestregError, match="text goes with tokenizer, batch_size, force and progress alone"):
        testreg.find(planted.model, text=ids, top_k=3)
    with pytest.raises(testreg.BadImages, match="give images"):
        testreg.find(planted.model)
    broken = planted_text().model
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TestregError, match="block 2 gives NaN"):
        testreg.find(broken, text=ids)


def test_experts_have_no_neurons_that_can_be_told_apart():
    model = built("mixtral")
    assert find_decoder(model).downs == (None, None, None)
    assert find_decoder(model).neurons == (0, 0, 0)
    assert find_decoder(
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, **ENDS))
    ).neurons == (128,)


def test_inspection_after_patching(planted, found):
    ids = text_for(8, 64)
    before = testreg.inspect(planted.model, text=ids)
    assert before.registers == 0
    assert "testreg patch MODEL --text FILE" in before.verdict
    with testreg.patch(planted.model, found):
        after = testreg.inspect(planted.model, text=ids)
    assert after.registers == found.registers
    assert after.taken > 0.3
    assert after.rates[0] < 0.05 < before.rates[0]
    assert f"{found.registers} register" in after.verdict
    assert not any(block.massive for block in after.blocks)
    assert any(block.massive for block in before.blocks)
