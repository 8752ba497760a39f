"""Our classes against upstream's `modeling_llama`, with the same weights; see `parity.py`."""

import pytest
import torch
from parity import CHECKS, GEOMETRY, check_logits, make_pair, same, tokens
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as theirs_module

from hf_llama3 import Llama3Config, attention, mlp, modeling_llama3, norm, rotary
from hf_llama3.presets import llama3_scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", CHECKS)
def test_equal_to_upstream(check, dtype):
    check(*make_pair(dtype))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.long)])
@torch.no_grad()  # flex attention has no backward on a CPU
def test_attention_implementations(implementation):
    check_logits(*make_pair(attention=implementation))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_head_layouts(kv_heads, tied):
    check_logits(*make_pair(num_key_value_heads=kv_heads, tie_word_embeddings=tied))


LLAMA_2 = {
    "vocab_size": 128,
    "num_key_value_heads": None,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
CODE_LLAMA = LLAMA_2 | {"vocab_size": 130, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
WIDE_HEADS = {"head_dim": 32}


@pytest.mark.parametrize("changes", [LLAMA_2, CODE_LLAMA, WIDE_HEADS], ids=["llama2", "codellama", "head_dim"])
def test_other_geometries(changes):
    check_logits(*make_pair(**changes))


OTHER_ROPES = [
    {"rope_type": "default"},
    {"rope_type": "llama3"} | llama3_scaling(32.0),
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("rope", OTHER_ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_types(rope):
    ours, theirs = make_pair(rope_parameters={"rope_theta": 500000.0} | rope, max_position_embeddings=96)
    for start in (0, 200):  # within the window and past it, where dynamic types recompute; then back
        positions = torch.arange(start, start + 64).expand(2, -1)
        same(ours(tokens(), position_ids=positions).logits, theirs(tokens(), position_ids=positions).logits)
    check_logits(ours, theirs)


@pytest.mark.parametrize("kind", ["assisted", "prompt_lookup"])
def test_speculative_decoding(kind):
    ours, theirs = make_pair()
    draft = make_pair(num_hidden_layers=1)
    prompt, outputs = tokens(batch=1, length=24), []
    for model, assistant in zip((ours, theirs), draft, strict=True):
        more = {"assistant_model": assistant} if kind == "assisted" else {"prompt_lookup_num_tokens": 3}
        outputs.append(model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, **more))
    same(*outputs)
    same(outputs[0], ours.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False))


def test_outputs_by_name():
    ours, theirs = make_pair(attention="eager")
    outputs = [model(tokens(), output_hidden_states=True, output_attentions=True) for model in (ours, theirs)]
    for mine, other in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        same(mine, other)
    for mine, other in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
        same(mine, other)


@pytest.mark.parametrize("kept", [5, torch.tensor([3, 60]), torch.tensor([[1, 2], [3, 4]]), tokens() > 90])
def test_logits_to_keep(kept):
    ours, _ = make_pair()
    full = ours(tokens()).logits
    if isinstance(kept, int):
        expected = full[:, -kept:]
    elif kept.ndim == 1:
        expected = full[:, kept]
    elif kept.dtype == torch.bool:
        expected = full[kept]
    else:
        expected = torch.stack([row[index] for row, index in zip(full, kept, strict=True)])
    # Another number of rows may take another kernel, whose sums round elsewhere: 1e-5 of logits around 10.
    torch.testing.assert_close(ours(tokens(), logits_to_keep=kept).logits, expected, rtol=1e-5, atol=1e-5)


# Modules, one by one


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def configs():
    return Llama3Config(**GEOMETRY, attn_implementation="eager"), LlamaConfig(**GEOMETRY, attn_implementation="eager")


def same_weights(ours, theirs, dtype):
    torch.manual_seed(3)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.5, 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def states(dtype):
    return torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(4)).to(dtype)


def test_norm(dtype):
    ours, theirs = same_weights(norm.Llama3RMSNorm(64, 1e-5), theirs_module.LlamaRMSNorm(64, 1e-5), dtype)
    same(ours(states(dtype)), theirs(states(dtype)))


def test_mlp(dtype):
    our_config, their_config = configs()
    ours, theirs = same_weights(mlp.Llama3MLP(our_config), theirs_module.LlamaMLP(their_config), dtype)
    same(ours(states(dtype)), theirs(states(dtype)))


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_rotary(dtype, factor):
    rope = {"rope_theta": 500000.0} | (llama3_scaling(factor) if factor else {"rope_type": "default"})
    ours = rotary.Llama3RotaryEmbedding(Llama3Config(**GEOMETRY | {"rope_parameters": dict(rope)}))
    theirs = theirs_module.LlamaRotaryEmbedding(LlamaConfig(**GEOMETRY | {"rope_parameters": dict(rope)}))
    same(ours.inv_freq, theirs.inv_freq)
    positions = torch.tensor([[0, 1, 8191, 8192, 131071]])
    for mine, other in zip(ours(states(dtype), positions), theirs(states(dtype), positions), strict=True):
        same(mine, other[..., :8])  # upstream stores each angle twice


def test_rotation(dtype):
    ours = rotary.Llama3RotaryEmbedding(configs()[0])
    theirs = theirs_module.LlamaRotaryEmbedding(configs()[1])
    x = states(dtype).view(2, 64, 4, 16).transpose(1, 2)
    positions = torch.arange(64).expand(2, -1)
    mine = rotary.apply_rotary_pos_emb(x, x[:, :2] * 2, *ours(x, positions))
    other = theirs_module.apply_rotary_pos_emb(x, x[:, :2] * 2, *theirs(x, positions))
    same(mine[0], other[0])
    same(mine[1], other[1])


def test_attention(dtype):
    our_config, their_config = configs()
    ours, theirs = same_weights(
        attention.Llama3Attention(our_config, 0), theirs_module.LlamaAttention(their_config, 0), dtype
    )
    x, positions = states(dtype), torch.arange(64).expand(2, -1)
    mask = torch.full((1, 1, 64, 64), torch.finfo(dtype).min, dtype=dtype).triu(1)
    mine = ours(x, rotary.Llama3RotaryEmbedding(our_config)(x, positions), mask)
    other = theirs(x, theirs_module.LlamaRotaryEmbedding(their_config)(x, positions), mask)
    same(mine[0], other[0])
    same(mine[1], other[1])


def test_decoder_layer(dtype):
    our_config, their_config = configs()
    ours, theirs = same_weights(
        modeling_llama3.Llama3DecoderLayer(our_config, 0), theirs_module.LlamaDecoderLayer(their_config, 0), dtype
    )
    x, positions = states(dtype), torch.arange(64).expand(2, -1)
    mine = ours(x, position_embeddings=rotary.Llama3RotaryEmbedding(our_config)(x, positions))
    other = theirs(x, position_embeddings=theirs_module.LlamaRotaryEmbedding(their_config)(x, positions))
    same(mine, other)
