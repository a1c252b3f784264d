"""What a model says of each image, by whatever kind of output it has."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput

from testreg.finding.answers import answer

ROWS, STATES = torch.arange(6.0).view(2, 3), torch.zeros(2, 5, 3)


def never():
    raise AssertionError("the model has an answer of its own")


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (ROWS, "logits"),
        (ImageClassifierOutput(logits=ROWS), "logits"),
        (CLIPOutput(image_embeds=ROWS, logits_per_image=-ROWS), "image_embeds"),
        (BaseModelOutputWithPooling(last_hidden_state=STATES, pooler_output=ROWS), "pooler_output"),
        (SimpleNamespace(logits=ROWS, image_embeds=-ROWS, pooler_output=-ROWS), "logits"),
        (SimpleNamespace(logits=torch.zeros(2, 3, 4, 4), pooler_output=ROWS), "pooler_output"),  # a map of logits
    ],
)
def test_the_models_own_answer(output, kind):
    found, said = answer(output, never)
    assert found == kind
    assert torch.equal(said, ROWS)


@pytest.mark.parametrize("output", [STATES, (STATES,), BaseModelOutput(last_hidden_state=STATES)])
def test_without_one_a_state_speaks_for_it(output):
    kind, said = answer(output, lambda: ROWS.half())
    assert kind == "state"
    assert torch.equal(said, ROWS)
    assert said.dtype == torch.float32
