"use strict";
(function () {
  const tip = document.getElementById("tip");
  // The tip replaces the browser's own slow titles, which stay for pages without scripts.
  document.querySelectorAll("[data-tip] > title").forEach((title) => title.remove());

  function place(event) {
    const gap = 14;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + gap, window.innerWidth - box.width - gap);
    const below = event.clientY + gap;
    const top = below + box.height > window.innerHeight ? event.clientY - box.height - gap : below;
    tip.style.left = Math.max(gap, left) + "px";
    tip.style.top = Math.max(gap, top) + "px";
  }

  document.addEventListener("pointermove", (event) => {
    const marked = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    tip.hidden = !marked;
    if (marked) {
      tip.textContent = marked.getAttribute("data-tip");
      place(event);
    }
  });

  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element ? event.target.closest("[data-panel]") : null;
    if (!button) return;
    const panels = button.closest(".panels");
    panels.querySelectorAll("[data-panel]").forEach((one) => {
      const chosen = one === button;
      one.setAttribute("aria-pressed", String(chosen));
      document.getElementById(one.dataset.panel).classList.toggle("open", chosen);
    });
  });
})();
