"""Make the Auto classes, the library's name tables and PEFT know the model type "llama3", and packed folders; give the
model class the loss that its six files leave to the package.

Nothing heavy is imported here: the rows are added the moment that each table's own module has been imported (at once if
it already is), and the classes themselves are looked up through `hf_llama3` when somebody asks for one. Registering at
once instead would make `import hf_llama3`, and with it `hf-llama3 --help`, wait for torch and the modelling code.
"""

import sys

from wrapt import when_imported

MODEL_TYPE = "llama3"
CONFIG_CLASS = "Llama3Config"

# Auto class, its table in transformers.models.auto.modeling_auto, our class
MODEL_CLASSES = (
    ("AutoModel", "MODEL_MAPPING", "Llama3Model"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "Llama3ForCausalLM"),
    (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "Llama3ForSequenceClassification",
    ),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "Llama3ForTokenClassification"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING", "Llama3ForQuestionAnswering"),
)


def register():
    """Add the rows now or as soon as their tables exist; calling it again changes nothing."""
    # The tables hold names, which the library looks up in `transformers.models.<model type>`. The public `register`
    # takes classes, whose import in the middle of the library's own would be a circle; it serves below, after that.
    sys.modules.setdefault(f"transformers.models.{MODEL_TYPE}", sys.modules["hf_llama3"])
    built_before_us = "transformers.models.auto.modeling_auto" in sys.modules

    @when_imported("transformers.models.auto.configuration_auto")
    def add_config(configuration_auto):
        configuration_auto.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG_CLASS

    @when_imported("transformers.models.auto.modeling_auto")
    def add_models(modeling_auto):
        for auto_class, table, name in MODEL_CLASSES:
            getattr(modeling_auto, f"{table}_NAMES")[MODEL_TYPE] = name
            if built_before_us:  # its reverse index lacks our configuration, so it takes classes rather than names
                hf_llama3 = sys.modules["hf_llama3"]
                config_class, model_class = getattr(hf_llama3, CONFIG_CLASS), getattr(hf_llama3, name)
                getattr(modeling_auto, auto_class).register(config_class, model_class, exist_ok=True)

    @when_imported("hf_llama3.modeling_llama3")
    def add_loss(modeling_llama3):
        from .training.loss import loss_without_logits

        modeling_llama3.Llama3ForCausalLM.loss_without_logits = staticmethod(loss_without_logits)

    @when_imported("transformers.quantizers.auto")
    def add_packed_folders(auto):
        from .conversion.config.hf import PACKED
        from .cpu.quantizer import PackedConfig, PackedQuantizer

        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[PACKED] = PackedConfig
        auto.AUTO_QUANTIZER_MAPPING[PACKED] = PackedQuantizer

    @when_imported("peft.utils.constants")
    def add_adapter_targets(constants):
        for table in vars(constants).values():
            if isinstance(table, dict) and "llama" in table:
                table.setdefault(MODEL_TYPE, table["llama"])


def register_with_vllm():
    """Have vLLM run our type by its own Llama; the package's entry point in the group "vllm.general_plugins".

    vLLM calls it in each of its processes before any work, as often as it likes, and imports the class it names when it
    is wanted (docs.vllm.ai, "Plugin System" and "Registering a Model").
    """
    from vllm import ModelRegistry

    architecture = "Llama3ForCausalLM"
    if architecture not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture, "vllm.model_executor.models.llama:LlamaForCausalLM")
