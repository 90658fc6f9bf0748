"""Prompt methods: Flax modules from their parameters to an Injection."""
