"use strict";
// The token is the address's fragment, which browsers keep to themselves.
const bar = document.getElementById("bar");
const frames = document.getElementById("frames");
const refresh_ms = Number(document.body.dataset.refreshMs);
const name = bar.textContent;
let tag = "", made = "", scroll = 0, frame = null, health = null;

function say(text, kind) {
  bar.textContent = text;
  bar.className = kind;
}

async function ask(path, more = {}) {
  const headers = { Authorization: `Bearer ${location.hash.slice(1)}`, ...more };
  return fetch(path, { headers, cache: "no-store", credentials: "omit" });
}

// The report runs in an origin of its own: it cannot see the token. Where it is scrolled to, it tells.
function show(html) {
  const kept = `<script>scrollTo(0, ${scroll});
    addEventListener("scroll", () => parent.postMessage(scrollY, "*"), { passive: true });</scr` + "ipt></body>";
  const next = document.createElement("iframe");
  next.title = "report";
  next.className = "coming";
  next.setAttribute("sandbox", "allow-scripts");
  next.srcdoc = html.replace(/<\/body>\s*<\/html>\s*$/, () => `${kept}</html>`);
  next.addEventListener("load", () => {
    if (frame) frame.remove();
    frame = next;
    next.className = "";
  }, { once: true });
  frames.append(next);
}

addEventListener("message", (event) => {
  if (frame && event.source === frame.contentWindow && typeof event.data === "number") scroll = event.data;
});

function tell() {
  const of = made ? ` · the page is of ${made}` : "";
  if (!health) return say(`${name}${of}`, "");
  const at = health.last_step_age_s;
  const step = at === null ? "" : `, step ${health.step}, the last one done ${at < 1.5 ? "now" : `${Math.round(at)} s ago`}`;
  const why = health.verdict ? ` · ${health.verdict}` : "";
  return say(`${name}: ${health.state}${step}${why}${of}`, health.alive ? "" : "bad");
}

async function look() {
  try {
    const well = await ask("healthz");
    health = await well.json();
    const answer = await ask("report", tag ? { "If-None-Match": tag } : {});
    if (answer.status === 401) return say("The token is missing or wrong: open the address in RUN/page.url", "bad");
    if (answer.status === 503) return made ? tell() : say(`${name}: ${await answer.text()}`, "");
    if (answer.status === 200) {
      tag = answer.headers.get("ETag");
      show(await answer.text());
    }
    made = new Date(1000 * Number(answer.headers.get("X-Outlast-Made"))).toLocaleTimeString();
    return tell();
  } catch (error) {
    const of = made ? `; the page is of ${made}` : "";
    return say(`${name}: no answer: the job has ended, or the connection is cut (${error.message})${of}`, "old");
  }
}

async function keep() {
  if (!document.hidden) await look(); // what nobody sees is not computed
  setTimeout(keep, made || document.hidden ? refresh_ms : 1000);
}

addEventListener("hashchange", () => location.reload());
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
keep();
