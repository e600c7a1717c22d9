(() => {
  const section = document.getElementById("conversations");
  if (!section) return;
  const talks = [...section.querySelectorAll(".talk")], filters = section.querySelector(".filters");
  const AT_ONCE = 30; // in the list, until more are asked for
  const LONG = { characters: 700, lines: 14 }; // text beyond this is folded
  const LINE = 76; // characters of a call on one line

  const number = (value) => (value === null ? "–" : String(+value.toPrecision(4)).replace("-", "−"));
  const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));
  const sign = (worth) => (worth === null ? "" : worth > 0 ? "up" : worth < 0 ? "down" : "level");

  // ------------------------------------------------------------------ pictures

  /** Where pictures were cut out of this one, and where its evidence is: boxes over it. */
  const boxes = (talk, n) => {
    const { width, height } = talk.pictures[n];
    const within = ([left, top, right, bottom]) => right - left < width || bottom - top < height;
    const cut = talk.pictures.map((picture) => ({ name: `image ${picture.number}`, box: picture.source === n ? picture.box : null }));
    const evidence = n === talk.asked && talk.evidence ? [{ name: "evidence", box: talk.evidence, kind: "evidence" }] : [];
    return [...evidence, ...cut.filter(({ box }) => box && within(box))].map(({ name, box: [left, top, right, bottom], kind }) => {
      const part = (value, whole) => `${((100 * value) / whole).toFixed(2)}%`;
      const box = html("span", { class: `box ${kind ?? ""}` }, html("small", {}, name));
      Object.assign(box.style, { left: part(left, width), top: part(top, height), width: part(right - left, width), height: part(bottom - top, height) });
      return box;
    });
  };

  const screen = (talk, n) => {
    const { file, width, height } = talk.pictures[n], source = data.pictures[file];
    if (!source) return html("span", { class: "screen missing" }, "not embedded, to keep this page small");
    const image = html("img", { src: source, alt: `Image ${talk.pictures[n].number} of the conversation.`, width, height });
    if (Math.max(width, height) <= 128) image.classList.add("small");
    return html("span", { class: "screen" }, image, ...boxes(talk, n));
  };

  const caption = (talk, n) => {
    const { number, width, height, source } = talk.pictures[n];
    return `image ${number} · ${width} × ${height}${source === null ? "" : ` · of image ${talk.pictures[source].number}`}`;
  };

  const enlarge = (talk, n) => {
    const shown = screen(talk, n), { width, height } = talk.pictures[n];
    shown.style.setProperty("--shape", width / height);
    enlarged.replaceChildren(shown, html("p", { class: "small" }, caption(talk, n), html("button", { type: "button" }, "Close")));
    enlarged.showModal();
  };

  const picture = (talk, n) => {
    const button = html("button", { type: "button", class: "picture", title: "Enlarge" }, screen(talk, n), html("small", {}, caption(talk, n)));
    button.addEventListener("click", () => enlarge(talk, n));
    return button;
  };

  // ------------------------------------------------------------------ messages

  /** A text, folded where it is long. */
  const text = (value) => {
    const whole = html("div", { class: "text" }, value), lines = value.split("\n").length;
    if (value.length <= LONG.characters && lines <= LONG.lines) return whole;
    const first = value.trim().slice(0, 120).split("\n")[0];
    return html("details", { class: "fold" }, html("summary", {}, html("span", {}, `${first} …`), html("small", {}, `${value.length.toLocaleString("en")} characters`)), whole);
  };

  const parts = (talk, message) => message.parts.map((part) => (typeof part === "number" ? picture(talk, part) : text(part)));

  const tokens = (message) => {
    const line = html("div", { class: "text tokens" });
    message.tokens.forEach(([piece, , worth], i) => line.append(html("span", { class: `t ${sign(worth)}`, "data-i": i }, piece)));
    line.message = message;
    return line;
  };

  /** An argument as it would be written; a text of several lines as it stands. */
  const argument = ([name, value]) => {
    if (typeof value === "string" && value.includes("\n")) return `${name}=\n${value.replace(/^/gm, "    ")}`;
    return `${name}=${JSON.stringify(value)}`;
  };

  const written = (call) => {
    const given = Object.entries(call.arguments).map(argument), line = `${call.name}(${given.join(", ")})`;
    const below = given.map((each) => `  ${each}${each.includes("\n") ? "" : ","}\n`);
    return line.length <= LINE && !line.includes("\n") ? line : `${call.name}(\n${below.join("")})`;
  };

  const lasting = (seconds) => (seconds === null ? "" : seconds < 0.001 ? "less than 1 ms" : `${number(seconds)} s`);

  const call = (talk, called) => {
    const about = [lasting(called.seconds), ...Object.entries(called.numbers).map(([name, value]) => `${name} ${number(value)}`)];
    const head = html("p", { class: "small muted" }, about.filter(Boolean).join(" · "));
    if (called.error !== null) head.prepend(html("b", { class: "wrong" }, `✕ ${called.error.replaceAll("_", " ")}`), " ");
    const reply = called.reply === null ? [text(called.text)] : parts(talk, talk.messages[called.reply]);
    const code = called.name ? html("pre", { tabindex: 0 }, html("code", {}, written(called))) : html("p", { class: "small" }, "a call that could not be read");
    return html("div", { class: `call ${called.error === null ? "" : "failed"}` }, code, html("div", { class: "result" }, head, ...reply));
  };

  const learned = (message) => {
    if (message.advantage === undefined) return [];
    const worth = message.advantage === null ? "carries no loss" : `advantage ${signed(message.advantage)}`;
    const earned = message.reward ? [html("span", {}, `reward ${signed(message.reward)}`)] : [];
    return [html("span", { class: `worth ${sign(message.advantage)}` }, worth), ...earned];
  };

  const said = (talk, message, turn) => {
    const name = message.calls ? `policy · turn ${turn}` : message.role;
    const head = html("p", { class: "who small" }, html("b", {}, name), ...learned(message));
    if (message.finish === "length") head.append(html("span", { class: "wrong" }, "cut: too long"));
    const body = message.tokens ? [tokens(message)] : parts(talk, message);
    return html("div", { class: `said ${message.role}` }, head, ...body, ...(message.calls ?? []).map((called) => call(talk, called)));
  };

  /** All messages but those that stand below the call they answer. */
  const chat = (talk) => {
    const below = new Set(talk.messages.flatMap((message) => (message.calls ?? []).map((called) => called.reply)));
    let turn = 0;
    return html("div", { class: "chat" }, ...talk.messages.flatMap((message, i) => (below.has(i) ? [] : [said(talk, message, message.calls ? ++turn : 0)])));
  };

  // ------------------------------------------------------------------ what it came to

  const ENDINGS = { answer: "with an answer", turns: "out of turns", length: "too long", running: "cut by the rollout's end" };

  const facts = (talk) => {
    const list = html("dl", { class: "facts" });
    const add = (name, value) => list.append(html("div", {}, html("dt", {}, name), html("dd", {}, value)));
    add("answer", talk.answer === "" ? "a picture" : talk.answer ?? "none");
    if (talk.answer !== "" || talk.references.length) add(talk.references.length === 1 ? "right answer" : "right answers", talk.references.join(" · ") || "not known");
    if (talk.mark !== null) add("mark", number(talk.mark));
    add("ended", ENDINGS[talk.ended] ?? talk.ended);
    return list;
  };

  const rewards = (talk) => {
    if (!talk.rewards.length) return [];
    const head = html("tr", {}, ...["reward", "score", "weight"].map((name) => html("th", { scope: "col" }, name)));
    const rows = talk.rewards.map(({ name, score, weight }) =>
      html("tr", weight ? {} : { class: "muted" }, html("th", { scope: "row" }, name), html("td", {}, score === null ? "failed" : number(score)), html("td", {}, weight === null ? "" : `× ${number(weight)}`)));
    const total = html("tr", {}, html("th", { scope: "row" }, "total"), html("td", {}, number(talk.total)), html("td"));
    return [html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows), html("tfoot", {}, total))];
  };

  const open = (card, i) => {
    const body = card.querySelector(".body"), talk = data.conversations[i];
    if (card.open && !body.firstChild) body.append(html("aside", {}, facts(talk), ...rewards(talk)), chat(talk));
  };
  talks.forEach((card, i) => card.addEventListener("toggle", () => open(card, i)));

  // ------------------------------------------------------------------ reading tokens

  const hide = () => { tip.hidden = true; };
  section.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".t[data-i]");
    if (!token) return hide();
    const [piece, logProb, worth] = token.parentElement.message.tokens[token.dataset.i];
    const lines = [pair(JSON.stringify(piece), ""), pair("log-probability", number(logProb)), pair("probability", logProb === null ? "–" : `${number(100 * Math.exp(logProb))} %`)];
    tip.replaceChildren(...lines, worth === null ? pair("carries no loss", "") : pair("advantage", signed(worth)));
    tip.hidden = false;
    const box = token.getClientRects()[0];
    tip.style.left = `${scrollX + Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${scrollY + box.bottom + 6}px`;
  });
  section.addEventListener("pointerleave", hide);

  // ------------------------------------------------------------------ filters

  const words = []; // of each conversation, found when first searched
  const wordsOf = (i) => {
    const talk = data.conversations[i];
    words[i] ??= [talk.answer ?? "", ...talk.references, ...talk.messages.flatMap((message) =>
      [...message.parts.filter((part) => typeof part === "string"), ...(message.calls ?? []).map((called) => `${written(called)}\n${called.text}`)])].join("\n").toLowerCase();
    return words[i];
  };
  const uses = (card, wanted) => {
    const tools = JSON.parse(card.dataset.tools);
    const kinds = { any: tools.length > 0, none: tools.length === 0, failed: card.dataset.failed !== "0" };
    return kinds[wanted] ?? tools.includes(wanted.slice("tool ".length));
  };
  const earned = (card) => (card.dataset.earned === "" ? NaN : Number(card.dataset.earned));
  const TESTS = {
    tool: uses,
    low: (card, value) => earned(card) >= Number(value),
    high: (card, value) => earned(card) <= Number(value),
    text: (card, value) => wordsOf(talks.indexOf(card)).includes(value.toLowerCase()),
  };
  const same = (name) => (card, value) => card.dataset[name] === value;
  const more = document.getElementById("more-talks");
  let room = AT_ONCE;
  const filter = () => {
    const wanted = [...new FormData(filters)].filter(([, value]) => value);
    const found = talks.filter((card) => wanted.every(([name, value]) => (TESTS[name] ?? same(name))(card, value)));
    const shown = new Set(found.slice(0, room));
    for (const card of talks) card.hidden = !shown.has(card);
    more.hidden = found.length <= room;
    more.textContent = `Show ${found.length - shown.size} more`;
    document.getElementById("count-talks").textContent = `${found.length} of ${talks.length} conversations match`;
  };
  const anew = () => { room = AT_ONCE; filter(); };
  filters.addEventListener("input", anew);
  filters.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { room = Infinity; filter(); });
  anew();
  if (talks[0]) talks[0].open = talks.length === 1;
})();
