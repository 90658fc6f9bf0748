"""Frozen pretrained models: `(frozen params, Batch, Injection) → logits`."""
