"""Pictures of what prompts are near to, and of how similar they are; matplotlib draws them.

It is imported when something is drawn, so that only those who want pictures need it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prompt_tuning_jax.neighbors import words
from prompt_tuning_jax.neighbors.analysis import PromptAnalysis

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe & Ito).
_WORD, _OTHER, _LABEL, _CHANCE, _TEXT = '#0072B2', '#9CC6E0', '#D55E00', '#999999', '#333333'
_COSINES = dict(cmap='RdBu_r', vmin=-1.0, vmax=1.0)
_FONT, _SMALL = 8, 7

# Of a longer prompt the first positions are shown.
_MOST_SHOWN = 100
_ROWS = 25
# Inches.
_ROW, _AXIS, _PANEL, _LEFT, _TOP, _BOTTOM = 0.2, 1.5, 3.9, 0.45, 0.4, 0.75

_WORDS_SHOWN = 3
_LONGEST_WORD = 14


def check() -> None:
  """Raises ImportError, saying what to do, if matplotlib is not installed."""
  if importlib.util.find_spec('matplotlib') is None:
    raise ImportError(
        'Pictures need matplotlib, which is not installed: pip install '
        "'prompt-tuning-jax[plots]'. Without it, --gin.neighbors.picture=False writes the "
        'tables and records alone.'
    )


def draw_prompt(prompt: PromptAnalysis, path: str | os.PathLike[str], title: str = '') -> None:
  """Draws the nearest words of a prompt's positions, and its positions with each other.

  Left, a row for each position: the cosines of its nearest words (the nearest one large), and
  the words, without the mark of a word's beginning. Orange is a position that has a class label
  among them, full at the label's own position; the broken line is where random vectors have
  their nearest word. Right, the cosines of the positions with each other, those that are close
  side by side, with a frame around each cluster.

  Args:
    prompt: what it is near to.
    path: the PNG file to write.
    title: what stands above it.
  """
  shown = min(len(prompt.positions), _MOST_SHOWN)
  panels = math.ceil(shown / _ROWS)
  rows = math.ceil(shown / panels)
  height = max(rows, 12) * _ROW
  side = min(height, 4.5)
  extra_top = 0.3 if title else 0.0
  size = (
      _LEFT + panels * _PANEL + 0.2 + side + 0.85,
      extra_top + _TOP + height + _BOTTOM,
  )
  with _figure(path, size) as figure:
    if title:
      figure.suptitle(_literal(title), y=1 - 0.12 / size[1], va='top', fontsize=_FONT + 2)
    limits = _limits(prompt, shown)
    for panel in range(panels):
      numbers = range(panel * rows, min((panel + 1) * rows, shown))
      own_height = len(numbers) * _ROW
      axes = _add_axes(
          figure,
          size,
          (_LEFT + panel * _PANEL, _BOTTOM + height - own_height, _AXIS, own_height),
      )
      _draw_words(axes, prompt, numbers, limits)
      if panel == 0:
        more = f', the first {shown} of {len(prompt.positions)}'
        _head(axes, 'a', 'nearest words' + more * (shown < len(prompt.positions)))
        axes.set_ylabel('position', labelpad=2)
    left = _LEFT + panels * _PANEL + 0.2
    axes = _add_axes(figure, size, (left, _BOTTOM + height - side, side, side))
    bar = _add_axes(figure, size, (left + side + 0.12, _BOTTOM + height - side, 0.1, side))
    _draw_positions(axes, bar, prompt)
    _head(axes, 'b', 'cosines of positions with each other')
    handles = _legend(prompt)
    figure.legend(
        handles=handles,
        loc='lower left',
        bbox_to_anchor=((_LEFT - 0.15) / size[0], 0),
        ncols=len(handles),
        frameon=False,
        fontsize=_SMALL,
        handletextpad=0.3,
        columnspacing=1.2,
    )


def draw_similarities(
    names: Sequence[str],
    similarities: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
) -> None:
  """Draws each matrix of `similarity.prompt_similarities`, side by side.

  Args:
    names: names of the prompts.
    similarities: the matrices by their names.
    path: the PNG file to write.
  """
  side = max(0.42 * len(names), 1.6)
  longest = max(map(len, names)) * 0.07 + 0.15
  size = (
      longest + len(similarities) * (side + 0.25) + 0.5,
      _TOP + side + 0.75 * longest + 0.15,
  )
  shown = list(map(_literal, names))
  with _figure(path, size) as figure:
    for number, (measure, matrix) in enumerate(similarities.items()):
      left = longest + number * (side + 0.25)
      axes = _add_axes(figure, size, (left, size[1] - _TOP - side, side, side))
      image = axes.imshow(np.ma.masked_invalid(matrix), **_COSINES)
      axes.set_facecolor('#DDDDDD')
      for row, column in np.ndindex(matrix.shape):
        value = matrix[row, column]
        axes.text(
            column,
            row,
            '–' if math.isnan(value) else f'{value:z.2f}',
            ha='center',
            va='center',
            fontsize=_SMALL,
            color='white' if abs(value) > 0.5 else _TEXT,
        )
      axes.set_xticks(
          range(len(names)), shown, rotation=45, ha='right', rotation_mode='anchor'
      )
      axes.set_yticks(range(len(names)), shown if number == 0 else [''] * len(names))
      axes.tick_params(length=0)
      _head(axes, 'abc'[number], measure)
    bar = _add_axes(
        figure,
        size,
        (longest + len(similarities) * (side + 0.25) - 0.13, size[1] - _TOP - side, 0.1, side),
    )
    _draw_bar(image, bar)


# Parts of a prompt's picture.


def _draw_words(
    axes: Axes, prompt: PromptAnalysis, numbers: Sequence[int], limits: tuple[float, float]
) -> None:
  """A row for each of some positions: cosines as dots, and the words beside them."""
  own = {label.position for label in prompt.labels if label.survives == 'own'}
  labels = {label.label.strip() for label in prompt.labels}
  held = {number for label in prompt.labels for number in label.positions}
  axes.axvline(prompt.chance.cosine, color=_CHANCE, linewidth=0.8, linestyle=(0, (4, 3)))
  for row, number in enumerate(numbers):
    position = prompt.positions[number]
    nearest, *others = (neighbor.cosine for neighbor in position.neighbors)
    color = _LABEL if number in held else _WORD
    axes.plot([*others[-1:], nearest], [row] * (1 + bool(others)), color='#D5DEE5', linewidth=1)
    axes.scatter(others, [row] * len(others), s=7, color=_OTHER, linewidths=0, zorder=2)
    is_hollow = number in held and number not in own
    axes.scatter(
        nearest, row, s=22, zorder=3, linewidths=1, edgecolors=color,
        facecolors='white' if is_hollow else color,
    )  # fmt: skip
    words_shown = _words_shown([_plain(n.word) for n in position.neighbors], labels)
    text = axes.annotate(
        '',
        xy=(1.02, row),
        xycoords=axes.get_yaxis_transform(),
        annotation_clip=False,
    )
    for place, word in enumerate(words_shown):
      text = axes.annotate(
          _literal(_short(word)),
          xy=(1, row),
          xycoords=(text, 'data'),
          xytext=(5, 0),
          textcoords='offset points',
          va='center_baseline',
          fontsize=_SMALL if place else _FONT,
          color=_LABEL if word in labels else '#777777' if place else 'black',
          annotation_clip=False,
      )
  axes.set(xlim=limits, ylim=(len(numbers) - 0.4, -0.6), xlabel='cosine')
  axes.set_yticks(range(len(numbers)), [prompt.positions[number].name for number in numbers])
  axes.tick_params(axis='y', length=0)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.grid(axis='x', color='#EEEEEE', linewidth=0.6)
  axes.set_axisbelow(True)


def _words_shown(near: Sequence[str], labels: Collection[str]) -> list[str]:
  """The first of the nearest words; a class label beyond them stands in for the last."""
  first, others = list(near[:_WORDS_SHOWN]), near[_WORDS_SHOWN:]
  label = next((word for word in others if word in labels), None)
  return first if label is None else [*first[:-1], label]


def _limits(prompt: PromptAnalysis, shown: int) -> tuple[float, float]:
  """The axis of cosines: from 0, or what is below it, to a little above the largest."""
  cosines = [n.cosine for position in prompt.positions[:shown] for n in position.neighbors]
  low, high = min([0.0, *cosines]), max([prompt.chance.cosine, *cosines])
  margin = 0.05 * (high - low)
  return low - margin * (low < 0), high + margin


def _draw_positions(axes: Axes, bar: Axes, prompt: PromptAnalysis) -> None:
  """The cosines of all positions with each other, in the order of the clusters."""
  from matplotlib.patches import Rectangle

  order = list(prompt.clusters.order)
  units_PD = words.unit(prompt.rows_PD)[order]
  image = axes.imshow(units_PD @ units_PD.T, interpolation='nearest', **_COSINES)
  place = {number: row for row, number in enumerate(order)}
  for members in prompt.clusters.members:
    if len(members) > 1:
      first, count = min(place[number] for number in members), len(members)
      frame = Rectangle(
          (first - 0.5, first - 0.5), count, count, fill=False, color='black', linewidth=1
      )
      frame.set_clip_on(False)
      axes.add_patch(frame)
  # As many names as there is room for.
  step = math.ceil(len(order) / 30)
  ticks = range(0, len(order), step)
  named = [prompt.positions[order[tick]].name for tick in ticks]
  axes.set_xticks(ticks, named, rotation=90)
  axes.set_yticks(ticks, named)
  axes.set_xlabel('position, those that are close side by side')
  axes.tick_params(length=0, labelsize=_SMALL if len(order) < 25 else _SMALL - 1)
  _draw_bar(image, bar)


def _draw_bar(image, bar: Axes) -> None:
  bar.figure.colorbar(image, cax=bar, ticks=[-1, -0.5, 0, 0.5, 1])
  bar.tick_params(length=2, labelsize=_SMALL)
  for spine in bar.spines.values():
    spine.set_linewidth(0.5)


def _legend(prompt: PromptAnalysis) -> list:
  from matplotlib.lines import Line2D

  def dot(label, size=4.7, **kwargs):
    return Line2D([], [], linestyle='', marker='o', markersize=size, label=label, **kwargs)

  handles = [dot('nearest word', color=_WORD)]
  if prompt.k > 1:
    handles.append(dot(f'the other {prompt.k - 1} of the nearest', size=3, color=_OTHER))
  if prompt.labels:
    handles += [
        dot('class label near its own position', color=_LABEL),
        dot('class label near another', markeredgecolor=_LABEL, markerfacecolor='white'),
    ]
  handles.append(
      Line2D([], [], color=_CHANCE, linestyle=(0, (4, 3)), linewidth=0.8, label='random vectors')
  )
  return handles


# Figures.


@contextlib.contextmanager
def _figure(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator[Figure]:
  """A figure that is written in the end; the user's own settings of matplotlib do not count."""
  check()
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(), warnings.catch_warnings():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({'font.size': _FONT, 'axes.linewidth': 0.6})
    # Scripts that the font does not have are shown as boxes.
    warnings.filterwarnings('ignore', message='Glyph')
    figure = Figure(figsize=size)
    yield figure
    figure.savefig(path, format='png', dpi=200)


def _add_axes(
    figure: Figure, size: tuple[float, float], box: tuple[float, float, float, float]
) -> Axes:
  """Axes at left, bottom, width and height in inches."""
  left, bottom, width, height = box
  return figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))


def _head(axes: Axes, letter: str, text: str) -> None:
  axes.set_title(text, loc='left', fontsize=_FONT + 1, pad=7)
  axes.annotate(
      letter, xy=(0, 1), xycoords='axes fraction', xytext=(-11, 7), textcoords='offset points',
      fontsize=_FONT + 2, fontweight='bold',
  )  # fmt: skip


def _plain(word: str) -> str:
  # Without the mark of a word's beginning.
  return word.removeprefix('▁') or word


def _short(word: str) -> str:
  return word if len(word) <= _LONGEST_WORD else word[: _LONGEST_WORD - 1] + '…'


def _literal(text: str) -> str:
  # Two dollar signs would be the ends of a formula.
  return text.replace('$', r'\$')
