"""Packaging: `pip install .`, or `pip install -c constraints.txt .` for the tested versions."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r"^__version__ = '([^']+)'$",
    (ROOT / 'prompt_tuning_jax' / '__init__.py').read_text(encoding='utf-8'),
    re.MULTILINE,
).group(1)
README = ROOT / 'README.md'

setuptools.setup(
    name='prompt-tuning-jax',
    version=VERSION,
    description='Prompt tuning of frozen T5 models in JAX, from a laptop to a TPU pod',
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11,<3.14',
    # `tasks/` and `gin/` lie at the top level, where users edit them, and are installed
    # under the package's name, where they cannot clash with anyone else's.
    packages=[
        *setuptools.find_packages(include=['prompt_tuning_jax', 'prompt_tuning_jax.*']),
        'prompt_tuning_jax.tasks',
        'prompt_tuning_jax.gin_configs',
    ],
    package_dir={
        'prompt_tuning_jax.tasks': 'tasks',
        'prompt_tuning_jax.gin_configs': 'gin',
    },
    package_data={
        'prompt_tuning_jax': [
            'py.typed',
            *(f'zoo/**/*.{kind}' for kind in (
                'json', 'jsonl', 'md', 'model', 'png', 'safetensors', 'txt', 'vocab'
            )),
        ],
        'prompt_tuning_jax.gin_configs': ['**/*.gin'],
    },
    install_requires=[
        'flax>=0.12',
        'gin-config>=0.5',
        'importlib_resources',  # Writing TFDS data needs it, but TFDS does not declare it.
        'jax>=0.10',
        'ml_dtypes',
        'msgpack',
        'numpy>=2.0',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11.20',
        'rouge-score',
        'sacrebleu',
        'safetensors>=0.5',
        'scikit-learn',
        'scipy',
        'sentencepiece>=0.2',
        'seqio>=0.0.19',
        'tensorboardX>=2.6',
        'tensorflow-datasets>=4.9.4',
        'tensorstore',
        'tqdm',
    ],
    extras_require={
        'cuda12': ['jax[cuda12]'],
        'cuda13': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'hub': ['huggingface_hub'],
        'hf': ['huggingface_hub', 'peft', 'protobuf', 'torch', 'transformers'],
        'plots': ['matplotlib'],
        'notebooks': ['ipykernel', 'matplotlib', 'nbclient', 'nbformat'],
        'test': ['build', 'matplotlib', 'pytest', 'pytest-xdist'],
    },
    entry_points={'console_scripts': ['prompt-tuning = prompt_tuning_jax.cli:main']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)
