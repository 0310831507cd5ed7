// The chosen theme, before anything is painted; `main.js` has the switch. The system's theme needs nothing.
try {
  document.documentElement.dataset.theme = localStorage.getItem("megalith.theme") ?? "";
} catch {
  // A browser that keeps nothing has the system's theme.
}
