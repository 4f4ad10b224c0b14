"""The parts of `python -m llava.eval.granularity_report`.

`settings` holds the flags and `tasks` reads the questions. `answers` asks each question at every granularity, `answers_file` keeps
answers.jsonl, `policies` lists the rules that pick a granularity, `outcomes` computes their accuracy and cost from the answers, `measure`
times single requests, `baseline` compares with an earlier report, `examples` picks and draws images; `contents` puts these together as
report.json. `texts` and `tables` write what it says, `plots` and `page` the HTML, from `templates/`.
"""
