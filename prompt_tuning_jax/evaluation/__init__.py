"""Scores, decoding and metrics of a frozen backbone with or without a prompt."""
