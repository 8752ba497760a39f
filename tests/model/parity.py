"""What "equal to upstream" means: each check takes our model and upstream's with the same weights and raises if they
differ. `test_parity.py` runs them on the right model, `test_sabotage.py` on wrong ones, where each must raise.

The geometry is chosen to see: grouped queries, heads of 16 channels, 64 tokens, a feed-forward that is not 4 x hidden,
weights of 0.2 and norms that are not all one. With smaller ones a forgotten RoPE scaling hides in the rounding.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from hf_llama3 import Llama3Config, Llama3ForCausalLM
from hf_llama3.presets import llama3_scaling

GEOMETRY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 152,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0} | llama3_scaling(8.0),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_pair(dtype=torch.float32, attention="sdpa", seed=0, **changes):
    """Build our model and upstream's with the same random weights."""
    geometry = copy.deepcopy(GEOMETRY | changes)
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(geometry), attn_implementation=attention))
    randomise(theirs)
    ours = Llama3ForCausalLM(Llama3Config(**geometry, attn_implementation=attention))
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs.model.rotary_emb)
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype).eval()
    theirs.model.rotary_emb = exact  # upstream's `.to(bfloat16)` rounds the frequencies, its `from_pretrained` does not
    return ours, theirs


def randomise(model):
    """Draw weights that leave no module near the identity."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1, 0.3) if "norm" in name else weight.normal_(0, 0.2)


def tokens(batch=2, length=64, seed=1):
    return torch.randint(3, GEOMETRY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def same(ours, theirs):
    """Equal to the bit: both sides round at the same places, so no tolerance is needed on one machine."""
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def check_logits(ours, theirs):
    same(ours(tokens()).logits, theirs(tokens()).logits)


def check_loss(ours, theirs):
    labels = tokens().masked_fill(tokens(seed=2) % 5 == 0, -100)
    same(ours(tokens(), labels=labels).loss, theirs(tokens(), labels=labels).loss)


def check_gradients(ours, theirs):
    for model in (ours, theirs):
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
    theirs = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert weight.grad.abs().sum() > 0, name
        same(weight.grad, theirs[name].grad)


def check_cached_steps(ours, theirs):
    """Prefill 60 tokens, then one at a time."""
    outputs = []
    for model in (ours, theirs):
        step = model(tokens()[:, :60], use_cache=True)
        logits = [step.logits]
        for position in range(60, 64):
            step = model(tokens()[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
        outputs.append(torch.cat(logits, dim=1))
    same(*outputs)


def check_left_padding(ours, theirs):
    mask = torch.ones_like(tokens())
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "position_ids": positions}
    same(ours(**inputs).logits[mask.bool()], theirs(**inputs).logits[mask.bool()])


def check_packed(ours, theirs):
    """Two texts in one row, told apart by positions that start again, which only counts without a cache."""
    positions = torch.cat([torch.arange(40), torch.arange(24)]).expand(2, -1)
    inputs = {"input_ids": tokens(), "position_ids": positions, "use_cache": False}
    same(ours(**inputs).logits, theirs(**inputs).logits)


def check_static_cache(ours, theirs):
    outputs = []
    for model in (ours, theirs):
        cache = StaticCache(config=model.config, max_cache_len=80)
        first = model(tokens()[:, :63], past_key_values=cache, use_cache=True).logits
        outputs.append(torch.cat([first, model(tokens()[:, 63:], past_key_values=cache, use_cache=True).logits], 1))
    same(*outputs)


def check_far_positions(ours, theirs):
    """Beyond the 8192 positions that the scaling starts from."""
    positions = torch.arange(100_000, 100_064).expand(2, -1)
    same(ours(tokens(), position_ids=positions).logits, theirs(tokens(), position_ids=positions).logits)


def check_generation(ours, theirs, **settings):
    """The tokens, and the logits behind them: with few tokens a small error changes none."""
    settings |= {"max_new_tokens": 24, "min_new_tokens": 24, "output_logits": True, "return_dict_in_generate": True}
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        outputs.append(model.generate(tokens(length=24), **settings))
    same(outputs[0].sequences, outputs[1].sequences)
    same(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))


def check_greedy(ours, theirs):
    check_generation(ours, theirs, do_sample=False)


def check_sampling(ours, theirs):
    check_generation(ours, theirs, do_sample=True, temperature=0.8, top_p=0.9)


def check_beam_search(ours, theirs):
    check_generation(ours, theirs, do_sample=False, num_beams=3)


CHECKS = [
    check_logits,
    check_loss,
    check_gradients,
    check_cached_steps,
    check_left_padding,
    check_packed,
    check_static_cache,
    check_far_positions,
    check_greedy,
    check_sampling,
    check_beam_search,
]
