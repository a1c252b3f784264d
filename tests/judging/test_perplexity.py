"""Which tokens are scored: every sequence begins as a text does, a stream begins once, whatever is left out first."""

import pytest
import torch

import testreg
from testreg.demo.planted_text import START, planted_text, text_for
from testreg.judging import perplexity as judging


class Words:
    """A tokenizer that knows numbers, and begins every text with the start token."""

    bos_token_id, unk_token_id = START, None

    def __call__(self, text):
        return {"input_ids": [START, *(int(word) for word in text.split() if word.isdecimal())]}


@pytest.fixture(scope="module")
def model():
    return planted_text().model


@pytest.fixture(scope="module")
def words():
    return text_for(1, 3000, start=False)[0]


@pytest.mark.parametrize("skip", [0, 100])
def test_what_is_read(model, words, skip):
    text = " ".join(map(str, words.tolist()))
    ids = judging._tokens(model, text, Words(), skip, 1024, 512)
    assert ids.shape == (1024,)
    for at, first in ((0, skip), (512, skip + 511)):
        assert ids[at] == START
        assert torch.equal(ids[at + 1 : at + 512], words[first : first + 511])
    stream = judging._tokens(model, text, Words(), skip, 1024, 512, whole=True)
    assert stream[0] == START
    assert torch.equal(stream[1:], words[skip : skip + 1023])
    given = judging._tokens(model, words, None, skip, 1024, 512)
    assert torch.equal(given, words[skip : skip + 1024])


def test_too_little(model, words):
    text = " ".join(map(str, words.tolist()))
    with pytest.raises(testreg.BadText, match="101 tokens behind the first 2900 are too few"):
        judging.perplexity(model, text, tokenizer=Words(), skip=2900)
    with pytest.raises(testreg.BadText, match="0 tokens are too few"):
        judging.perplexity(model, "", tokenizer=Words())
