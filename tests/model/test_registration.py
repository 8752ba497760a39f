"""`import hf_llama3` teaches the Auto classes, in any order, once, without importing what is not needed."""

import json
import subprocess
import sys
import textwrap

import pytest

CLASSES = """
    import torch
    tiny = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model("llama3", **tiny)
    assert type(config) is hf_llama3.Llama3Config
    for auto, name in ((AutoModel, "Model"), (AutoModelForCausalLM, "ForCausalLM"),
                       (AutoModelForSequenceClassification, "ForSequenceClassification"),
                       (AutoModelForTokenClassification, "ForTokenClassification"),
                       (AutoModelForQuestionAnswering, "ForQuestionAnswering")):
        assert type(auto.from_config(config)) is getattr(hf_llama3, "Llama3" + name), name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert "Llama3ForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    model = AutoModelForCausalLM.from_config(config)
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert type(AutoConfig.from_pretrained(folder)) is hf_llama3.Llama3Config
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is hf_llama3.Llama3ForCausalLM
"""
AUTO = (
    "from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, "
    "AutoModelForSequenceClassification, AutoModelForTokenClassification)"
)


def run(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


ORDERS = {
    "ours first": f"import hf_llama3\n{AUTO}",
    "theirs first": f"{AUTO}\nimport hf_llama3",
    "upstream's modelling first": f"from transformers import LlamaForCausalLM\nimport hf_llama3\n{AUTO}",
    "ours, then upstream's modelling": f"import hf_llama3\nfrom transformers import LlamaForCausalLM\n{AUTO}",
    "configuration between": f"from transformers import AutoConfig\nimport hf_llama3\n{AUTO}",
    "our modelling, then theirs": f"import hf_llama3.modeling_llama3, hf_llama3\n{AUTO}",
    "twice": f"import hf_llama3\nhf_llama3.registration.register()\n{AUTO}\nhf_llama3.registration.register()",
}


# Each order in a process that is forked before any of it is imported: all that comes before takes most of the time.
EACH = """
import json, os, sys, traceback
import torch, transformers.modeling_utils, transformers.generation
begun = [name for name in sys.modules if name.startswith(("hf_llama3", "transformers.models."))]
assert not {"hf_llama3", "transformers.models.auto.modeling_auto", "transformers.models.llama"} & set(begun), begun
results = {}
for name, code in json.loads(sys.argv[1]).items():
    output = os.pipe()
    if (child := os.fork()) == 0:
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            os.write(output[1], traceback.format_exc().encode()[-4000:])
        os._exit(0)
    os.close(output[1])
    results[name] = os.fdopen(output[0]).read() or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def of_each_order():
    codes = {order: imports + textwrap.dedent(CLASSES) for order, imports in ORDERS.items()}
    return json.loads(run(EACH, json.dumps(codes)).stdout.splitlines()[-1])


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes(order, of_each_order):
    assert of_each_order[order] == 0


UPSTREAM = """
    config = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == "LlamaForCausalLM"
"""


def test_upstream_is_left_alone():
    """In a process that begins with nothing."""
    run(ORDERS["ours first"] + textwrap.dedent(UPSTREAM) + textwrap.dedent(CLASSES))


def test_import_is_light():
    """The command line starts with it: torch and transformers wait until somebody asks for a class."""
    run("import hf_llama3, sys; assert not {'torch', 'transformers'} & sys.modules.keys(), sorted(sys.modules)")


def test_adapter_targets():
    run(
        """
        import hf_llama3
        from peft.utils import constants
        for name, table in vars(constants).items():
            if isinstance(table, dict) and "llama" in table:
                assert table["llama3"] == table["llama"], name
        assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama3"] == ["q_proj", "v_proj"]
        """
    )


def test_unknown_attribute():
    run(
        """
        import hf_llama3
        try:
            hf_llama3.Llama4Model
        except AttributeError as error:
            assert str(error) == "module 'hf_llama3' has no attribute 'Llama4Model'"
        assert "Llama3Model" in dir(hf_llama3)
        """
    )
