"use strict";
// Every text of a prompt or completion is put on the page by `textContent`: it is never read as markup.

const WORDS = {
  en: {
    title: "Which answer is better?", name: "Your name", password: "Password", login: "Start", logout: "Log out",
    guidelines: "Guidelines", prompt: "Prompt", tie: "Equally good", incomparable: "Cannot compare", skip: "Skip",
    rank: "Rank all", send: "Send the order", comment: "Comment", undo: "Undo the last answer",
    done: "Nothing to label at the moment. New questions appear when you reload.", best: "This one",
    cut: "Cut here by length: the answer went on.",
    own: (n) => `${n} by you`, all: (n, m) => `${n} of ${m} in all`, other: "中文",
    lost: "The answer was not stored: no connection. Try again; it is counted once.", taken: "Somebody else has this one now. Here is the next.",
    stored: "Your earlier answer to the question before was stored. Undo it to change it.",
    stuck: "The answer was stored, but the next question did not come. Reload the page.",
  },
  zh: {
    title: "哪个回答更好？", name: "您的名字", password: "密码", login: "开始", logout: "退出",
    guidelines: "标注说明", prompt: "提示", tie: "一样好", incomparable: "无法比较", skip: "跳过",
    rank: "全部排序", send: "提交排序", comment: "备注", undo: "撤销上一个回答",
    done: "暂时没有可标注的内容。刷新页面可以查看新的问题。", best: "选这个",
    cut: "因长度限制在此截断，回答并未结束。",
    own: (n) => `您已标 ${n} 条`, all: (n, m) => `共 ${n} / ${m} 条`, other: "English",
    lost: "没有存上：网络断开。请再试一次，不会重复计数。", taken: "这一条已被别人领走，换下一条。",
    stored: "您先前对上一条的回答已经存上。要修改请撤销。", stuck: "回答已存上，但下一条没有取到。请刷新页面。",
  },
};

const $ = (id) => document.getElementById(id);
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let state = { task: null, key: null, ranking: null, lastLabel: null, busy: false, progress: null, name: null };
let clock = { since: 0, spent: 0 };

function words() {
  return WORDS[language];
}

function translate() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = words()[element.dataset.text];
  $("language").textContent = words().other;
  for (const span of document.querySelectorAll(".choose span")) span.textContent = words().best;
  for (const note of document.querySelectorAll(".cut")) note.textContent = words().cut;
  showProgress();
}

function showProgress() {
  const progress = state.progress;
  $("progress").textContent = progress ? `${words().own(progress.own)} · ${words().all(progress.labels, progress.wanted)}` : "";
}

async function call(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await fetch(path, { credentials: "same-origin", ...options });
  const found = await response.json();
  if (!response.ok) throw Object.assign(new Error(found.message), { reason: found.reason, status: response.status });
  return found;
}

// The time that somebody looked at the task, without the time the page was hidden.
function startClock() {
  clock = { since: performance.now(), spent: 0 };
}

function secondsSpent() {
  const running = document.hidden ? 0 : performance.now() - clock.since;
  return (clock.spent + running) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clock.spent += performance.now() - clock.since;
  else clock.since = performance.now();
});

function textOf(value) {
  if (value === null) return "";
  if (typeof value === "string") return value;
  return value.map((turn) => `${turn.role}: ${typeof turn.content === "string" ? turn.content : JSON.stringify(turn.content)}`).join("\n\n");
}

function showTask(task) {
  state.task = task;
  state.key = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()) + String(Date.now());
  setRanking(null);
  $("work").hidden = task === null;
  $("done").hidden = task !== null;
  $("comment").value = "";
  $("candidates").replaceChildren();
  if (task === null) return;
  $("prompt").textContent = textOf(task.prompt);
  task.completions.forEach((completion, place) => {
    const box = document.createElement("article");
    box.className = "candidate";
    const text = document.createElement("div");
    text.className = "text";
    text.textContent = textOf(completion);
    const button = document.createElement("button");
    button.type = "button";
    button.className = "choose";
    const key = document.createElement("kbd");
    key.textContent = String(place + 1);
    const label = document.createElement("span");
    label.textContent = words().best;
    button.append(key, " ", label);
    button.addEventListener("click", () => choose(place));
    box.append(text);
    if (task.truncated[place]) {
      const note = document.createElement("p");
      note.className = "cut";
      note.textContent = words().cut;
      box.append(note);
    }
    box.append(button);
    $("candidates").append(box);
  });
  startClock();
}

function setRanking(ranking) {
  state.ranking = ranking;
  $("rank").setAttribute("aria-pressed", String(ranking !== null));
  $("send").hidden = ranking === null || state.task === null || ranking.length < state.task.completions.length;
  document.querySelectorAll(".candidate").forEach((box, place) => {
    const rank = ranking === null ? -1 : ranking.indexOf(place);
    box.classList.toggle("chosen", rank >= 0);
    box.querySelector("kbd").textContent = rank >= 0 ? `${place + 1} → ${rank + 1}.` : String(place + 1);
  });
}

function choose(place) {
  if (state.task === null || place >= state.task.completions.length) return;
  if (state.ranking === null) {
    answer("best", place);
    return;
  }
  const without = state.ranking.filter((other) => other !== place);
  setRanking(without.length < state.ranking.length ? without : [...state.ranking, place]);
}

async function answer(kind, value = null) {
  if (state.task === null || state.busy) return;
  state.busy = true;
  $("message").textContent = "";
  const comment = $("comment").value.trim();
  try {
    const found = await call("/api/label", {
      comparison_id: state.task.comparison_id, kind, value, seconds: secondsSpent(), comment: comment || null, key: state.key,
    });
    state.lastLabel = found.label_id;
    await nextTask().catch((error) => report(error, words().stuck));
  } catch (error) {
    if (["taken", "labelled", "key"].includes(error.reason)) {
      // An answer whose reply was lost: to undo it, it has to be the last one here too.
      if (error.reason !== "taken") await findLastLabel().catch(() => {});
      const why = error.reason === "taken" ? words().taken : words().stored;
      await nextTask().then(() => { $("message").textContent = why; }, report);
    } else report(error);
  } finally {
    state.busy = false;
  }
}

function report(error, otherwise = words().lost) {
  if (error.reason === "login") showLogin();
  else $("message").textContent = error.reason ? error.message : otherwise;
}

async function nextTask() {
  const found = await call("/api/task", {});
  state.progress = found.progress;
  $("undo").hidden = state.lastLabel === null;
  showTask(found.task);
  showProgress();
}

async function undo() {
  if (state.lastLabel === null || state.busy) return;
  state.busy = true;
  try {
    await call("/api/undo", { label_id: state.lastLabel });
    state.lastLabel = null;
    await findLastLabel();
    await nextTask();
  } catch (error) {
    report(error);
  } finally {
    state.busy = false;
  }
}

async function findLastLabel() {
  const found = await call("/api/labels");
  state.lastLabel = found.labels.length ? found.labels[0].id : null;
}

function showLogin() {
  state.name = null;
  state.progress = null;
  $("login").hidden = false;
  for (const id of ["work", "done", "undo", "logout", "guidelines"]) $(id).hidden = true;
  $("who").textContent = "";
  showProgress();
  $("name").focus();
}

async function enter(session) {
  state.name = session.name;
  $("login").hidden = true;
  $("logout").hidden = false;
  $("who").textContent = session.name;
  $("guidelines").hidden = !session.guidelines;
  $("guidelines-text").textContent = session.guidelines;
  await findLastLabel();
  await nextTask();
}

$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("message").textContent = "";
  try {
    await call("/api/login", { name: $("name").value, password: $("password").value });
    $("password").value = "";
    await enter(await call("/api/session"));
  } catch (error) {
    report(error);
  }
});
$("logout").addEventListener("click", async () => {
  await call("/api/logout", {});
  showLogin();
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
});
$("tie").addEventListener("click", () => answer("tie"));
$("incomparable").addEventListener("click", () => answer("incomparable"));
$("skip").addEventListener("click", () => answer("skip"));
$("rank").addEventListener("click", () => setRanking(state.ranking === null ? [] : null));
$("send").addEventListener("click", () => answer("ranking", state.ranking));
$("undo").addEventListener("click", undo);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.tagName === "INPUT" || state.name === null) return;
  const key = event.key.toLowerCase();
  if (/^[1-9]$/.test(key)) choose(Number(key) - 1);
  else if (key === "t") answer("tie");
  else if (key === "x") answer("incomparable");
  else if (key === "s") answer("skip");
  else if (key === "r") $("rank").click();
  else if (key === "z") undo();
  else if (key === "enter" && !$("send").hidden) answer("ranking", state.ranking);
  else return;
  event.preventDefault();
});

(async () => {
  translate();
  try {
    const session = await call("/api/session");
    $("password-row").hidden = !session.needs_password;
    if (session.name === null) showLogin();
    else await enter(session);
  } catch (error) {
    report(error);
  }
})();
