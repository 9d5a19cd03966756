"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const made = (name, text, into) => {
    const element = document.createElement(name);
    element.textContent = text;
    into?.append(element);
    return element;
  };

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Tables: sorted by a column, filtered by words, and cut after SHOWN rows.
  const SHOWN = 12;
  const UNITS = { ns: 1, us: 1e3, ms: 1e6, s: 1e9 };
  const value = (text) => {
    const plain = text.replace(/(\d),(?=\d{3})/g, "$1");
    if (/^0x[0-9a-f]+$/i.test(plain)) return Number(plain);
    const found = /^([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?:\s*(ns|us|ms|s)\b)?/.exec(plain);
    return found ? Number(found[1]) * (UNITS[found[2]] ?? 1) : null;
  };
  const compared = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x !== null && y !== null) return x - y;
    if (x !== null || y !== null) return x !== null ? 1 : -1;
    return a.localeCompare(b);
  };
  const sort = (table, column, heading) => {
    const falls = heading.getAttribute("aria-sort") === "descending"
      || (!heading.hasAttribute("aria-sort") && !heading.classList.contains("n"));
    all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", falls ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    const text = (row) => row.cells[column].textContent;
    rows.sort((a, b) => (falls ? 1 : -1) * compared(text(a), text(b)));
    table.tBodies[0].append(...rows);
  };
  const tools = (table) => {
    const n = table.tBodies[0].rows.length;
    // Rows of two cells are names with values, in their order.
    if (n < 2 || table.tHead.rows[0].cells.length < 3) return;
    all("thead th", table).forEach((heading, column) => {
      const label = made("button", heading.textContent);
      label.type = "button";
      label.addEventListener("click", () => sort(table, column, heading));
      heading.replaceChildren(label);
    });
    const scroll = table.closest(".scroll");
    if (n > 8) {
      const filter = document.createElement("input");
      filter.type = "search";
      filter.placeholder = "Filter rows";
      filter.setAttribute("aria-label", "Filter rows");
      filter.addEventListener("input", () => {
        const words = filter.value.toLowerCase().split(/\s+/);
        table.classList.toggle("filtered", filter.value.trim() !== "");
        for (const row of table.tBodies[0].rows) {
          const text = row.textContent.toLowerCase();
          row.hidden = !words.every((word) => text.includes(word));
        }
      });
      scroll.before(filter);
    }
    if (n > SHOWN) {
      table.classList.add("cut");
      const more = made("button", `Show all ${n.toLocaleString("en")} rows`);
      more.type = "button";
      more.className = "all";
      more.addEventListener("click", () => { table.classList.remove("cut"); more.remove(); });
      scroll.after(more);
    }
  };
  all("table").forEach(tools);

  // Folded parts: opened by links into them, and for print.
  const reveal = (element) => {
    for (let at = element; at; at = at.parentElement) {
      if (at.tagName === "DETAILS") at.open = true;
    }
    if (element?.classList.contains("detail")) element.firstElementChild.open = true;
  };
  const follow = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target) { reveal(target); target.scrollIntoView(); }
  };
  addEventListener("hashchange", follow);
  all("nav a").forEach((link) => link.addEventListener("click", () => {
    if (link.hash === location.hash) follow();
  }));
  const folded = () => all("main details:not([open])");
  let forPrint = [];
  addEventListener("beforeprint", () => {
    forPrint = folded();
    forPrint.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => forPrint.forEach((part) => { part.open = false; }));
  const contents = document.querySelector("nav details");
  if (contents && matchMedia("(max-width: 60rem)").matches) contents.open = false;

  // The marks of a chart as a table of rows of the input; a click on a mark leads to its row.
  const listed = (place, spec) => {
    const fields = (spec.layer?.[0] ?? spec).encoding.tooltip;
    const marks = Object.values(spec.datasets ?? {})[0] ?? [];
    if (!Array.isArray(fields) || !fields.some((field) => field.field === "line")) return null;
    const part = document.createElement("details");
    part.className = "chart-table";
    made("summary", `The ${marks.length.toLocaleString("en")} marks as a table`, part);
    const note = "Row: line or record of the input. To see one with its neighbours: "
      + "tdxtrace explain TRACE --seq ROW";
    made("p", note, part).className = "caption";
    place.closest("figure").append(part);
    const rows = new Map();
    const fill = () => {
      if (rows.size) return;
      const scroll = made("div", "", part);
      scroll.className = "scroll";
      const table = made("table", "", scroll);
      const head = made("tr", "", made("thead", "", table));
      fields.forEach((field) => { made("th", field.title, head).scope = "col"; });
      const body = made("tbody", "", table);
      for (const mark of marks) {
        const row = made("tr", "", body);
        fields.forEach((field) => made("td", String(mark[field.field] ?? ""), row));
        rows.set(`${mark.thread} ${mark.line} ${mark.what}`, row);
      }
      tools(table);
    };
    part.addEventListener("toggle", fill);
    return (mark) => {
      fill();
      part.open = true;
      const row = rows.get(`${mark.thread} ${mark.line} ${mark.what}`);
      if (!row) return;
      rows.forEach((other) => other.classList.remove("chosen"));
      row.classList.add("chosen");
      row.parentElement.prepend(row);
      row.scrollIntoView({ block: "center" });
    };
  };

  // A chart in a closed part would have no width.
  const closed = folded();
  closed.forEach((part) => { part.open = true; });
  const charts = all(".chart");
  const drawn = charts.map((place) => {
    const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
    return vegaEmbed(place, spec, {
      mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: "custom" },
    }).then(({ view }) => {
      const choose = listed(place, spec);
      if (choose) {
        view.addEventListener("click", (_, item) => {
          if (item?.datum?.line !== undefined) choose(item.datum);
        });
      }
    });
  });
  Promise.all(drawn).then(
    () => { root.dataset.drawn = String(charts.length); },
    (error) => { root.dataset.failed = String(error); console.error(error); },
  ).finally(() => {
    closed.forEach((part) => { part.open = false; });
    all("details").forEach((part) => part.addEventListener("toggle", () => {
      if (part.open) dispatchEvent(new Event("resize"));
    }));
    if (location.hash) follow();
  });
})();
