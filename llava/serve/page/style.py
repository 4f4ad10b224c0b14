"""The page's own style, in Gradio's variables, so that light and dark both fit."""

CSS = """
.gradio-container {max-width: 1360px !important; width: 100%; margin: 0 auto !important; padding: 0 !important}
.gradio-container main.app, .gradio-container .app {padding: 14px 18px !important}
footer {display: none !important}
.avg-said {white-space: pre-wrap; overflow-wrap: anywhere}
#avg-title h1 {font-size: 1.35rem; margin: 0; font-weight: 700; color: var(--body-text-color)}
#avg-title p {margin: 2px 0 0; color: var(--body-text-color-subdued)}
.avg-notice, .avg-error {border-radius: 8px; padding: 10px 14px; margin: 2px 0; border: 1px solid; color: var(--body-text-color)}
.avg-notice {border-color: #d9a21b; background: color-mix(in srgb, #d9a21b 12%, transparent)}
.avg-error {border-color: #d0433a; background: color-mix(in srgb, #d0433a 12%, transparent)}
.avg-notice p, .avg-error p {margin: 0 0 4px}
.avg-notice pre {overflow-x: auto; margin: 6px 0 0; font-size: .82rem; padding: 8px; border-radius: 6px;
  background: var(--background-fill-secondary); color: var(--body-text-color)}
.avg-small {font-size: .8rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; margin: 4px 0}
#avg-about-0, #avg-about-1 {background: var(--block-background-fill); padding: 0 12px}
#avg-about-0 .html-container, #avg-about-1 .html-container {padding: 0}
.avg-about {margin: 0 0 8px; line-height: 1.4}
.avg-hint {padding: 18px 20px 4px; text-align: center; color: var(--body-text-color)}
.avg-thumbnails {display: flex; flex-wrap: wrap; gap: 8px}
.avg-thumbnails img {max-height: 180px; max-width: min(100%, 260px); min-height: 96px; border-radius: 8px; object-fit: contain;
  margin: 0 !important}
.avg-thumbnails + .avg-said {margin-top: 6px}
.avg-card {border-top: 1px solid var(--border-color-primary); margin-top: 8px; padding-top: 8px; width: 100%}
.avg-facts {display: flex; flex-wrap: wrap; gap: 6px}
.avg-fact {font-size: .8rem; padding: 2px 9px; border-radius: 999px; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color-subdued); white-space: nowrap}
.avg-fact b {color: var(--body-text-color)}
.avg-strong {border-color: var(--color-accent); background: color-mix(in srgb, var(--color-accent) 14%, transparent)}
.avg-image {display: grid; gap: 8px 18px; margin-top: 10px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr))}
.avg-image h4 {grid-column: 1 / -1; margin: 0; font-size: .85rem; color: var(--body-text-color)}
.avg-card table.avg-bars {border-collapse: collapse; border: 0; width: 100%; font-size: .8rem; table-layout: fixed; margin: 0;
  font-variant-numeric: tabular-nums; color: var(--body-text-color)}
.avg-card .avg-bars caption {text-align: left; color: var(--body-text-color-subdued); padding-bottom: 4px; font-size: .8rem}
.avg-card .avg-bars tr {border: 0 !important; background: none !important}
.avg-card .avg-bars th, .avg-card .avg-bars td {padding: 2px 6px !important; border: 0 !important; text-align: right; font-weight: 400;
  background: none !important; white-space: nowrap}
.avg-card .avg-bars thead th {color: var(--body-text-color-subdued); font-size: .75rem}
.avg-card .avg-bars thead th:nth-child(1), .avg-card .avg-bars thead th:nth-child(2) {width: 5.6em}
.avg-card .avg-bars thead th:nth-child(3) {text-align: left}
.avg-card .avg-bars thead th:nth-child(4) {width: 4.6em}
.avg-card .avg-bars .avg-bar {text-align: left}
.avg-card .avg-bar i {display: block; height: 10px; min-width: 1px; border-radius: 5px; opacity: .5;
  background: var(--body-text-color-subdued)}
.avg-card .avg-bars .avg-chosen th, .avg-card .avg-bars .avg-chosen td {font-weight: 700}
.avg-card .avg-chosen .avg-bar i {background: var(--color-accent); opacity: 1}
.avg-card .avg-forbidden th, .avg-card .avg-forbidden td {text-decoration: line-through; opacity: .5}
.avg-card .avg-forbidden .avg-bar i {opacity: .25}
.avg-views {display: flex; flex-wrap: wrap; gap: 10px}
.avg-views figure {margin: 0; max-width: 100%; width: fit-content}
.avg-views svg, .avg-views img {display: block; height: 170px; width: auto; max-width: 100%; border-radius: 4px; margin: 0}
.avg-views figcaption {font-size: .75rem; color: var(--body-text-color-subdued); margin-top: 3px; width: 0;
  min-width: max(100%, 110px)}
.avg-canvas {fill: #000}
.avg-dropped {fill: #777; fill-opacity: .8}
.avg-grid {fill: none; stroke: #ff4040; stroke-opacity: .85; stroke-width: .8; vector-effect: non-scaling-stroke}
.avg-tile {fill: none; stroke: #ffdc00; stroke-width: 2; vector-effect: non-scaling-stroke}
.avg-waiting {display: flex; gap: 5px; padding: 6px 0}
.avg-waiting i {width: 8px; height: 8px; border-radius: 50%; background: var(--body-text-color-subdued); animation: avg-pulse 1.2s infinite}
.avg-waiting i:nth-child(2) {animation-delay: .2s} .avg-waiting i:nth-child(3) {animation-delay: .4s}
@keyframes avg-pulse {0%, 60%, 100% {opacity: .25} 30% {opacity: 1}}
@media (prefers-reduced-motion: reduce) {.avg-waiting i {animation: none}}
.avg-side-name, .avg-side-name * {font-size: .9rem; font-weight: 600 !important; color: var(--body-text-color)}
/* Gradio paints what is chosen white, as its dot is, while the mouse is over it. */
#avg-settings input:checked:hover {background-color: var(--checkbox-background-color-selected) !important}
#avg-buttons button {white-space: nowrap; padding-inline: 4px}
@media (max-width: 768px) {
  .gradio-container main.app, .gradio-container .app {padding: 8px !important}
  #avg-main {flex-direction: column}
  #avg-talk {order: 1; width: 100%} #avg-settings {order: 2; width: 100%}
  #avg-sides {flex-direction: column}
  #avg-chat-0, #avg-chat-1 {height: 60vh !important}
  .avg-views svg, .avg-views img {height: 130px}
}
"""
