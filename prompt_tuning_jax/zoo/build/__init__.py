"""The scripts that made the packaged data and vocabulary, from WordNet and plain text."""
