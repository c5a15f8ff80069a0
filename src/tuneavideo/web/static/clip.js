"use strict";
// The part of the clip that is used, its frames, and the estimate.
const form = document.getElementById("tune"), field = id => document.getElementById(id);
const fps = Number(form.dataset.fps), total = Number(form.dataset.total);
let timer = 0, latest = 0;

function choose() {
  const first = Number(field("from").value), last = Number(field("to").value), count = Math.max(1, Number(field("num_frames").value));
  field("start_time").value = (first / fps).toFixed(4);
  field("sample_fps").value = Math.min(fps, count * fps / (last - first + 1)).toFixed(4);
  field("span").textContent = `${(first / fps).toFixed(2)} s to ${((last + 1) / fps).toFixed(2)} s: ${last - first + 1} frames of the clip`;
  for (const [id, number] of [["from", first], ["to", last]]) field(id).setAttribute("aria-valuetext", `frame ${number + 1} of ${total}`);
}

async function ask(name, query) {
  const got = await fetch(`/clips/${form.dataset.clip}/${name}?${query}`, {headers: {accept: "application/json"}});
  const found = await got.json();
  if (!got.ok) throw new Error(found.error);
  return found;
}

// Time and memory; if nothing is known, a measurement of a few steps tells them.
let measuring = 0, asked = false;
async function estimate(query) {
  const note = field("estimate");
  try {
    const found = await ask("estimate", query);
    note.textContent = measuring ? "Measuring time and memory …" : found.estimate;
    field("measure").hidden = !found.measure || measuring > 0;
    if (found.auto && !asked) measure();
  } catch (error) {
    note.textContent = error.message;
  }
}

async function post(name, values) {
  const got = await fetch(`/clips/${form.dataset.clip}/${name}`, {method: "POST", headers: {accept: "application/json"}, body: new URLSearchParams(values)});
  const found = await got.json();
  if (!got.ok) throw new Error(found.error);
  return found;
}

async function measure() {
  asked = true;
  field("measure").hidden = true;
  field("estimate").textContent = "Measuring time and memory …";
  try {
    measuring = (await post("measure", new FormData(form))).job;
  } catch (error) {
    field("estimate").textContent = error.message;
  }
}
field("measure").onclick = measure;
source.addEventListener("job", event => {
  const job = JSON.parse(event.data);
  if (job.job !== measuring || !OVER.includes(job.state)) return;
  measuring = 0;
  if (job.state === "failed") field("estimate").textContent = job.error; else later();
});

if (field("suggest")) field("suggest").onclick = async () => {
  const button = field("suggest"), error = field("prompt-error");
  button.disabled = true;
  button.textContent = "Looking …";
  say("looking for a caption");
  error.hidden = true;
  try {
    const middle = (Number(field("from").value) + Number(field("to").value)) / 2 / fps;
    field("prompt").value = (await post("caption", {time: middle})).caption;
    say(`caption: ${field("prompt").value}`);
  } catch (problem) {
    error.textContent = problem.message;
    error.hidden = false;
  }
  button.disabled = false;
  button.textContent = "Suggest";
};

async function update() {
  const turn = ++latest, data = new FormData(form), strip = field("strip"), note = field("strip-note");
  data.delete("prompt");
  const query = new URLSearchParams(data);
  estimate(query);
  try {
    const found = await ask("frames", query);
    if (turn !== latest) return;
    const image = new Image();
    image.src = found.picture;
    image.alt = `${found.frames} frames`;
    strip.replaceChildren(image);
    note.textContent = `${found.frames} frames of ${found.width} × ${found.height} pixels, from ${found.times[0].toFixed(2)} s to ${found.times.at(-1).toFixed(2)} s`;
  } catch (error) {
    if (turn !== latest) return;
    strip.replaceChildren();
    note.textContent = error.message;
  }
}

function later() {
  clearTimeout(timer);
  timer = setTimeout(update, 300);
}

for (const [id, other, bound] of [["from", "to", Math.min], ["to", "from", Math.max]]) field(id).addEventListener("input", () => {
  field(id).value = bound(Number(field(id).value), Number(field(other).value));
  if (playing) state(false);
  go(Number(field(id).value));
});
form.addEventListener("input", () => { choose(); later(); });
for (const id of ["base", "preset"]) field(id).addEventListener("change", () => {
  const names = ["base", "preset", "prompt", "edit"];
  location.search = new URLSearchParams(names.map(name => [name, field(name).value]));
});
choose();
later();
