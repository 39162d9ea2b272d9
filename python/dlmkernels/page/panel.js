// Shared by both pages: a panel that shows one decoding.
// A decoding is an initial canvas and a list of events. The canvas after n forwards has the events of the first n.
  const data = JSON.parse(document.getElementById("data").textContent);
  const [COMMIT, EDIT, REMASK, RENOISE, INSERT, REMOVE, FILL] = data.kinds.keys();
  const NAMES = data.kinds;
  const WIDTH = data.decodings.length === 1 ? 1160 : 600;
  const by = (id) => document.getElementById(id);
  const make = (name, parent, attributes = {}, text = null) => {
    const isDrawn = ["svg", "line", "circle", "rect", "text", "polyline", "title"].includes(name);
    const node = isDrawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    parent.append(node);
    return node;
  };
  const hue = (confidence) => 30 + 120 * Math.min(Math.max((confidence - 0.3) / 0.7, 0), 1);
  const percent = (x) => `${(100 * x).toFixed(x > 0.999 || x < 0.01 ? 2 : 1)} %`;
  const forwardsOf = (row) => row.events.reduce((n, e) => Math.max(n, e[0] + 1), 0);

  // The canvas after a number of forwards, as a list of cells: token, state, and the forward that set it.
  function canvasAfter(decoding, row, forwards) {
    const cells = row.start.map((token, i) => ({
      token, open: row.open[i] === "1", given: row.open[i] === "0", edits: 0, forward: -1, confidence: 0,
    }));
    for (const [forward, kind, position, token, confidence] of row.events) {
      if (forward >= forwards) break;
      const now = { token, open: kind === REMASK || kind === RENOISE || kind === INSERT, given: false, edits: 0,
                    forward, confidence, kind };
      if (kind === INSERT) cells.splice(position, 0, now);
      else if (kind === REMOVE) cells.splice(position, 1);
      else {
        const before = cells[position];
        if (kind === EDIT || (kind === COMMIT && before.wasDecided)) now.edits = (before.edits || 0) + 1;
        now.wasDecided = before.wasDecided || !before.open;
        if (kind === REMASK) now.edits = before.edits;
        cells[position] = now;
      }
    }
    return cells;
  }

  const shown = (decoding, token) => decoding.texts[token] ?? String(token);
  function quoted(decoding, token) { return `“${shown(decoding, token).replaceAll("\n", "⏎")}” (${token})`; }

  class Panel {
    constructor(parent, decoding, index) {
      this.decoding = decoding; this.row = decoding.rows[index];
      this.width = WIDTH;
      const root = this.root = make("section", parent, { class: "panel" });
      const title = make("h2", root);
      const name = [decoding.name, decoding.rows.length > 1 ? `row ${index + 1}` : ""].filter(Boolean).join(", ");
      title.append(name ? `${name} ` : "");
      this.summary = make("small", title);
      this.canvas = make("div", root, { class: "canvas", role: "img", "aria-label": "The canvas" });
      this.canvas.addEventListener("pointerover", (event) => this.pointAt(event.target.dataset.position));
      this.map = make("svg", root, { viewBox: `0 0 ${this.width} 190`, role: "img", "aria-label": "Positions by forward" });
      this.curve = make("svg", root, { viewBox: `0 0 ${this.width} 90`, role: "img", "aria-label": "Share committed" });
      this.draw();
    }

    // Redraw after new events.
    draw() {
      this.forwards = forwardsOf(this.row);
      this.map.replaceChildren(); this.curve.replaceChildren();
      this.drawMap(); this.drawCurve();
    }

    x(position) {
      const { prompt, last } = this.row;
      return 34 + (this.width - 40) * (position - prompt + 0.5) / Math.max(last - prompt, 1);
    }
    y(forward) { return 10 + 155 * (forward + 0.5) / Math.max(this.forwards, 1); }

    // Map of positions and forwards: committed tokens (dots), remasked ones (rings), changed ones (squares).
    drawMap() {
      const { row, map } = this;
      const right = this.width - 6;
      make("line", map, { class: "axis", x1: 34, y1: 167, x2: right, y2: 167 });
      make("line", map, { class: "axis", x1: 34, y1: 8, x2: 34, y2: 167 });
      make("text", map, { x: 34, y: 182 }, `position ${row.prompt}`);
      make("text", map, { x: right, y: 182, "text-anchor": "end" }, String(row.last - 1));
      make("text", map, { x: 30, y: 18, "text-anchor": "end" }, "1");
      make("text", map, { x: 30, y: 166, "text-anchor": "end" }, String(this.forwards));
      make("text", map, { x: 4, y: 90 }, "forward").setAttribute("transform", "rotate(-90 12 90)");
      for (const column of row.blocks) {
        if (column > row.prompt && column < row.last) {
          const x = this.x(column - 0.5);
          make("line", map, { class: "border", x1: x, y1: 8, x2: x, y2: 167 });
        }
      }
      const size = Math.max(1.6, Math.min(5, 200 / Math.max(row.last - row.prompt, 1), 60 / Math.max(this.forwards, 1)));
      for (const event of row.events) {
        const [forward, kind, position, , confidence] = event;
        if (kind === FILL || kind === RENOISE || position < row.prompt || position >= row.last) continue;
        const x = this.x(position), y = this.y(forward);
        const colour = `hsl(${hue(confidence)} 60% var(--dot))`;
        let dot;
        if (kind === EDIT) {
          dot = make("rect", map, { class: "dot", x: x - size, y: y - size, width: 2 * size, height: 2 * size });
        } else {
          dot = make("circle", map, { cx: x, cy: y, r: size });
        }
        if (kind === REMASK || kind === REMOVE || kind === INSERT) dot.setAttribute("class", "back");
        else dot.style.fill = colour;
        dot.addEventListener("pointerover", () => tell(this.describe(event)));
        dot.addEventListener("click", () => seek(forward + 1));
      }
      this.now = make("line", map, { class: "now", x1: 34, x2: right, y1: 0, y2: 0 });
    }

    // Share of the answer's positions committed after each forward, and mean confidence of each forward's commits.
    drawCurve() {
      const { row, curve, forwards } = this;
      const sums = Array.from({ length: forwards }, () => [0, 0]);
      const counts = [];
      for (let n = 0; n <= forwards; n++) counts.push(this.decided(canvasAfter(this.decoding, row, n)));
      for (const [forward, kind, , , confidence] of row.events) {
        if (kind === COMMIT) { sums[forward][0] += confidence; sums[forward][1] += 1; }
      }
      const most = Math.max(counts[forwards][1], 1);
      const x = (n) => 34 + (this.width - 40) * n / Math.max(forwards, 1), y = (share) => 70 - 60 * share;
      make("line", curve, { class: "axis", x1: 34, y1: 70, x2: this.width - 6, y2: 70 });
      make("text", curve, { x: 30, y: 16, "text-anchor": "end" }, "100");
      make("text", curve, { x: 30, y: 73, "text-anchor": "end" }, "0 %");
      make("text", curve, { x: 34, y: 86 }, "line: share of tokens committed; dots: mean confidence of each forward's tokens");
      make("polyline", curve, { class: "share", points: counts.map(([c], n) => `${x(n)},${y(c / most)}`).join(" ") });
      sums.forEach(([sum, count], n) => {
        if (count) make("circle", curve, { cx: x(n + 1), cy: y(sum / count), r: 2 }).style.fill =
          `hsl(${hue(sum / count)} 60% var(--dot))`;
      });
      this.mark = make("line", curve, { class: "now", y1: 8, y2: 70 });
      this.curveX = x; this.counts = counts;
    }

    // Number of committed positions in the answer, and number of all its positions, both without given tokens.
    decided(cells) {
      const answer = cells.slice(this.row.prompt, this.row.last).filter((cell) => !cell.given);
      return [answer.filter((cell) => !cell.open).length, answer.length];
    }

    show(forwards) {
      const { row, decoding } = this;
      const at = Math.min(forwards, this.forwards);
      this.cells = canvasAfter(decoding, row, at);
      const blocks = new Set(row.blocks.filter((column) => column > row.prompt));
      const nodes = [];
      for (let i = row.first; i < Math.min(row.last, this.cells.length); i++) {
        const cell = this.cells[i], node = document.createElement("span");
        const isMask = cell.open && (cell.token < 0 || cell.token === decoding.mask);
        const text = isMask ? "▁" : shown(decoding, cell.token);
        node.textContent = text.replaceAll("\n", "⏎\n") + (/^\d+$/.test(text) && !hasText ? " " : "");
        node.dataset.position = i;
        const classes = [];
        if (cell.given) classes.push("given");
        if (cell.open) classes.push(isMask ? "open" : "draft");
        if (cell.forward === at - 1 && at > 0 && !cell.given && (!cell.open || cell.kind !== RENOISE)) classes.push("fresh");
        if (cell.edits) classes.push("edited");
        if (blocks.has(i)) classes.push("block");
        if (cell.kind === FILL) classes.push("behind");
        node.className = classes.join(" ");
        if (!cell.open && !cell.given && cell.kind !== FILL) {
          node.style.background = `hsl(${hue(cell.confidence)} 60% var(--light))`;
        }
        nodes.push(node);
      }
      this.canvas.replaceChildren(...nodes);
      const y = at > 0 ? this.y(at - 1) : 8;
      this.now.setAttribute("y1", y); this.now.setAttribute("y2", y);
      this.mark.setAttribute("x1", this.curveX(at)); this.mark.setAttribute("x2", this.curveX(at));
      this.summary.textContent =
        `${this.counts[at].join(" of ")} tokens committed after ${at} of ${this.forwards} forwards`;
    }

    pointAt(position) {
      if (position === undefined) return;
      const cell = this.cells[position], i = Number(position);
      if (cell.given) return tell(`Position ${i}: ${quoted(this.decoding, cell.token)}, given.`);
      if (cell.open) {
        const isMask = cell.token < 0 || cell.token === this.decoding.mask;
        return tell(`Position ${i}: masked${isMask ? "" : `, current draft ${quoted(this.decoding, cell.token)}`}.`);
      }
      tell(this.describe([cell.forward, cell.kind, i, cell.token, cell.confidence]));
    }

    describe([forward, kind, position, token, confidence]) {
      const words = {
        commit: "committed", edit: "changed", remask: "masked again", renoise: "redrawn", insert: "inserted",
        remove: "removed", fill: "padding",
      };
      let text = `Position ${position}: ${quoted(this.decoding, token)}, ${words[NAMES[kind]]} in forward ${forward + 1}`;
      if (kind === COMMIT || kind === EDIT) text += ` with probability ${percent(confidence)}`;
      const row = this.row, isFinal = kind === COMMIT || kind === EDIT;
      if (isFinal && row.entropy[position] !== undefined) text += `; entropy ${row.entropy[position]} nats`;
      if (isFinal && row.choices[position]) {
        const list = row.choices[position].map(([id, p]) => `${quoted(this.decoding, id)} ${percent(p)}`);
        text += `; most likely: ${list.join(", ")}`;
      }
      return `${text}.`;
    }
  }

