"""Dropout on the residual stream (Vaswani et al. 2017, arXiv:1706.03762, section 5.4), which small texts need and Llama
has not."""

from torch.nn.functional import dropout

from hf_llama3.modeling_llama3 import Llama3ForCausalLM


def add_residual_dropout(model: Llama3ForCausalLM, rate: float):
    """Have the model drop channels of the embeddings and of what each block adds to the residual stream, in training.

    Forward hooks do it: no module or parameter is added, and a folder that is saved knows nothing of it.
    """

    def drop(module, inputs, output):
        if isinstance(output, tuple):  # attention's weights come second
            return dropout(output[0], rate, module.training), *output[1:]
        return dropout(output, rate, module.training)

    blocks = [block for layer in model.model.layers for block in (layer.self_attn, layer.mlp)]
    for module in (model.model.embed_tokens, *blocks):
        module.register_forward_hook(drop)
