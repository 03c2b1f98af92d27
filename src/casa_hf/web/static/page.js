// The page of a stream. Everything it knows comes as server-sent events; captions are a model's words, so they only
// ever become text nodes.

import { listen } from "/events.js";

const WORKER_MILLISECONDS = 5000; // without a sign of life after that, there is no shared worker
const KEPT_FRAMES = 600;
const KEPT_LINES = 400;
const KEPT_ANSWERS = 50;
const SUBTITLE_SECONDS = 6;
const SUBTITLE_CHARACTERS = 120;
const SLACK_SECONDS = 0.05;
const STATES = {
  waiting: "Waiting",
  loading: "Loading the model…",
  running: "Captioning",
  paused: "Paused",
  finished: "Finished",
  failed: "Stopped by an error",
  closed: "The server has been stopped",
};

const element = (id) => document.getElementById(id);
const video = element("video");
const image = element("image");

let run = null; // identifies the server's stream; another one starts the page from scratch
let state = "waiting";
let period = 0.5; // seconds from frame to frame
let playable = false; // whether there is a video that this browser plays
let stream = fresh();

function fresh() {
  return {
    frames: new Map(), // index -> {start, end, text, cut: whether the next frame's text continues it, line}
    latest: null, // the last frame that was begun
    frontier: 0, // the video may play up to here: what follows hasn't been looked at
    joined: false, // whether the video has been put where the stream is
    latency: [],
    memory: [],
    counts: { end: 0, dropped: 0, merged: 0, error: 0 },
    answer: null, // where the answer goes that is being given
    following: false, // whether the list of captions is to be scrolled to its end
  };
}

// Events of the server

function connect() {
  let heard = false;
  let alone = false;
  const byMyself = () => {
    if (!heard && !alone) {
      alone = true;
      listen(deliver);
    }
  };
  if (!window.SharedWorker) {
    byMyself();
    return;
  }
  const worker = new SharedWorker("/events.js", { type: "module" });
  worker.onerror = byMyself;
  setTimeout(byMyself, WORKER_MILLISECONDS);
  worker.port.onmessage = ({ data }) => {
    heard = true; // the worker greets every page
    if (!alone) {
      deliver(data);
    }
  };
  addEventListener("pagehide", () => worker.port.postMessage("closed"));
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
}

const HANDLERS = {
  session(session) {
    if (run !== session.run) {
      run = session.run;
      clear();
      playable = session.video;
      video.hidden = true;
      if (playable) {
        video.src = "/video";
      }
    }
    document.title = session.title;
    element("title").textContent = session.title;
    showState(session);
  },
  state: showState,
  gap({ lost }) {
    element("gap").hidden = false;
    element("gap").textContent = `${lost} earlier events are no longer kept.`;
  },
  caption,
  answer,
  memory({ frame_index, text, image, recurrent = 0 }) {
    // What linear attention remembers is of the text.
    keep(stream.memory, { x: frame_index, first: text + recurrent, second: image });
  },
  question({ text }) {
    stream.answer = document.createElement("p");
    stream.answer.className = "answer";
    const item = document.createElement("li");
    item.append(paragraph("question", text), stream.answer);
    element("answers").prepend(item);
    trim(element("answers"), KEPT_ANSWERS, "lastChild");
    element("asked").textContent = "The model is answering…";
  },
  lost() {
    if (state !== "closed") {
      showStatus("lost", "No connection; trying again…");
      element("pause").disabled = true;
    }
  },
  restart() {
    run = null;
  },
};

function deliver(messages) {
  for (const [name, data] of messages) {
    HANDLERS[name](JSON.parse(data));
  }
  if (stream.joined) {
    keepInStep(); // also in a page that is hidden and isn't drawn
  }
  refresh();
}

function caption(event) {
  const { kind } = event;
  const frame = event.frame_index < 0 ? null : frameOf(event); // there is none where the video has a problem
  if (kind === "text") {
    frame.text += event.text;
    followCaptions();
    line(frame).lastChild.append(event.text);
    return;
  }
  stream.counts[kind] += event.count;
  if (kind !== "end") {
    report(event);
    return;
  }
  frame.cut = event.cut;
  keep(stream.latency, { x: event.frame_index, first: event.latency });
  if (event.text.trim()) {
    element("spoken").textContent = event.text;
  }
}

function answer({ kind, text, message }) {
  if (kind === "answer") {
    stream.answer?.append(text);
    return;
  }
  if (kind === "error") {
    stream.answer?.classList.add("error");
    stream.answer?.append(message);
  }
  element("spoken").textContent = text || message;
  element("asked").textContent = "";
  stream.answer = null;
}

function showState({ state: name, message }) {
  state = name;
  showStatus(name, [STATES[name] ?? name, message].filter(Boolean).join(": "));
  const button = element("pause");
  button.textContent = name === "paused" ? "Resume" : "Pause";
  button.disabled = name !== "running" && name !== "paused";
}

function showStatus(name, text) {
  element("status").dataset.state = name;
  element("status").textContent = text;
}

// Captions

function frameOf({ kind, frame_index: index, start, end }) {
  let frame = stream.frames.get(index);
  if (!frame) {
    frame = { index, start, end, text: "", cut: false, line: null };
    stream.frames.set(index, frame);
    if (stream.frames.size > KEPT_FRAMES) {
      stream.frames.delete(stream.frames.keys().next().value);
    }
    stream.frontier = Math.max(stream.frontier, end);
    period = end - start;
  }
  if (kind === "text" || kind === "end") {
    stream.latest = frame; // one that the model has looked at
  }
  return frame;
}

function line(frame) {
  frame.line ??= addLine(frame.start, paragraph("", ""));
  return frame.line;
}

function report({ kind, start, message }) {
  addLine(start, paragraph(`report ${kind}`, `${kind}: ${message}`));
}

function addLine(start, content) {
  followCaptions();
  const list = element("captions");
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.dateTime = `PT${start.toFixed(3)}S`;
  time.textContent = clock(start, period < 1 ? 1 : 0);
  if (!playable) {
    item.append(time, content);
  } else {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Show this moment";
    button.append(time);
    button.onclick = () => seek(start);
    item.append(button, content);
  }
  element("none").hidden = true;
  list.append(item);
  trim(list, KEPT_LINES, "firstChild");
  return item;
}

// The list stays at its end while nobody has scrolled away from there.
function followCaptions() {
  const list = element("captions");
  stream.following ||= list.scrollHeight - list.scrollTop - list.clientHeight < 40;
}

function paragraph(className, text) {
  const made = document.createElement("p");
  made.className = className;
  made.textContent = text;
  return made;
}

function trim(list, length, end) {
  while (list.childElementCount > length) {
    list[end].remove();
  }
}

function clear() {
  stream = fresh();
  for (const id of ["captions", "answers"]) {
    element(id).replaceChildren();
  }
  element("gap").hidden = true;
  element("none").hidden = false;
  element("spoken").textContent = "";
}

// The video, or the frames where there is none to play

const now = () => (!playable ? (stream.latest?.start ?? 0) : video.currentTime);
const atFrontier = () => video.currentTime >= stream.frontier + (state === "finished" ? period : 0) - SLACK_SECONDS;

function keepInStep() {
  if (video.hidden || !stream.latest) {
    return;
  }
  if (!stream.joined) {
    stream.joined = true;
    const [first] = stream.frames.values();
    video.currentTime = (state === "finished" ? first : stream.latest).start;
  }
  // Nothing is shown before the model has begun to look at it; a slow model makes the video wait.
  const plays = (state === "running" || state === "finished") && !atFrontier();
  if (plays && video.paused && !video.ended) {
    video.play().catch(() => {}); // the browser may want a gesture first; the next press of a button is one
  } else if (!plays && !video.paused) {
    video.pause();
  }
}

function watch() {
  keepInStep();
  showTime();
  if (!video.paused) {
    requestAnimationFrame(watch);
  }
}

function seek(time) {
  video.currentTime = Math.max(0, Math.min(time, stream.frontier - SLACK_SECONDS));
  refresh();
}

function showTime() {
  const time = now();
  element("clock").textContent = clock(time);
  element("live").hidden = !playable || stream.frontier - time < 2 + 2 * period;
  let text = "";
  let cut = false; // whether the text before is continued
  let current = null;
  for (const frame of stream.frames.values()) {
    if (frame.start > time + SLACK_SECONDS) {
      break;
    }
    if (frame.start > time - SUBTITLE_SECONDS) {
      text += (cut || !frame.text ? "" : " ") + frame.text;
    }
    cut = frame.cut;
    current = frame.line ?? current;
  }
  const highlighted = element("captions").querySelector("[aria-current]");
  if (highlighted !== current) {
    highlighted?.removeAttribute("aria-current");
    current?.setAttribute("aria-current", "time");
  }
  const subtitle = element("subtitle");
  text = text.replace(/\s+/g, " ").trim();
  const shown = text.length > SUBTITLE_CHARACTERS ? `…${text.slice(-SUBTITLE_CHARACTERS)}` : text;
  if (subtitle.textContent !== shown.trim()) {
    const span = document.createElement("span");
    span.textContent = shown.trim();
    subtitle.replaceChildren(...(shown.trim() ? [span] : []));
  }
}

let loading = false;

function showFrame() {
  if (playable || loading || !stream.latest || image.dataset.frame === String(stream.latest.index)) {
    return;
  }
  const frame = stream.latest;
  const loaded = new Image();
  loading = true;
  const done = () => {
    loading = false;
    image.dataset.frame = frame.index;
    refresh();
  };
  loaded.onload = () => {
    image.src = loaded.src;
    image.alt = `Frame at ${clock(frame.start)}`;
    image.hidden = false;
    element("placeholder").hidden = true;
    done();
  };
  loaded.onerror = done;
  loaded.src = `/frames/${run}/${frame.index}.jpg`;
}

video.addEventListener("loadedmetadata", () => {
  video.hidden = false;
  image.hidden = true;
  element("sound").hidden = false;
  element("placeholder").hidden = true;
  stream.joined = false;
  refresh();
});
video.addEventListener("error", () => {
  // A format that this browser doesn't play: the frames that the model sees are shown instead.
  playable = false;
  video.hidden = true;
  refresh();
});
video.addEventListener("play", watch);
video.addEventListener("timeupdate", keepInStep);
video.addEventListener("seeked", showTime);

// Plots

function keep(points, point) {
  points.push(point);
  if (points.length > KEPT_FRAMES) {
    points.shift();
  }
}

function draw(target, points, { limit, format, label }) {
  const namespace = "http://www.w3.org/2000/svg";
  const make = (name, attributes) => {
    const made = document.createElementNS(namespace, name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, value);
    }
    return made;
  };
  const values = points.flatMap((point) => [point.first, point.second ?? 0]);
  const top = 1.1 * Math.max(limit ?? 0, ...values) || 1;
  const [left, right] = [points[0].x, Math.max(points.at(-1).x, points[0].x + 1)];
  const place = (x, y) => `${((100 * (x - left)) / (right - left)).toFixed(2)} ${(100 - (100 * y) / top).toFixed(2)}`;
  const svg = make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", label);
  if (limit !== undefined) {
    svg.append(make("path", { class: "limit", d: `M${place(left, limit)} L${place(right, limit)}` }));
  }
  for (const name of ["second", "first"]) {
    if (points[0][name] !== undefined) {
      svg.append(make("path", { class: name, d: `M${points.map((point) => place(point.x, point[name])).join(" L")}` }));
    }
  }
  const scale = document.createElement("div");
  scale.className = "scale";
  scale.append(paragraph("", format(top)), paragraph("", format(0)));
  const range = document.createElement("div");
  range.className = "range";
  range.append(paragraph("", `frame ${left}`), paragraph("", `frame ${right}`));
  for (const part of [scale, range]) {
    part.setAttribute("aria-hidden", "true");
  }
  target.replaceChildren(scale, svg, range);
}

function drawPlots() {
  if (stream.latency.length) {
    element("due").textContent = `a frame is due every ${seconds(period)}`;
    const last = seconds(stream.latency.at(-1).first);
    element("latency-now").textContent = last;
    draw(element("latency-plot"), stream.latency, {
      limit: period,
      format: seconds,
      label: `Latency of the last ${stream.latency.length} frames, now ${last}`,
    });
  }
  if (stream.memory.length) {
    const { first, second } = stream.memory.at(-1);
    element("memory-now").textContent = bytes(first + second);
    element("text-now").textContent = bytes(first);
    element("image-now").textContent = bytes(second);
    draw(element("memory-plot"), stream.memory, {
      format: bytes,
      label: `Memory of the cache, now ${bytes(first)} for text and ${bytes(second)} for images`,
    });
  }
  for (const [kind, count] of Object.entries(stream.counts)) {
    element(`count-${kind}`).textContent = count;
  }
}

// Formats

function clock(time, digits = 0) {
  const whole = Math.floor(time + 1e-6);
  const fraction = digits ? `.${String(Math.floor((time - whole + 1e-6) * 10 ** digits)).padStart(digits, "0")}` : "";
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(rest)}${fraction}`;
}

function seconds(time) {
  return time < 1 ? `${Math.round(1000 * time)} ms` : `${time.toFixed(2)} s`;
}

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = number < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(number) / 10));
  return `${(number / 1024 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
}

// Drawing once per animation frame, however many events arrive

let pending = false;

function refresh() {
  if (pending) {
    return;
  }
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    if (stream.following) {
      stream.following = false;
      element("captions").scrollTop = element("captions").scrollHeight;
    }
    keepInStep();
    showFrame();
    showTime();
    drawPlots();
  });
}

// What a person does

async function send(path, content) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  });
  if (!response.ok) {
    throw new Error((await response.json()).error);
  }
}

function togglePause() {
  const button = element("pause");
  if (!button.disabled) {
    send(state === "paused" ? "/resume" : "/pause", {}).catch((error) => {
      element("asked").textContent = error.message;
    });
  }
}

element("pause").onclick = togglePause;
element("live").onclick = () => seek(stream.latest.start);
element("sound").onclick = () => {
  video.muted = !video.muted;
  element("sound").setAttribute("aria-pressed", String(!video.muted));
};
element("fullscreen").onclick = () => {
  if (document.fullscreenElement) {
    document.exitFullscreen();
  } else {
    element("screen").requestFullscreen?.();
  }
};
element("fullscreen").hidden = !document.fullscreenEnabled;
document.addEventListener("keydown", (event) => {
  if (event.key === " " && !event.target.closest("button, input, ol")) {
    event.preventDefault();
    togglePause();
  }
});
element("ask").onsubmit = async (event) => {
  event.preventDefault();
  const question = element("question");
  element("asked").textContent = "Asked; the answer comes after the current frame.";
  try {
    await send("/ask", { question: question.value });
    question.value = "";
  } catch (error) {
    element("asked").textContent = error.message;
  }
};

connect();
