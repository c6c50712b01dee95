"use strict";
// Filters, search, hover and keys of the preview. All text from the data stays text: this script
// writes with textContent only.
(() => {
  const $ = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll(".conversation")];
  const refused = [...document.querySelectorAll("tr.refused")];
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const off = new Set();
  let at = -1;

  const shown = () => cards.filter((card) => !card.hidden);

  function apply() {
    const words = $("search").value.toLowerCase();
    const source = $("source").value;
    const reason = $("reason").value;
    for (const card of cards) {
      card.hidden = (source !== "" && card.dataset.source !== source) || (words !== "" && !texts.get(card).includes(words));
    }
    for (const row of refused) {
      row.hidden = (source !== "" && row.dataset.source !== source) || (reason !== "" && row.dataset.reason !== reason)
        || (words !== "" && !row.textContent.toLowerCase().includes(words));
    }
    for (const turn of document.querySelectorAll(".turn")) turn.classList.toggle("off", off.has(turn.dataset.role));
    $("count").textContent = `${shown().length} of ${cards.length} conversations`;
    highlight(words);
  }

  function highlight(words) {
    if (!("highlights" in CSS)) return;
    CSS.highlights.delete("found");
    if (words === "") return;
    const ranges = [];
    for (const card of shown()) {
      for (const tokens of card.querySelectorAll(".tokens")) ranges.push(...find(tokens, words));
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  function find(tokens, words) {
    const nodes = [];
    const walker = document.createTreeWalker(tokens, NodeFilter.SHOW_TEXT);
    let whole = "";
    while (walker.nextNode()) {
      nodes.push([whole.length, walker.currentNode]);
      whole += walker.currentNode.data.toLowerCase();
    }
    const place = (offset) => {
      let found = nodes[0];
      for (const node of nodes) { if (node[0] > offset) break; found = node; }
      return [found[1], Math.min(offset - found[0], found[1].length)];
    };
    const ranges = [];
    for (let from = whole.indexOf(words); from >= 0 && ranges.length < 200; from = whole.indexOf(words, from + words.length)) {
      const range = new Range();
      range.setStart(...place(from));
      const [last, index] = place(from + words.length - 1);
      range.setEnd(last, Math.min(index + 1, last.length));
      ranges.push(range);
    }
    return ranges;
  }

  function go(step) {
    const list = shown();
    if (!list.length) return;
    const now = list.indexOf(cards[at]);
    const next = list[Math.max(0, Math.min(list.length - 1, now + step))];
    for (const card of cards) card.classList.remove("at");
    at = cards.indexOf(next);
    next.classList.add("at");
    next.scrollIntoView({block: "start"});
  }

  for (const id of ["search", "source", "reason"]) $(id).addEventListener("input", apply);
  for (const button of document.querySelectorAll("button[data-role]")) {
    button.addEventListener("click", () => {
      const role = button.dataset.role;
      if (!off.delete(role)) off.add(role);
      button.setAttribute("aria-pressed", String(!off.has(role)));
      apply();
    });
  }
  for (const block of document.querySelectorAll(".packbar rect[data-to]")) {
    block.addEventListener("click", () => { at = cards.indexOf($(block.dataset.to)); go(0); });
  }

  const tip = $("tip");
  document.addEventListener("mousemove", (event) => {
    const token = event.target.closest ? event.target.closest("[data-t]") : null;
    if (!token) { tip.hidden = true; return; }
    const card = token.closest(".conversation");
    const tokens = [...card.querySelectorAll("[data-t]")];
    const position = tokens.indexOf(token);
    const next = tokens[position + 1];
    const label = next && next.tagName === "B" ? `predicts ${next.dataset.t}, counted in the loss` : "no label";
    tip.textContent = `id ${token.dataset.t}\nposition ${position}, pack ${Number(card.dataset.start) + position}\n${label}`;
    tip.hidden = false;
    tip.style.setProperty("left", `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`);
    tip.style.setProperty("top", `${Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8)}px`);
  });

  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); $("search").focus(); }
    else if (event.key === "j") go(1);
    else if (event.key === "k") go(-1);
    else if (event.key === "t") window.switchTheme();
    else if (event.key === "?") $("keys").open ? $("keys").close() : $("keys").showModal();
  });
  $("help").addEventListener("click", () => $("keys").showModal());
  apply();
})();
