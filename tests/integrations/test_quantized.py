"""Weights quantised on loading by other libraries: the logits of upstream's class, quantised alike, to the bit."""

import pytest
import torch
from parity import make_pair, same, tokens
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import hf_llama3
from hf_llama3.cpu import compiled, processor
from hf_llama3.errors import UserError
from hf_llama3.measure.bench import weight_bytes

pytestmark = pytest.mark.integrations


def torchao(name, **how):
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)(**how))


# The configuration, and how far from the plain logits its own may lie, as a share of their norm.
CONFIGURATIONS = {
    "bitsandbytes int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.1),
    "bitsandbytes nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.7),
    "torchao int8 weights": (lambda: torchao("Int8WeightOnlyConfig"), 0.1),
    "torchao int8 weights and inputs": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 0.1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Our model, and its folder and upstream's."""
    ours, theirs = make_pair(intermediate_size=192)  # a multiple of 64: others bitsandbytes' 4 bits refuse on a CPU
    folders = [tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("upstream")]
    ours.save_pretrained(folders[0])
    theirs.save_pretrained(folders[1])
    return ours, folders


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_quantised_on_loading(name, models, tmp_path):
    plain, folders = models
    make, tolerance = CONFIGURATIONS[name]
    ours, theirs = [
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), device_map="cpu", dtype=torch.float32)
        for folder in folders
    ]
    assert type(ours).__name__ == "Llama3ForCausalLM" and type(theirs).__name__ == "LlamaForCausalLM"
    # Before anything is computed: for that bitsandbytes repacks 4 bits on a CPU, and its way back rounds the scales.
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    logits, expected = ours(tokens()).logits, plain(tokens()).logits
    same(logits, theirs(tokens()).logits)
    distance = (logits - expected).norm() / expected.norm()
    instructions = processor.here().instructions
    if "inputs" in name and "avx2" in instructions and not any("vnni" in one for one in instructions):
        tolerance = 1  # torch's 8-bit products add in 16 bits there, and saturate
    assert 0 < distance < tolerance, distance
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert weight_bytes(ours) < weight_bytes(plain) / 3
    with pytest.raises(UserError, match=r"on cpu weights must be plain, got a model loaded with a \w+Config; load it"):
        hf_llama3.optimize(ours, compile=True)
    same(ours.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    how = {"max_new_tokens": 8, "do_sample": False}
    same(ours.generate(tokens(), **how), theirs.generate(tokens(), **how))
    same(again(tokens()).logits, logits)


@pytest.mark.parametrize("name", ["torchao int8 weights"])
def test_compiled_step(name, models, monkeypatch):
    """What `optimize(compile=True)` does on a GPU, where it takes such a model, done here without one."""
    monkeypatch.setattr(compiled, "CPU_ROWS", 2)
    how = {"quantization_config": CONFIGURATIONS[name][0](), "device_map": "cpu", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(models[1][0], **how).requires_grad_(False)
    asked = {"inputs": tokens(), "attention_mask": torch.ones_like(tokens()), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**asked)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_decoding(model)
    assert counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        same(model.generate(**asked), expected)


@pytest.mark.parametrize("bits", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_adapters_train_on_quantised_weights(bits, models):
    """QLoRA: gradients reach the adapters through weights that have none."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    losses = []
    for folder in models[1]:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CONFIGURATIONS[bits][0](), device_map="cpu", dtype=torch.float32
        )
        torch.manual_seed(0)
        model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(r=4, task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
