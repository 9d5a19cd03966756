"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const charts = [...document.querySelectorAll(".chart")];
  const drawn = charts.map((place) => {
    const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
    return vegaEmbed(place, spec, {
      mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: "custom" },
    });
  });
  Promise.all(drawn).then(
    () => { root.dataset.drawn = String(charts.length); },
    (error) => { root.dataset.failed = String(error); console.error(error); },
  );
})();
