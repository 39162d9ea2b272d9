// The live page: the server reports every step of its decodings; panels show their current state, newest first.
  const hasText = true;
  const tell = (text) => { by("told").textContent = text; };
  const seek = () => {};
  const panels = new Map(), changed = new Set();
  const state = (text) => { by("state").textContent = text; };
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  let key = "", isDrawing = false, drawn = 0;

  function take(message) {
    const { type, id } = message;
    if (type === "reset") {
      panels.clear();
      by("panels").replaceChildren();
    } else if (type === "begin") {
      const row = { ...message.row, events: [], entropy: {}, choices: {} };
      const decoding = { name: id, mask: message.mask, texts: message.texts, rows: [row] };
      const panel = new Panel(by("panels"), decoding, 0);
      by("panels").prepend(panel.root);
      panels.set(id, panel);
    } else if (panels.has(id)) {
      const panel = panels.get(id);
      if (type === "gone") {
        panel.root.remove();
        panels.delete(id);
      } else {
        Object.assign(panel.decoding.texts, message.texts);
        panel.row.events.push(...message.events);
        if (type === "end") panel.ended = message.reason;
      }
    }
    if (panels.has(id)) changed.add(id);
  }

  // Draw all changes of a batch of messages together, but at most once per 60 ms.
  function drawSoon() {
    if (isDrawing) return;
    if (performance.now() - drawn > 60) return draw();
    isDrawing = true;
    setTimeout(draw, 60);
  }

  // Several messages may have arrived since the last drawing.
  function draw() {
    isDrawing = false;
    drawn = performance.now();
    for (const id of changed) {
      const panel = panels.get(id);
      if (panel === undefined) continue;
      panel.draw();
      panel.show(Infinity);
      panel.root.classList.toggle("ended", panel.ended !== undefined);
      if (panel.ended !== undefined) panel.summary.textContent += `; ended: ${panel.ended}`;
    }
    changed.clear();
    by("none").hidden = panels.size > 0;
  }

  // Server-sent events are parsed here because an EventSource cannot send an Authorization header.
  async function read(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) take(JSON.parse(event.slice(6)));
      drawSoon();
    }
  }

  function askForKey() {
    by("login").hidden = false;
    state("This server requires an API key.");
    return new Promise((done) => by("login").addEventListener("submit", (event) => {
      event.preventDefault();
      key = by("key").value;
      by("login").hidden = true;
      done();
    }, { once: true }));
  }

  async function follow() {
    for (;;) {
      try {
        const headers = key ? { Authorization: `Bearer ${key}` } : {};
        const response = await fetch(data.live, { headers, cache: "no-store" });
        if (response.status === 401) { await askForKey(); continue; }
        if (!response.ok) throw new Error(String(response.status));
        state("Connected.");
        await read(response.body);
      } catch (error) {
        if (error instanceof SyntaxError) throw error;
      }
      state("Disconnected. Trying again.");
      await pause(2000);
    }
  }

  by("login").hidden = true;
  draw();
  follow();
