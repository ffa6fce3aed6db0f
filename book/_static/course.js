/* The reader's progress (kept in this browser), glossary definitions on hover, the claims ledger's filters, quizzes,
   and printing.
   Plain JavaScript without dependencies; every part is an extra, the pages read the same without it. */
(() => {
  "use strict";

  const KEY = "moe-course:done";
  const root = new URL(document.documentElement.dataset.content_root || "./", location.href);
  const here = pageOf(location.href);
  const article = document.querySelector("article.bd-article");

  /** "book/start/quickstart" for any address of that page, "" for addresses elsewhere. */
  function pageOf(href) {
    const url = new URL(href, location.href);
    const inside = url.protocol === root.protocol && url.host === root.host && url.pathname.startsWith(root.pathname);
    return inside ? decodeURI(url.pathname.slice(root.pathname.length)).replace(/(\.html|\/)$/, "") : "";
  }

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  /* ---- Progress: {page: true} in localStorage; null where the browser keeps nothing ---- */

  function readDone() {
    try {
      const done = JSON.parse(localStorage.getItem(KEY) || "{}");
      return done && typeof done === "object" ? done : {};
    } catch (error) {
      return error instanceof SyntaxError ? {} : null;
    }
  }

  function writeDone(done) {
    try {
      localStorage.setItem(KEY, JSON.stringify(done));
    } catch {
      return;
    }
    showProgress();
  }

  function showProgress() {
    const done = readDone();
    if (!done) return;
    markSidebar(done);
    if (article && article.querySelector("[data-minutes]")) showButton(done);
    const box = document.getElementById("course-progress");
    const data = document.getElementById("course-pages");
    if (box && data) showBar(box, JSON.parse(data.textContent), done);
  }

  function markSidebar(done) {
    for (const link of document.querySelectorAll(".bd-sidebar-primary nav.bd-links a.reference.internal, .course-map a")) {
      const mark = link.querySelector(".done-mark");
      const isDone = Boolean(done[pageOf(link.href)]);
      if (isDone && !mark) {
        const tick = element("span", { "aria-hidden": "true" }, "✓");
        link.append(element("span", { class: "done-mark" }, tick, element("span", { class: "visually-hidden" }, " (done)")));
      } else if (!isDone && mark) {
        mark.remove();
      }
    }
  }

  function showButton(done) {
    let box = article.querySelector(".page-done");
    if (!box) {
      const button = element("button", { type: "button", class: "course-button" });
      button.addEventListener("click", () => {
        const now = readDone() || {};
        if (now[here]) delete now[here];
        else now[here] = true;
        writeDone(now);
      });
      const note = element("span", { class: "page-done__note" }, "Kept in this browser only.");
      box = element("div", { class: "page-done" }, button, note);
      article.append(box);
    }
    box.classList.toggle("is-done", Boolean(done[here]));
    box.querySelector("button").textContent = done[here] ? "✓ Done. Mark as not done" : "Mark this page as done";
  }

  function showBar(box, pages, done) {
    const finished = pages.filter((page) => done[page.page]);
    const next = pages.find((page) => !done[page.page]);
    const sum = (list) => list.reduce((total, page) => total + page.minutes, 0);
    const left = sum(pages) - sum(finished);
    const count = `${finished.length} of ${pages.length} pages done`;
    const time = next ? `about ${duration(left)} left` : "you have read it all";

    const actions = element("p", { class: "progress__actions" });
    if (next) {
      const words = finished.length ? "Continue with" : "Begin with";
      const href = new URL(`${next.page}.html`, root).href;
      actions.append(element("a", { class: "course-button", href }, `${words} ${next.title}`));
    }
    if (finished.length) {
      const clear = element("button", { type: "button", class: "course-button course-button--quiet" }, "Clear my progress");
      clear.addEventListener("click", () => {
        if (confirm("Forget which pages you have marked as done?")) writeDone({});
      });
      actions.append(clear);
    }
    box.classList.add("progress");
    box.replaceChildren(
      element("p", { class: "progress__title", id: "progress-title" }, "Your progress"),
      element("progress", { max: sum(pages), value: sum(finished), "aria-labelledby": "progress-title" }, count),
      element("p", { class: "progress__count" }, `${count}, ${time}`),
      actions,
      element("p", { class: "progress__note" }, "It stays in this browser: nothing is sent anywhere, no account is needed."),
    );
  }

  function duration(minutes) {
    const hours = Math.floor(minutes / 60);
    const rest = minutes % 60;
    return [hours ? `${hours} h` : "", rest || !hours ? `${rest} min` : ""].filter(Boolean).join(" ");
  }

  /* ---- Glossary: a definition beside the word, on hover and on keyboard focus ---- */

  const GLOSSARY = /(^|\/)reference\/glossary\.html#g-/;
  let glossary = null; // a promise of the glossary page, fetched once
  let tip = null;
  let tipOwner = null;
  let closing = 0;

  function offerDefinitions() {
    if (!article || !location.protocol.startsWith("http")) return;
    for (const link of article.querySelectorAll("a[href]")) {
      if (!GLOSSARY.test(link.getAttribute("href"))) continue;
      link.classList.add("glossary-link");
      link.addEventListener("mouseenter", () => openTip(link));
      link.addEventListener("focus", () => openTip(link));
      link.addEventListener("mouseleave", closeSoon);
      link.addEventListener("blur", closeTip);
    }
    document.addEventListener("keydown", (event) => event.key === "Escape" && closeTip());
  }

  async function definition(link) {
    const url = new URL(link.href);
    glossary ??= fetch(url.href.split("#")[0])
      .then((response) => (response.ok ? response.text() : ""))
      .then((text) => new DOMParser().parseFromString(text, "text/html"));
    const target = (await glossary).getElementById(decodeURIComponent(url.hash.slice(1)));
    let source = target;
    if (target && target.matches("dt")) source = target.nextElementSibling;
    else if (target && !target.textContent.trim()) source = target.nextElementSibling;
    if (!source) return null;
    const copy = document.importNode(source, true);
    copy.removeAttribute("id");
    for (const node of copy.querySelectorAll(".headerlink")) node.remove();
    for (const node of copy.querySelectorAll("a, [id]")) node.replaceWith(...node.childNodes);
    return copy;
  }

  async function openTip(link) {
    clearTimeout(closing);
    if (tipOwner === link) return;
    closeTip();
    tipOwner = link;
    let text = null;
    try {
      text = await definition(link);
    } catch {
      return; // no definition is better than an error
    }
    if (!text || tipOwner !== link) return;
    tip = element("div", { class: "glossary-tip", role: "tooltip", id: "glossary-tip" }, text);
    tip.addEventListener("mouseenter", () => clearTimeout(closing));
    tip.addEventListener("mouseleave", closeSoon);
    document.body.append(tip);
    link.setAttribute("aria-describedby", "glossary-tip");
    if (window.MathJax?.typesetPromise) await window.MathJax.typesetPromise([tip]).catch(() => {});
    else for (const math of tip.querySelectorAll(".math")) math.textContent = math.textContent.replace(/^\\[([]|\\[)\]]$/g, "");
    if (tipOwner === link) place(link);
  }

  function place(link) {
    const at = link.getClientRects()[0] || link.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.max(12, Math.min(at.left, width - tip.offsetWidth - 12));
    const below = at.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(below ? at.bottom + 8 : at.top - 8 - tip.offsetHeight) + scrollY}px`;
    tip.classList.add("is-open");
  }

  function closeSoon() {
    clearTimeout(closing);
    closing = setTimeout(closeTip, 200); // time to move the pointer onto the definition
  }

  function closeTip() {
    tipOwner?.removeAttribute("aria-describedby");
    tip?.remove();
    tip = tipOwner = null;
  }

  /* ---- The claims ledger: filters and search, kept in the address; without JavaScript every row shows ---- */

  function filterLedger() {
    const form = document.querySelector(".ledger-form");
    if (!form) return;
    const filters = [...form.querySelectorAll("select")];
    const rows = [...document.querySelectorAll(".ledger > li")];
    const texts = rows.map((row) => Array.from(row.querySelectorAll("[data-field]"), (field) => field.textContent).join(" ").toLowerCase());
    const verdicts = Array.from(form.elements.verdict.options, (option) => option.value).filter(Boolean);

    function show() {
      const words = form.elements.q.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row, i) => {
        const chosen = filters.every(({ name, value }) => !value || row.dataset[name] === value);
        row.hidden = !chosen || !words.every((word) => texts[i].includes(word));
      });
      const shown = rows.filter((row) => !row.hidden);
      const tally = verdicts.map((verdict) => `${verdict} ${shown.filter((row) => row.dataset.verdict === verdict).length}`);
      document.getElementById("ledger-count").textContent = `${shown.length} of ${rows.length} claims: ${tally.join(", ")}`;
    }

    function remember() {
      const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
      history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}${location.hash}`);
    }

    function recall() {
      const query = new URLSearchParams(location.search);
      form.elements.q.value = query.get("q") ?? "";
      for (const filter of filters) {
        filter.value = query.get(filter.name) ?? "";
        if (filter.selectedIndex < 0) filter.value = ""; // an address that names no such choice
      }
      show();
    }

    form.addEventListener("input", () => (show(), remember()));
    form.addEventListener("reset", () => setTimeout(() => (show(), remember()))); // once the fields are empty
    form.addEventListener("submit", (event) => event.preventDefault());
    addEventListener("popstate", recall);
    form.hidden = false;
    recall();
  }

  /* ---- A figure opens in full size: on a phone its labels are too small to read in the page ---- */

  function linkFigures() {
    for (const image of document.querySelectorAll("article figure img")) {
      if (image.closest("a")) continue;
      const link = element("a", { href: image.src, class: "full-size", title: "Open in full size" });
      image.replaceWith(link);
      link.append(image);
    }
  }

  /* ---- What scrolls sideways can be reached with the keyboard ---- */

  function reachScrollers() {
    for (const node of document.querySelectorAll("article pre, .pst-scrollable-table-container, article mjx-container, .cell_output > .output")) {
      if (node.scrollWidth > node.clientWidth + 1) node.tabIndex = 0;
    }
  }

  /* ---- Quizzes: a button that says what is right or wrong about a choice. Nothing is kept or sent ---- */

  function answerQuizzes() {
    for (const quiz of document.querySelectorAll("fieldset.quiz")) {
      const button = element("button", { type: "button" }, "Check");
      const feedback = element("p", { class: "quiz-feedback", role: "status" });
      quiz.querySelector("details").before(button, feedback);
      const choices = [...quiz.querySelectorAll("input")];
      const answers = quiz.querySelectorAll("li");
      for (const choice of choices) {
        choice.checked = false; // some browsers restore a choice, but not its answer
        choice.addEventListener("change", () => feedback.replaceChildren());
      }
      button.addEventListener("click", () => {
        const answer = answers[choices.findIndex((choice) => choice.checked)];
        if (!answer) return feedback.replaceChildren("Choose an option first.");
        const verdict = answer.classList.contains("quiz-right") ? "Right. " : "Not this one. ";
        feedback.replaceChildren(element("strong", {}, verdict), ...answer.querySelector(".quiz-why").cloneNode(true).childNodes);
      });
    }
  }

  /* ---- Paper is white and shows every answer ---- */

  let opened = [];
  let theme = "";
  addEventListener("beforeprint", () => {
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    document.documentElement.dataset.theme = theme;
    for (const details of opened) details.open = false;
  });

  // Sphinx calls the bibliography a list, but its entries are no list items: screen readers would find an empty list.
  for (const list of document.querySelectorAll(".citation-list[role=list]")) list.removeAttribute("role");

  showProgress();
  offerDefinitions();
  linkFigures();
  filterLedger();
  answerQuizzes();
  addEventListener("load", reachScrollers);
  addEventListener("resize", reachScrollers);
  addEventListener("storage", (event) => event.key === KEY && showProgress());
})();
