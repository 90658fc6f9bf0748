"""The soft prompt: what it hands the backbone, and which lengths there are."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.typing import BackboneSpec

SPEC = BackboneSpec(64, 16, 3, 4, 2, 3)


@pytest.mark.parametrize('length', [1, np.int64(3)])
def test_the_prompt_is_the_injection(length):
  method = SoftPrompt(length)
  params = method.init(jax.random.key(0), SPEC)
  injection = method.apply(params, SPEC)
  assert injection.virtual_embeddings.shape == (length, SPEC.d_model)
  assert method.num_virtual_tokens == length
  injection.check(SPEC)


@pytest.mark.parametrize('length', [0, -1, None, 20.0, '20'])
def test_what_is_no_length_is_refused_by_the_name_of_its_macro(length):
  with pytest.raises(ValueError, match=r'PROMPT_LENGTH is .*\(SoftPrompt.length\).*at least 1'):
    SoftPrompt(length)
  with pytest.raises(ValueError, match='PROMPT_LENGTH is'):
    SoftPrompt(5).clone(length=length)
