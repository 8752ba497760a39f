"""The library's exporters take our class: graphs for any batch and length, saved, loaded and run without its code."""

import pytest
import torch
from parity import make_pair, same, tokens
from transformers import DynamicCache

pytestmark = pytest.mark.integrations
ROWS = 3
BACKENDS = {"Dynamo": 0.0, "Onnx": 2e-5}  # onnxruntime sums in another order


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    from transformers import exporters

    name = request.param
    exporter = getattr(exporters, f"{name}Exporter")()
    return exporter, getattr(exporters, f"{name}Config")(dynamic=True), BACKENDS[name]


def sample():
    return {"input_ids": tokens(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long)}


@torch.no_grad()
def test_exported_model_agrees(backend, tmp_path):
    """On another batch, of another length, with padding."""
    from transformers.exporters import ExportedModel

    ours, _ = make_pair()
    exporter, config, tolerance = backend
    exporter.export(ours, sample(), config).save_pretrained(tmp_path)
    inputs = {"input_ids": tokens(ROWS, 20), "attention_mask": torch.ones(ROWS, 20, dtype=torch.long)}
    inputs["attention_mask"][0, :5] = 0
    exported = ExportedModel.from_pretrained(tmp_path)
    torch.testing.assert_close(exported(**inputs).logits, ours(**inputs).logits, rtol=0, atol=tolerance)
    assert exported.config.model_type == "llama3"


@torch.no_grad()
def test_exported_model_generates(backend):
    """A prompt, then one token at a time over the cache that the graphs hand on."""
    ours, theirs = make_pair()
    exporter, config, _ = backend
    runners = exporter.export_for_generation(ours, sample(), config).runners
    ids, cache, step = tokens(ROWS, 20), DynamicCache(config=ours.config), "prefill"
    written = ids
    while written.shape[1] < 28:
        positions = torch.arange(written.shape[1])[-ids.shape[1] :].expand(ROWS, -1)
        output = runners[step](input_ids=ids, position_ids=positions, past_key_values=cache)
        ids, cache, step = output.logits[:, -1:].argmax(-1), output.past_key_values, "decode"
        written = torch.cat((written, ids), dim=1)
    assert torch.equal(written, theirs.generate(tokens(ROWS, 20), max_new_tokens=8, do_sample=False, eos_token_id=None))


@torch.no_grad()
def test_exports_by_torch(tmp_path):
    """One graph for any batch and length, without the library's exporters."""
    ours, _ = make_pair()
    sizes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=1024)}}
    kwargs = {"input_ids": tokens(2, 16), "use_cache": False}
    program = torch.export.export(ours, (), kwargs, dynamic_shapes=sizes | {"use_cache": None})
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    ids = tokens(ROWS, 40)
    same(exported(input_ids=ids, use_cache=False).logits, ours(ids).logits)


@torch.no_grad()
def test_compiled_by_inductor():
    """`fullgraph=True` raises where Dynamo has to leave the graph; one compilation serves other lengths."""
    ours, _ = make_pair(num_hidden_layers=1)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for length in (32, 48):
        ids = tokens(2, length)
        torch.testing.assert_close(compiled(ids).logits, ours(ids).logits, rtol=0, atol=2e-5)
