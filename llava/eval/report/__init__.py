"""The parts of `python -m llava.eval.granularity_report`.

`tasks` reads questions, `answers` asks each of them at every granularity, `outcomes` computes rows of the table from these answers,
`measure` times single requests, `plots` and `page` write the HTML. Only the command composes them.
"""
