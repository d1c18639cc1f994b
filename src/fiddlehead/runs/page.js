"use strict";
// Replaces each chart by one that zooms: drag over a part to see it, click twice to see the whole.
const figures = [...document.querySelectorAll("figure.chart")];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (value) => {
  if (value === null || value === undefined) return "";
  if (Math.abs(value) >= 1e15) return String(value.toExponential(3)).replace(/\.?0*e\+/, "e");
  for (const [limit, unit, letter] of [[1e12, 1e12, "T"], [1e9, 1e9, "B"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
    if (Math.abs(value) >= limit) return +(value / unit).toPrecision(4) + letter;
  return value && Math.abs(value) < 1e-3 ? String(value.toExponential(3)).replace(/\.?0+e/, "e") : String(+value.toPrecision(4));
};
const made = new Map();
function draw(figure) {
  const told = JSON.parse(figure.querySelector("script").textContent);
  const place = figure.querySelector(".plot");
  if (!told.curves.length) return;
  if (made.has(figure)) made.get(figure).destroy();
  const dashes = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
  const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false },
    font: "11px system-ui, sans-serif", values: (_, ticks) => ticks.map(short) };
  const series = told.curves.map((curve, number) => ({
    label: curve.name, stroke: COLOURS[number % COLOURS.length],
    width: 1.5 * (told.curves.length > 1 ? 1.5 - 0.8 * number / (told.curves.length - 1) : 1),
    dash: dashes[Math.floor(number / COLOURS.length) % 4], value: (_, value) => short(value),
    points: { show: curve.xs.length < 30, size: 4, fill: COLOURS[number % COLOURS.length] } }));
  const width = place.clientWidth;
  const options = { width, height: Math.round(width * 0.55), scales: { x: { time: false } },
    cursor: { drag: { x: true, y: false } }, axes: [{ ...axis, size: 24, label: told.x, labelSize: 16, labelGap: 0, labelFont: axis.font }, { ...axis, size: 46 }],
    series: [{ label: told.x, value: (_, value) => short(value) }, ...series] };
  place.replaceChildren();
  const chart = new uPlot(options, uPlot.join(told.curves.map((curve) => [curve.xs, curve.ys])), place);
  // Without a pointer on it the legend has the newest values; uPlot empties it after these events.
  const newest = () => setTimeout(() => {
    if (chart.cursor.idx == null)
      chart.setLegend({ idxs: chart.data.map((values) => values.findLastIndex((value) => value != null)) });
  }, 50);
  chart.over.addEventListener("mouseleave", newest);
  newest();
  made.set(figure, chart);
  const legend = figure.querySelector(".legend");
  if (legend) legend.remove();
}
const drawAll = () => figures.forEach(draw);
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
const observer = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  const chart = made.get(target.parentElement);
  if (chart && target.clientWidth && chart.width !== target.clientWidth)
    chart.setSize({ width: target.clientWidth, height: Math.round(target.clientWidth * 0.55) });
}));
figures.forEach((figure) => observer.observe(figure.querySelector(".plot")));
