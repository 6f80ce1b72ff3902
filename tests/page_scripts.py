"""What the tests of the chat page run in it: JavaScript that records, judges and holds up."""

from __future__ import annotations

# Records what the page sends.
SPY = """(() => {
  window.sent = []; window.lengths = new Set(); window.polls = 0;
  const real = window.fetch;
  window.fetch = (path, options) => {
    if (options?.body) window.sent.push(JSON.parse(options.body));
    if (path === "stats") window.polls += 1;
    return real(path, options);
  };
  new MutationObserver(() => {
    window.lengths.add(document.querySelector("article:last-of-type > .said")?.textContent.length ?? 0);
  }).observe(document.querySelector("#log"), {subtree: true, childList: true, characterData: true});
})()"""


# Whether the charts ever showed that something runs, and the highest speed they showed.
WITNESS = """
window.saw = {running: false, described: false, rate: 0};
new MutationObserver(() => {
  const load = document.querySelectorAll("#figures figure")[3];
  saw.running ||= Number(load?.querySelector("strong").textContent) > 0;
  saw.described ||= /running: [1-9]/.test(load?.querySelector("desc")?.textContent);
  saw.rate = Math.max(saw.rate, Number(document.querySelector("#figures strong").textContent.replaceAll(",", "")) || 0);
}).observe(document.querySelector("#figures"), {subtree: true, childList: true, characterData: true});
"""


# The lowest contrast of a text with the first opaque background behind it (WCAG 2.2, 1.4.3), and what text that is.
CONTRAST = """(() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  let lowest = [99, ""], count = 0;
  const judge = (element, colour, text) => {
    const [a, b] = [light(parse(colour)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    count += 1;
    if (ratio < lowest[0]) lowest = [ratio, text];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement, style = getComputedStyle(element);
    const isUnseen = !element.checkVisibility() || element.closest("title, desc, option, .hidden-label");
    if (!node.data.trim() || isUnseen) continue;
    judge(element, element.namespaceURI.endsWith("svg") ? style.fill : style.color, node.data);
  }
  const field = document.querySelector("#message");
  judge(field, getComputedStyle(field, "::placeholder").color, "placeholder");
  return [...lowest, count];
})()"""


# The first answer about the model is withheld until letThrough() is called.
FIRST_ANSWER_LATE = """(() => {
  const plain = window.fetch;
  let held = null;
  window.letThrough = async () => {
    held.release();
    await held.answer;
    await new Promise((resolve) => setTimeout(resolve, 200));
  };
  window.fetch = async (path, options) => {
    const answer = plain(path, options);
    if (path === "v1/models" && held === null) {
      held = {answer};
      await new Promise((resolve) => { held.release = resolve; });
    }
    return answer;
  };
})()"""
