"""The classes that `run.py` puts among transformers' tests: upstream's Llama and ours, under the same common tests."""

import unittest

import transformers

import hf_llama3

from ...generation.test_utils import GenerationTesterMixin  # empty here: see `run.py`
from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from ...test_training_mixin import TrainingTesterMixin


class Tester:
    """Small configurations and inputs, as the common tests ask for them."""

    __test__ = False

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, intermediate_size = 99, 32, 48
    num_hidden_layers, num_attention_heads, num_key_value_heads = 2, 4, 2
    num_labels = 3

    def __init__(self, config_class, base_model_class, causal_lm_class):
        self.config_class, self.base_model_class = config_class, base_model_class
        self.causal_lm_class = causal_lm_class

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class LlamaCommonTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (
        transformers.LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForTokenClassification,
        transformers.LlamaForQuestionAnswering,
    )
    all_generative_model_classes = (transformers.LlamaForCausalLM,)

    def setUp(self):
        self.model_tester = Tester(transformers.LlamaConfig, transformers.LlamaModel, transformers.LlamaForCausalLM)


class Llama3CommonTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (
        hf_llama3.Llama3Model,
        hf_llama3.Llama3ForCausalLM,
        hf_llama3.Llama3ForSequenceClassification,
        hf_llama3.Llama3ForTokenClassification,
        hf_llama3.Llama3ForQuestionAnswering,
    )
    all_generative_model_classes = (hf_llama3.Llama3ForCausalLM,)

    def setUp(self):
        self.model_tester = Tester(hf_llama3.Llama3Config, hf_llama3.Llama3Model, hf_llama3.Llama3ForCausalLM)
