// Tables sort by a click on a heading (or Enter on it): numbers by their value, what is missing last.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  table.querySelectorAll("thead th").forEach((heading, column) => {
    heading.classList.add("sorts");
    heading.tabIndex = 0;
    const sort = () => {
      const now = heading.getAttribute("aria-sort");
      const upward = now ? now === "descending" : column === 0;
      for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", upward ? "ascending" : "descending");
      const key = (row) => (row.cells[column]?.textContent ?? "").trim();
      const value = (text) => Number.parseFloat(text.replace("−", "-").replace(/^[≤≥<>]\s*/, ""));
      const compare = (a, b) => {
        const [x, y] = [value(key(a)), value(key(b))];
        if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
        const order = Number.isNaN(x) ? key(a).localeCompare(key(b)) : x - y;
        return upward ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    };
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}
// A link to a place within a folded section unfolds it.
const unfold = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", unfold);
unfold();
