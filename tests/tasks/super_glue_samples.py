"""The tasks of SuperGLUE, and lines of their official files with what is to become of them."""

import json

# Task → its word in front, and the split that was recorded.
TASKS = {
    'super_glue_boolq_v102': ('boolq', 'validation'),
    'super_glue_cb_v102': ('cb', 'validation'),
    'super_glue_copa_v102': ('copa', 'validation'),
    'super_glue_multirc_v102': ('multirc', 'validation'),
    'super_glue_record_v102': ('record', 'validation'),
    'super_glue_rte_v102': ('rte', 'validation'),
    'super_glue_wic_v102': ('wic', 'validation'),
    'super_glue_axb_v102': ('rte', 'test'),
    'super_glue_axg_v102': ('rte', 'test'),
    'super_glue_wsc_v102_simple_train': ('wsc:', 'train'),
    'super_glue_wsc_v102_simple_eval': ('wsc:', 'validation'),
    'dpr_v001_simple': ('wsc:', 'test'),
}
# Official file → its lines and, of the task that reads it, the examples: input, target, what
# metrics compare, and the example's own numbers.
SKY = {'passage': 'Sky -- It is  blue.', 'question': 'is the sky blue'}
FELL = {'premise': 'He fell.', 'choice1': 'It hurt.', 'choice2': 'It rained.', 'question': 'effect'}
PET = {'premise': 'Ann has a cat.', 'hypothesis': 'Ann has a pet.'}
BAR = {'word': 'bar', 'sentence1': 'A bar of gold.', 'sentence2': 'A bar in town.', 'version': 1.1}
PARTY = {
    'text': '<b>Sent 1: </b>Sue has a party.<br>She calls Joe.<br>',
    'questions': [
        {'idx': 3, 'question': 'Who calls?', 'answers': [
            {'idx': 7, 'text': 'Joe', 'label': 0}, {'idx': 8, 'text': 'Sue', 'label': 1},
        ]},
        {'idx': 4, 'question': 'Why?', 'answers': [{'idx': 9, 'text': 'For <b>a</b> party'}]},
    ],
}  # fmt: skip
NEWS = {
    'text': 'Rome met "Oslo"\n@highlight\nRome won\n@highlight\nIt rained',
    'entities': [{'start': 10, 'end': 13}, {'start': 0, 'end': 3}, {'start': 27, 'end': 30}],
}
QUERIES = [
    {'idx': 21, 'query': '@placeholder won', 'answers': [
        {'start': 27, 'end': 30, 'text': 'Rome'}, {'start': 10, 'end': 13, 'text': 'Oslo'},
        {'start': 0, 'end': 3, 'text': 'Rome'},
    ]},
    {'idx': 22, 'query': 'Rain in @placeholder'},
]  # fmt: skip
NEWS_TEXT = 'entities: Oslo, Rome passage: Rome met "Oslo" Rome won. It rained'


def wsc(text, index1, span1, index2, span2, **others):
  target = {
      'span1_index': index1, 'span1_text': span1, 'span2_index': index2, 'span2_text': span2
  }  # fmt: skip
  return {'text': text, 'target': target, **others}


TOLD = 'Mark told Pete that he fell.'
# Repaired as in `wsc.fixed`: case, the full stop; and two texts in which T5 moves the pronoun.
WHIP = (
    'The boy continued to whip the pony , and eventually the pony threw him over. John '
    'laughed out quite loud. "Good for him," he said. '
)
SAFE = (
    'When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the '
    'magic pebble in an iron safe . Some day they might want to use it , but really for now, '
    'what more could they wish for?'
)
OFFICIAL = {
    ('super_glue_boolq_v102', 'BoolQ/val.jsonl'): (
        [SKY | {'idx': 5, 'label': True}, SKY | {'idx': 6, 'label': False}, SKY | {'idx': 8}],
        [
            ('passage: Sky -- It is  blue. question: is the sky blue', target, value, index)
            for target, value, index in [('True', 1, 5), ('False', 0, 6), ('<unk>', -1, 8)]
        ],
    ),
    ('super_glue_cb_v102', 'CB/val.jsonl'): (
        [PET | {'idx': 0, 'label': 'neutral'}, PET | {'idx': 1, 'label': 'contradiction'}],
        [
            ('hypothesis: Ann has a pet. premise: Ann has a cat.', target, value, index)
            for target, value, index in [('neutral', 2, 0), ('contradiction', 1, 1)]
        ],
    ),
    ('super_glue_copa_v102', 'COPA/val.jsonl'): (
        [FELL | {'idx': 0, 'label': 1}, FELL | {'idx': 1, 'label': 0}],
        [
            (
                'choice1: It hurt. choice2: It rained. premise: He fell. question: effect',
                target, value, index,
            )
            for target, value, index in [('choice2', 1, 0), ('choice1', 0, 1)]
        ],
    ),
    ('super_glue_rte_v102', 'RTE/val.jsonl'): (
        [PET | {'idx': 4, 'label': 'not_entailment'}],
        [('hypothesis: Ann has a pet. premise: Ann has a cat.', 'not_entailment', 1, 4)],
    ),
    ('super_glue_wic_v102', 'WiC/val.jsonl'): (
        [BAR | {'idx': 0, 'label': False, 'start1': 2, 'start2': 2, 'end1': 5, 'end2': 5}],
        [('sentence1: A bar of gold. sentence2: A bar in town. word: bar', 'False', 0, 0)],
    ),
    ('super_glue_axb_v102', 'AX-b/AX-b.jsonl'): (
        [{'sentence1': 'It is.', 'sentence2': 'Is it?', 'idx': 0, 'label': 'entailment'}],
        [('hypothesis: Is it? premise: It is.', 'entailment', 0, 0)],
    ),
    ('super_glue_axg_v102', 'AX-g/AX-g.jsonl'): (
        [PET | {'idx': 1, 'label': 'not_entailment', 'pair_id': 551}],
        [('hypothesis: Ann has a pet. premise: Ann has a cat.', 'not_entailment', 1, 1)],
    ),
    ('super_glue_multirc_v102', 'MultiRC/val.jsonl'): (
        [{'idx': 2, 'version': 1.1, 'passage': PARTY}],
        [
            (
                f'question: {question} answer: {answer} paragraph: Sent 1: Sue has a party. '
                'She calls Joe. ',
                target,
                {'value': value, 'group': group},
                {'idx/paragraph': 2, 'idx/question': group, 'idx/answer': index},
            )
            for question, answer, target, value, group, index in [
                ('Who calls?', 'Joe', 'False', 0, 3, 7),
                ('Who calls?', 'Sue', 'True', 1, 3, 8),
                ('Why?', 'For a party', '<unk>', -1, 4, 9),
            ]
        ],
    ),
    ('super_glue_record_v102', 'ReCoRD/val.jsonl'): (
        [{'idx': 11, 'source': 'CNN', 'passage': NEWS, 'qas': QUERIES}],
        [
            (
                f'query: {query} {NEWS_TEXT}',
                target,
                {'value': answers, 'group': [11, group]},
                {'idx/passage': 11, 'idx/query': group, 'answers': answers},
            )
            for query, target, answers, group in [
                ('@placeholder won', 'Oslo', ['Oslo', 'Rome'], 21),
                ('@placeholder won', 'Rome', ['Oslo', 'Rome'], 21),
                ('Rain in @placeholder', '<unk>', [], 22),
            ]
        ],
    ),
    ('super_glue_wsc_v102_simple_train', 'WSC/train.jsonl'): (
        [
            wsc(TOLD, 0, 'Mark', 4, 'he', idx=0, label=True),
            wsc(TOLD, 2, 'Pete', 4, 'he', idx=1, label=False),
            wsc(WHIP, 6, 'The pony.', 22, 'him', idx=2, label=True),
        ],
        [
            ('Mark told Pete that *he* fell.', 'Mark', 'Mark', {'label': 1, 'idx': 0}),
            (WHIP.replace('for him," he said. ', 'for *him* ," he said.'), 'the pony',
             'the pony', {'label': 1, 'idx': 2}),
        ],
    ),
    ('super_glue_wsc_v102_simple_eval', 'WSC/val.jsonl'): (
        [
            wsc(TOLD, 0, 'Mark', 4, 'he', idx=0, label=True),
            wsc(TOLD, 2, 'pete', 4, 'He', idx=1, label=False),
            wsc(SAFE, 22, 'safe', 30, 'it', idx=2),
        ],
        [
            ('Mark told Pete that *he* fell.', 'Mark', 1, {'label': 1, 'idx': 0}),
            ('Mark told Pete that *he* fell.', 'Pete', 0, {'label': 0, 'idx': 1}),
            (SAFE.replace('use it ', 'use *it* '), 'safe', -1, {'label': -1, 'idx': 2}),
        ],
    ),
}  # fmt: skip


def write_official(folder, file, lines):
  path = folder / 'superglue' / file
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path
