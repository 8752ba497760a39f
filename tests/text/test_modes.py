"""Every way to generate works on the optimised model, with the tokens of the plain one."""

import io
from contextlib import redirect_stdout

import pytest
import torch
from small import CLASSES, make_model, prompts
from transformers import (
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
    TextStreamer,
    pipeline,
)

import hf_llama3
from hf_llama3.training.tokenizer import character_tokenizer


@pytest.fixture(scope="module", params=CLASSES)
def pair(request):
    """A plain model and the same, optimised."""
    return make_model(request.param), hf_llama3.optimize(make_model(request.param))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One that has a character for every id but the last."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in character_tokenizer([characters(range(511))], 512).files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def characters(ids):
    return "".join(chr(ord("a") + index) for index in ids)


def left_padded():
    ids = prompts(3, 12)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 9)):
        ids[row, :padding] = mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


MODES = {
    "greedy": lambda model: {},
    "left padding": lambda model: left_padded(),
    "sampling": lambda model: {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40},
    "beams": lambda model: {"num_beams": 3, "num_return_sequences": 2},
    "several stop tokens": lambda model: {"eos_token_id": list(range(2, 60))},
    "prompt lookup": lambda model: {"input_ids": prompts(1, 6).repeat(1, 4), "prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"input_ids": prompts(1), "assistant_model": make_model(num_hidden_layers=1)},
    "in chunks": lambda model: left_padded() | {"prefill_chunk_size": 5},
    "static cache": lambda model: {"past_key_values": StaticCache(model.config, max_cache_len=64)},
    "no cache": lambda model: {"use_cache": False},
    "several sequences": lambda model: {"do_sample": True, "num_return_sequences": 3},
    "penalty": lambda model: {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens(mode, pair):
    outputs = []
    for model in pair:
        torch.manual_seed(0)
        options = {"input_ids": prompts(), "max_new_tokens": 20, "do_sample": False} | MODES[mode](model)
        options.setdefault("attention_mask", torch.ones_like(options["input_ids"]))
        outputs.append(model.generate(**options))
    theirs, ours = outputs
    assert torch.equal(ours, theirs) and ours.shape[1] > 12


def test_scores_and_cache(pair):
    how = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    theirs, ours = [model.generate(prompts(1), **how) for model in pair]
    for its, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(its, other, rtol=0, atol=1e-4)
    go_on = {"past_key_values": ours.past_key_values, "max_new_tokens": 4, "do_sample": False}
    longer = pair[0].generate(prompts(1), max_new_tokens=9, do_sample=False)
    assert torch.equal(pair[1].generate(ours.sequences, **go_on), longer)


def test_stop_strings(pair, tokenizer):
    whole = pair[0].generate(prompts(1), max_new_tokens=20, do_sample=False)
    stop = tokenizer.decode(whole[0, 14])
    how = {"max_new_tokens": 20, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    theirs, ours = [model.generate(prompts(1), **how) for model in pair]
    assert torch.equal(ours, theirs) and ours.shape[1] <= 15 < whole.shape[1]


def test_streaming(pair, tokenizer):
    printed = []
    for model in pair:
        with redirect_stdout(io.StringIO()) as out:
            model.generate(prompts(1), streamer=TextStreamer(tokenizer), max_new_tokens=10, do_sample=False)
        printed.append(out.getvalue())
    assert printed[0] == printed[1] and len(printed[0]) >= 15


def test_continuous_batching(pair):
    rows = [prompts(1, length)[0].tolist() for length in (5, 9, 3, 12, 7)]
    fields = ContinuousBatchingConfig.__dataclass_fields__
    size = {"page_size" if "page_size" in fields else "block_size": 16}  # the later name, the earlier one
    how = {
        "generation_config": GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=2),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, **size),
        "progress_bar": False,
    }
    theirs, ours = [
        {key: output.generated_tokens for key, output in model.generate_batch(inputs=rows, **how).items()}
        for model in pair
    ]
    assert list(ours.values()) == list(theirs.values()) and len(ours) == 5
    for row, tokens in zip(rows, ours.values(), strict=True):
        alone = pair[0].generate(torch.tensor([row]), max_new_tokens=10, do_sample=False)
        assert alone[0, len(row) :].tolist() == tokens


def test_pipeline(pair, tokenizer):
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)(
            characters([5, 6, 7]), max_new_tokens=8, do_sample=False
        )
        for model in pair
    ]
    assert texts[0] == texts[1]
