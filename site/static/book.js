// Code wider than its box can be scrolled with the keyboard, whatever the width of the window.
addEventListener("load", () => {
  const watcher = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }));
  document.querySelectorAll("article pre").forEach((pre) => watcher.observe(pre));
});
