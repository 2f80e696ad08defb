"""The page's script: run tabs, readings in charts, the image viewer. The page can be read without it."""

SCRIPT = r"""
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Run tabs: one pane at a time; arrow keys as the ARIA pattern asks.
const tabs = all('[role=tab]');
function selectTab(index, focus) {
  tabs.forEach((tab, i) => {
    tab.setAttribute('aria-selected', i === index);
    tab.tabIndex = i === index ? 0 : -1;
    document.getElementById(tab.getAttribute('aria-controls')).hidden = i !== index;
  });
  if (focus) tabs[index].focus();
}
tabs.forEach((tab, i) => {
  tab.addEventListener('click', () => selectTab(i));
  tab.addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step) selectTab((i + step + tabs.length) % tabs.length, true);
    if (event.key === 'Home') selectTab(0, true);
    if (event.key === 'End') selectTab(tabs.length - 1, true);
  });
});
if (tabs.length) selectTab(0);

// Charts: the values at the iteration under the pointer, or under the arrow keys.
for (const chart of all('.chart')) {
  const lines = JSON.parse(chart.dataset.chart), svg = chart.querySelector('svg');
  const cursor = chart.querySelector('.cursor'), output = chart.querySelector('output');
  const stops = [...new Map(lines.flatMap(line => line.points).map(point => [point[0], point[2]]))]
    .sort((a, b) => a[0] - b[0]);
  let at = stops.length - 1;
  function show(index) {
    at = Math.max(0, Math.min(stops.length - 1, index));
    const [x, position] = stops[at];
    cursor.setAttribute('x1', position); cursor.setAttribute('x2', position);
    cursor.setAttribute('visibility', 'visible');
    const values = lines.map(line => {
      const point = line.points.filter(p => p[0] <= x).pop();
      return point ? `${line.name} ${+point[1].toPrecision(4)}` : null;
    });
    output.textContent = `iteration ${x}: ` + values.filter(Boolean).join(' · ');
  }
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = 0;
    stops.forEach((stop, i) => { if (Math.abs(stop[1] - x) < Math.abs(stops[nearest][1] - x)) nearest = i; });
    show(nearest);
  });
  svg.addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step) { event.preventDefault(); show(at + step); }
  });
}

// Viewer: the card's own layers (custom properties), enlarged, with a slider between truth and prediction.
const viewer = document.querySelector('.viewer'), stage = viewer.querySelector('.stage');
const cut = viewer.querySelector('.cut'), opacity = viewer.querySelector('.opacity');
const reading = viewer.querySelector('.reading'), views = all('.views button', viewer);
const cards = () => all('.card[data-size]').filter(card => card.offsetParent);
let current = null, maps = null;
const names = {};
for (const item of all('.classes li')) {
  const color = item.querySelector('.swatch').style.backgroundColor.match(/\d+/g).slice(0, 3).join();
  names[color] = item.textContent;
}

function setView(name) {
  stage.dataset.view = name;
  views.forEach(button => button.setAttribute('aria-pressed', button.dataset.view === name));
}
function setCut(value) {
  cut.value = value;
  stage.style.setProperty('--cut', value + '%');
}
function pixels(card, layer) {
  const [width, height] = card.dataset.size.split('x').map(Number), image = new Image();
  const canvas = Object.assign(document.createElement('canvas'), {width, height});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  image.onload = () => context.drawImage(image, 0, 0);
  image.src = card.style.getPropertyValue('--' + layer).trim().replace(/^url\(["']?|["']?\)$/g, '');
  return (x, y) => {
    const [r, g, b, a] = context.getImageData(x * width | 0, y * height | 0, 1, 1).data;
    return a ? names[[r, g, b].join()] || 'unknown' : 'ignored';
  };
}
function open(card, view) {
  current = card;
  const value = getComputedStyle(stage).getPropertyValue('--cut').trim() || '50%';
  stage.style.cssText = card.style.cssText;
  setCut(parseFloat(value));
  stage.style.setProperty('--opacity', opacity.value / 100);
  viewer.querySelector('.caption').textContent = card.querySelector('figcaption').textContent;
  reading.textContent = '\u00a0';
  maps = {truth: pixels(card, 'truth'), prediction: pixels(card, 'prediction')};
  setView(view);
  if (!viewer.open) { viewer.showModal(); cut.focus(); }
}
function turn(step) {
  const list = cards(), index = list.indexOf(current);
  open(list[(index + step + list.length) % list.length], stage.dataset.view);
}
for (const panel of all('.panel')) {
  panel.addEventListener('click', () => {
    const view = panel.dataset.view;
    if (view === 'truth' || view === 'prediction') setCut(view === 'truth' ? 75 : 25);
    open(panel.closest('.card'), view === 'truth' || view === 'prediction' ? 'slider' : view);
  });
}
views.forEach(button => button.addEventListener('click', () => setView(button.dataset.view)));
cut.addEventListener('input', () => { setView('slider'); setCut(cut.value); });
opacity.addEventListener('input', () => stage.style.setProperty('--opacity', opacity.value / 100));
viewer.querySelector('.previous').addEventListener('click', () => turn(-1));
viewer.querySelector('.next').addEventListener('click', () => turn(1));
viewer.addEventListener('click', event => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === 'n') turn(1);
  else if (key === 'p') turn(-1);
  else if (views[key - 1]) setView(views[key - 1].dataset.view);
  else if ((key === 'arrowleft' || key === 'arrowright') && event.target.type !== 'range') {
    setView('slider');
    setCut(Math.max(0, Math.min(100, +cut.value + (key === 'arrowleft' ? -2 : 2))));
  } else return;
  event.preventDefault();
});
function point(event) {
  const box = stage.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
    .map(value => Math.max(0, Math.min(0.9999, value)));
}
stage.addEventListener('pointerdown', event => {
  if (stage.dataset.view !== 'slider') return;
  stage.setPointerCapture(event.pointerId);
  setCut(Math.round(point(event)[0] * 100));
});
stage.addEventListener('pointermove', event => {
  const [x, y] = point(event);
  if (stage.hasPointerCapture(event.pointerId)) setCut(Math.round(x * 100));
  const truth = maps.truth(x, y), prediction = maps.prediction(x, y);
  reading.textContent = truth === prediction ? `${truth}, right` : `truth: ${truth} · predicted: ${prediction}`;
});
"""
