"""`python -m prompt_tuning_jax <command>`, the same as `prompt-tuning <command>`."""

import sys

from prompt_tuning_jax.cli import main

if __name__ == '__main__':
  sys.exit(main())
