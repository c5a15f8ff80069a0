"use strict";
// One clock, in seconds, for all clips. The longest is the reference while they play; the others stay within a frame of it.
const $ = id => document.getElementById(id);
const clips = [...document.querySelectorAll("video:not([data-alone])")].map(video => {
  const tick = 1 / Number(video.dataset.fps), length = Number(video.dataset.frames) * tick;
  video.controls = false;
  video.addEventListener("click", toggle);
  return {video, tick, length};
});
const longest = clips.reduce((a, b) => b.length > a.length + 1e-6 ? b : a, clips[0]);
const tick = Math.min(...clips.map(clip => clip.tick));
const count = longest ? Math.round(longest.length / tick) : 0;
let frame = 0, playing = false, looping = true, moving = null, wanted = null;

// Seek to the middle of a frame, as players round its edges up or down.
const place = (clip, time) => Math.min(Math.max(time, 0), clip.length - clip.tick / 2);

function moved({video}, time) {
  if (Math.abs(video.currentTime - time) < 1e-3 && !video.seeking) return Promise.resolve();
  return new Promise(done => {
    video.addEventListener("seeked", done, {once: true});
    video.addEventListener("error", done, {once: true});
    video.currentTime = time;
  });
}

// Show a frame in every clip. Calls while clips still seek are merged: the last frame wins.
function go(number) {
  show(Math.min(Math.max(number, 0), count - 1));
  wanted = frame;
  moving ??= (async () => {
    while (wanted !== null) {
      const time = (wanted + 0.5) * tick;
      wanted = null;
      clips.forEach(({video}) => video.pause());
      await Promise.all(clips.map(clip => moved(clip, place(clip, time))));
    }
    moving = null;
  })();
  return moving;
}

function show(number) {
  frame = number;
  $("at").value = frame;
  $("at").setAttribute("aria-valuetext", `frame ${frame + 1} of ${count}`);
  $("number").textContent = `${frame + 1} / ${count}`;
}

function state(now) {
  playing = now;
  document.body.classList.toggle("playing", playing);
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
}

async function play() {
  state(true);
  await from(frame >= count - 1 ? 0 : frame);
}

// A shorter clip pauses in its last frame, or else it would start again.
const ended = (clip, now) => clip !== longest && now >= clip.length - 0.75 * clip.tick;

function run() {
  if (!playing || moving) return;
  clips.filter(clip => !ended(clip, longest.video.currentTime)).forEach(start);
  requestAnimationFrame(follow);
}

function start({video}) {
  video.play().catch(error => { if (error.name === "NotAllowedError") state(false); });
}

function follow() {
  if (!playing || moving) return;
  const now = longest.video.currentTime;
  if (longest.video.ended || now >= longest.length - tick / 4) return finish();
  show(Math.min(Math.floor(now / tick + 1e-3), count - 1));
  // If decoding is too slow, all clips wait for the slowest and stay in step.
  if (clips.some(clip => Math.abs(behind(clip, now)) > 0.9 * clip.tick)) return from(frame);
  for (const clip of clips) if (clip !== longest) keep(clip, now);
  requestAnimationFrame(follow);
}

const behind = (clip, now) => place(clip, now) - clip.video.currentTime;

function keep(clip, now) {
  const late = behind(clip, now) / clip.tick;
  if (ended(clip, now)) clip.video.pause();
  else clip.video.playbackRate = Math.abs(late) > 0.1 ? 1 + late / 3 : 1;
}

async function from(number) {
  await go(number);
  run();
}

function finish() {
  if (!looping) { state(false); return go(count - 1); }
  return from(0);
}

function pause() {
  state(false);
  return go(frame);
}

function toggle() { return playing ? pause() : play(); }

async function step(by) {
  const was = frame;
  if (playing) state(false);
  return go((was + by + count) % count);
}

function loop() {
  looping = !looping;
  $("loop").setAttribute("aria-pressed", looping);
}

const keys = {" ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1), r: loop, j: () => step(-1), k: toggle, l: () => step(1), Home: () => step(-frame), End: () => step(count - 1 - frame)};

if (longest) {
  $("at").max = count - 1;
  $("play").onclick = toggle;
  $("back").onclick = () => step(-1);
  $("next").onclick = () => step(1);
  $("loop").onclick = loop;
  $("at").oninput = async () => {
    const on = playing;
    state(false);
    await go(Number($("at").value));
    if (on) play();
  };
  addEventListener("keydown", event => {
    const here = event.target, native = here.closest("summary, a, textarea, select, dialog, input:not(#at)") || (here.closest("button") && event.key === " ");
    const sliding = here === $("at") && event.key !== " " && event.key !== "r";
    if (native || sliding || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  document.body.classList.add("ready");
  show(0);
  const loaded = clips.map(({video}) => video.readyState >= 2 || video.error ? null : new Promise(done => {
    video.addEventListener("loadeddata", done, {once: true});
    video.addEventListener("error", done, {once: true});
  }));
  Promise.all(loaded).then(() => {
    for (const {video} of clips.filter(clip => clip.video.error)) {
      const note = document.createElement("div");
      note.className = "nothing";
      note.textContent = "this browser cannot play H.264 video";
      video.replaceWith(note);
    }
    const whole = clips.filter(clip => !clip.video.error);
    clips.splice(0, clips.length, ...whole);
    if (clips.includes(longest) && !matchMedia("(prefers-reduced-motion: reduce)").matches) play(); else if (clips.length) go(0);
  });
}
