// The credit view: answers with every token coloured by what it was paid.
"use strict";
const MEASURES = {
  reward: { title: "process reward", has: (r) => r.process_reward },
  returns: { title: "suffix return", has: (r) => r.process_reward },
  advantage: { title: "advantage", has: (r) => r.advantage },
  ratio: { title: "PRM log-ratio (nats)", has: (r, group) => r.process_reward && group.unit !== null },
};
const OUTCOMES = { correct: "✓ right", wrong: "✗ wrong", partial: "◐ partly right", unknown: "? no verdict" };
const PAGE = 8;
const credit = { run: 0, iteration: 0, measure: "reward", pages: 1, scale: 1 };

function suffixSums(values) {
  const sums = new Array(values.length);
  let sum = 0;
  for (let i = values.length - 1; i >= 0; i--) sums[i] = sum += values[i] ?? 0;
  return sums;
}

function valuesOf(measure, response, group) {
  if (!MEASURES[measure].has(response, group)) return null;
  if (measure === "reward") return response.process_reward;
  if (measure === "advantage") return response.advantage;
  if (measure === "ratio") return response.process_reward.map((x) => (x === null ? null : x * group.unit));
  return suffixSums(response.process_reward);
}

const iterations = () => [...new Set(DATA.credit[credit.run].groups.map((g) => g.iteration))];
const groupsNow = () => {
  const iteration = iterations()[credit.iteration];
  return DATA.credit[credit.run].groups.filter((g) => g.iteration === iteration);
};

// The 98th percentile of the sizes in view, so that one outlier does not bleach the rest.
function scaleOf(groups, measure) {
  const sizes = groups
    .flatMap((g) => g.responses.flatMap((r) => valuesOf(measure, r, g) ?? []))
    .filter((x) => x !== null).map(Math.abs).sort((a, b) => a - b);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 0;
}

function wanted(response, group) {
  const outcome = byId("outcome").value;
  const most = byId("longest").value === "" ? Infinity : Number(byId("longest").value);
  if (response.length < Number(byId("shortest").value) || response.length > most) return false;
  if (outcome === "cut") return response.finish === "length";
  if (outcome === "mixed") return ["correct", "wrong"].every((v) => group.responses.some((r) => r.verdict === v));
  return outcome === "all" || response.verdict === outcome;
}

function tokenElement(text, i, value, steps) {
  const made = element("span", { className: "token", textContent: visible(text), tabIndex: i ? -1 : 0 });
  made.setAttribute("role", "option");
  made.setAttribute("aria-label", `token ${i + 1}: ${visible(text)}`);
  made.dataset.i = i;
  if (/^<.+>$/.test(text)) made.classList.add("special");
  const size = credit.scale ? Math.min(1, Math.abs(value ?? 0) / credit.scale) : 0;
  if (size > 0) made.classList.add(value > 0 ? "positive" : "negative");
  made.style.setProperty("--size", size.toFixed(3));
  const wrong = steps.find(([start, stop, right]) => !right && start <= i && i < stop);
  if (wrong) made.classList.add("bad", ...(wrong[0] === i ? ["first"] : []));
  return made;
}

const shownResponses = new WeakMap();
function responseElement(response, group, times) {
  const values = valuesOf(credit.measure, response, group);
  const tokens = element("div", { className: "tokens" });
  tokens.setAttribute("role", "listbox");
  tokens.setAttribute("aria-orientation", "horizontal");
  tokens.setAttribute("aria-label", `${OUTCOMES[response.verdict].slice(2)} answer of ${response.length} tokens; arrow keys move`);
  tokens.append(...response.tokens.map((text, i) => tokenElement(text, i, values?.[i], response.steps)));
  shownResponses.set(tokens, { response, group });
  const sum = response.process_reward?.reduce((a, b) => a + (b ?? 0), 0);
  const facts = [`${response.length} tokens`];
  if (times > 1) facts.unshift(`${times} times`);
  if (response.verdict === "partial") facts.unshift(`score ${number(response.score)}`);
  if (sum !== undefined) facts.push(`process return ${signed(sum)}`);
  if (response.finish === "length") facts.push("truncated");
  if (response.tokens.length < response.length) facts.push(`first ${response.tokens.length} tokens shown`);
  return element("div", { className: "response" }, element("p", { textContent: facts.join(" · ") }), tokens);
}

function side(title, responses, group) {
  const made = element("div", {}, element("h4", { textContent: title }));
  const same = Map.groupBy(responses, (r) => JSON.stringify([r.tokens, r.verdict, r.finish]));
  made.append(...[...same.values()].map((equal) => responseElement(equal[0], group, equal.length)));
  return made;
}

function groupElement(group, responses) {
  const right = group.responses.filter((r) => r.verdict === "correct").length;
  const facts = [`prompt ${visible(String(group.draw))}`, visible(group.source)];
  if (group.answer) facts.push(`answer ${visible(group.answer.slice(0, 300))}`);
  facts.push(`${right} of ${group.responses.length} right`);
  const sides = element("div", { className: "sides" });
  for (const [verdicts, title] of [[["correct"], "✓ right"], [["wrong", "partial", "unknown"], "✗ not right"]]) {
    const found = responses.filter((r) => verdicts.includes(r.verdict));
    const same = new Set(found.map((r) => r.verdict)).size === 1;
    sides.append(found.length ? side(same ? OUTCOMES[found[0].verdict] : title, found, group) : side(`${title}: none`, [], group));
  }
  const heading = element("h3", { textContent: facts.filter(Boolean).join(" · ") });
  const prompt = element("div", { className: "prompt", textContent: visible(group.prompt), tabIndex: -1 });
  return element("article", { className: "group" }, heading, prompt, sides);
}

// Mean reward of the steps whose truth is known: does the PRM see the errors?
function stepsNote(groups) {
  const sums = { true: [0, 0], false: [0, 0] };
  for (const group of groups) {
    for (const response of group.responses) {
      const values = valuesOf(credit.measure, response, group);
      if (!values || credit.measure === "returns") continue;
      for (const [start, stop, right] of response.steps) {
        sums[right][0] += values.slice(start, stop).reduce((a, b) => a + (b ?? 0), 0);
        sums[right][1] += 1;
      }
    }
  }
  const known = groups.some((g) => g.responses.some((r) => r.steps.length));
  byId("steps-note").hidden = !known;
  if (!known) return;
  const title = MEASURES[credit.measure].title;
  const means = sums.true[1] && sums.false[1]
    ? ` Mean ${title} of a step in this iteration: right ${signed(sums.true[0] / sums.true[1])} (${sums.true[1]}), ` +
      `wrong ${signed(sums.false[0] / sums.false[1])} (${sums.false[1]}).` : "";
  byId("steps-note").textContent = `✘ and a double line mark a step that is truly wrong; no label of it is ever trained on.${means}`;
}

function drawCredit() {
  const all = groupsNow();
  credit.scale = scaleOf(all, credit.measure);
  const search = byId("search").value.toLowerCase();
  const found = all
    .filter((g) => g.prompt.toLowerCase().includes(search))
    .map((group) => ({ group, responses: group.responses.filter((r) => wanted(r, group)) }))
    .filter(({ responses }) => responses.length);
  const shown = found.slice(0, credit.pages * PAGE);
  byId("groups").replaceChildren(...shown.map(({ group, responses }) => groupElement(group, responses)));
  byId("more").hidden = shown.length === found.length;
  byId("more").textContent = `Show ${Math.min(PAGE, found.length - shown.length)} more prompts of ${found.length}`;
  const count = found.reduce((sum, { responses }) => sum + responses.length, 0);
  byId("shown").textContent = count
    ? `${count} answers to ${found.length} prompts` : "No answer of this iteration passes the filters.";
  byId("iteration-value").textContent = `${iterations()[credit.iteration]} of ${iterations().at(-1)}`;
  byId("iteration").setAttribute("aria-valuetext", `iteration ${iterations()[credit.iteration]}`);
  byId("scale-low").textContent = signed(-credit.scale);
  byId("scale-high").textContent = signed(credit.scale);
  byId("scale-name").textContent = credit.scale
    ? MEASURES[credit.measure].title : `${MEASURES[credit.measure].title}: 0 throughout this iteration`;
  stepsNote(all);
  hideTip();
}

// ---- values on hover and on focus

function hideTip() { byId("tip").hidden = true; }

function factsOf(token) {
  const { response, group } = shownResponses.get(token.parentElement);
  const i = Number(token.dataset.i);
  const rows = Object.keys(MEASURES).map((m) => [MEASURES[m].title, valuesOf(m, response, group)?.[i]])
    .filter(([, value]) => value !== undefined && value !== null).map(([title, value]) => [title, signed(value)]);
  const step = response.steps.find(([start, stop]) => start <= i && i < stop);
  if (step) rows.push(["this step is truly", step[2] ? "right" : "wrong"]);
  return { text: visible(response.tokens[i]), place: `token ${i + 1} of ${response.length}`, rows };
}

function showTip(token) {
  const { text, place, rows } = factsOf(token);
  const list = element("dl");
  for (const [title, value] of rows) list.append(element("dt", { textContent: title }), element("dd", { textContent: value }));
  const tip = byId("tip");
  tip.replaceChildren(element("b", { textContent: `“${text}”` }), ` ${place}`, list);
  token.setAttribute("aria-label", `${text}, ${place}, ${rows.map((row) => row.join(" ")).join(", ")}`);
  tip.hidden = false;
  const box = token.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 14 < innerHeight;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${scrollY + (below ? box.bottom + 8 : box.top - tip.offsetHeight - 8)}px`;
}

function moveFocus(event) {
  const token = event.target.closest(".token");
  if (event.key === "Escape") hideTip();
  if (!token) return;
  const all = token.parentElement.children;
  const i = Number(token.dataset.i);
  const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  token.tabIndex = -1;
  all[to].tabIndex = 0;
  all[to].focus();
}

function chooseRun(run) {
  credit.run = run;
  const last = iterations().length - 1;
  byId("iteration").max = last;
  const kept = iterations().indexOf(Number(memory.get("iteration") || NaN));
  credit.iteration = kept < 0 ? last : kept; // the last one follows a live run
  byId("iteration").value = credit.iteration;
  credit.pages = 1;
}

function startCredit() {
  byId("credit").hidden = false;
  byId("run-control").hidden = DATA.credit.length === 1;
  byId("run").append(...DATA.credit.map(({ run }, i) => element("option", { value: i, textContent: visible(DATA.runs[run].name) })));
  const every = DATA.credit.flatMap((c) => c.groups);
  const offered = Object.keys(MEASURES).filter((m) => every.some((g) => g.responses.some((r) => MEASURES[m].has(r, g))));
  credit.measure = offered.includes(memory.get("measure")) ? memory.get("measure") : offered[0] ?? "reward";
  choices(byId("measure"), "measure", offered.map((m) => [m, MEASURES[m].title]), credit.measure, (m) => {
    credit.measure = m;
    drawCredit();
  });
  byId("run").value = Number(memory.get("run")) < DATA.credit.length ? Number(memory.get("run")) : 0;
  chooseRun(Number(byId("run").value));
  byId("run").addEventListener("change", () => {
    memory.set("run", byId("run").value);
    chooseRun(Number(byId("run").value));
    drawCredit();
  });
  byId("iteration").addEventListener("input", () => {
    credit.iteration = Number(byId("iteration").value);
    credit.pages = 1;
    memory.set("iteration", credit.iteration === iterations().length - 1 ? "" : iterations()[credit.iteration]);
    drawCredit();
  });
  for (const id of ["outcome", "shortest", "longest", "search"]) {
    byId(id).value = memory.get(id) ?? byId(id).value;
    byId(id).addEventListener("input", () => { memory.set(id, byId(id).value); drawCredit(); });
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => { credit.pages += 1; drawCredit(); });
  const groups = byId("groups");
  groups.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token) showTip(token); else hideTip();
  });
  groups.addEventListener("pointerleave", hideTip);
  groups.addEventListener("focusin", (event) => { if (event.target.matches(".token")) showTip(event.target); });
  groups.addEventListener("focusout", hideTip);
  groups.addEventListener("keydown", moveFocus);
  drawCredit();
}
if (DATA.credit.length) startCredit();
