"""The loss without the logits: the same number and the same gradients as with them."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from parity import make_pair, tokens
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_llama3 import Llama3ForCausalLM
from hf_llama3.training import loss


@pytest.fixture(params=["torch's function", "our chunks", "one chunk"])
def ours(request, monkeypatch):
    """A model whose logits come in 13 chunks of ten positions, or in one."""
    if request.param != "one chunk":
        monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", 10 * 96)
    if request.param == "our chunks":
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    return make_pair()[0].train()


def loss_and_gradients(model, **inputs):
    model = copy.deepcopy(model)
    output = model(**inputs)
    output.loss.backward()
    return output, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def compare(model, tolerance=2e-6, **inputs):
    """Sums of the same terms in another order: a few float32 roundings of the largest."""
    theirs, expected = loss_and_gradients(model, **inputs)
    output, gradients = loss_and_gradients(model, skip_logits=True, **inputs)
    assert theirs.logits is not None and output.logits is None and expected
    torch.testing.assert_close(output.loss, theirs.loss, rtol=tolerance, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=tolerance * gradient.abs().max().item())


def some_labels():
    labels = tokens()
    labels[0, :20] = -100
    labels[1, 7] = -100
    return labels


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"shift_labels": tokens(seed=5)},
        {"ignore_index": 7},
    ],
    ids=lambda more: next(iter(more), "plain"),
)
def test_loss_and_gradients(more, ours):
    labels = some_labels().clamp(min=0) if "ignore_index" in more else some_labels()
    compare(ours, input_ids=tokens(), labels=labels, **more)


def test_tied(ours):
    torch.manual_seed(0)
    tied = make_pair(tie_word_embeddings=True)[0].train()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    compare(tied, input_ids=tokens(), labels=some_labels())


def test_bfloat16(ours):
    """Both sides round the logits to bfloat16, of 8 bits, but the sums over them differ."""
    compare(ours.to(torch.bfloat16), tolerance=2e-2, input_ids=tokens(), labels=some_labels())


def test_autocast(ours):
    with torch.autocast("cpu", torch.bfloat16):
        compare(ours, tolerance=2e-2, input_ids=tokens(), labels=some_labels())


def test_adapters_on_the_head(ours):
    """A head that is more than its weight is called, not read."""
    adapted = get_peft_model(ours, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    compare(adapted.train(), input_ids=tokens(), labels=some_labels())


def test_offloaded_head(ours):
    """A head whose weight lies elsewhere between calls, as accelerate's `cpu_offload` has it."""
    inputs = {"input_ids": tokens(), "labels": some_labels()}
    expected = ours(**inputs).loss
    cpu_offload(ours.lm_head, torch.device("cpu"))
    assert ours.lm_head.weight.is_meta
    torch.testing.assert_close(ours(**inputs, skip_logits=True).loss, expected, rtol=2e-6, atol=0)


def test_head_whose_hooks_fetch_its_weight(ours):
    """As under ZeRO-3, where a weight is empty but for the call."""
    inputs = {"input_ids": tokens(), "labels": some_labels()}
    expected, weight = ours(**inputs).loss, ours.lm_head.weight.detach().clone()

    def hold(data):
        def hook(module, *unused):
            module.weight.data = data

        return hook

    ours.lm_head.register_forward_pre_hook(hold(weight))
    ours.lm_head.register_forward_hook(hold(weight[:0]))
    ours.lm_head.weight.data = weight[:0]
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs, skip_logits=True).loss, expected, rtol=2e-6, atol=0)


def test_head_with_a_bias(ours):
    head = torch.nn.Linear(64, 96)
    torch.nn.init.normal_(head.bias)
    head.weight = ours.lm_head.weight
    ours.lm_head = head
    compare(ours, input_ids=tokens(), labels=some_labels())


def test_number_of_items_on_another_device(ours):
    """The Trainer counts on the device of its first process, and where it divides a batch itself, in a tensor (1)."""
    inputs = {"input_ids": tokens().to("meta"), "labels": tokens().to("meta")}
    ours.to("meta")
    assert ours(**inputs, skip_logits=True, num_items_in_batch=torch.tensor([50])).loss.is_meta


def test_gradient_checkpointing(ours):
    ours.gradient_checkpointing_enable()
    compare(ours, input_ids=tokens(), labels=some_labels(), use_cache=False)


def test_compiled(ours):
    inputs = {"input_ids": tokens(), "labels": some_labels()}
    theirs, expected = loss_and_gradients(ours, **inputs)
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager")
    output = compiled(**inputs, skip_logits=True)
    output.loss.backward()
    torch.testing.assert_close(output.loss, theirs.loss, rtol=2e-6, atol=0)
    gradients = dict(compiled._orig_mod.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name].grad, gradient, rtol=0, atol=2e-6 * gradient.abs().max().item())


def test_when_they_are_skipped(ours):
    inputs = {"input_ids": tokens(), "labels": tokens()}
    assert ours(**inputs).logits is not None
    ours.skip_logits_in_training = True
    assert ours(**inputs).logits is None
    assert ours(**inputs, skip_logits=False).logits is not None
    assert ours(tokens()).logits is not None, "without labels there is nothing else to return"
    assert ours.eval()(**inputs).logits is not None


def test_label_smoothing_of_the_trainer(ours, tmp_path):
    """The Trainer smooths labels itself, from logits: it takes the labels away, and gets them."""
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    losses = []
    for ours.skip_logits_in_training in (False, True):
        inputs = {"input_ids": tokens(), "labels": tokens()}
        losses.append(Trainer(ours, arguments).compute_loss(ours, inputs))
    assert torch.equal(*losses)


def test_control_sees_a_chunk_left_out(ours, monkeypatch):
    """The control: the comparison fails where the last positions are forgotten."""
    original = loss.loss_without_logits
    shortened = lambda states, head, labels, **kwargs: original(states[:, :60], head, labels[:, :60], **kwargs)  # noqa: E731
    monkeypatch.setattr(Llama3ForCausalLM, "loss_without_logits", staticmethod(shortened))
    with pytest.raises(AssertionError):
        compare(ours, input_ids=tokens(), labels=some_labels())
