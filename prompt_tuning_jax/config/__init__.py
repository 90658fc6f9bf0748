"""What gin files and flags say: read, checked, and built into a command's arguments."""

from prompt_tuning_jax.config.errors import ConfigError
from prompt_tuning_jax.config.files import gin_folder, packaged_files
from prompt_tuning_jax.config.parsing import Config, parse

__all__ = ['Config', 'ConfigError', 'gin_folder', 'packaged_files', 'parse']
