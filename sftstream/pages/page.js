"use strict";
// The theme of every page: that of the system, until a reader chooses one.
(() => {
  const root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  window.switchTheme = () => { root.dataset.theme = dark() ? "light" : "dark"; };
  const button = document.getElementById("theme");
  if (button) button.addEventListener("click", window.switchTheme);
})();
