"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

  // Lateness from none to the most: one hue, light to dark (dark to light on a dark page).
  const RAMP = {
    light: [[243, 242, 238], [253, 214, 165], [246, 158, 72], [217, 88, 24], [140, 28, 12]],
    dark: [[36, 38, 43], [92, 50, 22], [168, 78, 22], [236, 134, 45], [255, 217, 150]],
  };
  function heatColour(share) {
    const stops = RAMP[dark() ? "dark" : "light"];
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
  }

  function element(name, attributes = {}, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function html(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function legend(id, entries) {
    const box = document.getElementById(id);
    box.replaceChildren();
    for (const [name, fill, shape] of entries) {
      const entry = html("span");
      const swatch = html("i", shape || "");
      swatch.style.background = fill;
      entry.append(swatch, name);
      box.append(entry);
    }
  }
  function canvasOf(id, height) {
    const box = document.getElementById(id);
    box.replaceChildren();
    const width = Math.max(260, Math.floor(box.clientWidth));
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    box.append(svg);
    return { box, svg, width, height };
  }
  function empty(id, text) {
    const box = document.getElementById(id);
    box.replaceChildren(html("p", "empty", text));
  }
  function showTip(event, title, lines) {
    tip.replaceChildren(html("b", "", title), ...lines.map((line) => html("div", "", line)));
    tip.hidden = false;
    const gap = 14;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap;
    const top = event.clientY + gap + box.height > innerHeight ? event.clientY - gap - box.height : event.clientY + gap;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }
  const hideTip = () => { tip.hidden = true; };

  function ticks(low, high, wanted) {
    const span = high - low || 1;
    const raw = span / Math.max(1, wanted);
    const power = 10 ** Math.floor(Math.log10(raw));
    const unit = [1, 2, 2.5, 5, 10].find((one) => one * power >= raw) * power;
    const found = [];
    for (let value = Math.ceil(low / unit - 1e-9) * unit; value <= high + unit * 1e-6; value += unit) {
      found.push(Math.abs(value) < unit * 1e-6 ? 0 : value);
    }
    return found;
  }
  const wholeTicks = (low, high, wanted) => ticks(low, high, wanted).filter((value) => Number.isInteger(Math.round(value * 1e6) / 1e6));
  const plain = (value) => Number(value.toPrecision(3)).toString();
  const clock = (value) => {
    if (value === 0 || wallUnit(value) === "s") return value === 0 ? "0" : `${plain(value)} s`;
    const minutes = Math.round(value / 60);
    return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")}`;
  };
  const wallUnit = (value) => (value % 60 === 0 ? "min" : "s");
  function timeTicks(wall, wanted) {
    if (wall < 90) return ticks(0, wall, wanted);
    const minutes = [1, 2, 5, 10, 15, 30, 60, 120, 240, 480, 1440, 2880, 7200, 14400, 43200];
    const unit = 60 * (minutes.find((one) => (wall / 60 / one) <= wanted) || 43200);
    return Array.from({ length: Math.floor(wall / unit) + 1 }, (_, i) => i * unit);
  }
  function seconds(value) {
    if (value >= 100) return `${Math.floor(value / 60)} min ${String(Math.round(value % 60)).padStart(2, "0")} s`;
    return value >= 1 ? `${plain(value)} s` : `${plain(value * 1e3)} ms`;
  }
  const stepName = ([first, last]) => (first === last ? `step ${first}` : `steps ${first}–${last}`);
  const scale = (d0, d1, r0, r1) => (value) => r0 + ((value - d0) / (d1 - d0 || 1)) * (r1 - r0);

  function axes({ svg }, plot, x, y, xTicks, yTicks, yText) {
    for (const value of yTicks) {
      const at = Math.round(y(value)) + 0.5;
      svg.append(element("line", { x1: plot.left, x2: plot.right, y1: at, y2: at, stroke: colour("grid") }));
      svg.append(element("text", { x: plot.left - 8, y: at + 4, "text-anchor": "end" }, yText(value)));
    }
    svg.append(element("line", { x1: plot.left, x2: plot.right, y1: plot.bottom + 0.5, y2: plot.bottom + 0.5, stroke: colour("line") }));
    for (const value of xTicks) {
      svg.append(element("text", { x: x(value), y: plot.bottom + 17, "text-anchor": "middle" }, String(value)));
    }
    svg.append(element("text", { x: plot.right, y: plot.bottom + 33, "text-anchor": "end" }, "step"));
  }
  function restarts({ svg }, plot, x) {
    for (const step of data.restart_steps) {
      const at = x(step - 0.5);
      svg.append(element("line", { x1: at, x2: at, y1: plot.top, y2: plot.bottom, stroke: colour("bad"), "stroke-dasharray": "2 3", opacity: 0.8 }));
    }
  }

  // -- heat map ---------------------------------------------------------------------------------------------------
  function drawHeat() {
    const heat = data.heat;
    if (!heat.bins.length || heat.ranks.length < 2) {
      document.getElementById("heat-legend").replaceChildren();
      return empty("heat", heat.ranks.length === 1 ? "There is only one rank." : "No step was finished.");
    }
    const rows = heat.ranks.length;
    const rowHeight = Math.max(4, Math.min(26, Math.floor(620 / rows)));
    const top = 6;
    const who = (row) => (heat.last_ranks[row] === heat.ranks[row] ? `rank ${heat.ranks[row]}` : `ranks ${heat.ranks[row]}–${heat.last_ranks[row]}`);
    const names = heat.ranks.map((rank, i) => `${who(i)} · ${heat.hosts[i]}`);
    const longest = Math.max(...names.map((name) => name.length));
    const narrow = document.getElementById("heat").clientWidth < 640;
    const labelled = names.map((name, i) => (narrow ? who(i) : name.length > 26 ? name.slice(0, 25) + "…" : name));
    const left = narrow ? 60 : Math.min(190, 20 + Math.min(longest, 26) * 6.6);
    const view = canvasOf("heat", top + rows * rowHeight + 40);
    const barRoom = narrow ? 84 : 170;
    const plot = { left, right: view.width - barRoom, top, bottom: top + rows * rowHeight };
    const bins = heat.bins.length;
    const width = plot.right - plot.left;
    const canvas = html("canvas");
    const ratio = Math.max(1, devicePixelRatio || 1);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(rows * rowHeight * ratio);
    canvas.style.cssText = `position:absolute;left:${plot.left}px;top:${top}px;width:${width}px;height:${rows * rowHeight}px;border-radius:4px`;
    view.box.append(canvas);
    const pen = canvas.getContext("2d");
    const gapX = width / bins > 6 ? ratio : 0;
    const gapY = rowHeight > 6 ? ratio : 0;
    for (let row = 0; row < rows; row++) {
      for (let bin = 0; bin < bins; bin++) {
        const value = heat.mean[row][bin];
        const x0 = Math.round((bin / bins) * canvas.width);
        const x1 = Math.round(((bin + 1) / bins) * canvas.width);
        const y0 = Math.round(row * rowHeight * ratio);
        pen.fillStyle = value === null ? colour("card") : `rgb(${heatColour(value / heat.top_ms).join(",")})`;
        pen.fillRect(x0, y0, x1 - x0 - gapX, rowHeight * ratio - gapY);
      }
    }
    const every = Math.max(1, Math.ceil(13 / rowHeight));
    const named = (row) => heat.guilty[row] || (row % every === 0 && !heat.guilty.slice(Math.max(0, row - every + 1), row + every).some(Boolean));
    const most = Math.max(...heat.median, heat.top_ms / 2);
    const barLeft = plot.right + 12;
    const barScale = scale(0, most, 0, barRoom - 92);
    heat.ranks.forEach((rank, row) => {
      const guilty = heat.guilty[row];
      const middle = top + (row + 0.5) * rowHeight;
      if (named(row)) {
        svgText(view.svg, plot.left - 8, middle + 4, labelled[row], "end", guilty && "strong");
      }
      view.svg.append(element("rect", {
        x: barLeft, y: middle - Math.min(5, rowHeight * 0.3), width: Math.max(1, barScale(heat.median[row])),
        height: Math.min(10, Math.max(2, rowHeight * 0.6)), rx: 1.5, fill: colour(guilty ? "bad" : "transfer"),
      }));
      if (named(row)) {
        svgText(view.svg, barLeft + Math.max(1, barScale(heat.median[row])) + 6, middle + 4, `${heat.median[row].toFixed(1)} ms`, "start", guilty && "strong");
      }
    });
    const steps = heat.bins.map((bin) => bin[0]);
    const place = (step) => {
      let bin = steps.findIndex((first) => first > step) - 1;
      if (bin < 0) bin = bins - 1;
      return plot.left + ((bin + 0.5) / bins) * width;
    };
    const first = heat.bins[0][0], last = heat.bins[bins - 1][1];
    for (const value of wholeTicks(first, last, width / 90)) {
      if (value >= first) svgText(view.svg, place(value), plot.bottom + 17, String(value), "middle");
    }
    svgText(view.svg, plot.right, plot.bottom + 33, "step", "end");
    for (const step of data.restart_steps) {
      const at = place(step) - width / bins / 2;
      const mark = html("div");
      mark.style.cssText = `position:absolute;left:${at - 1}px;top:${top - 4}px;height:${rows * rowHeight + 8}px;border-left:2px dotted ${colour("bad")}`;
      view.box.append(mark);
    }
    canvas.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      const bin = Math.min(bins - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * bins)));
      const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / rowHeight)));
      const mean = heat.mean[row][bin], highest = heat.most[row][bin];
      const [from, to] = heat.bins[bin];
      const lines = [stepName(heat.bins[bin])];
      if (mean === null) lines.push("no event");
      else if (from === to) lines.push(`${mean.toFixed(1)} ms late`);
      else lines.push(`${mean.toFixed(1)} ms late on average, at most ${highest.toFixed(1)} ms`);
      lines.push(`median over all steps: ${heat.median[row].toFixed(1)} ms`);
      if (heat.last_ranks[row] !== heat.ranks[row]) lines.push("each the latest of these ranks");
      showTip(event, `${who(row)} on ${heat.hosts[row]}`, lines);
    });
    canvas.addEventListener("mouseleave", hideTip);
    const box = document.getElementById("heat-legend");
    const ramp = html("div", "ramp");
    const stops = RAMP[dark() ? "dark" : "light"].map((one) => `rgb(${one.join(",")})`);
    ramp.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
    box.replaceChildren(html("span", "", "0 ms"), ramp, html("span", "", `${plain(heat.top_ms)} ms late or more`));
    if (data.restart_steps.length) {
      const entry = html("span");
      const swatch = html("i");
      swatch.style.cssText = `width:0;border-radius:0;height:13px;border-left:2px dotted ${colour("bad")}`;
      entry.append(swatch, "restart");
      box.append(entry);
    }
  }
  function svgText(svg, x, y, text, anchor, className) {
    const made = element("text", { x, y, "text-anchor": anchor }, text);
    if (className) made.setAttribute("class", className);
    svg.append(made);
  }

  // -- loss -------------------------------------------------------------------------------------------------------
  function drawLoss() {
    const { bins, train, eval_steps: evalSteps, evaluated } = data.loss;
    const known = [...train, ...evaluated].filter((value) => value !== null);
    if (!known.length) {
      document.getElementById("loss-legend").replaceChildren();
      return empty("loss", "No loss was recorded.");
    }
    const view = canvasOf("loss", 290);
    const plot = { left: 44, right: view.width - 18, top: 10, bottom: view.height - 40 };
    const middles = bins.map(([first, last]) => (first + last) / 2);
    const xs = [...middles, ...evalSteps];
    const x = scale(Math.min(...xs), Math.max(...xs), plot.left + 6, plot.right - 6);
    const low = Math.min(...known), high = Math.max(...known), pad = (high - low) * 0.06 || 0.1;
    const y = scale(low - pad, high + pad, plot.bottom, plot.top);
    axes(view, plot, x, y, wholeTicks(Math.min(...xs), Math.max(...xs), view.width / 90), ticks(low - pad, high + pad, 5), (v) => plain(v));
    restarts(view, plot, x);
    const path = (points) => {
      let pen = "", down = false;
      for (const [px, value] of points) {
        if (value === null) { down = false; continue; }
        pen += `${down ? "L" : "M"}${x(px).toFixed(1)} ${y(value).toFixed(1)}`;
        down = true;
      }
      return pen;
    };
    const shared = { fill: "none", "stroke-linejoin": "round", "stroke-linecap": "round" };
    view.svg.append(element("path", { ...shared, d: path(middles.map((m, i) => [m, train[i]])), stroke: colour("train-ink"), "stroke-width": 2 }));
    view.svg.append(element("path", { ...shared, d: path(evalSteps.map((s, i) => [s, evaluated[i]])), stroke: colour("heldout"), "stroke-width": 1.5, "stroke-dasharray": "1 4" }));
    evalSteps.forEach((step, i) => {
      if (evaluated[i] !== null) view.svg.append(element("circle", { cx: x(step), cy: y(evaluated[i]), r: 4.2, fill: colour("heldout"), stroke: colour("card"), "stroke-width": 2 }));
    });
    const hair = element("line", { y1: plot.top, y2: plot.bottom, stroke: colour("faint"), visibility: "hidden" });
    view.svg.append(hair);
    view.svg.addEventListener("mousemove", (event) => {
      const px = event.clientX - view.svg.getBoundingClientRect().left;
      const near = (list) => list.reduce((best, one, i) => (Math.abs(x(one) - px) < Math.abs(x(list[best]) - px) ? i : best), 0);
      const lines = [];
      let at = px, title = "";
      if (middles.length) {
        const i = near(middles);
        at = x(middles[i]);
        title = stepName(bins[i]);
        lines.push(`training loss ${train[i] === null ? "not finite" : train[i].toFixed(4)}`);
      }
      if (evalSteps.length) {
        const i = near(evalSteps);
        lines.push(`held-out loss ${evaluated[i] === null ? "not finite" : evaluated[i].toFixed(4)} (step ${evalSteps[i]})`);
      }
      hair.setAttribute("x1", at);
      hair.setAttribute("x2", at);
      hair.setAttribute("visibility", "visible");
      showTip(event, title, lines);
    });
    view.svg.addEventListener("mouseleave", () => { hideTip(); hair.setAttribute("visibility", "hidden"); });
    const entries = [["training", colour("train-ink"), "rule"]];
    if (evalSteps.length) entries.push(["held-out", colour("heldout"), "dot"]);
    legend("loss-legend", entries);
  }

  // -- time split -------------------------------------------------------------------------------------------------
  const PARTS = ["compute", "data", "transfer", "waiting", "checkpoint"];
  function drawSplit() {
    const { bins } = data.split;
    if (!bins.length) {
      document.getElementById("split-legend").replaceChildren();
      return empty("split", "No step was finished.");
    }
    const view = canvasOf("split", 290);
    const plot = { left: 58, right: view.width - 18, top: 10, bottom: view.height - 40 };
    const totals = bins.map((_, i) => PARTS.reduce((sum, part) => sum + data.split[part][i], 0));
    const sorted = [...totals].sort((a, b) => a - b);
    // one very slow step must not flatten all others: the axis ends at the 99th percentile, taller bars are cut
    const high = Math.max(sorted[Math.floor((sorted.length - 1) * 0.99)] * 1.08, 1e-6);
    const x = scale(0, bins.length, plot.left, plot.right);
    const y = scale(0, high, plot.bottom, plot.top);
    const steps = bins.map((bin) => bin[0]);
    const place = (step) => { const i = steps.findIndex((first) => first > step) - 1; return x((i < 0 ? bins.length - 1 : i) + 0.5); };
    const unitIsS = high >= 1;
    axes(view, plot, place, y, wholeTicks(steps[0], bins[bins.length - 1][1], view.width / 90).filter((v) => v >= steps[0]),
      ticks(0, high, 5), (value) => (unitIsS ? `${plain(value)} s` : `${plain(value * 1e3)} ms`));
    const gap = (plot.right - plot.left) / bins.length > 4 ? 1 : 0;
    bins.forEach((_, i) => {
      let base = 0;
      for (const part of PARTS) {
        const next = Math.min(base + data.split[part][i], high);
        const height = y(base) - y(next);
        if (height > 0.05) {
          view.svg.append(element("rect", { x: x(i), width: Math.max(0.5, x(i + 1) - x(i) - gap), y: y(next), height, fill: colour(part), "shape-rendering": gap ? "auto" : "crispEdges" }));
        }
        base = next;
      }
    });
    restarts(view, plot, (step) => place(step + 0.5) - (x(1) - x(0)) / 2);
    view.svg.addEventListener("mousemove", (event) => {
      const px = event.clientX - view.svg.getBoundingClientRect().left;
      const i = Math.min(bins.length - 1, Math.max(0, Math.floor(((px - plot.left) / (plot.right - plot.left)) * bins.length)));
      showTip(event, `${stepName(bins[i])}: ${seconds(totals[i])}`,
        [...PARTS].reverse().map((part) => `${part} ${seconds(data.split[part][i])} · ${Math.round((100 * data.split[part][i]) / (totals[i] || 1))} %`));
    });
    view.svg.addEventListener("mouseleave", hideTip);
    legend("split-legend", PARTS.map((part) => [`${part} ${data.split.shares[part]}`, colour(part)]));
  }

  // -- timeline ---------------------------------------------------------------------------------------------------
  function drawTime() {
    const { starts, incidents, wall_s: wall } = data.time;
    if (!starts.length && !incidents.length) {
      document.getElementById("time-legend").replaceChildren();
      return empty("time", "No events were recorded.");
    }
    const rowHeight = 26;
    const shown = starts.slice(-12);
    const view = canvasOf("time", 34 + shown.length * rowHeight + 26);
    const plot = { left: 84, right: view.width - 34, top: 34, bottom: 34 + shown.length * rowHeight };
    const x = scale(0, wall || 1, plot.left, plot.right);
    for (const value of timeTicks(wall || 1, view.width / 120)) {
      const at = Math.round(x(value)) + 0.5;
      view.svg.append(element("line", { x1: at, x2: at, y1: plot.top - 6, y2: plot.bottom, stroke: colour("grid") }));
      svgText(view.svg, at, plot.bottom + 18, clock(value), "middle");
    }
    shown.forEach((start, row) => {
      const y = plot.top + row * rowHeight + 4;
      svgText(view.svg, plot.left - 10, y + 13, `attempt ${start.attempt}`, "end");
      const begin = x(start.launched_s), ready = x(start.training_s ?? start.ended_s), end = x(start.ended_s);
      view.svg.append(element("rect", { x: begin, y, width: Math.max(2, ready - begin), height: 18, rx: 3, fill: colour("idle") }));
      if (start.training_s !== null) {
        view.svg.append(element("rect", { x: ready, y, width: Math.max(2, end - ready), height: 18, rx: 3, fill: colour("compute") }));
        if (end - ready > 110) {
          const label = element("text", { x: (ready + end) / 2, y: y + 13, "text-anchor": "middle", style: "fill:#fff;font-weight:600" }, `steps ${start.first_step}–${start.last_step}`);
          if (dark()) label.style.fill = "#10131a";
          view.svg.append(label);
        }
      }
      const lost = start.lost_until_s === null ? end : x(start.lost_until_s);
      if (lost - end > 1) {
        view.svg.append(element("rect", { x: end, y: y + 5, width: lost - end, height: 8, fill: colour("bad"), opacity: 0.35 }));
      }
      const cover = element("rect", { x: begin, y, width: Math.max(6, lost - begin), height: 18, fill: "transparent" });
      cover.addEventListener("mousemove", (event) => showTip(event, `attempt ${start.attempt}`, [
        start.generation ? `restart ${start.generation} by the launcher` : "started by hand",
        start.training_s === null ? "no step was finished" : `steps ${start.first_step}–${start.last_step}`,
        `${start.world_size} ranks; launched ${seconds(start.launched_s)} into the run, last event at ${seconds(start.ended_s)}`,
        start.training_s === null ? "" : `${seconds(start.training_s - start.launched_s)} until its first step`,
        start.lost_until_s === null ? "" : `${seconds(start.lost_until_s - start.ended_s)} from its last event until the failure was noticed`,
      ].filter(Boolean)));
      cover.addEventListener("mouseleave", hideTip);
      view.svg.append(cover);
    });
    for (const one of incidents) {
      const at = x(Math.min(one.at_s, wall)), y = 18;
      view.svg.append(element("line", { x1: at, x2: at, y1: y, y2: plot.bottom, stroke: colour(one.severity), opacity: 0.45 }));
      const shape = one.severity === "bad"
        ? element("rect", { x: at - 5, y: y - 5, width: 10, height: 10, transform: `rotate(45 ${at} ${y})` })
        : one.severity === "warn" ? element("rect", { x: at - 5, y: y - 5, width: 10, height: 10, rx: 2 }) : element("circle", { cx: at, cy: y, r: 5.5 });
      shape.setAttribute("fill", colour(one.severity));
      shape.setAttribute("stroke", colour("card"));
      shape.setAttribute("stroke-width", "1.5");
      shape.addEventListener("mousemove", (event) => showTip(event, one.title, [one.detail, `${seconds(one.at_s)} into the run`]));
      shape.addEventListener("mouseleave", hideTip);
      view.svg.append(shape);
    }
    legend("time-legend", [["set-up", colour("idle")], ["training", colour("compute")], ["failure, and silence before it", colour("bad")], ["warning", colour("warn")], ["recovered", colour("good"), "dot"]]);
  }

  // -- the worst incident -----------------------------------------------------------------------------------------
  const DOES = { compute: "compute", communication: "transfer", data: "data", checkpoint: "checkpoint", wait: "waiting", hung: "bad", failed: "bad" };
  function drawScene() {
    const scene = data.scene;
    if (scene === null) return;
    const rowHeight = 24, top = 8;
    const view = canvasOf("scene", top + scene.ranks.length * rowHeight + 40);
    const plot = { left: 84, right: view.width - 18, top, bottom: top + scene.ranks.length * rowHeight };
    const x = scale(scene.begin_s, scene.end_s, plot.left, plot.right);
    const inside = (at) => Math.min(plot.right, Math.max(plot.left, x(at)));
    for (const value of ticks(scene.begin_s, scene.end_s, view.width / 120)) {
      const at = Math.round(x(value)) + 0.5;
      view.svg.append(element("line", { x1: at, x2: at, y1: plot.top, y2: plot.bottom, stroke: colour("grid") }));
      svgText(view.svg, at, plot.bottom + 17, `${Number(value.toFixed(3))} s`, "middle");
    }
    svgText(view.svg, plot.right, plot.bottom + 33, "since the first event of the run", "end");
    const middle = (row) => plot.top + (row + 0.5) * rowHeight;
    scene.ranks.forEach((one, row) => {
      svgText(view.svg, plot.left - 10, middle(row) + 4, `rank ${one.rank}`, "end", one.rank === scene.culprit && "strong");
      for (const span of one.spans) {
        if (span.end_s < scene.begin_s || span.begin_s > scene.end_s) continue;
        const from = inside(span.begin_s), to = inside(span.end_s);
        const bar = element("rect", { x: from, y: middle(row) - 7, width: Math.max(1, to - from - 0.5), height: 14, rx: 2, fill: colour(DOES[span.kind]), opacity: span.kind === "wait" ? 0.35 : 1 });
        bar.addEventListener("mousemove", (event) => showTip(event, `rank ${one.rank} on ${one.host}`, [span.what, seconds(span.end_s - span.begin_s)]));
        bar.addEventListener("mouseleave", hideTip);
        view.svg.append(bar);
      }
    });
    const to = scene.ranks.findIndex((one) => one.rank === scene.culprit);
    const tipX = inside(scene.at_s) - 1;
    scene.ranks.forEach((one, row) => {
      if (one.waits_from_s === null || row === to) return;
      const from = inside(one.waits_from_s), side = row < to ? -1 : 1;
      const endY = middle(to) + side * 8, bend = Math.max(10, (tipX - from) * 0.4);
      view.svg.append(element("path", { class: "arrow", d: `M${from} ${middle(row)}C${from + bend} ${middle(row)} ${tipX} ${endY + side * 26} ${tipX} ${endY}`, fill: "none", stroke: colour("bad"), "stroke-width": 1.4, opacity: 0.85 }));
      view.svg.append(element("circle", { cx: from, cy: middle(row), r: 2.5, fill: colour("bad") }));
      view.svg.append(element("path", { d: `M${tipX} ${endY}l-4 ${side * 7}h8z`, fill: colour("bad") }));
    });
    const shown = new Set(scene.ranks.flatMap((one) => one.spans.map((span) => span.kind)));
    legend("scene-legend", Object.keys(DOES).filter((kind) => shown.has(kind)).map((kind) => [kind, colour(DOES[kind])]));
  }

  function draw() { drawScene(); drawHeat(); drawLoss(); drawSplit(); drawTime(); }
  draw();
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 120); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("scroll", hideTip, { passive: true });
})();
