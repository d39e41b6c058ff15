// What both halves of the page use: the data, elements, text made visible, numbers, the theme, state kept over a reload.
// Text from runs reaches the page by textContent only.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Control characters, invisible ones, marks that turn the direction of writing, and halves of characters, by name.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\u{e0000}-\u{e007f}]/gu;
function visible(text) {
  return text.replace(UNSEEN, (c) => {
    const code = c.codePointAt(0);
    if (c === "\n") return "⏎\n";
    if (c === "\t") return "⇥\t";
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

function number(x, digits = 3) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-4 || Math.abs(x) >= 1e9)) return x.toExponential(digits - 1);
  return Number(x.toPrecision(Math.abs(x) >= 1000 ? 7 : digits)).toLocaleString("en-US", { maximumFractionDigits: 8 });
}
const signed = (x, digits = 3) => (x > 0 ? "+" : "") + number(x, digits).replaceAll("-", "−");

// State of this page that a reload keeps; a browser may forbid it to files.
const memory = {
  key: (key) => `prime ${location.pathname} ${key}`,
  get(key) { try { return sessionStorage.getItem(memory.key(key)); } catch { return null; } },
  set(key, value) { try { sessionStorage.setItem(memory.key(key), value); } catch { /* forgotten, then */ } },
};

function choices(fieldset, name, options, chosen, changed) {
  for (const [value, title] of options) {
    const input = element("input", { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => { memory.set(name, value); changed(value); });
    fieldset.append(element("label", {}, input, element("span", { textContent: title })));
  }
}

const root = document.documentElement;
function setTheme(theme) {
  root.dataset.theme = theme;
  const button = byId("theme");
  if (button) button.textContent = theme === "dark" ? "Light" : "Dark";
  document.dispatchEvent(new Event("theme"));
}
const system = matchMedia("(prefers-color-scheme: dark)");
const themeNow = () => memory.get("theme") || (system.matches ? "dark" : "light");
setTheme(themeNow());
system.addEventListener("change", () => setTheme(themeNow()));
byId("theme")?.addEventListener("click", () => {
  memory.set("theme", root.dataset.theme === "dark" ? "light" : "dark");
  setTheme(themeNow());
});
// A page is laid out for paper before it is printed, since plots take the width that they find.
addEventListener("beforeprint", () => { root.classList.add("paper"); setTheme("light"); });
addEventListener("afterprint", () => { root.classList.remove("paper"); setTheme(themeNow()); });

byId("notes").append(...DATA.notes.map((note) => element("li", { textContent: visible(note) })));
byId("notes").hidden = DATA.notes.length === 0;
