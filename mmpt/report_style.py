"""The style sheet of the report."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfc; --raised: #f4f4f1; --ink: #1d2126; --soft: #5d656e; --line: #dcdcd6;
  --accent: #2f6fab; --good: #1f7a3d; --good-page: #e5f4e9; --bad: #b23b2e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --raised: #1d2126; --ink: #e4e7ea; --soft: #9aa3ad; --line: #333941;
    --accent: #7ab3e6; --good: #6fcf8d; --good-page: #1a3324; --bad: #f08a7d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 {
  font-size: clamp(1.6rem, 5vw, 2.2rem); line-height: 1.2; margin: 0; letter-spacing: -.015em; overflow-wrap: anywhere;
}
h2 { font-size: 1.25rem; margin: 0 0 .9rem; letter-spacing: -.01em; }
.lead { margin: .5rem 0 0; font-size: 1.1rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1.1rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; padding-top: 1.6rem; }
.note, .absent { color: var(--soft); margin: 0 0 1rem; font-size: .92rem; }
.absent { font-style: italic; }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .9rem 2rem; margin: 0; }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
dd span { display: inline-block; margin-right: .8em; }
dd b { font-weight: 600; }

.scroll { overflow-x: auto; margin-bottom: 1.6rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.numbers { width: auto; }
.numbers tbody th { width: 15rem; min-width: 9rem; }
.numbers td { min-width: 6.2rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
th, td { text-align: left; vertical-align: top; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: .82rem; white-space: nowrap; }
tbody th { font-weight: 400; overflow-wrap: anywhere; }
.numbers td, .numbers thead th:not(:first-child) {
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; padding: .42rem .5rem .42rem .9rem;
}
.numbers .own { background: var(--raised); }
.better { color: var(--good); }
.worse { color: var(--bad); }
td span { display: inline-block; width: 1em; font-size: .75em; text-align: center; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; max-width: 46rem; }
figure > img { width: 100%; height: auto; display: block; }
figcaption { font-size: .92rem; margin-bottom: .3rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; color: var(--soft); font-size: .86rem; }
.legend i { font-style: normal; }

.example {
  display: grid; grid-template-columns: 7.5rem 1fr; gap: 1.2rem; padding: 1rem 0; border-bottom: 1px solid var(--line);
  align-items: center;
}
.example:last-child { border-bottom: 0; }
.query, .example li { display: flex; flex-direction: column; gap: .35rem; overflow-wrap: anywhere; }
.query { font-weight: 600; line-height: 1.35; }
.query img { width: 100%; }
.example ol {
  list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr));
}
.example li {
  border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .65rem; font-size: .88rem; line-height: 1.35;
}
.example li.correct { border-color: var(--good); background: var(--good-page); }
.example small { margin-top: auto; color: var(--soft); font-variant-numeric: tabular-nums; }
.example li.correct small { color: var(--good); font-weight: 600; }
.example img { border-radius: .35rem; background: #fff; max-width: 100%; height: auto; object-fit: contain; }
.example li img { width: 100%; aspect-ratio: 1; }
img.small { image-rendering: pixelated; }
.missed { margin: .5rem 0 0; color: var(--soft); font-size: .86rem; }

summary { cursor: pointer; color: var(--accent); }
pre {
  background: var(--raised); border-radius: .5rem; padding: 1rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}

@media (max-width: 36rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .facts { grid-template-columns: repeat(2, 1fr); gap: .8rem 1.2rem; }
  .numbers tbody th { min-width: 7.5rem; }
  .numbers td { min-width: 0; }
  .numbers td, .numbers thead th:not(:first-child) { padding: .42rem .3rem .42rem .45rem; }
  .example { grid-template-columns: 1fr; }
  .query { flex-direction: row; align-items: center; }
  .query img { width: 5.5rem; flex: none; }
}
@media print {
  :root {
    --page: #fff; --raised: #f4f4f1; --ink: #000; --soft: #444; --line: #ccc;
    --accent: #2f6fab; --good: #1f7a3d; --good-page: #e5f4e9; --bad: #b23b2e;
  }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .example, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
