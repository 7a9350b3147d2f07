"use strict";
// What comes from the index is only ever set as text or as an attribute, never read as HTML.

const SIDE = 1536; // pixels of the longer side that are sent of a larger image
const $ = (id) => document.getElementById(id);
const asked = []; // the searches since the page was loaded, for the browser's way back
const loaded = performance.timeOrigin; // states of the history that an earlier load has left have another one
let image = null; // a data URI, or nothing
let running = null;

// ---------------------------------------------------------------- the image

async function takeImage(file) {
  if (!file) return;
  showError("");
  if (!file.type.startsWith("image/")) return showError(`“${file.name}” is not an image.`);
  try {
    image = await asDataURI(file);
  } catch {
    return showError(`“${file.name || "The image"}” cannot be read; it may be broken, or of a kind this browser does not know.`);
  }
  showImage();
}

async function asDataURI(file) {
  const bitmap = await createImageBitmap(file);
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1) return read(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // as the server does with what is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function showImage() {
  $("preview").hidden = $("clear").hidden = image === null;
  $("pick").hidden = image !== null;
  if (image === null) $("preview").removeAttribute("src");
  else $("preview").src = image;
  $("file").value = "";
}

// ---------------------------------------------------------------- the search

function fromForm() {
  const question = { k: Number($("k").value) };
  if ($("text").value.trim()) question.text = $("text").value.trim();
  if (image !== null) question.image = image;
  if ($("where").value.trim()) question.where = $("where").value.trim();
  return question;
}

async function search(question, title, { remember = true } = {}) {
  showError("");
  if (!question.text && !question.image && !question.like) {
    showError("Type some words, or choose an image.");
    return $("text").focus();
  }
  running?.abort();
  const mine = (running = new AbortController());
  $("results").setAttribute("aria-busy", "true");
  $("status").textContent = "Searching…";
  try {
    const hits = await ask(question, mine.signal);
    if (remember) {
      asked.push({ question, title });
      history.pushState({ loaded, number: asked.length - 1 }, "");
    }
    show(hits, title);
  } catch (error) {
    if (error.name !== "AbortError") {
      $("status").textContent = "";
      showError(error.message);
    }
  }
  if (running === mine) $("results").setAttribute("aria-busy", "false");
}

async function ask(question, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("token").value) headers.Authorization = `Bearer ${$("token").value}`;
  let answer;
  try {
    answer = await fetch("search", { method: "POST", headers, body: JSON.stringify(question), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (answer.status === 401) {
    $("locked").hidden = false;
    $("token").focus();
    throw new Error("This server asks for a token: type it in and search again.");
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.error?.message ?? `The server answered ${answer.status}.`);
  return content.hits;
}

// ---------------------------------------------------------------- what is shown

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function show(hits, title) {
  $("heading").textContent = title;
  $("status").textContent = hits.length === 1 ? "1 result" : `${hits.length} results`;
  if (!hits.length) $("status").textContent = "Nothing found; is the filter too narrow?";
  $("results").replaceChildren(...hits.map(card));
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function card(hit, place) {
  const name = hit.text || hit.id;
  const face = hit.thumbnail
    ? element("img", { src: hit.thumbnail, alt: hit.text || `Image ${hit.id}`, loading: "lazy" })
    : element("span", { className: "none", textContent: shortened(name, 160) });
  const more = element("button", { className: "more", type: "button", title: "More like this" }, face);
  more.setAttribute("aria-label", `More like ${shortened(name, 80)}; result ${place + 1}, score ${hit.score.toFixed(3)}`);
  more.addEventListener("click", () => like(hit));
  const parts = [
    more,
    element("p", { className: "score" }, element("span", { textContent: `${place + 1}` }),
      element("span", { textContent: hit.score.toFixed(3), title: "cosine" })),
  ];
  if (hit.text && hit.thumbnail) parts.push(element("p", { className: "text", textContent: shortened(hit.text, 400) }));
  const extra = Object.entries(hit.extra).filter(([, value]) => value !== null);
  if (extra.length) {
    const pairs = extra.flatMap(([key, value]) => [
      element("dt", { textContent: key }),
      element("dd", { textContent: shortened(typeof value === "object" ? JSON.stringify(value) : `${value}`, 200) }),
    ]);
    parts.push(element("dl", {}, ...pairs));
  }
  if (hit.text || hit.thumbnail) parts.push(element("p", { className: "id", textContent: hit.id }));
  return element("li", { className: "card hit" }, ...parts);
}

function shortened(text, length) {
  return text.length > length ? `${text.slice(0, length - 1).trimEnd()}…` : text;
}

async function like(hit) {
  const question = { like: hit.id, k: Number($("k").value) };
  if ($("where").value.trim()) question.where = $("where").value.trim();
  await search(question, `More like “${shortened(hit.text || hit.id, 80)}”`);
  $("heading").focus(); // a screen reader continues where the new results begin
  $("heading").scrollIntoView({ block: "start" });
}

function titleOf(question) {
  const words = question.text ? `“${shortened(question.text, 80)}”` : "";
  if (!question.image) return words;
  return words ? `Your image and ${words}` : "Your image";
}

// ---------------------------------------------------------------- what people do

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = fromForm();
  search(question, titleOf(question));
});
$("file").addEventListener("change", () => takeImage($("file").files[0]));
$("clear").addEventListener("click", () => {
  image = null;
  showImage();
  $("file").focus();
});
for (const name of ["dragenter", "dragover"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
window.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) $("drop").classList.remove("over");
});
window.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  takeImage(event.dataTransfer.files[0]);
});
window.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  takeImage(file);
});
window.addEventListener("popstate", (event) => {
  const before = event.state?.loaded === loaded ? asked[event.state.number] : null;
  if (before) search(before.question, before.title, { remember: false });
  else {
    running?.abort();
    $("results").replaceChildren();
    $("heading").textContent = $("status").textContent = "";
  }
});
