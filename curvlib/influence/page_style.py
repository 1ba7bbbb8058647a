"""The look of the page of influence: colours that people without full colour vision tell apart.

Blue (up) and vermilion (down) are Okabe and Ito's. Light or dark as the reader's system is set.
"""

STYLE = """
:root { color-scheme: light dark; --up: 0 114 178; --down: 213 94 0; --back: #fff; --card: #f6f7f9;
  --ink: #16181d; --soft: #565c67; --line: #d9dde3; --mid: #b3b9c3; --link: #00578a; }
@media (prefers-color-scheme: dark) {
  :root { --up: 60 150 215; --down: 226 112 30; --back: #14161a; --card: #1d2026; --ink: #e9ebee;
    --soft: #a4abb8; --line: #353a44; --mid: #5d6470; --link: #7cc1f0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0 auto; max-width: 78rem; padding: 1.2rem clamp(.8rem, 3vw, 2.2rem) 4rem;
  background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .2rem 0 .4rem; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
p { margin: .3rem 0; }
a { color: var(--link); }
a:focus-visible, [tabindex]:focus-visible, summary:focus-visible { outline: 2px solid var(--link);
  outline-offset: 2px; }
.soft, .none, figcaption, .caption { color: var(--soft); font-size: .88rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .7rem 0; font-size: .9rem; }
.u, .d { border-radius: 2px; }
.u { background: rgb(var(--up) / var(--a)); }
.d { background: rgb(var(--down) / var(--a)); }
.ramp { display: inline-block; width: 11rem; height: .8rem; vertical-align: -.08rem;
  margin: 0 .4rem;
  border: 1px solid var(--line); background: linear-gradient(90deg, rgb(var(--down) / .72),
  rgb(var(--down) / 0) 50%, rgb(var(--up) / 0) 50%, rgb(var(--up) / .72)); }
.upper { color: rgb(var(--up)); font-weight: 600; }
.downer { color: rgb(var(--down)); font-weight: 600; }
nav ol { list-style: none; margin: .4rem 0; padding: 0; display: grid; gap: .35rem;
  grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); max-height: 22rem; overflow: auto; }
nav a { display: flex; gap: .6rem; align-items: center; padding: .3rem .55rem; height: 100%;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; font-size: .88rem;
  text-decoration: none; color: inherit; }
nav a:hover { border-color: var(--link); }
nav img { width: 2.2rem !important; height: 2.2rem; object-fit: contain; flex: none; }
nav .none { display: none; }
section { border-top: 2px solid var(--line); margin-top: 2.2rem; padding-top: 1.1rem;
  scroll-margin-top: .5rem; }
.text { white-space: pre-wrap; font: .86rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; max-height: 15rem; overflow: auto; unicode-bidi: isolate;
  tab-size: 4; }
.query { border-left: 4px solid var(--mid); background: var(--card); padding: .6rem .9rem;
  border-radius: 0 6px 6px 0; }
.overview { display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr);
  align-items: start; margin-top: .8rem; }
.sides { display: grid; gap: 0 1.6rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 60rem) { .overview, .sides { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; }
svg { display: block; max-width: 100%; }
.histogram { width: 100%; height: auto; }
.tick { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
rect.all { fill: var(--mid); }
rect.up { fill: rgb(var(--up)); }
rect.down { fill: rgb(var(--down)); }
ol.cards { list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem; }
figcaption { margin-top: .45rem; }
.tiles .head { flex-direction: column; }
ol.tiles { grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem .65rem; min-width: 0; }
.head { display: flex; flex-wrap: wrap; gap: .1rem .8rem; align-items: baseline;
  justify-content: space-between; font-size: .88rem; }
.score { font-variant-numeric: tabular-nums; }
.meter { height: 4px; margin: .25rem 0 .45rem; background: var(--line); border-radius: 2px; }
.meter span { display: block; height: 100%; border-radius: 2px; }
.up { background: rgb(var(--up)); }
.down { background: rgb(var(--down)); }
.parts { margin-top: .45rem; height: 30px; }
img.pixels { image-rendering: pixelated; width: 6.4rem; border: 1px solid var(--line); }
.query img.pixels, .query img.photo { width: 9rem; }
img.photo { max-width: 100%; height: auto; border: 1px solid var(--line); }
.numbers { font-variant-numeric: tabular-nums; font-size: .88rem; }
.scroll { max-height: 19rem; overflow: auto; }
table { border-collapse: collapse; font-size: .86rem; width: 100%; }
th { text-align: left; font-weight: 500; }
thead th { color: var(--soft); }
th, td { padding: .16rem .5rem .16rem 0; vertical-align: top; }
tbody tr { border-top: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  overflow-wrap: normal; }
.layers tbody th { min-width: 7rem; }
.track { width: 22%; min-width: 4rem; vertical-align: middle; background: linear-gradient(90deg,
  transparent calc(50% - .5px), var(--soft) 0 calc(50% + .5px), transparent 0); padding: 0; }
.track span { display: block; height: .6rem; }
details { margin: .7rem 0; }
summary { cursor: pointer; color: var(--link); }
.provenance th { width: 14rem; color: var(--soft); }
.back { float: right; font-size: .85rem; }
@media print { nav, .back { display: none; } .text, .scroll { max-height: none; } }
"""
