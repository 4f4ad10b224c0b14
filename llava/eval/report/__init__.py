"""The parts of `python -m llava.eval.granularity_report`.

`tasks` reads questions, `answers` asks each of them at every granularity and keeps answers.jsonl, `ways` lists the ways of choosing one,
`outcomes` computes rows of the table from the answers, `measure` times single requests, `examples` picks and draws pictures, `words` writes
table and notes, `plots` and `page` the HTML. Only the command composes them.
"""
