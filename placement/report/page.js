"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const E = data.experts, L = data.layers.length, R = data.ranks;
const state = { layer: 0, expert: -1, pairs: null };
const byId = id => document.getElementById(id);
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"];
const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
const NAMES = { linear: "linear", load: "load only", plan: "this plan" };
const percent = (x, digits = 1) => (100 * x).toFixed(digits) + "%";
const whole = x => x.toLocaleString("en");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* Colours. */
function between(stops, t) {
  const x = Math.max(0, Math.min(1, t)) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
  return stops[i].map((v, k) => v + (stops[i + 1][k] - v) * (x - i));
}
const rgb = c => `rgb(${c.map(Math.round).join(",")})`;
const firstRank = (layer, expert) => data.ranksOf[layer][expert][0];
const rankNames = (layer, expert) => { const ranks = data.ranksOf[layer][expert]; return `rank${ranks.length > 1 ? "s" : ""} ${ranks.join(", ")}`; };
const together = (layer, a, b) => data.ranksOf[layer][a].some(rank => data.ranksOf[layer][b].includes(rank));
const rankColour = rank => R <= PALETTE.length ? PALETTE[rank] : rgb(between(CIVIDIS, rank / (R - 1)));
function liftStops() {  // purple below chance, orange above, the page's own tone at chance
  const mid = css("--mid").split(",").map(Number);
  if (document.documentElement.dataset.theme === "dark") return [[186, 160, 245], [104, 88, 158], mid, [176, 104, 26], [255, 178, 84]];
  return [[84, 39, 136], [153, 142, 195], mid, [241, 163, 64], [179, 88, 6]];
}
const loadStops = () => document.documentElement.dataset.theme === "dark" ? CIVIDIS : [...CIVIDIS].reverse();

/* Hover values: any element with data-tip, and canvases that say what is under the pointer. */
const tip = byId("tip");
function showTip(text, event) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18) + "px";
}
for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, event => {
  const target = event.target.closest?.("[data-tip], canvas");
  if (!target) return showTip("", event);
  showTip(target.dataset.tip ?? target.tipAt?.(event.offsetX / target.clientWidth, event.offsetY / target.clientHeight) ?? "", event);
});

/* Pairs: counts above the diagonal, deflated. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint32Array(await new Response(stream).arrayBuffer());
}
function pairCount(layer, a, b) {
  if (a === b) return 0;
  const [i, j] = a < b ? [a, b] : [b, a];
  return state.pairs[layer * (E * (E - 1) / 2) + i * E - i * (i + 1) / 2 + j - i - 1];
}
const chanceScale = [];
function lift(layer, a, b) {
  const load = data.load[layer];
  if (chanceScale[layer] === undefined) {
    const n = E * (E - 1) / 2, sum = load.reduce((x, y) => x + y, 0), squares = load.reduce((x, y) => x + y * y, 0);
    let pairs = 0;
    for (let k = layer * n; k < (layer + 1) * n; k++) pairs += state.pairs[k];
    chanceScale[layer] = 2 * pairs / Math.max(sum * sum - squares, 1);
  }
  const chance = load[a] * load[b] * chanceScale[layer];
  return chance > 0 ? pairCount(layer, a, b) / chance : NaN;
}
function partners(layer, expert, n) {
  const others = [...Array(E).keys()].filter(other => other !== expert && pairCount(layer, expert, other) > 0);
  return others.sort((a, b) => pairCount(layer, expert, b) - pairCount(layer, expert, a) || a - b).slice(0, n);
}

/* Heatmaps. */
function drawPairs(canvas, order, perRank) {
  const n = order.length, side = Math.max(n, Math.round(480 / n) * n), cell = side / n, layer = state.layer;
  canvas.width = canvas.height = side;
  canvas.style.aspectRatio = "1";
  const ctx = canvas.getContext("2d"), stops = liftStops();
  ctx.fillStyle = css("--card");
  ctx.fillRect(0, 0, side, side);
  for (let y = 0; y < n; y++) for (let x = 0; x < n; x++) {
    const a = order[y], b = order[x];
    if (a < 0 || b < 0 || a === b) continue;
    const times = lift(layer, a, b);
    if (Number.isNaN(times)) continue;
    ctx.fillStyle = rgb(between(stops, (Math.max(-2, Math.min(2, Math.log2(times || 0.01))) + 2) / 4));
    ctx.fillRect(x * cell, y * cell, cell, cell);
  }
  ctx.strokeStyle = css("--text");
  ctx.lineWidth = Math.max(1, side / 480);
  ctx.globalAlpha = n / perRank > 16 ? 0.35 : 0.9;
  for (let k = perRank; k < n; k += perRank) {
    ctx.beginPath(); ctx.moveTo(k * cell, 0); ctx.lineTo(k * cell, side); ctx.moveTo(0, k * cell); ctx.lineTo(side, k * cell); ctx.stroke();
  }
  ctx.globalAlpha = 1;
  order.forEach((expert, k) => {
    if (expert !== state.expert) return;
    ctx.strokeStyle = css("--mark"); ctx.lineWidth = Math.max(2, side / 240);
    ctx.strokeRect(k * cell, 0, cell, side); ctx.strokeRect(0, k * cell, side, cell);
  });
  canvas.tipAt = (fx, fy) => {
    const a = order[Math.min(n - 1, Math.floor(fy * n))], b = order[Math.min(n - 1, Math.floor(fx * n))];
    if (a < 0 || b < 0) return "empty slot";
    if (a === b) return `expert ${a}: ${whole(data.load[layer][a])} tokens`;
    const count = pairCount(layer, a, b);
    return `experts ${a} and ${b}\n${whole(count)} tokens (${percent(count / data.tokens, 2)})${Number.isNaN(lift(layer, a, b)) ? "" : `, ${lift(layer, a, b).toFixed(2)} times chance`}`;
  };
}
function drawLoads() {
  const canvas = byId("loads"), row = Math.max(4, Math.min(22, Math.round(360 / L))), cell = Math.max(2, Math.round(1080 / E));
  canvas.width = E * cell; canvas.height = L * row;
  canvas.style.aspectRatio = `${E * cell} / ${L * row}`;
  const ctx = canvas.getContext("2d"), stops = loadStops();
  for (let layer = 0; layer < L; layer++) {
    const mean = data.load[layer].reduce((a, b) => a + b, 0) / E || 1;
    for (let expert = 0; expert < E; expert++) {
      ctx.fillStyle = rgb(between(stops, data.load[layer][expert] / mean / 3));
      ctx.fillRect(expert * cell, layer * row, cell, row);
    }
  }
  ctx.strokeStyle = css("--bad"); ctx.lineWidth = 2;
  ctx.strokeRect(1, state.layer * row + 1, E * cell - 2, row - 2);
  if (state.expert >= 0) ctx.strokeRect(state.expert * cell, 1, cell, L * row - 2);
  const at = (fx, fy) => [Math.min(L - 1, Math.floor(fy * L)), Math.min(E - 1, Math.floor(fx * E))];
  canvas.tipAt = (fx, fy) => {
    const [layer, expert] = at(fx, fy), mean = data.load[layer].reduce((a, b) => a + b, 0) / E || 1, load = data.load[layer][expert];
    return `layer ${data.layers[layer]}, expert ${expert}\n${whole(load)} tokens (${percent(load / data.tokens)}), ${(load / mean).toFixed(2)} times the mean`;
  };
  canvas.onclick = event => {
    const [layer, expert] = at(event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight);
    find(expert); choose(layer);
  };
}

/* Charts. */
const svgHead = (w, h, label) => `<svg viewBox="0 0 ${w} ${h}" role="img" aria-label="${label}">`;
const escape = text => String(text).replace(/[&<>"]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" }[c]));
function ticks(top) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5].find(s => top / s <= 5) ?? top;
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, k) => k * step);
}
function legend(names) {
  return `<div class="key">${names.map(name => `<span><i style="background:var(--${name})"></i>${NAMES[name]}</span>`).join("")}</div>`;
}
function asTable(series, labels, axis, show) {  // what only the pointer would reach
  const names = Object.keys(series), rows = labels.map((label, k) => `<tr><th>${label}</th>${names.map(name => `<td>${show(series[name][k], true)}</td>`).join("")}</tr>`);
  return `<details><summary>As a table</summary><div class="tall"><table><thead><tr><th>${axis}</th>${names.map(name => `<th>${NAMES[name] ?? name}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table></div></details>`;
}
function put(id, html) {  // a table that is open stays open
  const box = byId(id), open = box.querySelector("details")?.open;
  box.innerHTML = html;
  if (open) box.querySelector("details").open = true;
}
function bars(series, labels, axis, unit, show, marked = true) {  // series: {name: values}; marked: a line at each one's maximum
  const names = Object.keys(series), w = 520, h = 190, left = 46, bottom = 34;
  const top = Math.max(...names.flatMap(name => series[name])) * 1.06 || 1;
  const x = k => left + (w - left) * k / labels.length, y = v => (h - bottom) * (1 - v / top);
  const wide = (w - left) / labels.length * 0.8 / names.length;
  let out = svgHead(w, h, `${unit} by ${axis}`);
  for (const t of ticks(top)) out += `<line class="axis" x1="${left}" x2="${w}" y1="${y(t)}" y2="${y(t)}"/><text x="${left - 6}" y="${y(t) + 4}" text-anchor="end">${show(t)}</text>`;
  const every = Math.ceil(labels.length / 16);
  labels.forEach((label, k) => {
    names.forEach((name, i) => {
      const v = series[name][k];
      out += `<rect x="${x(k) + wide * (0.12 * names.length + i)}" y="${y(v)}" width="${Math.max(wide - 0.6, 0.5)}" height="${Math.max(h - bottom - y(v), 0)}" fill="var(--${name})" data-tip="${axis} ${label}, ${NAMES[name]}: ${show(v, true)}"/>`;
    });
    if (k % every === 0) out += `<text x="${(x(k) + x(k + 1)) / 2}" y="${h - bottom + 14}" text-anchor="middle">${label}</text>`;
  });
  if (marked) names.forEach(name => { const m = Math.max(...series[name]); out += `<line x1="${left}" x2="${w}" y1="${y(m)}" y2="${y(m)}" stroke="var(--${name})" stroke-dasharray="4 3" pointer-events="none"/>`; });
  out += `<text x="${(w + left) / 2}" y="${h - 3}" text-anchor="middle">${axis}</text>`;
  out += `<text transform="translate(9 ${(h - bottom) / 2}) rotate(-90)" text-anchor="middle">${unit}</text></svg>`;
  return out + legend(names) + asTable(series, labels, axis, show);
}
function drawStrip() {
  const names = Object.keys(data.maps), w = 1100, h = 210, left = 52, bottom = 36;
  const series = Object.fromEntries(names.map(name => [name, data.maps[name].ingress.map(row => Math.max(...row))]));
  const all = names.flatMap(name => series[name]), low = Math.max(0, Math.min(...all) - 0.15 * (Math.max(...all) - Math.min(...all)) - 0.01);
  const top = Math.max(...all) + 0.02, x = k => left + (w - left - 10) * (k + 0.5) / L, y = v => (h - bottom) * (1 - (v - low) / (top - low));
  let out = svgHead(w, h, "busiest ingress by layer");
  const step = ticks(top - low)[1];
  for (let t = Math.ceil(low / step) * step; t <= top; t += step) out += `<line class="axis" x1="${left}" x2="${w}" y1="${y(t)}" y2="${y(t)}"/><text x="${left - 6}" y="${y(t) + 4}" text-anchor="end">${percent(t, 0)}</text>`;
  out += `<rect x="${x(state.layer) - (w - left) / L / 2}" y="0" width="${(w - left - 10) / L}" height="${h - bottom}" fill="var(--wash)"/>`;
  for (const name of names) {
    if (L > 1) out += `<polyline points="${series[name].map((v, k) => `${x(k)},${y(v)}`).join(" ")}" fill="none" stroke="var(--${name})" stroke-width="2"/>`;
    series[name].forEach((v, k) => { out += `<circle cx="${x(k)}" cy="${y(v)}" r="${L > 60 ? 2.5 : 4}" fill="var(--${name})"/>`; });
  }
  const every = Math.ceil(L / 30);
  data.layers.forEach((id, k) => {
    if (k % every === 0) out += `<text x="${x(k)}" y="${h - bottom + 15}" text-anchor="middle">${id}</text>`;
    const lines = names.map(name => `${NAMES[name]}: ${percent(series[name][k])}`).join("\n");
    out += `<rect data-layer="${k}" x="${x(k) - (w - left - 10) / L / 2}" y="0" width="${(w - left - 10) / L}" height="${h - bottom}" fill="transparent" style="cursor:pointer" data-tip="layer ${id}\n${lines}"/>`;
  });
  out += `<text x="${(w + left) / 2}" y="${h - 3}" text-anchor="middle">MoE layer</text><text transform="translate(10 ${(h - bottom) / 2}) rotate(-90)" text-anchor="middle">share of all tokens</text></svg>`;
  put("strip", out + legend(names) + asTable(series, data.layers, "MoE layer", v => percent(v)));
  byId("strip").onclick = event => { const at = event.target.dataset?.layer; if (at !== undefined) choose(Number(at)); };
}
function drawCurve() {
  const c = data.curve, box = byId("curve");
  if (!c || !box) return;
  const w = 520, h = 250, left = 62, bottom = 40, logs = c.tokens.map(Math.log2);
  const lo = Math.min(...logs) - 0.2, hi = Math.max(...logs) + 0.2;
  const low = Math.min(...c.value, c.final * 0.98) , top = Math.max(...c.value, c.final * 1.03), pad = (top - low) * 0.08;
  const x = v => left + (w - left) * (v - lo) / (hi - lo || 1), y = v => (h - bottom) * (1 - (v - low + pad) / (top - low + 2 * pad));
  let out = svgHead(w, h, "held-out busiest ingress by tokens planned with");
  for (let k = 0; k <= 4; k++) { const t = low + (top - low) * k / 4; out += `<line class="axis" x1="${left}" x2="${w}" y1="${y(t)}" y2="${y(t)}"/><text x="${left - 6}" y="${y(t) + 4}" text-anchor="end">${percent(t)}</text>`; }
  out += `<rect x="${left}" width="${w - left}" y="${y(c.final * 1.01)}" height="${y(c.final * 0.99) - y(c.final * 1.01)}" fill="var(--plan)" opacity="0.15"/>`;
  if (c.enough) out += `<line x1="${x(Math.log2(c.enough))}" x2="${x(Math.log2(c.enough))}" y1="0" y2="${h - bottom}" stroke="var(--good)" stroke-width="2" stroke-dasharray="5 3"/><text class="strong" x="${x(Math.log2(c.enough)) + 5}" y="12">enough: ${whole(c.enough)}</text>`;
  const last = c.tokens.length - 1, most = Math.max(...c.tokens);
  for (const draw of new Set(c.draw)) {
    const of = c.tokens.map((_, k) => k).filter(k => c.draw[k] === draw || c.tokens[k] === most);
    out += `<polyline points="${of.map(k => `${x(logs[k])},${y(c.value[k])}`).join(" ")}" fill="none" stroke="var(--plan)" stroke-width="1.5" opacity="0.6"/>`;
  }
  c.tokens.forEach((n, k) => { out += `<circle cx="${x(logs[k])}" cy="${y(c.value[k])}" r="5" fill="var(--plan)" data-tip="${whole(n)} tokens: ${percent(c.value[k], 2)}\n${(100 * (c.value[k] / c.final - 1)).toFixed(2)}% above all tokens"/>`; });
  const ends = [...new Set(c.tokens)].sort((a, b) => a - b);
  let drawn = -99;
  for (const n of ends) { const at = x(Math.log2(n)); if (at - drawn < 56) continue; drawn = at; out += `<text x="${at}" y="${h - bottom + 15}" text-anchor="middle">${whole(n)}</text>`; }
  out += `<text x="${(w + left) / 2}" y="${h - 4}" text-anchor="middle">tokens planned with (each counts in every layer)</text><text transform="translate(9 ${(h - bottom) / 2}) rotate(-90)" text-anchor="middle">busiest ingress, share of tokens</text></svg>`;
  put("curve", out + asTable({ "busiest ingress": c.value }, c.tokens.map(whole), "tokens planned with", v => percent(v, 2)));
}
function drawTransfer() {
  const t = data.transfer;
  if (!t) return;
  byId("transfer-figure").hidden = false;
  const n = t.columns.length;
  let out = `<thead><tr><th>planned on</th>${t.columns.map(c => `<th>${escape(c)}</th>`).join("")}</tr></thead><tbody>`;
  t.rows.forEach((row, i) => {
    out += `<tr${row === "this plan" ? ' class="chosen"' : ""}><td>${escape(row)}</td>`;
    t.columns.forEach((column, j) => {
      const regret = t.regret[i * n + j], depth = Math.max(0, Math.min(0.55, regret * 1.6));
      out += `<td style="background:rgb(230 159 0 / ${depth})" data-tip="planned on ${escape(row)}, measured on ${escape(column)}: ${percent(t.value[i * n + j])} of tokens at the busiest rank, ${regret >= 0 ? "+" : ""}${percent(regret)} against its own plan">${t.value[i * n + j].toFixed(3)}</td>`;
    });
    out += "</tr>";
  });
  byId("transfer").innerHTML = out + "</tbody>";
}
function drawGraph() {
  const layer = state.layer, w = 520, h = 420, pad = 22, place = data.places[layer].map(([a, b]) => [pad + (w - 2 * pad) * a / 1000, pad + (h - 2 * pad) * b / 1000]);
  const load = data.load[layer], most = Math.max(...load, 1), edges = new Map();
  for (let a = 0; a < E; a++) for (const b of partners(layer, a, 3)) edges.set(Math.min(a, b) * E + Math.max(a, b), pairCount(layer, a, b));
  const strongest = Math.max(...edges.values(), 1), big = E <= 64 ? 1 : E <= 128 ? 0.75 : 0.55;
  let out = "";
  const sorted = [...edges].map(([key, count]) => [Math.floor(key / E), key % E, count]).sort((p, q) => together(layer, p[0], p[1]) - together(layer, q[0], q[1]));
  for (const [a, b, count] of sorted) {
    const same = together(layer, a, b), mine = a === state.expert || b === state.expert;
    out += `<line x1="${place[a][0]}" y1="${place[a][1]}" x2="${place[b][0]}" y2="${place[b][1]}" stroke="var(--${mine ? "mark" : same ? "text" : "line"})" stroke-width="${(0.5 + 3 * count / strongest).toFixed(2)}" opacity="${same || mine ? 0.85 : 0.9}" data-tip="experts ${a} and ${b}: ${whole(count)} tokens, ${lift(layer, a, b).toFixed(2)} times chance\n${same ? "on one rank" : `${rankNames(layer, a)} and ${rankNames(layer, b)}`}"/>`;
  }
  for (let e = 0; e < E; e++) {
    const r = big * (4 + 8 * Math.sqrt(load[e] / most)), found = e === state.expert;
    out += `<circle class="node" cx="${place[e][0]}" cy="${place[e][1]}" r="${r + (found ? 3 : 0)}" fill="${rankColour(firstRank(layer, e))}" stroke="var(--${found ? "bad" : "card"})" stroke-width="${found ? 3 : 1}" style="cursor:pointer" data-expert="${e}" data-tip="expert ${e}, ${rankNames(layer, e)}\n${whole(load[e])} tokens (${percent(load[e] / data.tokens)})\nwith ${partners(layer, e, 3).map(o => `${o} (${lift(layer, e, o).toFixed(1)}x)`).join(", ") || "nobody"}"/>`;
    if (E <= 64) out += `<text x="${place[e][0]}" y="${place[e][1] - r - 2}" text-anchor="middle" font-size="9" pointer-events="none">${e}</text>`;
  }
  byId("graph").innerHTML = out;
  byId("graph").onclick = event => { const e = event.target.dataset?.expert; if (e !== undefined) find(Number(e)); };
  byId("rank-key").innerHTML = R <= 16 ? [...Array(R).keys()].map(r => `<span><i style="background:${rankColour(r)}"></i>rank ${r}</span>`).join("") : `<span>rank 0</span><span class="ramp" style="background:linear-gradient(90deg,${CIVIDIS.map(rgb)})"></span><span>rank ${R - 1}</span>`;
}
function drawFlows() {
  const layer = state.layer, flows = data.flows[layer], svg = byId("flows"), w = 520, h = 250;
  if (!flows) { svg.innerHTML = `<text x="${w / 2}" y="${h / 2}" text-anchor="middle">${L > 1 ? "the last MoE layer" : "one MoE layer only"}</text>`; byId("flow-note").textContent = ""; return; }
  const order = data.slots[layer].filter(e => e >= 0).filter((e, k, all) => all.indexOf(e) === k);
  const next = data.slots[layer + 1].filter(e => e >= 0).filter((e, k, all) => all.indexOf(e) === k);
  const x0 = {}, x1 = {};
  order.forEach((e, k) => { x0[e] = 8 + (w - 16) * (k + 0.5) / E; });
  next.forEach((e, k) => { x1[e] = 8 + (w - 16) * (k + 0.5) / E; });
  const all = [];
  flows.forEach((row, e) => { for (let k = 0; k < row.length; k += 2) if (row[k + 1]) all.push([e, row[k], row[k + 1]]); });
  const wanted = state.expert >= 0 ? all.filter(([e, f]) => e === state.expert || f === state.expert) : all;
  const shown = [...wanted].sort((a, b) => b[2] - a[2]).slice(0, 160).reverse();
  const most = Math.max(...all.map(f => f[2]), 1);
  let out = `<text x="0" y="10">layer ${data.layers[layer]}</text><text x="0" y="${h - 2}">layer ${data.layers[layer + 1]}</text>`;
  for (const [e, f, n] of shown) {
    const chance = Math.max(data.load[layer + 1][f], 1) / data.tokens;
    out += `<path d="M${x0[e]} 28C${x0[e]} 125 ${x1[f]} 125 ${x1[f]} ${h - 28}" fill="none" stroke="${rankColour(firstRank(layer, e))}" stroke-width="${(0.4 + 4.5 * n / most).toFixed(2)}" opacity="0.6" data-tip="expert ${e} to expert ${f} of the next layer\n${whole(n)} tokens, ${percent(n / Math.max(data.load[layer][e], 1))} of expert ${e}'s, ${(n / Math.max(data.load[layer][e], 1) / chance).toFixed(1)} times chance"/>`;
  }
  const dot = Math.min(5, (w - 16) / E / 2);
  for (let e = 0; e < E; e++) out += `<rect x="${x0[e] - dot}" y="18" width="${2 * dot}" height="9" fill="${rankColour(firstRank(layer, e))}" data-tip="layer ${data.layers[layer]}, expert ${e}, ${rankNames(layer, e)}"/><rect x="${x1[e] - dot}" y="${h - 28}" width="${2 * dot}" height="9" fill="${rankColour(firstRank(layer + 1, e))}" data-tip="layer ${data.layers[layer + 1]}, expert ${e}, ${rankNames(layer + 1, e)}"/>`;
  svg.innerHTML = out;
  const which = shown.length < wanted.length ? `The ${shown.length} widest of ${wanted.length} flows to experts' commonest successors` : "Commonest successors of each expert";
  byId("flow-note").textContent = `${which}, experts by the plan's ranks (colours). This layer's experts tell ${data.affinity[layer].toFixed(2)} bits about the next layer's, of which ${data.affinityByChance[layer].toFixed(2)} would be there by chance.`;
}

/* Experts: table, search. */
const ROLES = { c: "collaborative", s: "specialized", n: "none" };
function drawExperts() {
  const layer = state.layer, load = data.load[layer], mean = load.reduce((a, b) => a + b, 0) / E || 1;
  const sum = load.reduce((a, b) => a + b, 0);
  byId("experts").tBodies[0].innerHTML = load.map((n, e) => {
    const over = n / mean, heat = n === 0 ? "dead" : over >= 2 ? "hot" : over < 0.5 ? "cold" : "usual";
    const cells = [e, data.ranksOf[layer][e].join(", "), whole(n), percent(n / data.tokens), over.toFixed(2), heat, data.collaborators[layer][e].toFixed(1), percent(data.topShare[layer][e]),
      data.bits[layer][e].toFixed(3), ROLES[data.role[layer][e]], data.community[layer][e], partners(layer, e, 3).map(o => `${o} (${lift(layer, e, o).toFixed(1)}x)`).join(", ")];
    return `<tr data-expert="${e}"${e === state.expert ? ' class="found"' : ""}>${cells.map((c, k) => `<td${[5, 9, 11].includes(k) ? ' class="text"' : ""}>${c}</td>`).join("")}</tr>`;
  }).join("");
  const active = byId("experts").querySelector("[aria-sort]");
  if (active) sortBy(active, active.getAttribute("aria-sort"));
  const row = byId("experts").querySelector("tr.found"), table = byId("experts").closest(".tall");
  if (row && table) table.scrollTop = row.offsetTop - table.clientHeight / 2;  // the page itself stays where it is
  const found = byId("found"), e = state.expert;
  if (e < 0) { found.innerHTML = ""; return; }
  const byDomain = data.domainLoad.length ? data.domains.map((name, d) => [name, data.domainLoad[d][layer][e] / Math.max(data.domainTokens[d], 1)]).filter((_, d) => data.domainTokens[d]).sort((a, b) => b[1] - a[1]) : [];
  const ranks = R > 1 ? ` on ${rankNames(layer, e)}` : "";
  found.innerHTML = `<strong>Expert ${e} of layer ${data.layers[layer]}</strong>${ranks}: picked by ${percent(load[e] / data.tokens)} of all tokens, ${(load[e] / mean).toFixed(2)} times the mean; number ${[...load].sort((a, b) => b - a).indexOf(load[e]) + 1} of ${E} by load. `
    + `Strongest partners: ${partners(layer, e, 6).map(o => `${o} (${lift(layer, e, o).toFixed(1)} times chance, ${together(layer, o, e) ? "same rank" : rankNames(layer, o)})`).join(", ") || "none"}. `
    + (byDomain.length ? `Picked by ${byDomain.map(([name, v]) => `${percent(v)} of ${escape(name)}`).join(", ")}.` : "");
}
function sortBy(th, direction) {
  const table = th.closest("table"), k = [...th.parentNode.children].indexOf(th), sign = direction === "ascending" ? 1 : -1;
  const key = row => { const text = row.cells[k].textContent.replace(/,(?=\d{3})/g, ""), n = parseFloat(text); return Number.isNaN(n) ? text : n; };
  const rows = [...table.tBodies[0].rows].sort((p, q) => { const a = key(p), b = key(q); return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))); });
  table.tBodies[0].append(...rows);
  for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", direction);
}
document.querySelectorAll(".sortable th").forEach(th => {
  th.tabIndex = 0;
  const sort = () => sortBy(th, th.getAttribute("aria-sort") === "descending" ? "ascending" : "descending");
  th.addEventListener("click", sort);
  th.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
byId("experts").tBodies[0].addEventListener("click", event => { const row = event.target.closest("tr"); if (row) find(Number(row.dataset.expert)); });
function find(expert) { state.expert = expert; byId("search").value = expert >= 0 ? expert : ""; drawLayer(); }
byId("search").addEventListener("input", event => {
  const text = event.target.value.trim(), n = Number(text);
  state.expert = text !== "" && Number.isInteger(n) && n >= 0 && n < E ? n : -1;
  event.target.setCustomValidity(text !== "" && state.expert < 0 ? `a number from 0 to ${E - 1}` : "");
  drawLayer();
});

/* All of one layer. */
function drawLayer() {
  document.querySelectorAll(".layer-name").forEach(node => { node.textContent = data.layers[state.layer]; });
  byId("layer-name").value = data.layers[state.layer];
  drawStrip(); drawLoads(); drawExperts();
  drawPairs(byId("before"), data.linear, data.linearSlots);
  drawPairs(byId("after"), data.slots[state.layer], data.slotsPerRank);
  drawGraph(); drawFlows();
  const names = Object.keys(data.maps), ranks = [...Array(R).keys()], of = key => Object.fromEntries(names.map(name => [name, data.maps[name][key][state.layer]]));
  put("ingress", bars(of("ingress"), ranks, "rank", "share of all tokens", (v, exact) => percent(v, exact ? 1 : 0)));
  put("rankload", bars(of("load"), ranks, "rank", "load over the mean", v => v.toFixed(2)));
  const fans = Object.fromEntries(names.map(name => { const row = data.maps[name].fanCounts[state.layer], sum = row.reduce((a, b) => a + b, 0) || 1; return [name, row.slice(1).map(n => n / sum)]; }));
  put("fan", bars(fans, data.maps.plan.fanCounts[0].slice(1).map((_, k) => k + 1), "ranks", "share of tokens", (v, exact) => percent(v, exact ? 1 : 0), false));
}
function choose(layer) { state.layer = layer; byId("layer").value = layer; drawLayer(); }
byId("layer").addEventListener("input", event => { state.layer = Number(event.target.value); drawLayer(); });

/* Light and dark. */
function paint(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  document.querySelectorAll("[data-ramp]").forEach(node => { node.style.background = `linear-gradient(90deg, ${(node.dataset.ramp === "lift" ? liftStops() : loadStops()).map(rgb)})`; });
  if (state.pairs) drawLayer();
}
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
byId("theme").addEventListener("click", () => paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
prefersDark.addEventListener("change", event => paint(event.matches ? "dark" : "light"));
paint(prefersDark.matches ? "dark" : "light");
unpack(data.pairs).then(pairs => { state.pairs = pairs; drawLayer(); drawCurve(); drawTransfer(); document.body.dataset.ready = "yes"; });
