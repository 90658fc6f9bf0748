"""Reading and writing backbones: T5X, Hugging Face and the library's own layout."""
