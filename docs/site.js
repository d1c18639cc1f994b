// What the theme adds to a page when it is shown, made fit for screen readers and keyboards.
const mend = () => {
  // The button of a block of code is in a <nav> without a name, which would be one more way through the page.
  document.querySelectorAll("nav.md-code__nav:not([role])").forEach(nav => nav.setAttribute("role", "none"));
  // A table that is wider than the page scrolls, so the keyboard must reach it.
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach(wrap => {
    if (wrap.scrollWidth > wrap.clientWidth) wrap.setAttribute("tabindex", "0");
  });
};
new MutationObserver(mend).observe(document.documentElement, { childList: true, subtree: true });
