"""LoRA adapters of PEFT: read, converted between the two orders of rotary rows, merged into a checkpoint."""
