"""`inspect` on causal language models: planted sinks in closed form, and the kinds of attention told apart."""

import json

import pytest
import tokenizers
import torch
import transformers as hf
import zoo
from click.testing import CliRunner

import testreg
from testreg.cli.group import main
from testreg.finding.language import inspect, kind_of
from testreg.text.tokens import tokens

TOKENS, WORDS, SINK = 64, 60, 60  # a sequence; ordinary ids; the id that every planted query likes
SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "attention_bias": True,
    "bos_token_id": 61, "eos_token_id": 62, "pad_token_id": 63,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLOW = {"rope_type": "default", "rope_theta": 1e12}  # the slowest pair of channels does not turn within a sequence


def llama(**more):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, rope_parameters=SLOW, **more))


def gpt_oss():
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(**SHAPE, rope_parameters=SLOW, num_local_experts=4, num_experts_per_tok=2)
    )


def qwen3_next():
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    config = hf.Qwen3NextConfig(
        **SHAPE, **linear, **EXPERTS, linear_value_head_dim=8, num_experts=4, shared_expert_intermediate_size=16
    )
    return hf.Qwen3NextForCausalLM(config)


def built(make, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**more).eval()


def ids(sequences=6, sink=True):
    drawn = torch.randint(0, WORDS, (sequences, TOKENS), generator=torch.Generator().manual_seed(1))
    if sink:
        drawn[:, 0] = SINK
    return drawn


@torch.no_grad()
def plant(model, logit=6.0, heads=(0, 1, 2), blocks=(1, 2, 3)):
    """Every query of these heads gives `logit` to a key of the token SINK, and 0 to any other."""
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = 0
    embeddings[SINK] = 0
    embeddings[SINK, 0] = 100
    for block in model.model.layers:
        for name, parameter in block.named_parameters():
            if "norm" not in name:
                parameter.zero_()  # the residual stream stays what the embeddings are
    width = SHAPE["hidden_size"] ** 0.5  # what a norm makes of the token SINK in its one channel
    for index in blocks:
        attention = model.model.layers[index].self_attn
        attention.k_proj.weight[3::8, 0] = 1 / width  # channel 3 of each head is of the slowest pair
        for head in heads:
            attention.q_proj.bias[8 * head + 3] = logit * 8**0.5
    return model


def share(logit, taken=0.0):
    """The mean attention on the first token where its logit is that of the plant, other tokens' 0, by hand."""
    weight, extra = torch.tensor(logit).exp(), torch.tensor(taken).exp() if taken else 0
    return (weight / (weight + torch.arange(TOKENS) + extra)).mean().item()


def test_a_planted_sink_in_closed_form():
    found = inspect(plant(built(llama)), ids())
    assert found.kind == "plain"
    assert found.rates == pytest.approx((3 / 4 * 3 / 4, 0, 0, 0))  # three of four heads of three of four blocks
    assert found.elsewhere == 0
    assert found.taken == pytest.approx(0, abs=1e-6)
    uniform = (1 / torch.arange(1, TOKENS + 1)).mean().item()
    assert [block.sink for block in found.blocks] == [0, 0.75, 0.75, 0.75]
    assert found.blocks[0].received == pytest.approx(uniform, rel=1e-5)
    assert found.blocks[1].received == pytest.approx((3 * share(6.0) + uniform) / 4, rel=1e-4)
    assert "Softmax sinks are there: token 0 gets more than 30% of the attention in 56% of the heads" in found.verdict
    assert "first 4 tokens" in found.verdict


def test_a_sink_that_is_not_the_first_token():
    drawn = ids(sink=False)
    drawn[:, 2] = SINK
    found = inspect(plant(built(llama)), drawn)
    assert found.rates == pytest.approx((0, 0, 9 / 16, 0))  # queries before it cannot see it, and do not count
    assert "token 2 gets" in found.verdict
    drawn = ids(sink=False)
    drawn[:, 20] = SINK
    found = inspect(plant(built(llama)), drawn)
    assert max(found.rates) == 0
    assert found.elsewhere == pytest.approx(9 / 16)
    assert "a token behind the first 4 gets" in found.verdict
    drawn = ids(sink=False)
    drawn[:, 31] = SINK  # gets 0.4 from the 33 queries that can see it, which is 0.2 from all 64
    assert inspect(plant(built(llama), logit=3.5), drawn).elsewhere == pytest.approx(9 / 16)


def test_no_sink_where_none_is_planted():
    found = inspect(plant(built(llama)), ids(sink=False))
    assert max(found.rates) == found.elsewhere == 0
    assert found.verdict.startswith("No softmax sinks")


def test_a_sink_logit_takes_the_place_of_the_token():
    model = plant(built(gpt_oss))
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.sinks.fill_(-1e4)
    seen = inspect(model, ids())
    assert seen.kind == "sink logits"
    assert seen.rates[0] == pytest.approx(9 / 16)
    assert "Yet there are sinks" in seen.verdict
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.sinks.fill_(8.0)
    seen = inspect(model, ids())
    assert seen.blocks[1].received == pytest.approx((3 * share(6.0, 8.0) + share(0.0, 8.0)) / 4, rel=1e-4)
    assert max(seen.rates) == 0
    heads, count = torch.tensor([6.0] * 9 + [0.0] * 7).exp()[:, None], torch.arange(TOKENS)
    logit = torch.tensor(8.0).exp()
    assert seen.taken == pytest.approx((logit / (logit + heads + count)).mean().item(), rel=1e-4)
    assert "Sink logits: a learned term of the softmax takes" in seen.verdict
    assert "Indeed no token gets more than 30%" in seen.verdict


def test_gated_attention():
    model = built(qwen3_next)
    found = inspect(model, ids())
    assert found.kind == "gated"
    assert [block.sink is None for block in found.blocks] == [True, True, True, False]
    assert "Indeed no token gets more than 30%" in found.verdict
    assert "the 1 of 4 blocks that attend by softmax" in found.verdict
    attention = plant(model, blocks=()).model.layers[3].self_attn
    with torch.no_grad():  # queries and keys are normed here, and their last channels are not turned
        attention.q_proj.bias[7::16] = 1
        attention.k_proj.weight[7::8, 0] = 1
        attention.k_proj.bias[6::8] = 0.1
        attention.k_norm.weight.fill_(2.0)
    found = inspect(model, ids())
    assert found.rates[0] == 1
    assert "Yet there are sinks" in found.verdict


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (llama, "plain"),
        (gpt_oss, "sink logits"),
        (qwen3_next, "gated"),
        (lambda: hf.AfmoeForCausalLM(hf.AfmoeConfig(**SHAPE, **EXPERTS, num_experts=4)), "gated"),
        (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SHAPE)), "plain"),
        (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4)),
            "plain",
        ),
        (lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)), "plain"),
    ],
    ids=["llama", "gpt-oss", "qwen3-next", "afmoe", "gemma3", "gpt2", "bloom"],
)
def test_kinds_by_what_the_attention_holds(make, kind):
    model = built(make)
    found = inspect(model, ids())
    assert found.kind == kind
    assert max(found.rates) == 0  # random weights have no sinks
    assert found.sinks is False


def test_keys_and_values_of_different_widths_are_no_gate():
    attention = torch.nn.Module()
    for name, (inputs, outputs) in {"q": (64, 4 * 16), "k": (64, 2 * 16), "v": (64, 2 * 8), "o": (4 * 8, 64)}.items():
        setattr(attention, f"{name}_proj", torch.nn.Linear(inputs, outputs))
    assert kind_of(attention) == "plain"
    attention.q_proj = torch.nn.Linear(64, 2 * 4 * 16)
    assert kind_of(attention) == "gated"


def test_the_published_definition_term_by_term():
    model = built(llama)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(40)
            block.self_attn.k_proj.weight.mul_(40)
    drawn = ids(3, sink=False) % 3  # queries are of three kinds, so some first tokens get much from many
    drawn[:, :4] = torch.randint(3, WORDS, (3, 4), generator=torch.Generator().manual_seed(2))
    found = inspect(model, drawn, batch_size=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(drawn, output_attentions=True).attentions)  # (layers, sequences, heads, T, T)
    for key in range(4):
        hits = [
            sum(float(one[query, key]) for query in range(key, TOKENS)) / (TOKENS - key) > 0.3
            for one in maps.flatten(0, 2)
        ]
        assert found.rates[key] == pytest.approx(sum(hits) / len(hits))
    assert 0 < max(found.rates) < 1


@pytest.mark.parametrize(
    ("value", "of_others", "massive"), [(2000.0, 1.0, True), (200.0, 1.0, False), (90.0, 0.01, False)]
)
def test_massive_activations(value, of_others, massive):
    model = plant(built(llama))
    with torch.no_grad():
        random = torch.Generator().manual_seed(0)
        model.get_input_embeddings().weight.copy_(of_others * torch.randn(64, 64, generator=random))
        model.get_input_embeddings().weight[SINK, 17] = -value
    drawn = ids(4)
    drawn[1:, 0] = 0
    found = inspect(model, drawn)
    state = model.get_input_embeddings().weight[drawn[0]].detach()
    for block in found.blocks:
        assert block.massive == (0.25 if massive else 0)
        assert block.activation == pytest.approx(value)
        assert block.times == pytest.approx((value / state.abs().median()).item(), rel=1e-5)
        assert block.largest == pytest.approx(state.norm(dim=-1).max().item(), rel=1e-5)
    assert ("Massive activations" in found.verdict) == massive


def test_the_model_stays_as_it_was():
    model = built(llama).train()
    before = model.config._attn_implementation
    inspect(model, ids())
    assert model.training
    assert model.config._attn_implementation == before != "eager"
    assert not any(module._forward_hooks for module in model.modules())


def test_the_language_model_of_a_vision_language_model():
    vision = hf.CLIPVisionConfig(**zoo.VISION)
    words = hf.LlamaConfig(**{**SHAPE, "num_hidden_layers": 3})
    config = hf.LlavaConfig(vision_config=vision, text_config=words, image_token_index=60)
    model = hf.LlavaForConditionalGeneration(config).eval()
    found = testreg.inspect(model, text=torch.randint(0, 60, (2, 32)))
    assert (found.kind, found.sequences, found.tokens) == ("plain", 2, 32)
    assert len(found.blocks) == 3


def test_what_cannot_be_looked_at():
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    bert = hf.BertModel(hf.BertConfig(**shape, num_attention_heads=4, intermediate_size=48)).eval()
    with pytest.raises(testreg.UnsupportedModel, match="not causal"):
        inspect(bert, ids())
    assert not any(module._forward_hooks for module in bert.modules())
    with pytest.raises(testreg.UnsupportedModel, match="no blocks with attention"):
        inspect(hf.MambaForCausalLM(hf.MambaConfig(**shape, state_size=4)), ids())
    with pytest.raises(testreg.UnsupportedModel, match="no causal language model"):
        inspect(zoo.build("ViTModel")[0], ids())
    falcon = hf.FalconForCausalLM(hf.FalconConfig(**shape, num_attention_heads=4))
    with pytest.raises(testreg.UnsupportedModel, match='load it with attn_implementation="eager"'):
        inspect(falcon, ids())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.long), "32 tokens at least"),
        (torch.zeros(2, 64), "token ids"),
        (torch.zeros(64, dtype=torch.long), "token ids"),
        (torch.zeros(0, 64, dtype=torch.long), "token ids"),
        (torch.full((2, 64), 64), "the model knows 0 to 63"),
        (torch.full((2, 64), -1), "ids from -1"),
        ("a text", "no usable tokenizer"),
        ([1, 2], "text must be texts"),
        (None, "text must be texts"),
    ],
)
def test_text_that_is_none(text, message):
    with pytest.raises(testreg.TestregError, match=message):
        inspect(built(llama), text)


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{index}": index for index in range(WORDS)} | {"[s]": 61, "[e]": 62, "[p]": 63}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.post_processor = tokenizers.processors.TemplateProcessing("[s] $A", special_tokens=[("[s]", 61)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="[s]", eos_token="[e]", pad_token="[p]")


def prose(count):
    return " ".join(f"w{index % WORDS}" for index in range(count))


def test_texts_become_sequences_that_each_begin_as_a_text_does(tokenizer):
    found = tokens(None, [prose(130), prose(63)], tokenizer)
    assert found.shape == (3, TOKENS)
    assert found[:, 0].tolist() == [61, 61, 61]
    assert found[0, 1:].tolist() == [index % WORDS for index in range(63)]
    assert found[1, 1:].tolist() == [index % WORDS for index in range(63, 126)]
    assert found[2, 1:].tolist() == found[0, 1:].tolist()
    assert tokens(None, prose(40), tokenizer).shape == (1, 41)  # one short text is better than none
    with pytest.raises(testreg.TestregError, match="too short"):
        tokens(None, prose(20), tokenizer)
    with pytest.raises(testreg.TestregError, match="there is no text"):
        tokens(None, [], tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("language")
    model = plant(built(llama), heads=(0, 1, 2, 3))
    with torch.no_grad():  # the token that begins every text is the sink
        model.get_input_embeddings().weight[61] = model.get_input_embeddings().weight[SINK]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(prose(1000), encoding="utf-8")
    return folder


def test_the_command(checkpoint):
    def run(*more):
        return CliRunner().invoke(main, ["inspect", str(checkpoint / "model"), *more])

    result = run("--text", str(checkpoint / "text.txt"))
    assert result.exit_code == 0, result.output
    assert "Softmax sinks are there: token 0 gets more than 30% of the attention in 75% of the heads" in result.output
    told = json.loads(run("--text", str(checkpoint / "text.txt"), "--json").stdout)
    assert told["rates"] == [0.75, 0, 0, 0]
    assert (told["sequences"], told["tokens"], len(told["blocks"])) == (15, 64, 4)
    missing = run("--text", str(checkpoint / "none.txt"))
    assert missing.exit_code == 1
    assert "there is no file or folder" in missing.output
    neither = run()
    assert neither.exit_code == 2
    assert "--images" in neither.output
    assert "--text" in neither.output
    both = run("--text", str(checkpoint / "text.txt"), "--images", str(checkpoint))
    assert both.exit_code == 2
    wrong = run("--images", str(checkpoint))
    assert wrong.exit_code == 1
    assert "--text" in wrong.output
