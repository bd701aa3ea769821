"use strict";
/* Drawing figures takes longest of all, so each is drawn when it comes near to what is seen, one after the other so that the first
   is seen before the next is made, and all before the page is printed. Plotly stands on the page as text until the page is there. */
(function () {
  const waiting = new Set(document.querySelectorAll(".figure"));
  const near = new Set();
  const load = () => {
    if (window.Plotly) return;
    const library = document.createElement("script");
    library.textContent = document.getElementById("plotly").textContent;
    document.head.append(library);
  };
  const draw = (place) => {
    near.delete(place);
    if (!waiting.delete(place)) return;
    load();
    const figure = JSON.parse(place.querySelector("script").textContent);
    Plotly.newPlot(place, figure.data, figure.layout, { responsive: true });
  };
  let asked = false;
  const next = () => {
    asked = near.size > 0;
    if (!asked) return;
    draw(near.values().next().value);
    setTimeout(next);
  };
  const observer = new IntersectionObserver(
    (seen) => {
      // What was scrolled past before its turn came waits until it is near again.
      seen.forEach((each) => near[each.isIntersecting ? "add" : "delete"](each.target));
      if (!asked) next();
    },
    { rootMargin: "600px" },
  );
  waiting.forEach((place) => observer.observe(place));
  addEventListener("load", () => setTimeout(load));
  addEventListener("beforeprint", () => [...waiting].forEach(draw));
})();
