"""LoRA adapters of PEFT: read, crossed between the two orders of rotary rows, merged into a checkpoint on its way."""
