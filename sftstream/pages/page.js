"use strict";
// The theme of every page: that of the system, until a reader chooses one for this window.
(() => {
  const root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const kept = (use) => { try { return use(sessionStorage); } catch { return null; } }; // a browser may keep nothing of a file
  const theme = kept((store) => store.getItem("theme"));
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  window.switchTheme = () => {
    root.dataset.theme = dark() ? "light" : "dark";
    kept((store) => store.setItem("theme", root.dataset.theme));
  };
  const button = document.getElementById("theme");
  if (button) button.addEventListener("click", window.switchTheme);
})();
