"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Set();

  const palette = () => {
    const colours = data.palettes[dark.matches ? "dark" : "light"];
    return { ...colours, link: colours.series1 + "66", wash: colours.series1 + "33" };
  };

  // Colours are named by role ("@ink") until the reader's scheme is known.
  const coloured = (value, colours) => {
    if (typeof value === "string") {
      return value[0] === "@" && value.slice(1) in colours ? colours[value.slice(1)] : value;
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "number" ? value : value.map((item) => coloured(item, colours));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, colours)]));
    }
    return value;
  };

  // Experts out of order need a label each where there is room.
  const ticks = (own, width) => (own && own.type === "category" ? Math.max(7, Math.floor(width / 24)) : width < 520 ? 7 : 14);

  const axis = (own, colours, width) => ({
    automargin: true,
    fixedrange: true,
    gridcolor: colours.line,
    linecolor: colours.line,
    tickcolor: colours.line,
    zeroline: false,
    nticks: ticks(own, width),
    ...own,
    // The leaves of a dendrogram have a label each.
    ...(own && own.tickvals && own.tickvals.length > (width < 520 ? 12 : 40)
      ? { tickangle: -90, tickfont: { size: width < 520 || own.tickvals.length > 80 ? 7 : 9 } }
      : {}),
    ...(own && own.title ? { title: { ...own.title, standoff: 8, font: { size: 12 } } } : {}),
  });

  const draw = (element) => {
    const figure = data.figures[Number(element.dataset.figure)];
    const choice = element.querySelector("select");
    const view = figure.views[choice ? Number(choice.value) : figure.start];
    const canvas = element.querySelector(".canvas");
    const colours = palette();
    const own = coloured(view.layout, colours);
    const width = canvas.clientWidth;
    const heat = view.data.some((trace) => trace.type === "heatmap");
    const layout = {
      ...own,
      autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 44, r: 12, t: 24, b: 40, ...own.margin },
      hoverlabel: { bgcolor: colours.surface, bordercolor: colours.line, font: { color: colours.ink } },
      hovermode: "closest",
      dragmode: false,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 }, ...own.legend },
      xaxis: { ...axis(own.xaxis, colours, width), ...(heat ? { showgrid: false } : {}) },
      yaxis: { ...axis(own.yaxis, colours, width), ...(heat ? { showgrid: false, nticks: 40 } : {}) },
    };
    const options = { displayModeBar: false, responsive: true, displaylogo: false };
    Plotly.react(canvas, coloured(view.data, colours), layout, options);
    drawn.add(element);
  };

  const plots = [...document.querySelectorAll(".plot")];
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          watch.unobserve(entry.target);
          draw(entry.target);
        }
      }
    },
    { rootMargin: "600px" },
  );
  for (const element of plots) {
    watch.observe(element);
    const choice = element.querySelector("select");
    if (choice) choice.addEventListener("change", () => draw(element));
  }
  dark.addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => plots.forEach(draw));

  for (const box of document.querySelectorAll(".tokens")) {
    const passages = JSON.parse(box.querySelector("script").textContent);
    const rows = [...box.querySelectorAll(".passage p")].map((p) => [...p.children]);
    const choice = box.querySelector("select");
    const output = box.querySelector("output");
    const first = (passage, token) => passages[passage][0][token][Number(choice.value)][0];
    const tint = () =>
      rows.forEach((spans, passage) =>
        spans.forEach((span, token) => {
          const expert = first(passage, token);
          // The golden angle keeps neighbours in number apart in hue.
          if (expert < 0) span.style.setProperty("--a", "0");
          else span.style.setProperty("--h", String(Math.round((expert * 137.5) % 360)));
        }),
      );
    const leave = () => {
      box.classList.remove("point");
      box.querySelectorAll(".same,.here").forEach((span) => span.classList.remove("same", "here"));
    };
    const point = (span) => {
      leave();
      const passage = rows.findIndex((spans) => spans.includes(span));
      const token = rows[passage].indexOf(span);
      const expert = first(passage, token);
      const layer = Number(choice.value);
      const [experts, weights] = passages[passage];
      box.classList.add("point");
      span.classList.add("here");
      rows.forEach((spans, p) =>
        spans.forEach((other, t) => other.classList.toggle("same", first(p, t) === expert)),
      );
      const chosen = experts[token][layer]
        .map((id, place) => (id < 0 ? null : `${id} (${weights[token][layer][place]} %)`))
        .filter(Boolean);
      output.textContent = `“${span.textContent}” → ${chosen.length > 1 ? "experts" : "expert"} ${chosen.join(", ")}`;
    };
    const touched = (event) => {
      const span = event.target.closest(".passage span");
      if (span) point(span);
    };
    box.addEventListener("pointerover", touched);
    box.addEventListener("click", touched);
    box.addEventListener("pointerleave", leave);
    choice.addEventListener("change", () => {
      leave();
      tint();
    });
    tint();
  }
})();
