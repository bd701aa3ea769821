"use strict";
/* What each token of the demonstrations weighs, for a query, a layer and a head that are chosen, in-context beside what updates
   imply: one row per demonstration, one column per method, the tokens drawn by CircuitsVis. `data` holds the
   fields of an AttentionExample. Text goes into the page as text; CircuitsVis takes tokens for HTML, so these are escaped. */
window.iclgdAttention = function (root, data) {
  const made = (tag, parent, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    parent.append(element);
    return element;
  };
  const escaped = (text) =>
    text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
  const bytes = Uint8Array.from(atob(data.weights), (character) => character.charCodeAt(0));
  const lengths = data.demonstrations.map((tokens) => tokens.length);
  const total = lengths.reduce((sum, length) => sum + length, 0);
  const [, nQueries, nLayers, nHeads] = data.shape;
  const at = (method, query, layer, head) => ((method * nQueries + query) * nLayers + layer) * nHeads + head;
  let drawn = 0;

  const controls = made("div", root, undefined, "iclgd-controls");
  const selector = (name, options) => {
    const label = made("label", controls, name + " ");
    const select = made("select", label);
    select.name = name;
    options.forEach((option, index) => {
      made("option", select, option).value = index;
    });
    select.addEventListener("change", draw);
    return select;
  };
  // By characters: a string's own slice may end within one.
  const cut = (text) => Array.from(text).slice(0, 120).join("");
  const query = selector("query", data.queries.map((each, index) => cut(`${index + 1}: ${each.text.trim()}`)));
  const layer = selector("layer", Array.from({ length: nLayers }, (_, index) => String(index)));
  const head = selector("head", Array.from({ length: nHeads }, (_, index) => (index ? String(index - 1) : "mean over heads")));
  layer.value = nLayers - 1;
  const about = made("p", root, undefined, "iclgd-about");
  const table = made("div", root, undefined, "iclgd-table");
  table.style.setProperty("--methods", data.methods.length);

  function draw() {
    const chosen = [query, layer, head].map((select) => Number(select.value));
    const asked = data.queries[chosen[0]];
    about.textContent = `${asked.text.trim()} → in-context ${asked.predicted}` + (asked.gold === null ? "" : `, gold ${asked.gold}`);
    table.replaceChildren();
    made("div", table, "label", "iclgd-head");
    data.methods.forEach((method, index) => {
      const cell = at(index, ...chosen);
      const tau = data.tau[cell];
      const heading = made("div", table, undefined, "iclgd-head");
      made("b", heading, method);
      made("span", heading, ` darkest ${data.scale[cell].toFixed(3)}` + (tau === null ? "" : `, τ with ICL ${tau.toFixed(2).replace("-", "−")}`));
    });
    let start = 0;
    lengths.forEach((length, row) => {
      made("div", table, data.labels[row], "iclgd-label");
      data.methods.forEach((method, index) => {
        const cell = at(index, ...chosen);
        const first = cell * total + start;
        const values = Array.from(bytes.subarray(first, first + length), (byte) => (byte / 255) * data.scale[cell]);
        const around = made("div", table, undefined, "iclgd-tokens");
        around.dataset.method = method;
        const place = made("div", around);
        // A name of its own each time: CircuitsVis makes a root of React's, and an element may have one but once.
        place.id = `${root.id}-${++drawn}`;
        CircuitsVis.render(place.id, CircuitsVis.ColoredTokens, {
          tokens: data.demonstrations[row].map(escaped),
          values: values.map((value) => Number(value.toPrecision(3))),
          minValue: 0,
          maxValue: data.scale[cell] || 1,
          positiveColor: data.colours[index],
          paddingBottom: 0,
        });
      });
      start += length;
    });
  }
  draw();
};
