"""One error says what is wrong with a file: how much of it, and the first few lines."""

import json

import pytest

from prompt_tuning_jax.data.bad_lines import BadLines, decode_lines, warn_of_shared_ids


def message(errors, total):
  bad = BadLines('a.jsonl', 'Expected better.')
  for number, error in errors:
    bad.add(number, error)
  with pytest.raises(ValueError) as raised:
    bad.check(total)
  return str(raised.value)


def error_of(function, *args):
  with pytest.raises(Exception) as raised:
    function(*args)
  return raised.value


def test_a_file_without_bad_lines_is_fine():
  BadLines('a.jsonl', '').check(0)


def test_a_single_bad_line_is_named_at_once():
  assert message([(7, KeyError('idx'))], 1_200) == (
      "a.jsonl, line 7: no field 'idx'. 1 of 1,200 lines is bad. Expected better."
  )


def test_of_many_bad_lines_all_are_counted_and_five_are_named():
  assert message([(2 * n, ValueError(f'reason {n}')) for n in range(1, 1_008)], 2_500) == (
      'a.jsonl: 1,007 of 2,500 lines are bad:\n'
      '  line 2: reason 1\n  line 4: reason 2\n  line 6: reason 3\n  line 8: reason 4\n'
      '  line 10: reason 5\n  and 1,002 more\nExpected better.'
  )


@pytest.mark.parametrize(
    ('error', 'reason'),
    [
        (error_of(json.loads, '{"a": x}'), 'not JSON: Expecting value at column 7'),
        (error_of(b'a\xff'.decode), "not UTF-8: 'utf-8' codec can't decode byte 0xff in pos"),
        (error_of(json.loads, '[' * 100_000), 'nested too deeply'),
        (TypeError("'int' object is not iterable"), "'int' object is not iterable"),
        (ValueError('x' * 10_000), 'x' * 240 + '…. 1 of'),
    ],
)
def test_reasons_are_short_and_of_the_line(error, reason):
  assert message([(3, error)], 9).startswith(f'a.jsonl, line 3: {reason}')


def test_lines_that_are_not_utf_8_are_counted_too():
  assert decode_lines('a.tsv', b'\xef\xbb\xbfa\r\nb', '') == 'a\r\nb'
  with pytest.raises(ValueError, match=r'(?s)a\.tsv: 2 of 3 lines are bad:.*line 1:.*line 3: not'):
    decode_lines('a.tsv', b'\xff\nb\nc\xe9\n', 'Expected UTF-8.')


def test_shared_ids_are_counted_and_named_with_their_lines():
  with pytest.warns(UserWarning) as warned:
    warn_of_shared_ids('a.jsonl', [(1, 2), (3, 4), (1, 2), (5, 6), (3, 4)], [1, 1, 2, 3, 4])
  (warning,) = warned
  assert str(warning.message) == (
      'a.jsonl: 4 of 5 examples share their idx with another: 1/2 (lines 1, 2), 3/4 (lines '
      '1, 4). All of them are kept.'
  )
  # Warnings are errors here: this one says nothing.
  warn_of_shared_ids('a.jsonl', [(1,), (2,)], [1, 2])
