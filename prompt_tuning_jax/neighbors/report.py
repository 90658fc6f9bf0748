"""`prompt-tuning neighbors`: what prompts are near to, as text, jsonl and a picture.

    report = analyze_prompts(backbone, 'prompt.safetensors', labels=['positive', 'negative'])
    print(report)                                         # tables
    report.prompts[0].positions[0].nearest.word           # '▁positive'
    report.prompts[0].labels[0].survives                  # 'own'
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax import screen
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt, source_of, unpack_prompt
from prompt_tuning_jax.evaluation.prompt_paths import find_prompts
from prompt_tuning_jax.json_files import write_jsonl
from prompt_tuning_jax.neighbors import picture as picture_lib
from prompt_tuning_jax.neighbors import words
from prompt_tuning_jax.neighbors.analysis import PromptAnalysis, analyze
from prompt_tuning_jax.neighbors.similarity import MEASURES, prompt_similarities
from prompt_tuning_jax.writing import written_whole

_NUMBERS = ('position', 'norm', 'tightness', 'cluster', 'cosine', 'own position', 'rank there')
# Characters that mean something to Markdown.
_MARKUP = re.compile(r'([\\`*_{}\[\]<>|#~$&])')


@dataclasses.dataclass(frozen=True, repr=False)
class NeighborReport:
  """What prompts of a backbone are near to; it prints as tables.

  Attributes:
    backbone: name of the backbone.
    prompts: what each prompt is near to.
    similarities: of several prompts the matrices of `similarity.prompt_similarities`.
  """

  backbone: str
  prompts: tuple[PromptAnalysis, ...]
  similarities: Mapping[str, np.ndarray]

  def __repr__(self) -> str:
    return '\n'.join(self._lines(title=str, text=str))

  @property
  def names(self) -> list[str]:
    """The prompts' names without what all of them share: 'rte' of '/runs/rte/prompt.npy'."""
    split = [prompt.name.split('/') for prompt in self.prompts]
    start = len(os.path.commonprefix(split))
    end = len(os.path.commonprefix([parts[::-1] for parts in split]))
    return [
        '/'.join(parts[start : len(parts) - end]) or prompt.name
        for parts, prompt in zip(split, self.prompts)
    ]

  def records(self) -> Iterator[dict[str, Any]]:
    """The same as plain data; `kind` says what a record is about."""
    for prompt in self.prompts:
      yield {
          'kind': 'prompt',
          'prompt': prompt.name,
          'backbone': self.backbone,
          'positions': len(prompt.positions),
          'different_nearest_words': len(prompt.positions_by_word()),
          **dataclasses.asdict(prompt.nearness),
          'random_vectors': dataclasses.asdict(prompt.chance),
      }
      for number, position in enumerate(prompt.positions):
        yield {
            'kind': 'position',
            'prompt': prompt.name,
            'position': number,
            **dataclasses.asdict(position),
            'neighbors': [neighbor._asdict() for neighbor in position.neighbors],
            'cluster': prompt.clusters.of(number),
        }
      for number, members in enumerate(prompt.clusters.members):
        yield {
            'kind': 'cluster',
            'prompt': prompt.name,
            'cluster': number,
            'positions': members,
            'words': prompt.words_of(members),
        }
      for label in prompt.labels:
        yield {
            'kind': 'label',
            'prompt': prompt.name,
            **dataclasses.asdict(label),
            'survives': label.survives,
        }
    for one, other in zip(*np.triu_indices(len(self.prompts), 1)):
      values = {name: float(matrix[one, other]) for name, matrix in self.similarities.items()}
      yield {
          'kind': 'similarity',
          'prompts': [self.prompts[one].name, self.prompts[other].name],
          # JSON has no NaN.
          **{name: None if math.isnan(value) else value for name, value in values.items()},
      }

  def write(self, folder: str | os.PathLike[str], *, picture: bool = True) -> None:
    """Writes `neighbors.jsonl`, `neighbors.md` and `neighbors.png`.

    Of several prompts the picture shows how similar they are, and `neighbors_0.png` and so
    on are of each.

    Raises:
      ImportError: if a picture is wanted and matplotlib is missing.
      OSError: if a file cannot be written.
    """
    if picture:
      picture_lib.check()
    os.makedirs(folder, exist_ok=True)
    write_jsonl(os.path.join(folder, 'neighbors.jsonl'), self.records())
    text = '\n'.join(self._lines(title=lambda x: f'## {_escaped(x)}', text=_escaped))
    with written_whole(os.path.join(folder, 'neighbors.md')) as unfinished:
      Path(unfinished).write_text(text + '\n', encoding='utf-8')
    if not picture:
      return
    several = len(self.prompts) > 1
    for number, (name, prompt) in enumerate(zip(self.names, self.prompts)):
      file = f'neighbors_{number}.png' if several else 'neighbors.png'
      with written_whole(os.path.join(folder, file)) as unfinished:
        picture_lib.draw_prompt(prompt, unfinished, title=name if several else '')
    if several:
      with written_whole(os.path.join(folder, 'neighbors.png')) as unfinished:
        picture_lib.draw_similarities(self.names, self.similarities, unfinished)

  def _lines(
      self, *, title: Callable[[str], str], text: Callable[[str], str]
  ) -> Iterator[str]:
    """All tables; `title` and `text` make what is taken literally of a title and a word."""
    for prompt in self.prompts:
      yield from (title(f'{prompt.name}, by the words of {self.backbone}'), '')
      yield from _positions(prompt, text)
      yield from ('', *_summary(prompt, text))
      yield from _clusters(prompt, text)
      yield from _labels(prompt, text)
      yield ''
    names = list(map(text, self.names))
    for name, matrix in self.similarities.items():
      yield from (title(f'Similarity, {name}: {MEASURES[name]}'), '')
      rows = [[own, *map(_cosine, values)] for own, values in zip(names, matrix)]
      yield from (screen.table([['', *names], *rows], numbers=names), '')


def analyze_prompts(
    backbone: Backbone,
    prompts: AnyPrompt | Sequence[AnyPrompt] | Mapping[str, AnyPrompt],
    *,
    k: int = 5,
    labels: Sequence[str] | None = None,
    cluster_cosine: float = 0.5,
) -> NeighborReport:
  """Reads prompts by the words near to them (Lester et al., 2021, section 7).

  Args:
    backbone: the model they were trained with.
    prompts: one or several prompts, by their names where it is a mapping: loaded, the path
      of one, or an Injection.
    k: how many nearest words of each position.
    labels: class labels to look for, in the order in which the prompts started from them.
    cluster_cosine: the mean cosine from which on positions are one cluster.

  Raises:
    ValueError: if a prompt has no virtual tokens, holds numbers that are not finite or a row
      of zeros, or does not belong to the backbone; if the backbone has no vocabulary, or one
      of less than `k` words; if a label has no tokens; if there are no prompts.
    OSError: if a path leads to no prompt.
  """
  if not isinstance(prompts, Mapping):
    listed = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    prompts = dict(zip(_names_of_sources(listed), listed, strict=True))
  if not prompts or None in prompts.values():
    raise ValueError(
        'analyze_prompts needs at least one prompt, and None is none: a model alone has no '
        'positions to find words for.'
    )
  injections = [(name, unpack_prompt(backbone, prompt)[0]) for name, prompt in prompts.items()]
  analyses = analyze(
      backbone, injections, k=k, labels=labels, cluster_cosine=cluster_cosine
  )
  similarities = {}
  if len(analyses) > 1:
    similarities = prompt_similarities([analysis.rows_PD for analysis in analyses])
  return NeighborReport(backbone.name, tuple(analyses), similarities)


def neighbors(
    *,
    backbone: Backbone,
    prompt_file: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    num_neighbors: int = 5,
    labels: Sequence[str] | None = None,
    cluster_cosine: float = 0.5,
    output_dir: str | None = None,
    picture: bool = True,
) -> NeighborReport:
  """Reads prompts by the words near to them, and writes what was found.

  Args:
    backbone: the model they were trained with.
    prompt_file: a prompt, or several: a list, a path with `*` in it, or a dict from names to
      these.
    num_neighbors: how many nearest words of each position.
    labels: class labels to look for, in the order in which the prompts started from them.
    cluster_cosine: the mean cosine from which on positions are one cluster.
    output_dir: where tables, records and pictures are written, if anywhere.
    picture: whether pictures are among them, for which matplotlib is needed.

  Returns:
    What was found, which prints as tables.

  Raises:
    ValueError, OSError: as `analyze_prompts`.
    ImportError: if pictures are to be drawn and matplotlib is missing.
  """
  if output_dir and picture:
    picture_lib.check()
  report = analyze_prompts(
      backbone,
      prompts_named(prompt_file),
      k=num_neighbors,
      labels=labels,
      cluster_cosine=cluster_cosine,
  )
  if output_dir:
    report.write(output_dir, picture=picture)
  return report


def prompts_named(
    where: str | Sequence[str] | Mapping[str, str | Sequence[str]],
) -> dict[str, str]:
  """The paths of the prompts by their names: the path, or the name of the dict.

  Raises:
    FileNotFoundError: if a path leads nowhere.
    ValueError: if a path has a `{task}` in it.
  """
  if not isinstance(where, Mapping):
    _check_no_task(where)
    return {path: path for path in find_prompts(where, '')}
  named = {}
  for name, of_name in where.items():
    _check_no_task(of_name)
    paths = find_prompts(of_name, '')
    for path in paths:
      named[name if len(paths) == 1 else f'{name}/{path}'] = path
  return named


def _check_no_task(where: str | Sequence[str]) -> None:
  for path in [where] if isinstance(where, str) else where:
    if '{task}' in path:
      raise ValueError(
          f'PROMPT_FILE is {path}, but `neighbors` knows no tasks whose names could stand for '
          '{task}. Write * in its place to find the prompts of all tasks.'
      )


def _names_of_sources(prompts: Sequence[AnyPrompt]) -> list[str]:
  """A name for each prompt; those that came from the same path, at other times, are numbered."""
  names = [source_of(prompt) or f'prompt {number}' for number, prompt in enumerate(prompts)]
  return [
      name if names.count(name) == 1 else f'{name} ({names[:number].count(name) + 1})'
      for number, name in enumerate(names)
  ]


# Tables.


def _positions(prompt: PromptAnalysis, text: Callable[[str], str]) -> Iterator[str]:
  rows = [('position', 'norm', 'nearest words (cosine)', 'tightness', 'cluster')]
  for number, position in enumerate(prompt.positions):
    cluster = prompt.clusters.of(number)
    rows.append((
        position.name,
        f'{position.norm:#.4g}',
        ' · '.join(f'{text(word)} {cosine:.2f}' for word, _, cosine in position.neighbors),
        _cosine(position.tightness),
        str(cluster) if len(prompt.clusters.members[cluster]) > 1 else '',
    ))
  yield screen.table(rows, numbers=_NUMBERS)


def _summary(prompt: PromptAnalysis, text: Callable[[str], str]) -> Iterator[str]:
  by_word = prompt.positions_by_word()
  shared = {word: numbers for word, numbers in by_word.items() if len(numbers) > 1}
  positions = screen.number(len(prompt.positions), 'position')
  line = f'{screen.number(len(by_word), "nearest word")} for {positions}'
  if shared:
    named = (
        f'{text(word)} ({_names(prompt, numbers)})' for word, numbers in list(shared.items())[:5]
    )
    line += f'; nearest to several: {", ".join(named)}' + ', …' * (len(shared) > 5)
  yield f'{line}.'
  own, chance = prompt.nearness, prompt.chance
  line = f'Cosine with the nearest word {own.cosine:.2f} on average, of random vectors '
  line += f'{chance.cosine:.2f}'
  if own.tightness is not None:
    line += f'; tightness {own.tightness:.2f}, of random vectors {chance.tightness:.2f}'
  yield f'{line}.'
  if own.tightness is not None:
    yield f"Tightness is the mean cosine of a position's {prompt.k} words with each other."


def _clusters(prompt: PromptAnalysis, text: Callable[[str], str]) -> Iterator[str]:
  shared = [members for members in prompt.clusters.members if len(members) > 1]
  if not shared:
    return
  rows = [('cluster', 'positions', 'cosine', 'nearest words together')]
  for number, members in enumerate(shared):
    rows.append((
        str(number),
        _names(prompt, members),
        _cosine(words.mean_pair_cosine(prompt.rows_PD[list(members)])),
        ' · '.join(map(text, prompt.words_of(members))),
    ))
  yield from ('', screen.table(rows, numbers=_NUMBERS), '')
  yield (
      f'Positions of a cluster have a mean cosine of at least {prompt.clusters.cosine:g} with '
      'what they join (average linkage).'
  )


def _labels(prompt: PromptAnalysis, text: Callable[[str], str]) -> Iterator[str]:
  if not prompt.labels:
    return
  rows = [('class label', 'own position', 'rank there', 'nearest to', f'among the {prompt.k} of')]
  for label in prompt.labels:
    rows.append((
        text(label.label),
        '' if label.position is None else prompt.positions[label.position].name,
        '' if label.rank is None else f'{label.rank:,}',
        f'{prompt.positions[label.best_position].name} (rank {label.best_rank:,})',
        _names(prompt, label.positions) or 'none',
    ))
  yield from ('', screen.table(rows, numbers=_NUMBERS), '')
  count = {survives: 0 for survives in ('own', 'other', 'none')}
  for label in prompt.labels:
    count[label.survives] += 1
  yield (
      f'Of {screen.number(len(prompt.labels), "class label")}, {count["own"]} among the '
      f'{prompt.k} nearest words of their own position, {count["other"]} of another alone, '
      f'{count["none"]} of none.'
  )


def _names(prompt: PromptAnalysis, numbers: Sequence[int]) -> str:
  return ', '.join(prompt.positions[number].name for number in numbers)


def _cosine(value: float | None) -> str:
  return '' if value is None or math.isnan(value) else f'{value:z.2f}'


def _escaped(text: str) -> str:
  return _MARKUP.sub(r'\\\1', text)
