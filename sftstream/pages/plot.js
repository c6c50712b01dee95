"use strict";
// The values of a plot at the pointer, and the reload of the page of a run under way.
(() => {
  function values(chart) {
    const svg = chart.querySelector("svg.lines");
    const out = chart.querySelector("output");
    const at = svg.querySelector(".at");
    const lines = [...svg.querySelectorAll("path[data-x]")].map((path) => ({
      name: path.dataset.name, x: path.dataset.x.split(" ").map(Number), s: path.dataset.s.split(" "), y: path.dataset.y.split(";"),
    }));
    const nearest = (xs, x) => {
      let best = 0;
      for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
      return best;
    };
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * 1000;
      const found = lines.map((line) => [line, nearest(line.x, x)]);
      const [first, index] = found.reduce((a, b) => Math.abs(b[0].x[b[1]] - x) < Math.abs(a[0].x[a[1]] - x) ? b : a);
      const here = first.x[index];
      at.removeAttribute("hidden");
      at.setAttribute("x1", here);
      at.setAttribute("x2", here);
      const shown = found.filter(([line, i]) => line.y[i] !== "" && Math.abs(line.x[i] - here) < 20);
      out.classList.toggle("left", x > 500);
      const texts = shown.map(([line, i]) => lines.length > 1 ? `${line.name} ${line.y[i]}` : line.y[i]);
      out.textContent = `${chart.dataset.axis} ${Number(first.s[index]).toLocaleString("en")}: ${texts.join(", ")}`;
    };
    const hide = () => { at.setAttribute("hidden", ""); out.textContent = ""; };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
  for (const chart of document.querySelectorAll(".chart")) if (chart.querySelector("svg.lines")) values(chart);

  const seconds = Number(document.querySelector("main").dataset.reload);
  const reading = () => document.hidden || document.querySelector("details[open]");
  if (seconds) setInterval(() => { if (!reading()) location.reload(); }, seconds * 1000);
})();
