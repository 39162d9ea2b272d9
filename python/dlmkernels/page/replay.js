// The replay page: plays finished decodings forward by forward.
  const hasText = data.decodings.some((d) => Object.entries(d.texts).some(([id, text]) => id !== text));
  const tell = (text) => { by("told").textContent = text; };
  const most = Math.max(...data.decodings.map((d) => d.rows.length));
  let panels = [], at = 0, timer = null, last = 0;

  function choose(row) {
    const root = by("panels");
    root.replaceChildren();
    panels = [];
    const wanted = row < 0 ? [...Array(most).keys()] : [row];
    for (const index of wanted) {
      for (const decoding of data.decodings) {
        if (index < decoding.rows.length) panels.push(new Panel(root, decoding, index));
      }
    }
    root.style.gridTemplateColumns = `repeat(${data.decodings.length}, minmax(0, 1fr))`;
    last = Math.max(...panels.map((panel) => panel.forwards), 0);
    by("forward").max = last;
    seek(Math.min(at, last));
  }

  function seek(forward) {
    at = Math.min(Math.max(forward, 0), last);
    by("forward").value = at;
    by("where").textContent = at ? `after forward ${at} of ${last}` : `before the first of ${last} forwards`;
    for (const panel of panels) panel.show(at);
  }

  function play(wanted = timer === null) {
    clearInterval(timer);
    timer = null;
    if (wanted && last > 0) {
      if (at >= last) seek(0);
      timer = setInterval(() => (at < last ? seek(at + 1) : play(false)), 1000 / Number(by("speed").value));
    }
    by("play").textContent = timer === null ? "▶" : "❚❚";
    by("play").setAttribute("aria-label", timer === null ? "Play" : "Pause");
  }

  for (let row = 0; row < most; row++) make("option", by("row"), { value: row }, String(row + 1));
  if (most > 1) make("option", by("row"), { value: -1 }, "all");
  by("rows").hidden = most === 1;
  by("row").addEventListener("change", () => choose(Number(by("row").value)));
  by("forward").addEventListener("input", () => { play(false); seek(Number(by("forward").value)); });
  by("play").addEventListener("click", () => play());
  by("back").addEventListener("click", () => { play(false); seek(at - 1); });
  by("on").addEventListener("click", () => { play(false); seek(at + 1); });
  by("speed").addEventListener("change", () => timer !== null && play(true));
  by("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("keydown", (event) => {
    if (event.target instanceof HTMLSelectElement || event.target instanceof HTMLInputElement) return;
    const keys = { ArrowLeft: () => seek(at - 1), ArrowRight: () => seek(at + 1), Home: () => seek(0),
                   End: () => seek(last), " ": () => play() };
    if (!(event.key in keys)) return;
    event.preventDefault();
    if (event.key !== " ") play(false);
    keys[event.key]();
  });

  // #forward=3&row=2 opens the page at that forward and row. Without it, the page shows the finished decoding.
  const wanted = new URLSearchParams(location.hash.slice(1));
  const row = Math.min(Math.max(Number(wanted.get("row") ?? 1) || 1, 1), most) - 1;
  at = wanted.has("forward") ? Number(wanted.get("forward")) || 0 : Infinity;
  by("row").value = wanted.get("row") === "all" && most > 1 ? -1 : row;
  choose(Number(by("row").value));
