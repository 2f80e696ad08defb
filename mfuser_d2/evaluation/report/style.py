"""The page's style sheet."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1d232b;--soft:#5d6875;--rule:#dfe4ea;--card:#f5f7f9;
--accent:#2563a8;--bar:#bcd6f0;--good:#0b7a3b;--bad:#b3261e;--warn:#fff4d6;--line-0:#2563a8;--line-1:#d1621b;
--line-2:#23855a;--line-3:#8b47ab;--line-4:#b3261e;--line-5:#6b5b1e;--line-6:#c2388f;--line-7:#4a6572}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--ink:#e5e9ee;--soft:#9aa6b3;--rule:#303843;--card:#1c222a;
--accent:#78b0ea;--bar:#274a6d;--good:#5fd38d;--bad:#ff8a80;--warn:#3a3116;--line-0:#78b0ea;--line-1:#f4a261;
--line-2:#6fd0a0;--line-3:#c79be0;--line-4:#ff8a80;--line-5:#d8c46a;--line-6:#f08cc6;--line-7:#a9bcc7}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
.kicker{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.04em}
h1{margin:.1em 0 .5em;font-size:clamp(1.4rem,4vw,2rem);overflow-wrap:anywhere;line-height:1.2}
h2{font-size:1.35rem;margin:1em 0 .4em;overflow-wrap:anywhere}
h3{font-size:1.15rem;margin:0 0 .8em}
h4{font-size:1rem;margin:1.6em 0 .6em}h5{margin:1em 0 .4em;font-size:.9rem;color:var(--soft);font-weight:600}
section{padding:26px 0;border-top:1px solid var(--rule)}
main:not(:has([role=tabpanel])) article>h2{display:none}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;padding:10px 0 18px}
a{color:var(--accent)}
.tabs{display:flex;gap:4px;overflow-x:auto;border-bottom:1px solid var(--rule)}
.tabs button{border:0;background:none;padding:10px 14px;white-space:nowrap;border-bottom:3px solid transparent}
.tabs [aria-selected=true]{border-color:var(--accent);font-weight:600}
button{font:inherit;color:inherit;cursor:pointer}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.tiles{list-style:none;display:flex;flex-wrap:wrap;gap:10px;padding:0;margin:0 0 24px}
.tile{background:var(--card);border-radius:10px;padding:12px 18px;min-width:128px;flex:0 1 auto}
.tile b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.tile.main{background:var(--accent);color:var(--bg)}.tile.main span{color:inherit}
.tile.source b{font-weight:500}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:4px 12px;text-align:right;border-bottom:1px solid var(--rule)}
th[scope=row],th:first-child{text-align:left;font-weight:500;white-space:nowrap}
thead th{font-weight:600;vertical-align:bottom}
table.bars{width:100%}table.bars td{width:22%}
table.bars th:first-child{position:sticky;left:0;background:var(--bg);z-index:1}
td.bar{min-width:120px;background:linear-gradient(var(--bar),var(--bar)) 0 50%/
calc((100% - 4.4em)*var(--value)/100) 66% no-repeat}
tfoot tr:first-child{font-weight:700}tfoot tr:first-child th{font-weight:700}
tfoot tr:first-child>*{border-top:2px solid var(--soft)}
table.plain th,table.plain td{text-align:left}table.plain td:last-child{overflow-wrap:anywhere}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}.same{color:var(--soft)}
.swatch{display:inline-block;width:.85em;height:.85em;border-radius:3px;margin-right:.55em;vertical-align:-.06em;
box-shadow:0 0 0 1px #8886}
.note,.missing,.keys{color:var(--soft);font-size:.9rem}
.missing{background:var(--card);border-radius:8px;padding:10px 14px}
.warning{background:var(--warn);border-radius:8px;padding:6px 16px 14px;margin:8px 0}
details{border:1px solid var(--rule);border-radius:8px;padding:0 14px;margin:8px 0}
summary{cursor:pointer;padding:10px 0;font-weight:600}
.beside{display:flex;flex-wrap:wrap;gap:20px;align-items:flex-start;padding-bottom:14px}
.beside .scroll{flex:1 1 420px;max-width:max-content}
.confusion{width:var(--size);max-width:none;display:block}
.confusion text{font-size:12px;fill:var(--ink)}
.confusion rect{fill:color-mix(in srgb,var(--accent) calc(var(--share)*100%),var(--card))}
.confusion rect.absent{fill:var(--rule)}
.confusion text.share{font-size:10px;pointer-events:none}.confusion text.on-dark{fill:var(--bg)}
.cards{display:grid;gap:18px}
.card{margin:0;background:var(--card);border-radius:10px;padding:10px}
.card figcaption{font-size:.9rem;margin-bottom:8px;overflow-wrap:anywhere}
.panels{display:grid;grid-template-columns:repeat(4,1fr);gap:6px}
.panel{border:0;padding:0;border-radius:6px;aspect-ratio:var(--ratio);position:relative;background-size:100% 100%;
overflow:hidden;display:block;width:100%}
.panel span{position:absolute;left:0;bottom:0;padding:1px 8px;font-size:.78rem;background:#000a;color:#fff;
border-top-right-radius:6px}
.panel.image,.photo{background-image:var(--photo)}
.panel.truth,.layer.truth{background-image:var(--truth)}
.panel.prediction,.layer.prediction{background-image:var(--prediction)}
.panel.truth,.panel.prediction{background-color:#000}
.panel.errors::before{content:"";position:absolute;inset:0;background:var(--photo) 0/100% 100%;
filter:grayscale(1) brightness(1.1) contrast(.7)}
.panel.errors::after{content:"";position:absolute;inset:0;background:var(--errors) 0/100% 100%}
.panel.errors span{z-index:1}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:8px 0;font-size:.88rem}
.legend svg{width:26px;height:8px;margin-right:7px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:22px}
.chart{margin:0}.chart figcaption{font-weight:600;margin-bottom:4px}.chart small{color:var(--soft)}
.chart>svg{width:100%;height:auto;display:block;background:var(--card);border-radius:8px}
.chart text{font-size:12px;fill:var(--soft)}
.chart .grid{stroke:var(--rule)}.chart .cursor{stroke:var(--soft)}
.chart output{display:block;font-size:.85rem;color:var(--soft);min-height:1.5em;font-variant-numeric:tabular-nums}
polyline.line{fill:none;stroke-width:2;stroke-linejoin:round}
.viewer{border:0;border-radius:12px;padding:14px;background:var(--bg);color:var(--ink);
width:min(1100px,calc(100vw - 16px));max-width:none;max-height:calc(100vh - 16px)}
.viewer::backdrop{background:#000a}
.viewer form{display:flex;justify-content:space-between;gap:10px;align-items:center;margin-bottom:8px}
.viewer .caption{overflow-wrap:anywhere;font-weight:500}
.viewer button{border:1px solid var(--rule);background:var(--card);border-radius:6px;padding:5px 12px}
.viewer button[aria-pressed=true]{background:var(--accent);color:var(--bg);border-color:var(--accent)}
.stage{position:relative;aspect-ratio:var(--ratio);width:min(100%,calc((100vh - 250px)*var(--ratio)));margin:0 auto;
border-radius:8px;overflow:hidden;background:#000;touch-action:pan-y;cursor:ew-resize}
.layer{position:absolute;inset:0;background-size:100% 100%}
.layer.truth,.layer.prediction{opacity:var(--opacity,.85)}
.layer.truth{clip-path:inset(0 calc(100% - var(--cut,50%)) 0 0)}
.layer.prediction{clip-path:inset(0 0 0 var(--cut,50%))}
.layer.errors{background-image:var(--errors);display:none}
.divider{position:absolute;top:0;bottom:0;left:var(--cut,50%);width:3px;margin-left:-1.5px;background:#fff;
box-shadow:0 0 4px #000}
.stage[data-view=image] .truth,.stage[data-view=image] .prediction,.stage[data-view=truth] .prediction,
.stage[data-view=prediction] .truth,.stage[data-view=errors] .truth,.stage[data-view=errors] .prediction,
.stage:not([data-view=slider]) .divider{display:none}
.stage[data-view=truth] .truth,.stage[data-view=prediction] .prediction{clip-path:none}
.stage[data-view=errors] .errors{display:block}.stage[data-view=errors] .photo{filter:grayscale(1) contrast(.7)}
.reading{margin:6px 0;font-size:.9rem;min-height:1.5em}
.controls{display:flex;flex-wrap:wrap;gap:10px 18px;align-items:center}
.slide{flex:1 1 260px;display:flex;gap:10px;align-items:center}.slide input{flex:1;min-width:80px}
.layer.truth,.layer.prediction,.layer.errors{image-rendering:pixelated}
.blend{display:flex;gap:8px;align-items:center}
.views,.turn{display:flex;flex-wrap:wrap;gap:6px}
input[type=range]{accent-color:var(--accent);min-height:28px}
@media(max-width:640px){header,main{padding:0 12px}.panels{grid-template-columns:repeat(2,1fr)}
th,td{padding:4px 8px}td.bar{min-width:88px}.keys{display:none}
.chart text{font-size:19px}.tile{min-width:calc(50% - 5px);padding:10px 12px}
.tile.main{min-width:100%}}
@media print{.tabs,nav,.viewer{display:none}article[hidden]{display:block!important}details>*{display:block}}
"""
