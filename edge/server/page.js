// The chat: what is said goes to /v1/chat/completions, and what comes back is shown as it comes, always as text.
import { startCharts } from "./charts.js";

const byId = (id) => document.getElementById(id);
const log = byId("log"), field = byId("message"), settings = byId("settings-form");
const KEY = "minicpm-edge key", CHAT = "minicpm-edge chat", SETTINGS = "minicpm-edge settings";
const WHOLE = new Set(["stop", "tool_calls"]); // ends that need no explanation

let turns = []; // {role, content, reasoning, note}
let running = null; // the AbortController of the reply on its way

/** A sentence for the user. status: of the answer that refused; 0 if there was none. */
class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function stored(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // the browser forbids storage, or something else wrote there
  }
}

function store(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
  } catch {
    // Full or forbidden: the page works on, and forgets when it is closed.
  }
}

/** What the server answers; Refused with its own sentence if it does not do what was asked. */
async function ask(path, options = {}) {
  const key = stored(sessionStorage, KEY, "");
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${latin1OfUtf8(key)}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer; check that it is running, then try again.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(sentence(body?.error?.message ?? `the server answered ${response.status}`), response.status);
}

/** The server takes a key's bytes as UTF-8; headers are written a byte a character. */
function latin1OfUtf8(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Shows a turn -> {say, think, note}, which add to it. */
function show(turn) {
  byId("empty").hidden = true;
  const isUser = turn.role === "user";
  const text = document.createTextNode(turn.content), thought = document.createTextNode(turn.reasoning ?? "");
  const said = element("p", { className: "said", dir: "auto" }, text);
  const details = element("details", { hidden: !turn.reasoning }, element("summary", { textContent: "Reasoning" }));
  details.append(element("p", { className: "said", dir: "auto" }, thought));
  const note = element("p", { className: "note", textContent: turn.note ?? "" });
  const copy = element("button", { type: "button", textContent: "Copy", onclick: () => copyText(turn.content) });
  copy.setAttribute("aria-label", isUser ? "Copy this message" : "Copy this reply");
  const head = element("div", { className: "bar" }, element("h3", { textContent: isUser ? "You" : "Model" }), copy);
  const parts = isUser ? [said] : [details, said, note];
  const article = element("article", { className: turn.role }, head, ...parts);
  log.append(article);
  const add = (node, more, name) => {
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    turn[name] = (turn[name] ?? "") + more;
    node.appendData(more);
    details.hidden = !turn.reasoning;
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  };
  log.scrollTop = log.scrollHeight;
  return {
    article,
    say: (more) => add(text, more, "content"),
    think: (more) => add(thought, more, "reasoning"),
    note: (words) => {
      turn.note = note.textContent = words;
      log.scrollTop = log.scrollHeight;
    },
  };
}

/** For screen readers: whole sentences, each once. */
function announcer() {
  const place = byId("spoken");
  let rest = "";
  const announce = (text) => {
    if (!text.trim()) return;
    place.append(element("p", { textContent: text }));
    while (place.childElementCount > 30) place.firstElementChild.remove();
  };
  return {
    announce,
    say(more) {
      rest += more;
      const whole = /^[\s\S]*(?:[.!?](?=\s)|[。！？\n])/.exec(rest)?.[0] ?? "";
      announce(whole);
      rest = rest.slice(whole.length);
    },
    finish() {
      announce(rest);
      rest = "";
    },
  };
}

/** The events of a stream, parsed, up to its end mark. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refused("The reply broke off; the server may have been stopped.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Refused(sentence(parsed.error.message));
      yield parsed;
    }
  }
}

function requestBody() {
  const { system, ...chosen } = chosenSettings();
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system?.trim()) messages.unshift({ role: "system", content: system });
  return JSON.stringify({ ...chosen, messages, stream: true, stream_options: { include_usage: true } });
}

function chosenSettings() {
  const chosen = {};
  for (const input of settings.querySelectorAll("[name]")) {
    if (input.value === "") continue;
    if (input.type === "number") chosen[input.name] = Number(input.value);
    else chosen[input.name] = input.name === "enable_thinking" ? input.value === "true" : input.value;
  }
  return chosen;
}

/** Read a reply into a turn that is shown -> a note on how it went. */
async function read(response, shown, voice) {
  const asked = performance.now();
  let first = 0, reason = null, usage = null;
  for await (const event of eventsOf(response)) {
    usage = event.usage ?? usage;
    const choice = event.choices[0];
    if (!choice) continue;
    reason = choice.finish_reason ?? reason;
    const { content, reasoning_content: reasoning } = choice.delta;
    if ((content || reasoning) && !first) first = performance.now();
    if (reasoning) shown.think(reasoning);
    if (content) {
      shown.say(content);
      voice.say(content);
    }
  }
  const ended = performance.now(), facts = [];
  if (usage) {
    const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = usage;
    facts.push(`${tokens} tokens`);
    if (tokens > 1 && ended > first) facts.push(`${((1000 * (tokens - 1)) / (ended - first)).toFixed(1)} tokens/s`);
    if (first) facts.push(`first after ${((first - asked) / 1000).toFixed(2)} s`);
    facts.push(`prompt ${prompt} tokens, ${details?.cached_tokens ?? 0} of them cached`);
  }
  if (reason === "length") facts.push("cut off: the longest reply, or the context, is full");
  else if (!WHOLE.has(reason)) facts.push(`ended: ${reason}`);
  return facts.join(" · ");
}

async function send() {
  const text = field.value;
  if (running || !text.trim()) return;
  if (!settings.checkValidity()) {
    byId("settings").open = true;
    settings.reportValidity();
    return;
  }
  complain("");
  const question = { role: "user", content: text }, answer = { role: "assistant", content: "" };
  turns.push(question);
  const asked = show(question), body = requestBody(), shown = show(answer), voice = announcer();
  turns.push(answer);
  field.value = "";
  setRunning(new AbortController());
  shown.article.classList.add("waiting");
  voice.announce("The model is replying.");
  const options = { method: "POST", body, headers: { "Content-Type": "application/json" }, signal: running.signal };
  try {
    shown.note(await read(await ask("v1/chat/completions", options), shown, voice));
    voice.say("\n");
    voice.announce("The reply is complete.");
  } catch (error) {
    voice.finish();
    if (error.name === "AbortError") voice.announce("The reply was stopped.");
    else complain(error.message, error.status);
    if (!turns.includes(answer)) {
      // A new chat has begun.
    } else if (answer.content || answer.reasoning) {
      shown.note(error.name === "AbortError" ? "stopped" : "broken off");
    } else {
      // Nothing came of it: the question goes back to where it can be sent again.
      turns.splice(-2);
      asked.article.remove();
      shown.article.remove();
      if (!field.value) field.value = text;
      byId("empty").hidden = turns.length > 0;
    }
  }
  shown.article.classList.remove("waiting");
  setRunning(null);
  store(sessionStorage, CHAT, turns);
}

function setRunning(controller) {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  running = controller;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  if (hadFocus) field.focus();
}

/** Show a sentence; one about a missing key with the field for it. */
function complain(words, status = 0) {
  byId("error").textContent = words;
  if (status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
}

async function copyText(text) {
  const voice = announcer();
  try {
    await navigator.clipboard.writeText(text);
    voice.announce("Copied.");
  } catch {
    // Over plain HTTP from another machine there is no clipboard but that of the selection.
    const holder = element("textarea", { value: text }), focused = document.activeElement;
    document.body.append(holder);
    holder.select();
    const isCopied = document.execCommand("copy");
    holder.remove();
    focused.focus();
    if (isCopied) voice.announce("Copied.");
    else complain("This browser does not let the page copy; select the text and press Ctrl+C.");
  }
}

function newChat() {
  running?.abort();
  turns = [];
  log.replaceChildren(byId("empty"));
  byId("empty").hidden = false;
  byId("spoken").replaceChildren();
  complain("");
  store(sessionStorage, CHAT, turns);
  field.focus();
}

let asked = 0;

/** Who answers, and whether the key is right. Answers to an earlier key may come late, and count no more. */
async function readModel() {
  const turn = ++asked;
  try {
    const model = (await (await ask("v1/models")).json()).data[0];
    if (turn !== asked) return false;
    byId("model").textContent = `${model.id}, context of ${model.max_model_len.toLocaleString("en")} tokens`;
    document.title = `${model.id} · minicpm-edge`;
    if (!byId("key-form").hidden) complain(""); // any other sentence is about something else
    byId("key-form").hidden = true;
    return true;
  } catch (error) {
    if (turn === asked) complain(error.message, error.status);
    return false;
  }
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new").addEventListener("click", newChat);
  byId("copy-all").addEventListener("click", () => {
    const named = turns.map(({ role, content }) => `${role === "user" ? "You" : "Model"}: ${content}`);
    copyText(named.join("\n\n"));
  });
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    store(sessionStorage, KEY, byId("key").value);
    if (await readModel()) field.focus();
  });
  const keep = () => store(localStorage, SETTINGS, chosenSettings());
  settings.addEventListener("input", keep);
  settings.addEventListener("submit", (event) => event.preventDefault());
  settings.addEventListener("reset", () => setTimeout(keep));
}

function restore() {
  for (const [name, value] of Object.entries(stored(localStorage, SETTINGS, {}))) {
    const input = settings.elements.namedItem(name);
    if (input) input.value = String(value);
  }
  turns = stored(sessionStorage, CHAT, []);
  turns.forEach(show);
}

restore();
listen();
readModel();
startCharts(async () => (await ask("stats")).json());
