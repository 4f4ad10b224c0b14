"""The report as one HTML file that asks for nothing else: style, plots and pictures are inside, and there is no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from llava.eval.report import words
from llava.eval.report.plots import choice_bars, escape, legend, scatter, time_bars

PICTURE_WIDTH = 760
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of the page: even a text that slipped through could load and run nothing."""

STYLE = """
:root{color-scheme:light dark;--paper:#f6f7f6;--card:#fff;--ink:#1b2422;--soft:#5c6b68;--line:#dde3e1;--accent:#0f766e;--warm:#c2570c;
--good:#15803d;--bad:#b42318;--grey:#7b8a87;--shade:0 1px 2px rgba(20,40,36,.07),0 4px 14px rgba(20,40,36,.05)}
@media (prefers-color-scheme:dark){:root{--paper:#121716;--card:#1a2120;--ink:#e6ecea;--soft:#9db0ab;--line:#2c3735;--accent:#4fd1c1;
--warm:#f0924a;--good:#5cc98a;--bad:#f58f82;--grey:#8b9b97;--shade:none}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:clamp(1.6rem,4.4vw,2.3rem);line-height:1.15;margin:0 0 8px;letter-spacing:-.02em}
h2{font-size:1.18rem;margin:0 0 4px;letter-spacing:-.01em}
p{margin:0 0 12px}
.soft{color:var(--soft)}
.note{color:var(--soft);font-size:.9rem;max-width:76ch}
.facts{display:flex;flex-wrap:wrap;gap:6px 8px;margin:14px 0 26px;padding:0;list-style:none}
.facts li{background:var(--card);border:1px solid var(--line);border-radius:99px;padding:2px 12px;font-size:.86rem;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:14px;margin-bottom:18px}
.card,section{background:var(--card);border:1px solid var(--line);border-radius:14px;box-shadow:var(--shade)}
.card{padding:16px 18px}
.card b{display:block;font-size:1.75rem;line-height:1.15;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card small{color:var(--soft);display:block;font-size:.86rem;line-height:1.4;margin-top:4px}
.card span{color:var(--soft);font-size:.78rem;letter-spacing:.06em;text-transform:uppercase}
section{padding:20px 22px;margin-bottom:18px;min-width:0}
.pair{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:18px}
.pair>section{margin-bottom:18px}
.alarm{border-color:var(--bad);border-left:6px solid var(--bad)}
.alarm b{color:var(--bad)}
.plot{display:block;width:100%;height:auto}
.plot.narrow{display:none}
.grid{stroke:var(--line);stroke-width:1}
.tick,.axis{fill:var(--soft);font-size:12.5px;font-variant-numeric:tabular-nums}
.line{fill:none;stroke:var(--grey);stroke-width:1.5;stroke-dasharray:4 4}
.whisker{stroke-width:1.6;opacity:.55}
.mark{stroke:var(--card);stroke-width:1.4}
.mark .whisker{stroke-width:1.6}
.mark.fixed{fill:var(--grey)}.mark.fixed .whisker{stroke:var(--grey)}
.mark.random{fill:var(--card);stroke:var(--bad);stroke-width:2}.mark.random .whisker{stroke:var(--bad)}
.mark.bias{fill:#7c6cd0}.mark.bias .whisker{stroke:#7c6cd0}
.mark.budget{fill:#3b82c4}.mark.budget .whisker{stroke:#3b82c4}
.mark.oracle{fill:#e0a400}.mark.oracle .whisker{stroke:#e0a400}
.mark.adaptive{fill:var(--accent)}.mark.adaptive .whisker{stroke:var(--accent)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:8px 0 12px;padding:0;list-style:none;font-size:.86rem;color:var(--soft)}
.legend li{display:inline-flex;align-items:center;gap:6px}
.key{width:20px;height:20px}
.swatch{width:13px;height:13px;border-radius:3px;display:inline-block}
.bars{display:grid;gap:7px}
.bar-row{display:grid;grid-template-columns:minmax(92px,22%) minmax(0,1fr);gap:10px;align-items:center;font-size:.88rem}
.timed .bar-row{grid-template-columns:minmax(92px,16%) minmax(0,1fr) 68px}
.bar-name{overflow-wrap:anywhere;line-height:1.2}
.bar{display:flex;height:24px;border-radius:6px;overflow:hidden;background:var(--line)}
.bar.open{background:none}
.bar span{display:flex;align-items:center;justify-content:center;min-width:0;overflow:hidden;
font-size:.74rem;font-variant-numeric:tabular-nums}
.bar-value{text-align:right;font-variant-numeric:tabular-nums;color:var(--soft)}
.part-views{background:#9fb4d1}.part-vision{background:#4f78b5}.part-router{background:#e5873a}.part-splice{background:#b3bf5f}
.part-prefill{background:#7b5ea7}.part-decode{background:#c0709f}.part-other{background:#a3aaa8}
.scroll{overflow-x:auto;margin:0 -22px;padding:0 22px 4px}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 7px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);vertical-align:bottom;font-size:.8rem;white-space:normal}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
td:first-child{font-weight:600;min-width:118px}
tr.adaptive td{background:color-mix(in srgb,var(--accent) 11%,var(--card))}
tr:last-child td{border-bottom:0}
td small{color:var(--soft)}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px}
figure{margin:0;border:1px solid var(--line);border-radius:12px;overflow:hidden;display:flex;flex-direction:column;background:var(--paper)}
figure img{display:block;width:100%;height:auto;background:#fff}
figcaption{padding:12px 14px 14px;font-size:.9rem;overflow-wrap:anywhere;min-width:0}
figcaption .family{color:var(--soft);font-size:.76rem;letter-spacing:.06em;text-transform:uppercase}
figcaption .question{font-weight:600;margin:2px 0 6px}
figcaption .said{margin:0 0 8px}
.verdict{font-weight:700}
.yes{color:var(--good)}.no{color:var(--bad)}
.tries{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:5px}
.tries li{border:1px solid var(--line);border-radius:7px;padding:1px 8px;font-size:.8rem;background:var(--card);
max-width:100%;overflow-wrap:anywhere}
.tries .taken{border-color:var(--accent);box-shadow:inset 0 0 0 1px var(--accent)}
.notes{margin:0;padding-left:20px;color:var(--soft);font-size:.92rem}
.notes li{margin-bottom:5px;overflow-wrap:anywhere}
@media (max-width:860px){.pair{grid-template-columns:minmax(0,1fr);gap:0}}
@media (max-width:620px){td:first-child{white-space:normal}.bar-row,.timed .bar-row{font-size:.82rem}
main{padding:26px 14px 44px}section{padding:16px 14px}.scroll{margin:0 -14px;padding:0 14px 4px}
.plot.wide{display:none}.plot.narrow{display:block}.cards{grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:10px}
.card{padding:12px 14px}.card b{font-size:1.4rem}}
"""


def write_page(report: Mapping[str, Any], pictures: Sequence[Image.Image]) -> str:
    """The page of a report.

    Args:
        report: what is written to report.json. pictures: one per entry of its `examples`.
    """
    rows = report["rows"]
    parts = [_head(report), _alarm(report), _cards(report), '<div class="pair">', _accuracy_plot(report), _choices(report), "</div>"]
    timed = [row for row in rows if row["cost"] is not None]
    if timed:
        parts.append(_section("Where the time of an answer goes", report["timing"]["text"], time_bars(timed)))
    parts += [_table(report), _baseline(report), _families(rows, report["families"])]
    parts += [_examples(report["examples"], pictures), _notes(report["notes"])]
    title = escape(f"{report['task']}: what adaptive granularity buys")
    ramp = _level_style(len(report["granularities"]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}{ramp}</style></head><body><main>{"".join(parts)}</main>'
        "</body></html>\n"
    )


def _level_style(count: int) -> str:
    """Colours of the granularities, pale for coarse to strong for fine; turned round on a dark page."""

    def blend(first: tuple[int, int, int], last: tuple[int, int, int], share: float) -> str:
        return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(first, last, strict=True))

    light, dark = [], []
    for index in range(count):
        share = index / max(count - 1, 1)
        strong = share > 0.45
        paper, ink = blend((205, 233, 227), (11, 84, 79), share), "#fff" if strong else "#12312d"
        light.append(f".level-{index}{{background:{paper};color:{ink}}}")
        paper, ink = blend((38, 72, 69), (126, 226, 209), share), "#08211e" if strong else "#dff3ef"
        dark.append(f".level-{index}{{background:{paper};color:{ink}}}")
    return "".join(light) + "@media (prefers-color-scheme:dark){" + "".join(dark) + "}"


def _section(title: str, lead: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(lead)}</p>{body}</section>'


def _head(report: Mapping[str, Any]) -> str:
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in report["facts"])
    return (
        "<header><h1>What adaptive granularity buys</h1>"
        f'<p class="soft">{escape(report["lead"])}</p><ul class="facts">{facts}</ul></header>'
    )


def _alarm(report: Mapping[str, Any]) -> str:
    crashes = report["crashes"]
    if not crashes:
        return ""
    first = "; ".join(f"question {crash['question_id']}: {crash['reason']}" for crash in crashes[:3])
    return (
        f'<section class="alarm"><b>{len(crashes)} of {report["asked"]} questions crashed</b> and are in no figure below. '
        f"{escape(first)}</section>"
    )


def _cards(report: Mapping[str, Any]) -> str:
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{escape(card["title"])}</span><b>{escape(card["value"])}</b>'
            f"<small>{escape(card['text'])}</small></div>"
            for card in report["cards"]
        )
        + "</div>"
    )


def _accuracy_plot(report: Mapping[str, Any]) -> str:
    rows = report["rows"]
    plots = scatter(rows, 560, 400).replace('class="plot"', 'class="plot wide"') + scatter(rows, 360, 330).replace(
        'class="plot"', 'class="plot narrow"'
    )
    lead = f"{words.heads(report)[0].capitalize()}. Whiskers are 95 % intervals; the dashed line joins the fixed granularities."
    return _section("Accuracy against cost", lead, plots + legend([row["kind"] for row in rows]))


def _choices(report: Mapping[str, Any]) -> str:
    adaptive = next((row for row in report["rows"] if row["kind"] == "adaptive"), None)
    if adaptive is None:
        return _section("What was chosen", report["no_router"], "") if report["no_router"] else ""
    families = adaptive["choices"]
    lead = "Share of the questions of each family, in percent, that the router answered at each granularity."
    return _section("What the router chose", lead, choice_bars(families, report["granularities"]))


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


COSTS = (
    "saved, %", "TTFT, ms", "total, ms", "tokens/s", "router, %", "peak, MiB", "KV, MiB",
)  # fmt: skip


def _table(report: Mapping[str, Any]) -> str:
    lines = []
    for row in report["rows"]:
        cost = row["cost"] or {}
        interval = "" if row["interval"] is None else f" <small>[{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]</small>"
        cells = [
            f"{words.percent(row['accuracy'])}{interval}",
            f"{row['difference']:+.1f}",
            *([words.percent(row["over_questions"])] if words.grouped(report) else []),
            f"{row['tokens']:.0f}",
            f"{row['saved']:.0f}",
            _number(cost.get("ttft_ms")),
            _number(cost.get("total_ms")),
            _number(cost.get("tokens_per_second"), 0),
            _number(cost.get("router_share")),
            _number(cost.get("peak_mib"), 2),
            _number(cost.get("kv_mib"), 2),
        ]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="{escape(row["kind"])}"><td>{escape(row["name"])}</td>{body}</tr>')
    accuracy, *others = words.heads(report)
    head = "".join(f"<th>{escape(name)}</th>" for name in (accuracy, "against finest", *others, *COSTS))
    table = f'<div class="scroll"><table><thead><tr><th>choice</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return _section("Every way of choosing", "How each column is measured is said at the end of the page.", table)


def _baseline(report: Mapping[str, Any]) -> str:
    if report.get("baseline") is None:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in words.BASELINE_HEADS)
    lines = [
        f'<tr class="{escape(row["kind"])}">' + "".join(f"<td>{escape(cell)}</td>" for cell in words.baseline_cells(row)) + "</tr>"
        for row in report["baseline"]["rows"]
    ]
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return _section("Against the baseline", words.baseline_text(report), table)


def _families(rows: Sequence[Mapping[str, Any]], families: Sequence[str]) -> str:
    if len(families) < 2:
        return ""
    head = "".join(f"<th>{escape(family)}</th>" for family in families)
    lines = [
        f'<tr class="{escape(row["kind"])}"><td>{escape(row["name"])}</td>'
        + "".join(f"<td>{row['families'][family]:.1f}</td>" for family in families)
        + "</tr>"
        for row in rows
    ]
    table = f'<div class="scroll"><table><thead><tr><th>choice</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return _section("Accuracy per question family", "In percent.", table)


def _examples(examples: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> str:
    if not examples:
        return ""
    figures = "".join(_example(example, picture) for example, picture in zip(examples, pictures, strict=True))
    lead = (
        "On the left the whole picture, on the right its tiles: a red cell is one visual token, a yellow frame one view. Below: the "
        "answer, and what every granularity said; the one taken is framed."
    )
    return _section("What it looked at", lead, f'<div class="examples">{figures}</div>')


def _example(example: Mapping[str, Any], picture: Image.Image) -> str:
    verdict = '<span class="verdict yes">✓ right</span>' if example["right"] else '<span class="verdict no">✗ wrong</span>'
    wanted = "" if example["right"] else f", expected “{escape(example['answer'])}”"
    tries = "".join(
        f'<li class="{"taken" if one["granularity"] == example["granularity"] else "other"}">{one["granularity"]}: '
        f'<span class="{"yes" if one["right"] else "no"}">{"✓" if one["right"] else "✗"} {escape(one["said"])}</span></li>'
        for one in example["tries"]
    )
    alternative = escape(f"The picture of the question “{example['text']}” with the token grid at granularity {example['granularity']}")
    return (
        f'<figure><img src="{_embedded(picture)}" alt="{alternative}" width="{PICTURE_WIDTH}" '
        f'height="{round(picture.height * PICTURE_WIDTH / picture.width)}"><figcaption>'
        f'<div class="family">{escape(example["family"])} · {escape(example["tokens"])} of {escape(example["full_tokens"])} tokens</div>'
        f'<div class="question">{escape(example["text"])}</div><p class="said">“{escape(example["said"])}” {verdict}{wanted}</p>'
        f'<ul class="tries">{tries}</ul></figcaption></figure>'
    )


def _embedded(picture: Image.Image) -> str:
    """A picture as a data address, at the width it is shown at on a sharp screen."""
    small = picture.resize((PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section><h2>How this was measured</h2><ul class="notes">{lines}</ul></section>'
