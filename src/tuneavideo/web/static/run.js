"use strict";
// The controls of the run page: repeat and vary, settings of a video, masks, steps, the wipe, the hub.
// Repeat or vary an edit, and load the settings of a downloaded one.
function text(value) {
  if (Array.isArray(value)) return value.map(text).join(" ");
  return value === null ? "" : value === true ? "on" : value === false ? "off" : String(value);
}
function fill(values) {
  for (const [name, value] of Object.entries(values)) {
    const field = one(`#edit-form [name="${CSS.escape(name)}"]`);
    if (!field) continue;
    field.value = text(value);
    field.dispatchEvent(new Event("input", {bubbles: true}));
  }
}
for (const figure of all("[data-edit]")) {
  const edit = JSON.parse(figure.dataset.edit), form = one("#edit-form"), mask = edit.values.mask;
  const values = {...edit.values, prompt: edit.prompt, seeds: edit.seeds, mask: mask ? mask.split("/").at(-1) : ""};
  one(".repeat", figure).onclick = () => { fill(values); form.requestSubmit(); };
  one(".vary", figure).onclick = () => { fill(values); form.scrollIntoView(); one("#prompt").focus(); };
}
const load = one("#load-file");
if (load) load.onchange = () => {
  const error = one("#load .error");
  send(load.files[0], async made => {
    const answer = await fetch("/settings", {method: "POST", headers: {accept: "application/json"}, body: new URLSearchParams({clip: made.clip})});
    const values = await answer.json();
    if (answer.ok) { fill(values); say("settings loaded"); one("#prompt").focus(); } else { error.textContent = values.error; error.hidden = false; }
    fetch(`/clips/${made.clip}/delete`, {method: "POST", redirect: "manual"});
  }, error);
};

const wipe = one("#wipe");
if (wipe) {
  const over = one(".wipe video + video"), draw = () => { over.style.clipPath = `inset(0 0 0 ${wipe.value}%)`; };
  wipe.oninput = draw;
  one("#wipe-edit").onchange = event => {
    over.src = event.target.value;
    over.addEventListener("loadeddata", () => go(frame), {once: true});
  };
  draw();
}

// Masks are uploaded at once, so that one that does not fit the clip is refused before the edit.
const maskFile = one("#mask-file"), mask = one("#mask");
function showMask() {
  const picture = one("#mask-picture");
  picture.hidden = !mask.value;
  if (mask.value) picture.src = `/runs/${encodeURIComponent(own)}/files/masks/${encodeURIComponent(mask.value)}/00000.png`;
}
if (maskFile) {
  mask.addEventListener("input", showMask);
  maskFile.onchange = () => {
    if (!maskFile.files[0]) return;
    say("uploading the mask");
    sendTo(`/runs/${encodeURIComponent(own)}/masks`, maskFile.files[0], made => {
      mask.add(new Option(made.mask, made.mask, true, true));
      showMask();
      say("the mask is there");
    }, one("#mask-error"));
  };
  showMask();
}
for (const button of all(".from-step")) {
  button.hidden = !one("#edit-form");
  button.onclick = () => { fill({step: button.dataset.step}); one("#edit-form").scrollIntoView(); one("#prompt").focus(); };
}

source.addEventListener("push", event => {
  const push = JSON.parse(event.data), note = one("#push");
  if (push.run !== own || !note) return;
  note.dataset.state = push.state;
  note.textContent = push.text;
  if (push.link) {
    const link = document.createElement("a");
    [link.href, link.textContent, link.rel] = [push.link, push.link, "noreferrer"];
    note.append(" ", link);
  }
});

// Previews of the training play while they are pointed at, and on a click.
for (const button of all(".sample")) {
  const video = one("video", button), play = () => video.play().catch(() => {});
  button.onpointerenter = event => { if (event.pointerType === "mouse") play(); };
  button.onpointerleave = () => video.pause();
  button.onclick = () => { if (video.paused) play(); else video.pause(); };
}
