"""The page's style sheet: light and dark, wide and narrow, screen and paper, without a script."""

from navit.report.runs import AXES

_LIGHT = ("#0969da", "#d9480f", "#2b8a3e", "#8e44ad", "#c2255c", "#0c8599", "#946300", "#5c636a")
_DARK = ("#58a6ff", "#ff8f57", "#56d364", "#d2a8ff", "#ff7eb6", "#39c5cf", "#e3b341", "#a8b0b9")
_DASHES = ("none", "7 4", "2 4")  # a second and third round of the colours


def style_sheet(num_runs: int) -> str:
    """Return the CSS of a page with so many runs.

    A radio button by axis and a check box by run, all siblings before the page's content, show and
    hide what belongs to them: the classes ``axis-NAME`` and ``run-NUMBER``.
    """
    return "".join([_colours(), _BASE, *map(_run, range(num_runs)), *map(_axis, AXES), _PRINT])


def _colours() -> str:
    light, dark = (
        "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))
        for colours in (_LIGHT, _DARK)
    )
    return (
        f":root{{color-scheme:light dark;{_LIGHT_PAGE}{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK_PAGE}{dark}}}}}"
    )


def _run(number: int) -> str:
    colour = f"var(--c{number % len(_LIGHT)})"
    dash = _DASHES[min(number // len(_LIGHT), len(_DASHES) - 1)]
    shown = f"#show-run-{number}"
    return (
        f".run-{number}{{--run:{colour};--dash:{dash}}}"
        f"{shown}:not(:checked)~main .run-{number}{{display:none}}"
        f"{shown}:not(:checked)~nav label[for=show-run-{number}]{{opacity:.45}}"
        f"{shown}:focus-visible~nav label[for=show-run-{number}]{{outline:2px solid currentColor}}"
    )


def _axis(axis: str) -> str:
    chosen = f"#by-{axis}"
    label = f"nav label[for=by-{axis}]"
    return (
        f".axis-{axis}{{display:none}}"
        f"{chosen}:checked~main .axis-{axis}{{display:block}}"
        f"{chosen}:checked~{label}{{background:var(--text);color:var(--page)}}"
        f"{chosen}:focus-visible~{label}{{outline:2px solid var(--c0);outline-offset:2px}}"
    )


_LIGHT_PAGE = "--page:#fff;--card:#f6f8fa;--text:#1f2328;--quiet:#59636e;--rule:#d1d9e0;"
_DARK_PAGE = "--page:#0d1117;--card:#161b22;--text:#e6edf3;--quiet:#9198a1;--rule:#30363d;"

_BASE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header,main,footer{max-width:92rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:1.5rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--rule)}
h3{font-size:.95rem;margin:0 0 .35rem}
p{margin:.3rem 0 .7rem;max-width:46rem}
.quiet,footer{color:var(--quiet)}
.switch{position:absolute;opacity:0;pointer-events:none}
nav{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--rule);
  padding:.5rem max(1.25rem,calc((100vw - 92rem)/2 + 1.25rem));
  display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;align-items:center;max-height:40vh;overflow-y:auto}
@media (max-width:45rem){nav{position:static;max-height:none}}
nav div{display:flex;flex-wrap:wrap;gap:.25rem .45rem;align-items:center;min-width:0}
nav label{cursor:pointer;border:1px solid var(--rule);border-radius:1rem;padding:.05rem .7rem;
  overflow-wrap:anywhere}
.chip{display:inline-block;width:1.6em;height:.7em;margin-right:.45em;vertical-align:baseline}
.chip line{stroke:var(--run);stroke-width:5;stroke-dasharray:var(--dash)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.2rem 0 .6rem}
th,td{padding:.28rem .8rem;text-align:right;border-bottom:1px solid var(--rule);
  vertical-align:top;min-width:6.5rem}
td{white-space:nowrap}
td.long{white-space:normal;overflow-wrap:anywhere;min-width:14rem}
thead th{vertical-align:bottom;border-bottom:2px solid var(--rule)}
th:first-child{position:sticky;left:0;background:var(--page);text-align:left;font-weight:500;
  padding-left:0;min-width:9rem;max-width:22rem}
td.best{font-weight:700}
th small{color:var(--quiet);font-weight:400;display:block}
td small{color:var(--quiet)}
.pair{display:flex;flex-wrap:wrap;gap:0 3.5rem}
.pair>div{min-width:0;max-width:100%}
.pair>div>p{width:0;min-width:100%}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr));gap:1rem}
.card{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.8rem;
  min-width:0;margin:0;break-inside:avoid}
.plot>svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.85rem;margin:.35rem 0 0;padding:0;
  list-style:none}
.legend li{overflow-wrap:anywhere}
.grid line{stroke:var(--rule);stroke-width:1}
svg text{fill:var(--quiet);font-size:12.5px;font-family:inherit}
.end{text-anchor:end}.mid{text-anchor:middle}
.curve,.raw{fill:none;stroke:var(--run);stroke-linejoin:round}
.curve{stroke-width:2.2;stroke-dasharray:var(--dash)}
.raw{stroke-width:.8;opacity:.38}
.many .raw{opacity:.13}
circle{fill:var(--run)}
.reference line{stroke:var(--quiet);stroke-dasharray:2 4;stroke-width:1.4}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,34rem),1fr));gap:1rem}
figure{margin:0}
figcaption{font-weight:600;margin-bottom:.4rem;overflow-wrap:anywhere}
.pictures img{display:block;width:100%;height:auto;background:#fff;border-radius:.3rem}
@media screen and (max-width:40rem){figure{overflow-x:auto}.pictures img{width:42rem}}
ul.notes{margin:.3rem 0;padding-left:1.2rem}
details{margin:1rem 0}
summary{cursor:pointer;font-weight:600}
footer{padding-top:1.5rem;padding-bottom:2rem;font-size:.85rem}
"""

_PRINT = """
@media print{
  body{font-size:10pt}
  nav{position:static;max-height:none;padding:.4rem 1.25rem}
  .cards{grid-template-columns:1fr 1fr}
  tr,.card,figure,.pair>div,.scroll{break-inside:avoid}
  h2,h2+p,figcaption{break-after:avoid}
  th:first-child{position:static}
  .pictures{display:block}
  figure{margin-bottom:6mm}
  .pictures img{max-height:230mm;object-fit:contain;object-position:left top}
  .scroll{overflow:visible}
  th,td{min-width:0;padding:.2rem .4rem}
}
@page{margin:14mm}
"""
