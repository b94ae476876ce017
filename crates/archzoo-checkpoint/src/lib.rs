//! Sharded safetensors checkpoints: validated reads, atomic writes.
