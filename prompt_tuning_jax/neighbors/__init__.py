"""What a soft prompt says, read by the words that its positions are near to."""

from prompt_tuning_jax.neighbors.words import nearest_words

__all__ = ['nearest_words']
