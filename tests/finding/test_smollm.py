"""A real language model, SmolLM2-135M: the neurons that are known by hand, and words that stay the same."""

import pytest
import torch
from smollm import needs_model, smollm, tokens

import testreg
from testreg.finding.massive import peak, token_norms
from testreg.finding.text_trial import losses_of
from testreg.runtime.decoders import find_decoder

pytestmark = needs_model
BY_HAND = ((11, 1229), (11, 1487))


@pytest.fixture(scope="module")
def model():
    return smollm()[0]


@pytest.fixture(scope="module")
def found(model):
    """Of as little text as will do, which is little for the guard: tests.benchmarks.language gives it what it needs."""
    return testreg.find(model, text=tokens()[: 6 * 256], tokenizer=smollm()[1], batch_size=8, force=True)


def test_the_known_neurons_rank_first_and_are_chosen(found):
    candidates = [(row["block"], row["neuron"]) for row in found.provenance["candidates"]]
    assert tuple(candidates[:2]) == BY_HAND
    assert found.pairs == BY_HAND
    assert found.provenance["artefact"]["block"] == 11
    assert found.provenance["first_token"] == 1.0


def test_no_real_token_is_massive_and_text_stays_as_likely(model, found):
    ids = tokens()[40_960 : 40_960 + 2 * 256].view(2, 256)
    tower = find_decoder(model)
    before, loss = peak(token_norms(model, tower, ids), 11), losses_of(model, ids).mean()
    with testreg.patch(model, found):
        for begun in (ids, torch.cat([torch.ones_like(ids[:, :1]), ids], 1)):  # whichever token comes first
            assert peak(token_norms(model, tower, begun), 11) < 3
        assert float((losses_of(model, ids).mean() - loss).exp()) < 1.01
    assert before > 100


def test_a_window_without_the_first_tokens(model, found):
    ids = tokens()[50_000:50_384]

    def loss(cache):
        with torch.no_grad():
            logits = model(input_ids=ids[None], past_key_values=cache).logits[0, -193:-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[-192:]))

    kept = loss(testreg.StreamingCache(model, 64, keep=4))
    alone = loss(testreg.StreamingCache(model, 64, keep=0))
    with testreg.patch(model, found):
        assert loss(testreg.StreamingCache(model, 64)) < kept + 0.05
    assert alone > kept + 0.3
