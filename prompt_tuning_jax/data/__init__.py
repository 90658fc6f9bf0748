"""From text to batches: vocabularies, the tokenised cache, virtual tokens, batch order."""
