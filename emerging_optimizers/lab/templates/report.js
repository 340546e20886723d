"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const figures = [...document.querySelectorAll(".plots")];

// Everything that changes a figure (a button, a view, a zoom, the theme) ends in this one call.
function draw(figure) {
  const panels = figure.querySelectorAll(".panel");
  const view = figure.querySelector("select")?.value ?? Object.keys(figure.spec.views)[0];
  figure.spec.views[view].forEach((panel, i) => Plotly.react(panels[i], traces(figure, panel), layout(figure, panel), {
    displayModeBar: false, doubleClick: false, responsive: true,
  }));
}

function traces(figure, panel) {
  const hidden = hiddenKeys(figure.closest("section"));
  const where = figure.spec.x.title;
  const color = (curve) => (curve.color === "currentColor" ? themed("ink") : curve.color);
  const edge = (curve, y, more) => ({
    x: curve.x, y, visible: !hidden.has(curve.key), mode: "lines", opacity: 0.2, hoverinfo: "skip",
    line: { color: color(curve), width: 0 }, ...more,
  });
  return panel.curves.flatMap((curve) => [...(curve.band ? [
    edge(curve, curve.band[0], {}), edge(curve, curve.band[1], { fill: "tonexty" }),
  ] : []), {
    ...(curve.x ? { x: curve.x } : { x0: 1, dx: 1 }),
    y: curve.y,
    name: curve.key,
    visible: !hidden.has(curve.key),
    mode: [curve.dash && "lines", curve.symbol && "markers"].filter(Boolean).join("+"),
    ...(curve.symbol ? { marker: { symbol: curve.symbol, ...(curve.dash ? {} : { size: 8 }) } } : {}),
    opacity: curve.faint ? 0.5 : 1,
    line: { color: color(curve), dash: curve.dash || "solid", width: 1.8 },
    // Plotly reads some tags in what it shows: a name is none.
    hovertemplate: `<b>${curve.key.replaceAll("&", "&amp;").replaceAll("<", "&lt;")}</b><br>%{y:.4g}<br>${where} %{x}<extra></extra>`,
  }]);
}

function layout(figure, panel) {
  const { spec, zoom } = figure;
  const single = figure.querySelectorAll(".panel").length === 1;
  const axis = ({ title, type, range, ticks }) => ({
    type,
    range: [...range], // plotly writes into it
    title: { text: single ? title : "", standoff: 8 },
    tickfont: { size: type === "log" ? 9 : 11 }, // powers of ten are set larger
    exponentformat: "power",
    gridcolor: themed("line"),
    zeroline: false,
    ...(ticks ? { tickvals: ticks[0], ticktext: ticks[1] } : type === "log" && range[1] - range[0] > 1.2
      ? { dtick: Math.ceil((range[1] - range[0]) / 6) } // whole decades, six at most
      : { nticks: single ? 12 : 5 }),
  });
  return {
    xaxis: axis({ ...spec.x, ...zoom.x }),
    yaxis: axis({ ...spec.y, ...zoom.y }),
    title: { text: panel.title, font: { size: 12 }, x: 0.5, y: 0.98, yanchor: "top" },
    shapes: [
      ...panel.lines.map((x) => ({ x0: x, x1: x, yref: "paper", y0: 0, y1: 1 })),
      ...panel.levels.map((y) => ({ y0: y, y1: y, xref: "paper", x0: 0, x1: 1 })),
    ].map((ends) => ({
      type: "line", layer: "below", ...ends, line: { color: themed("muted"), width: 1, dash: "dot" },
    })),
    margin: single ? { l: 56, r: 8, t: 8, b: 44 } : { l: 34, r: 6, t: 24, b: 24 },
    showlegend: false,
    // A finger scrolls the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    hovermode: "closest",
    hoverlabel: { bgcolor: themed("raised"), bordercolor: themed("line"), font: { color: themed("ink") } },
    font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: themed("muted") },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
  };
}

function hiddenKeys(section) {
  return new Set([...section.querySelectorAll(".key[aria-pressed=false]")].map((button) => button.value));
}

function show(section) {
  const hidden = hiddenKeys(section);
  section.querySelectorAll("tr[data-key]").forEach((row) => { row.hidden = hidden.has(row.dataset.key); });
  section.querySelectorAll(".plots").forEach(draw);
}

document.querySelectorAll("section").forEach((section) => {
  const keys = section.querySelectorAll(".key");
  const press = (key, shown) => key.setAttribute("aria-pressed", shown);
  keys.forEach((key) => key.addEventListener("click", () => {
    press(key, key.getAttribute("aria-pressed") === "false");
    show(section);
  }));
  section.querySelectorAll(".every").forEach((button) => button.addEventListener("click", () => {
    keys.forEach((key) => press(key, button.value));
    show(section);
  }));
});

figures.forEach((figure) => {
  figure.spec = JSON.parse(figure.querySelector("script").textContent);
  figure.zoom = {};
  draw(figure);
  figure.querySelector("select")?.addEventListener("change", () => draw(figure));
  figure.querySelectorAll(".panel").forEach((panel) => {
    // All panels of a figure look at the same ranges.
    panel.on("plotly_relayout", (change) => {
      if (!("xaxis.range[0]" in change || "yaxis.range[0]" in change)) return;
      figure.zoom = { x: { range: [...panel.layout.xaxis.range] }, y: { range: [...panel.layout.yaxis.range] } };
      draw(figure);
    });
    panel.on("plotly_doubleclick", () => {
      figure.zoom = {};
      draw(figure);
    });
  });
});
dark.addEventListener("change", () => figures.forEach(draw));
