"use strict";
// Live states of jobs, uploads, and the controls of the run page.
const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const own = document.body.dataset.run, title = document.title;
const WORDS = {begin: "starting", plan: "starting", open: "loading the model", memory: "planning memory", encode: "encoding the clip", tune: "training step", preview: "preview step", invert: "inversion step", edit: "denoising step", evaluate: "scoring", export: "exporting", measure: "measuring"};
const JOBS = {tune: "Training", preview: "Preview", edit: "Edits", evaluate: "Scores", export: "Export", measure: "Measurement"};
const OVER = ["done", "failed", "cancelled", "paused"];
const known = new Map(all("[data-job]").map(item => [Number(item.dataset.job), {state: one(".state", item).dataset.state, run: item.dataset.of}]));
let dirty = false;

function clock(seconds) {
  const total = Math.round(seconds);
  return `${Math.floor(total / 60)}:${String(total % 60).padStart(2, "0")} left`;
}

function details(job) {
  const parts = [];
  const stage = WORDS[job.stage] || job.stage;
  if (job.stage) parts.push(job.total ? `${stage} ${job.number} of ${job.total}` : stage);
  if (job.stage === "tune" && job.loss !== undefined) parts.push(`loss ${job.loss.toPrecision(3)}`);
  if (job.stage === "tune" && job.pace) parts.push(job.pace < 1 ? `${(1 / job.pace).toFixed(1)} steps a second` : `${job.pace.toFixed(1)} s a step`);
  if (typeof job.left === "number") parts.push(clock(job.left));
  if (job.about && job.stage !== "tune") parts.push(job.about);
  if (job.idle > 3) parts.push(`this step takes ${Math.round(job.idle)} s so far`);
  return parts.join(", ");
}

function onJob(job) {
  const before = known.get(job.job) || {}, now = {...before, ...job};
  known.set(job.job, now);
  for (const item of all(`[data-job="${Number(job.job)}"]`)) showJob(item, now);
  const percent = now.total ? `${Math.round(100 * now.number / now.total)} %` : "…";
  const changed = before.state && before.state !== now.state;
  for (const card of now.state === "done" && !changed ? [] : cards(now.run)) {
    one(".state", card).dataset.state = now.state;
    one(".state", card).textContent = now.state === "running" ? `${now.stage} ${percent}` : now.state;
  }
  if (now.state === "running") {
    one("#now").textContent = `${JOBS[now.kind] || now.kind} ${now.run}: ${percent}`;
    if (!own || own === now.run) document.title = `${percent} ${JOBS[now.kind] || now.kind} – ${title}`;
  } else if (![...known.values()].some(each => each.state === "running")) {
    one("#now").textContent = "";
    document.title = title;
  }
  if (changed) say(`${JOBS[now.kind] || now.kind} of ${now.run}: ${now.state}${now.error ? `: ${now.error}` : ""}`);
  if (document.body.dataset.here === "queue" && !one(`[data-job="${Number(job.job)}"]`) && !OVER.includes(now.state)) refresh();
  if (document.body.dataset.here === "home" && changed && now.run && OVER.includes(now.state)) refresh();
  if (now.run !== own || !own) return;
  addSteps(job.steps || []);
  const made = job.made && ["encode", "tune", "preview", "edit"].includes(job.stage);
  if (made || (changed && OVER.includes(now.state))) refresh();
}

function cards(run) { return all("[data-card]").filter(card => card.dataset.card === run); }

function showJob(item, job) {
  const state = one(".state", item), bar = one("progress", item), why = one(".why", item);
  state.dataset.state = job.state;
  state.textContent = job.state;
  bar.hidden = !["running", "stopping"].includes(job.state);
  if (job.total) { bar.max = job.total; bar.value = job.number; } else bar.removeAttribute("value");
  one(".detail", item).textContent = job.state === "running" ? details(job) : "";
  showPicture(item, job);
  why.textContent = job.error || "";
  why.hidden = !job.error;
  one('[data-action="retry"] button', item).firstChild.textContent = job.state === "paused" ? "Resume" : "Retry";
}

// The edits while they are sampled; a picture replaces the one before when it is loaded.
function showPicture(item, job) {
  const picture = one(".picture", item);
  if (job.state !== "running" || !job.picture || job.stage === "encode") { picture.hidden = true; return; }
  if (picture.dataset.number === String(job.picture)) return;
  picture.dataset.number = job.picture;
  const next = new Image();
  next.onload = () => { picture.src = next.src; picture.hidden = false; };
  next.src = `/jobs/${Number(job.job)}/picture?${Number(job.picture)}`;
}

function say(text) { one("#live").textContent = text; }

// Show new results by loading the page again; after typing only when the user says so.
let due = 0;
function refresh() {
  if (dirty) {
    one("#stale").hidden = false;
  } else {
    clearTimeout(due);
    due = setTimeout(() => { if (dirty) one("#stale").hidden = false; else location.reload(); }, 400);
  }
}

// All tabs share one connection, since browsers open at most six to a host: the tab with the lock tells the others.
const source = new EventTarget(), others = new BroadcastChannel("tuneavideo");
const deliver = (type, data) => source.dispatchEvent(new MessageEvent(type, {data}));
others.onmessage = event => deliver(event.data.type, event.data.data);
function listen() {
  const events = new EventSource("/events");
  for (const type of ["job", "other", "push"]) events.addEventListener(type, ({data}) => { deliver(type, data); others.postMessage({type, data}); });
  addEventListener("pagehide", () => events.close());
  return new Promise(() => {});
}
async function connect() {
  if (!navigator.locks) return listen();  // at an address without TLS that is not this computer's
  navigator.locks.request("tuneavideo", {ifAvailable: true}, lock => lock ? listen() : null).then(async () => {
    navigator.locks.request("tuneavideo", listen);
    const now = await (await fetch("/state")).json();
    for (const job of now.jobs.reverse()) deliver("job", JSON.stringify(job));
  });
}
addEventListener("DOMContentLoaded", connect);
source.addEventListener("job", event => onJob(JSON.parse(event.data)));
source.addEventListener("other", event => {
  const run = JSON.parse(event.data), text = `step ${run.number} of ${run.total}, loss ${run.loss.toPrecision(3)}`;
  if (run.run === own && one("#other")) one("#other").textContent = text;
  for (const card of cards(run.run)) one(".state", card).textContent = `in another process: ${text}`;
});

// The curve of the loss, on a logarithmic scale.
const chart = one("#chart"), steps = [];
function addSteps(more) {
  if (!chart || !more.length) return;
  steps.push(...more.filter(step => !steps.length || step[0] > steps.at(-1)[0]));
  const last = Math.max(Number(chart.dataset.total), steps.at(-1)[0]), logs = steps.map(step => Math.log(Math.max(step[1], 1e-9)));
  const low = Math.min(...logs) - 0.1, high = Math.max(...logs) + 0.1, every = Math.ceil(steps.length / 500);
  const at = (number, log) => `${(100 * number / last).toFixed(2)} ${(100 * (high - log) / (high - low)).toFixed(2)}`;
  const shown = steps.map((step, i) => i).filter(i => i % every === 0), width = Math.max(1, Math.round(steps.length / 15));
  const mean = i => { const part = logs.slice(Math.max(0, i - width), i + width + 1); return part.reduce((a, b) => a + b) / part.length; };
  one(".points", chart).setAttribute("d", shown.map(i => `M${at(steps[i][0], logs[i])}h0`).join(""));
  one(".smooth", chart).setAttribute("d", "M" + shown.map(i => at(steps[i][0], mean(i))).join("L"));
  one("#curve").hidden = false;
  one("#loss-now").textContent = `step ${steps.at(-1)[0]} of ${last}, loss ${steps.at(-1)[1].toPrecision(3)}, divided by the untuned model's if it is known; logarithmic scale`;
}
if (chart) addSteps(chart.dataset.steps.trim().split(" ").filter(Boolean).map(each => each.split(":").map(Number)));

// Sliders show their values; some actions ask first.
for (const slider of all(".slide input")) slider.addEventListener("input", () => { slider.nextElementSibling.value = slider.value; });
for (const form of all("form[data-confirm]")) form.addEventListener("submit", event => { if (!confirm(form.dataset.confirm)) event.preventDefault(); });
for (const form of all("#edit-form, .gallery, #upload, .search")) {
  form.addEventListener("input", () => { dirty = true; });
  form.addEventListener("submit", () => { dirty = false; });
}
if (one("#stale")) one("#stale button").onclick = () => location.reload();

function send(file, then, error, bar) { sendTo("/clips", file, then, error, bar); }
function sendTo(place, file, then, error, bar) {
  const request = new XMLHttpRequest();
  const failed = text => { error.textContent = text; error.hidden = false; if (bar) bar.hidden = true; };
  request.open("POST", `${place}?name=${encodeURIComponent(file.name)}`);
  request.setRequestHeader("accept", "application/json");
  request.setRequestHeader("content-type", "application/octet-stream");
  request.responseType = "json";
  error.hidden = true;
  if (bar) {
    bar.hidden = false;
    request.upload.onprogress = event => { bar.value = 100 * event.loaded / event.total; };
  }
  request.onload = () => request.status === 201 ? then(request.response) : failed(request.response ? request.response.error : "the upload was refused");
  request.onerror = () => failed("the connection broke, or the file is too large");
  request.send(file);
}

const upload = one("#upload");
if (upload) {
  const start = file => { if (file) { say("uploading"); send(file, made => { location.href = made.page; }, one("#upload-error"), one("#sent")); } };
  one("#file").onchange = event => start(event.target.files[0]);
  upload.addEventListener("dragover", event => { event.preventDefault(); upload.classList.add("over"); });
  upload.addEventListener("dragleave", () => upload.classList.remove("over"));
  upload.addEventListener("drop", event => { event.preventDefault(); upload.classList.remove("over"); start(event.dataTransfer.files[0]); });
  upload.addEventListener("submit", event => event.preventDefault());
}
for (const video of all(".gallery video")) {
  video.closest("li").addEventListener("pointerenter", () => video.play().catch(() => {}));
  video.closest("li").addEventListener("pointerleave", () => video.pause());
}
