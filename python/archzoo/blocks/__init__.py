"""Blocks: one file each, owning config, module, decode state and cost."""
