/* What the pages need beyond the theme: widgets that everybody can use, and mathematics inside them. */
(function () {
  "use strict";

  // require.js and what it loads look for files beside themselves, not beside the page.
  window.requirejs = { baseUrl: new URL("vendor/", document.currentScript.src).href };

  // html-manager typesets labels and HTML through MathJax 2's queue; the site has MathJax 3.
  document.addEventListener("DOMContentLoaded", function () {
    if (!window.MathJax || !MathJax.startup) return;
    MathJax.Hub = {
      Queue: function (task) {
        const element = task[2];
        if (!/\$|\\\(|\\\[/.test(element.textContent)) return;
        element.classList.add("mathjax_process");
        MathJax.startup.promise = MathJax.startup.promise
          .then(() => MathJax.typesetPromise([element]))
          .then(watchOverflow);
      },
    };
    MathJax.startup.promise.then(watchOverflow);
  });

  // noUiSlider's handles have the role of a slider and no name; their values are indices.
  function nameSliders() {
    for (const handle of document.querySelectorAll(".noUi-handle[role=slider]")) {
      const widget = handle.closest(".widget-slider, .jupyter-widgets");
      const label = widget.querySelector(".widget-label");
      const readout = widget.querySelector(".widget-readout");
      if (label) label.removeAttribute("title"); // "null"
      setOnce(handle, "aria-label", label ? label.textContent.trim() : "Value");
      if (readout) {
        setOnce(handle, "aria-valuetext", readout.textContent.trim());
        // Its value is the slider's; typing into it would be a second way to the same.
        setOnce(readout, "aria-hidden", "true");
        readout.removeAttribute("contenteditable");
        readout.removeAttribute("tabindex");
      }
    }
  }

  function setOnce(element, attribute, value) {
    if (element.getAttribute(attribute) !== value) element.setAttribute(attribute, value);
  }

  // Whatever scrolls sideways can be reached from the keyboard, and nothing else is a stop on the way.
  const SCROLLERS =
    "div.highlight > pre, .cell_output pre, .affnb-scroll, .affnb-card, .output.text_html, " +
    ".affnb-explore > .widget-box";

  function watchOverflow() {
    for (const box of document.querySelectorAll(SCROLLERS)) {
      const scrolls =
        box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (scrolls) setOnce(box, "tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  }

  window.addEventListener("load", function () {
    watchOverflow();
    window.addEventListener("resize", watchOverflow);
    if (!document.querySelector("script[type='application/vnd.jupyter.widget-view+json']")) return;
    let waiting = false;
    const watcher = new MutationObserver(function () {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(function () {
        waiting = false;
        nameSliders();
      });
    });
    // Sliders appear when html-manager has drawn them, and change when they are moved.
    for (const output of document.querySelectorAll(".cell_output")) {
      watcher.observe(output, {
        childList: true,
        subtree: true,
        characterData: true,
        attributes: true,
        attributeFilter: ["aria-valuenow", "aria-valuetext"],
      });
    }
    nameSliders();
  });
})();
