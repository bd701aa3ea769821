"use strict";
/* Drawing figures takes longest of all, so each is drawn when it comes near to what is seen, and all before the page is printed.
   Plotly stands on the page as text until the first of them needs it. */
(function () {
  const waiting = new Set(document.querySelectorAll(".figure"));
  const draw = (place) => {
    if (!waiting.delete(place)) return;
    if (!window.Plotly) {
      const library = document.createElement("script");
      library.textContent = document.getElementById("plotly").textContent;
      document.head.append(library);
    }
    const figure = JSON.parse(place.querySelector("script").textContent);
    Plotly.newPlot(place, figure.data, figure.layout, { responsive: true });
  };
  const near = new IntersectionObserver(
    (seen) => seen.filter((each) => each.isIntersecting).forEach((each) => draw(each.target)),
    { rootMargin: "600px" },
  );
  waiting.forEach((place) => near.observe(place));
  addEventListener("beforeprint", () => [...waiting].forEach(draw));
})();
