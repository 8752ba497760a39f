"""`optimize` changes how a model is executed, and nothing that a user can see but the time."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from small import CLASSES, logits, make_model, prompts
from torch import nn
from transformers import AutoModelForCausalLM

import hf_llama3
from hf_llama3.cpu import optimization, processor
from hf_llama3.cpu.linear import KernelLinear
from hf_llama3.cpu.processor import Processor
from hf_llama3.errors import UserError

# Of the logits' largest value: sums of 192 products in another order; bfloat16 keeps 8 bits of every layer's output
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=[(kind, tied) for kind in CLASSES for tied in (True, False)], ids=str)
def model(request):
    kind, tied = request.param
    return make_model(kind, tie_word_embeddings=tied)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_logits_and_greedy_tokens(model, dtype):
    model.to(dtype)
    theirs, plain = logits(model), generate(model)
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert hf_llama3.optimize(model) is model
    assert sum(type(module) is KernelLinear for module in model.modules()) == linears == 15
    ours = logits(model)
    assert (ours - theirs).abs().max() <= TOLERANCES[dtype] * theirs.abs().max()
    for row, (made, its) in enumerate(zip(generate(model).sequences, plain.sequences, strict=True)):
        for place in (made != its).nonzero()[:1, 0]:  # another token is as likely, to the same tolerance
            scores = plain.logits[place - prompts().shape[1]][row]
            assert scores.max() - scores[made[place]] <= TOLERANCES[dtype] * scores.abs().max()


def generate(model):
    how = {"max_new_tokens": 30, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(prompts(), **how)


def test_biases():
    model = make_model(attention_bias=True, mlp_bias=True)
    theirs = logits(model)
    assert torch.allclose(logits(hf_llama3.optimize(model)), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_saved(model, dtype, tmp_path):
    model.to(dtype)
    model.save_pretrained(tmp_path / "plain")
    before, count = {name: value.clone() for name, value in model.state_dict().items()}, model.num_parameters()
    hf_llama3.optimize(model)
    after = model.state_dict()
    assert list(after) == list(before) and model.num_parameters() == count
    assert all(type(after[name]) is torch.Tensor and torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "optimised")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "optimised" / path.name).read_bytes() == path.read_bytes(), path.name
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "optimised", dtype=dtype)), logits(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    ))  # fmt: skip


def test_weights_can_be_read(model):
    plain = copy.deepcopy(model)
    hf_llama3.optimize(model)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours + 0, theirs + 0), name


def test_restored(model):
    model.model.norm.weight.requires_grad_(False)
    before, theirs = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    hf_llama3.optimize(model)
    assert hf_llama3.restore(model) is model and hf_llama3.restore(model) is model
    assert not any(type(module) is KernelLinear for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), theirs)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.norm.weight"]
    model.train()
    model(input_ids=prompts(), labels=prompts()).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    model.half()


def test_restored_to_the_modes_it_had(model):
    """Of every module by itself: parts may have been put into evaluation mode on purpose."""
    model.train().model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    hf_llama3.optimize(model)
    hf_llama3.restore(hf_llama3.optimize(model, compile=False))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module.training for module in hf_llama3.restore(hf_llama3.optimize(model.eval())).modules())


def test_twice_and_in_another_way(model):
    theirs = logits(hf_llama3.optimize(model))
    kernels = [module.kernel for module in model.modules() if type(module) is KernelLinear]
    hf_llama3.optimize(model)
    assert [module.kernel for module in model.modules() if type(module) is KernelLinear] == kernels
    assert torch.equal(logits(model), theirs)
    hf_llama3.optimize(model, quantize="int8")
    theirs, exact = logits(model), theirs
    assert not torch.equal(theirs, exact)
    for again in ({"quantize": "int8"}, {}):
        hf_llama3.optimize(model, **again)
        assert torch.equal(logits(model), theirs)


def test_dropout_ends(model):
    assert not any(module.training for module in hf_llama3.optimize(model.train()).modules())


def test_a_copy_is_as_good(model):
    theirs = logits(hf_llama3.optimize(model))
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), theirs)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(192, 128)
    assert not torch.equal(logits(model), theirs)
    assert torch.equal(logits(other), theirs)  # it has weights of its own
    hf_llama3.restore(other)
    assert type(model.lm_head) is KernelLinear and not torch.equal(logits(model), theirs)


def test_gradients_of_inputs():
    """Where inputs ask for gradients they get them, or an error, never none."""
    model, embeds = make_model(), torch.randn(1, 5, 128, requires_grad=True)
    model(inputs_embeds=embeds).logits.sum().backward()
    expected, embeds.grad = embeds.grad, None
    hf_llama3.optimize(model)(inputs_embeds=embeds).logits.sum().backward()
    torch.testing.assert_close(embeds.grad, expected)
    with pytest.raises(UserError, match=r"a quantised model has no gradients, .*; use torch\.no_grad"):
        hf_llama3.optimize(make_model(), quantize="int8")(inputs_embeds=embeds)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.model.layers[0].train(),
        lambda model: model.half(),
        lambda model: model.to("meta"),
        lambda model: model.model.layers[1].mlp.to(torch.float64),
        lambda model: model.load_state_dict({}),
        lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.zeros(512, 128))),
    ],
)  # fmt: skip
def test_changes_are_refused(change, model):
    theirs = logits(hf_llama3.optimize(model))
    with pytest.raises(UserError, match=r"optimised model .* hf_llama3\.restore"):
        change(model)
    assert not any(module.training for module in model.modules()) and model.dtype is torch.float32
    assert torch.equal(logits(model), theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[0].mlp.up_proj.weight.mul_(2),
        lambda model: model.model.layers[0].mlp.up_proj.weight.data.zero_(),
        lambda model: nn.init.ones_(model.model.layers[0].mlp.up_proj.weight),
        lambda model: model.model.embed_tokens.weight.mul_(2),
    ],
)  # fmt: skip
def test_changes_in_place_are_followed(change, model):
    """An exact weight is read where it lies, so that what is written there counts."""
    plain = copy.deepcopy(model)
    before = logits(hf_llama3.optimize(model))
    with torch.no_grad():
        change(plain)
        change(model)
    assert not torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_changed_embedding_is_noticed(kind):
    """The head has what was quantised of it."""
    model = hf_llama3.optimize(make_model(kind), quantize="int8")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 1.0
    with pytest.raises(UserError, match=r"must stay as they are; call hf_llama3\.restore before"):
        logits(model)


def test_there_are_no_gradients(model):
    hf_llama3.optimize(model)
    assert not model(input_ids=prompts(), labels=prompts()).loss.requires_grad


def test_what_changes_nothing_is_let_through(model):
    theirs = logits(hf_llama3.optimize(model))
    assert model.to("cpu").eval().float() is model
    assert torch.equal(logits(model), theirs)


@pytest.mark.parametrize("kind", CLASSES)
def test_adapters(kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(make_model(kind), config)
    injected = make_model(kind)
    injected.add_adapter(config)
    for model in (wrapped, injected):
        with pytest.raises(UserError, match="adapters must be merged first"):
            hf_llama3.optimize(model)
    theirs = logits(wrapped)
    ours = logits(hf_llama3.optimize(wrapped.merge_and_unload()))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", CLASSES)
def test_offload(kind, tmp_path):
    make_model(kind, tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.rotary_emb", "lm_head"], "cpu")
        | dict.fromkeys(["model.layers.1", "model.norm"], "disk"),
        offload_folder=tmp_path / "offload",
    )
    with pytest.raises(
        UserError, match=r"all weights must lie on one device, got cpu and disk; load .* without offload"
    ):
        hf_llama3.optimize(model)
    assert not any(type(module) is KernelLinear for module in model.modules())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "must be a transformers model, got Linear; load one"),
        (make_model, {"quantize": "int3"}, r"one of \('int8', 'int4'\) or None, got 'int3'"),
        (lambda: make_model().to("meta"), {}, r"must lie on one device, got nowhere \(meta\)"),
        (
            lambda: hf_llama3.optimize(make_model(), quantize="int8"),
            {"quantize": "int4"},
            "int8 cannot become int4; load",
        ),
    ],
)
def test_refused_models(model, options, message):
    with pytest.raises(UserError, match=message):
        hf_llama3.optimize(model(), **options)


def test_no_kernel_for_a_type():
    model = make_model(dtype=torch.float64)
    theirs = logits(model)
    with pytest.warns(UserWarning, match="no faster kernel here were left as they are: 15 of float64 on cpu"):
        hf_llama3.optimize(model)
    assert torch.equal(logits(model), theirs)


def test_no_kernel_at_all(monkeypatch):
    monkeypatch.setattr(processor, "here", lambda: Processor("Old Chip", ()))
    with pytest.warns(UserWarning, match="15 of float32 on cpu"):
        hf_llama3.optimize(make_model())


def loaded_with(config: str, is_compileable: bool):
    """Return what the library keeps on a model that it quantised on loading."""
    return SimpleNamespace(quantization_config=type(config, (), {})(), is_compileable=is_compileable)


def test_other_quantisers_on_a_gpu(monkeypatch):
    model = make_model()
    model.hf_quantizer = loaded_with("BitsAndBytesConfig", is_compileable=False)
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    message = "on cuda:0 weights must be plain, got a model loaded with a BitsAndBytesConfig; load it without"
    with pytest.raises(UserError, match=message):
        hf_llama3.optimize(model, compile=True)


@pytest.mark.parametrize(
    "quantizer", [None, loaded_with("TorchAoConfig", is_compileable=True)], ids=["plain", "torchao"]
)
def test_on_a_gpu(quantizer, monkeypatch):
    """What a GPU is told, where there is none: all but the compiling."""
    plain = make_model()
    if quantizer:
        plain.hf_quantizer = quantizer
    monkeypatch.setattr(type(plain), "device", torch.device("cuda", 0))
    with pytest.raises(UserError, match="is for a CPU, got 'int8' for a model on cuda:0; load it with a TorchAoConfig"):
        hf_llama3.optimize(plain, quantize="int8")
    with pytest.warns(UserWarning, match="on cuda:0 a compiled step alone is faster; optimize with compile=True"):
        hf_llama3.optimize(plain)
    monkeypatch.setattr(optimization, "compile_decoding", lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_llama3.optimize(plain, compile=True)
    assert not any(type(module) is KernelLinear for module in plain.modules())


def test_nothing_is_said_where_all_is_well(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_llama3.optimize(model)
