"""The CSS of the page: colors by theme, typography, the grid of figures.

`--up` and `--down` are red, green, blue values for `rgba()`.
"""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #fafafa; --ink: #33373d; --strong: #14171a; --quiet: #6a7079; --faint: #d9dce0;
  --blue: #2563c9; --orange: #d9730d; --teal: #0f9488; --magenta: #b83280; --grey: #8b929b;
  --brown: #8a5a33; --violet: #7c4dd1; --sky: #58b0e0; --green: #4f9a3f; --red: #c43c35; --gold: #c9a20d;
  --up: 229, 122, 20; --down: 52, 116, 224; --good: #0f7b4f; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1b1f24; --ink: #c3c9d1; --strong: #f1f3f5; --quiet: #959da7; --faint: #363c44;
    --blue: #6ca0f6; --orange: #f09a4a; --teal: #3fc2b4; --magenta: #e57ab4; --grey: #8b929b;
    --brown: #b88458; --violet: #a985ee; --sky: #9fd4f5; --green: #80c46c; --red: #ee7b72; --gold: #e3c34a;
    --up: 236, 139, 48; --down: 84, 142, 240; --good: #4cc38a; --bad: #f2786f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 40px 28px 64px; }
h1, h2, h3 { color: var(--strong); line-height: 1.25; margin: 0; font-weight: 650; }
h1 { font-size: 30px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 14px; }
h3 { font-size: 15px; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 78ch; }
b { color: var(--strong); font-weight: 650; }
.facts, .absent { color: var(--quiet); }
.absent { font-size: 13px; }
header p { max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 0 7px 44px; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }
tbody th { text-align: left; font-weight: 400; color: var(--ink); }
th:first-child { padding-left: 0; }
tbody th + th { padding-left: 18px; }
thead th { color: var(--quiet); font-weight: 400; font-size: 13px; }
.headline tbody tr:first-child td { font-size: 24px; padding-top: 4px; padding-bottom: 4px; }
.headline p { color: var(--quiet); font-size: 13px; margin-top: 12px; }
.results table { border-collapse: separate; border-spacing: 0; }
.results th, .results td { padding-left: 26px; }
.results th:first-child { padding-left: 0; padding-right: 12px; text-align: left; position: sticky; left: 0;
  background: var(--page); }
.results details th:first-child { background: var(--panel); }
.results td { white-space: pre; }
.results p { color: var(--quiet); font-size: 13px; margin-top: 12px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 20px;
  align-items: start; }
.grid.wide { grid-template-columns: 1fr; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(560px, 100%), 1fr)); gap: 20px;
  margin-top: 20px; }
figure { margin: 0; padding: 16px 18px; background: var(--panel); border-radius: 8px; display: grid;
  grid-template-rows: subgrid; grid-row: span 4; row-gap: 4px; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; font-family: inherit; margin: 0; align-self: end; }
figcaption { font-size: 13px; line-height: 1.45; color: var(--quiet); }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0; align-content: start;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.keys span { display: inline-flex; align-items: center; gap: 6px; }
.keys i { width: 16px; height: 0; border-top: 2px solid var(--c); }
.keys i.dashes { border-top-style: dashed; }
.keys i.area, .keys i.band { width: 11px; height: 11px; border: 0; border-radius: 2px; background: var(--c); }
.keys i.band { opacity: 0.3; }
.sample { min-width: 0; padding: 16px 18px; background: var(--panel); border-radius: 8px;
  break-inside: avoid; }
.sample .facts { margin: 2px 0 10px; font-size: 13px; font-variant-numeric: tabular-nums; }
.right { color: var(--good); font-weight: 650; }
.wrong { color: var(--bad); font-weight: 650; }
pre { margin: 0; font: 13px/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--quiet); padding-left: 12px; border-left: 3px solid var(--faint); margin-bottom: 8px; }
.response { color: var(--strong); }
.response span { padding: 2px 0; border-radius: 2px; }
.cut { color: var(--quiet); font-style: italic; }
.scale { display: inline-grid; grid-template-columns: auto 220px auto; gap: 0 10px; align-items: center;
  font-size: 13px; color: var(--quiet); font-variant-numeric: tabular-nums; }
.scale .bar { height: 14px; border-radius: 3px;
  background: linear-gradient(to right, rgba(var(--down), 0.75), transparent, rgba(var(--up), 0.75)); }
.scale .middle { grid-column: 2; text-align: center; }
@media (max-width: 640px) {
  main { padding: 24px 16px 40px; }
  th, td { padding-left: 18px; }
  .headline tbody tr:first-child td { font-size: 18px; }
}
details { background: var(--panel); border-radius: 8px; padding: 12px 18px; }
summary { cursor: pointer; }
details pre { margin-top: 12px; }
"""
