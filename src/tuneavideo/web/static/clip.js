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

async function update() {
  const turn = ++latest, data = new FormData(form), strip = field("strip"), note = field("strip-note");
  data.delete("prompt");
  const query = new URLSearchParams(data);
  ask("estimate", query).then(found => { field("estimate").textContent = found.estimate; }, error => { field("estimate").textContent = error.message; });
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
