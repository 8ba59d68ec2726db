// The theme binds the first of two buttons for each menu, and the header with that one is hidden.
addEventListener("DOMContentLoaded", () => {
  for (const menu of ["primary", "secondary"]) {
    const [bound, ...others] = document.querySelectorAll(`.${menu}-toggle`);
    others.forEach((button) => button.addEventListener("click", () => bound.click()));
  }
  // A link to a place on this page leads out of the menu that covers the page.
  document.querySelectorAll("dialog").forEach((dialog) => dialog.addEventListener("click", ({ target }) => {
    if (target.closest("a[href^='#']")) dialog.close();
  }));
});

// Escape closes a menu that was opened with the mouse, too: the theme takes the focus out of it.
addEventListener("keydown", ({ key }) => {
  const button = key === "Escape" && document.querySelector(".dropdown-toggle.show");
  if (!button) return;
  button.click();
  button.focus();
}, { capture: true });

// Code wider than its box can be scrolled with the keyboard, whatever the width of the window.
addEventListener("load", () => {
  const watcher = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }));
  document.querySelectorAll("article pre").forEach((pre) => watcher.observe(pre));
});
