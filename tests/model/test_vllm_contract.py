"""What vLLM asks of a model package. vLLM itself does not run here: a stand-in takes the calls that its documents name.

Sources: docs.vllm.ai, "Plugin System", "Registering a Model" and "Supported Models: Writing custom models".
"""

import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModel, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_llama3

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


class Registry:
    def __init__(self):
        self.registered = {}

    def get_supported_archs(self):
        return self.registered.keys()

    def register_model(self, architecture, model):
        assert architecture not in self.registered, "registered twice"
        self.registered[architecture] = model


def test_entry_point(monkeypatch):
    """It may be called in every process and again; it names vLLM's class and imports nothing of it."""
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "hf_llama3"]
    registry = Registry()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    for _ in range(2):
        found.load()()
    assert registry.registered == {"Llama3ForCausalLM": "vllm.model_executor.models.llama:LlamaForCausalLM"}
    assert not any(name.startswith("vllm.") for name in sys.modules)


def test_native_llama_finds_what_it_reads(tmp_path):
    """Its Llama takes upstream's configuration: every field of that is in ours, by the same name, of the same value."""
    config = hf_llama3.Llama3Config(**SHAPE, architectures=["Llama3ForCausalLM"])
    config.save_pretrained(tmp_path)
    ours = AutoConfig.from_pretrained(tmp_path)
    assert ours.architectures == ["Llama3ForCausalLM"]
    theirs = LlamaConfig(**{key: value for key, value in ours.to_dict().items() if key != "model_type"})
    read = set(theirs.to_dict()) - {"model_type", "transformers_version", "pretraining_tp"}
    assert {key: getattr(ours, key) for key in read} == {key: getattr(theirs, key) for key in read}


def attention_of_an_engine(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """Hand heads that are not repeated to the engine's own attention of this layer; give tokens by channels back."""
    assert attention_mask is None and key.shape[1] == 2
    tokens = query.shape[-2]
    flat = (states.transpose(1, 2).reshape(tokens, -1) for states in (query, key, value))
    return attention_instances[module.layer_idx](*flat, scaling), None


def causal(queries, keys, values, scaling):
    heads = (states.unflatten(-1, (-1, 8)).transpose(0, 1) for states in (queries, keys, values))
    output = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(0, 1).flatten(1)


def test_transformers_backend(monkeypatch):
    """Attention by name, with what the engine passes through `forward`; plans of styles it knows; tuples on request."""
    torch.manual_seed(0)
    plain = AutoModel.from_config(hf_llama3.Llama3Config(**SHAPE)).eval()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", attention_of_an_engine)
    model = AutoModel.from_config(hf_llama3.Llama3Config(**SHAPE), attn_implementation="engine").eval()
    model.load_state_dict(plain.state_dict())
    ids = torch.randint(128, (1, 12))
    with torch.no_grad():
        expected = plain(ids).last_hidden_state
        found = model(
            input_ids=None,
            inputs_embeds=model.get_input_embeddings()(ids),
            use_cache=False,
            position_ids=torch.arange(12)[None],
            attention_instances=dict.fromkeys(range(3), causal),
            return_dict=False,
        )[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    assert model._supports_attention_backend and not isinstance(model, hf_llama3.Llama3ForCausalLM)
    first = model.layers[0]
    assert first.self_attn.is_causal
    assert set(model.config.base_model_tp_plan.values()) <= {"colwise", "rowwise", "replicate"}
    linears = {name for name, module in first.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(model.config.base_model_tp_plan) == {f"layers.*.{name}" for name in linears}
    children = [name for name, _ in model.named_children() if name not in ("rotary_emb", "dropout")]
    assert list(model.config.base_model_pp_plan) == children
