/* What a link within the book leads to (a theorem, a reference, an operation, a chapter), shown beside the
   link when the pointer rests on it or it has the focus. Without this script a link is just a link. */
(function () {
  "use strict";

  const pages = new Map(); // by path: promises of parsed pages

  function pageAt(url) {
    if (url.pathname === location.pathname) return Promise.resolve(document);
    if (!pages.has(url.pathname)) {
      pages.set(
        url.pathname,
        fetch(url)
          .then((answer) => (answer.ok ? answer.text() : Promise.reject(answer.status)))
          .then((text) => new DOMParser().parseFromString(text, "text/html")),
      );
    }
    return pages.get(url.pathname);
  }

  // A box or an entry as a whole; of a term its definition; of a section its title and first paragraph.
  function partsOf(target) {
    if (target.matches("dt")) {
      const paragraph = target.nextElementSibling?.querySelector("p");
      return paragraph ? [target, paragraph] : [target];
    }
    if (target.matches(".admonition, .citation, .math, figure, p, li")) return [target];
    const section = target.closest("section") ?? target;
    return [...section.querySelectorAll(":scope > :is(h1, h2, h3, h4), :scope > p")].slice(0, 2);
  }

  function contentOf(page, url) {
    const article = page.querySelector("article");
    const id = decodeURIComponent(url.hash.slice(1));
    const target = id ? page.getElementById(id) : article?.querySelector("section");
    if (!target || !article.contains(target)) return null;
    const box = document.createElement("div");
    box.className = "affnb-preview";
    for (const part of partsOf(target)) box.append(document.importNode(part, true));
    // Names are unique on a page; titles are no part of its outline; a preview is for reading.
    for (const element of box.querySelectorAll("noscript, .headerlink, .label, button")) {
      element.remove();
    }
    for (const element of box.querySelectorAll("h1, h2, h3, h4, a, dt")) {
      const plain = document.createElement(element.matches("a") ? "span" : "p");
      if (!element.matches("a")) plain.className = "affnb-preview-title";
      plain.append(...element.childNodes);
      element.replaceWith(plain);
    }
    for (const element of box.querySelectorAll("[id], [tabindex]")) {
      element.removeAttribute("id");
      element.removeAttribute("tabindex");
    }
    return box.textContent.trim() ? box : null;
  }

  async function fill(instance) {
    const url = new URL(instance.reference.href);
    const page = await pageAt(url).catch(() => null);
    const box = page && contentOf(page, url);
    if (!box) return instance.destroy();
    instance.setContent(box);
    if (page !== document) await window.MathJax?.typesetPromise?.([box]);
    instance.popperInstance?.update();
  }

  document.addEventListener("DOMContentLoaded", function () {
    if (!window.tippy) return;
    const links = document.querySelectorAll("article a.reference.internal:not(.headerlink)");
    tippy([...links], {
      content: "…",
      delay: [350, 100],
      duration: 0,
      interactive: true, // the pointer may move onto it
      maxWidth: 480,
      touch: false, // a tap follows the link
      appendTo: () => document.body,
      aria: { content: null, expanded: false },
      onTrigger(instance) {
        if (!instance.filled) instance.filled = fill(instance);
      },
    });
    document.addEventListener("keydown", function (event) {
      if (event.key === "Escape") tippy.hideAll();
    });
  });
})();
