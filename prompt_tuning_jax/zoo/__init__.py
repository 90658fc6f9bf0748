"""The packaged tiny models, the demo's data, and the scripts that made them."""
