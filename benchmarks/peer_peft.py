"""PEFT's side of `peers.py`: a process that works when it is told to."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from typing import Any

ANSWERS = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)  # What libraries print is no answer.
warnings.filterwarnings('ignore')

import numpy as np
import peft
import torch
import transformers

DECODED, INPUTS = 8, 512


class Peft:
  """The model, and the work that was asked for last."""

  def __init__(self, settings: dict[str, Any]):
    self._settings = settings
    with open(settings['tokens']) as file:
      self._tokens = json.load(file)
    self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
    transformers.logging.set_verbosity_error()
    self._base = transformers.T5ForConditionalGeneration.from_pretrained(
        settings['weights'], dtype=getattr(torch, settings['dtype']), dropout_rate=0.0
    ).to(self._device)

  def description(self) -> dict[str, Any]:
    versions = f'torch {torch.__version__}, transformers {transformers.__version__}'
    return {
        'text': f'peft {peft.__version__}, {versions}, {torch.get_num_threads()} threads'
        + ', compiled' * self._settings['compile_peft']
    }

  def _model(self, length: int) -> Any:
    config = self._base.config
    model = peft.get_peft_model(
        self._base,
        peft.PromptTuningConfig(
            task_type=peft.TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=length,
            num_transformer_submodules=1,
            num_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            token_dim=config.d_model,
        ),
    )
    prompt = np.random.default_rng(length).uniform(-0.5, 0.5, (length, config.d_model))
    model.prompt_encoder['default'].embedding.weight.data = torch.tensor(
        prompt.astype(np.float32)
    ).to(self._device)
    return model

  def prepare(
      self, task: str, kind: str, prompt_length: int, batch_size: int, rows: list
  ) -> dict[str, Any]:
    """Takes the batches as lists of examples, and computes what the other side found."""
    del batch_size
    start = time.perf_counter()
    model = self._model(prompt_length)
    if kind == 'train':
      values, self._run = self._train(model, self._tokens[task], rows)
    else:
      values, self._run = self._evaluate(kind, model, self._tokens[task], rows)
    if self._settings['compile_peft']:
      for number in range(self._settings['rounds']):  # Compiles what shapes there are.
        self._run(number)
    return {'values': values, 'seconds': time.perf_counter() - start}

  def _batch(self, examples: list) -> dict[str, torch.Tensor]:
    """A batch padded to its longest example."""
    inputs, mask = self._padded([row['inputs'][:INPUTS] for row in examples])
    labels, is_label = self._padded([row['targets'] for row in examples])
    labels = labels.masked_fill(is_label == 0, -100)
    return {'input_ids': inputs, 'attention_mask': mask, 'labels': labels}

  def _padded(self, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
      ids[place, : len(row)] = torch.tensor(row)
      mask[place, : len(row)] = 1
    return ids.to(self._device), mask.to(self._device)

  def _train(self, model, examples, rows):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.3)
    batch = self._batch([examples[i] for i in rows[0][0]])
    loss = model(**batch).loss
    loss.backward()  # What the first step alone does is not timed.
    first = float(loss)
    called = self._compiled(model)

    def run(number: int) -> None:
      for indices in rows[number]:
        batch = self._batch([examples[i] for i in indices])
        optimizer.zero_grad()
        called(**batch).loss.backward()
        optimizer.step()
      self._wait()

    return [first], run

  def _evaluate(self, kind, model, examples, rows):
    model.eval()
    called = self._compiled(model)

    def rank(batch: dict[str, torch.Tensor]) -> torch.Tensor:
      """Scores [B, choices]."""
      scores = []
      for ids in self._tokens['choices']:
        labels = torch.tensor([ids] * len(batch['labels']), device=self._device)
        logits = called(**{**batch, 'labels': labels}).logits.float()
        chosen = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        scores.append(chosen.sum(-1))
      return torch.stack(scores, 1)

    def decode(batch: dict[str, torch.Tensor]) -> torch.Tensor:
      """Tokens [B, DECODED], the start token left out."""
      del batch['labels']
      tokens = model.generate(
          **batch, max_new_tokens=DECODED, min_new_tokens=0, do_sample=False, num_beams=1
      )[:, 1:]
      return torch.nn.functional.pad(tokens, (0, DECODED - tokens.shape[1]))

    @torch.inference_mode()
    def results(number: int) -> np.ndarray:
      one = rank if kind == 'rank' else decode
      found = [one(self._batch([examples[i] for i in indices])) for indices in rows[number]]
      return torch.cat(found).cpu().numpy()

    return results(0).ravel().astype(float).tolist(), results

  def run(self, round: int) -> dict[str, Any]:
    start = time.perf_counter()
    self._run(round)
    return {'seconds': time.perf_counter() - start}

  def memory(self) -> dict[str, Any]:
    if self._device == 'cuda':
      return {'peak_bytes': torch.cuda.max_memory_allocated()}
    return {'peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

  def _compiled(self, model: Any) -> Any:
    return torch.compile(model, dynamic=True) if self._settings['compile_peft'] else model

  def _wait(self) -> None:
    if self._device == 'cuda':
      torch.cuda.synchronize()


def main() -> None:
  side = Peft(json.loads(sys.argv[1]))
  print(json.dumps(side.description()), file=ANSWERS, flush=True)
  for line in sys.stdin:
    details = json.loads(line)
    result = getattr(side, details.pop('what'))(**details)
    print(json.dumps(result), file=ANSWERS, flush=True)


if __name__ == '__main__':
  main()
