(() => {
  const panels = new Map(data.panels.map((panel) => [panel.key, panel]));
  const plots = [...document.querySelectorAll(".plot")];
  const PER_X_TICK = 70, PER_Y_TICK = 36; // pixels
  let axis = "minutes";

  // ------------------------------------------------------------------ small helpers

  const svg = (name, attributes = {}, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const colour = (i) => `var(--s${i % 6})`;
  const colourOf = (series, i) => colour(series.colour ?? i);
  /** Where the values of a panel's curves lie: evaluations have places of their own. */
  const places = (panel) => (panel.axes ? panel : data);

  /** Round values between low and high, about `count` of them. */
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
    return found;
  };
  /** 1, 2 and 5 times the powers of ten; the powers alone where that would be too many. */
  const logTicks = (low, high, count) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const m of [1, 2, 5]) found.push({ m, value: m * 10 ** power });
    const within = found.filter(({ value }) => value >= low && value <= high);
    const powers = within.filter(({ m }) => m === 1);
    return (within.length > count + 1 && powers.length > 1 ? powers : within).map(({ value }) => value);
  };
  const written = (value, unit) => {
    if (unit === "%") return `${+(100 * value).toFixed(1)} %`;
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size < 1e-4 || size >= 1e6) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  };

  // ------------------------------------------------------------------ what a chart shows

  /** Ends of both axes: from the data, widened a little, with the ends a panel fixes. */
  const domain = (panel) => {
    const xs = [], ys = [];
    for (const series of panel.series)
      series.raw.forEach((y, i) => { if (y !== null) { xs.push(places(panel).axes[axis][i]); ys.push(y); } });
    for (const point of panel.points) { xs.push(point[axis]); ys.push(point.low, point.high); }
    const extent = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [x0, x1] = extent(xs), [y0, y1] = extent(ys);
    if (panel.key === "success" && axis === "minutes") x0 = 0;
    if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
    // a quantity that moves over an order of magnitude is only legible on a logarithmic axis
    if (panel.log && y0 > 0 && y1 / y0 > 10) return { x0, x1, y0: y0 / 1.2, y1: y1 * 1.2, scale: Math.log10, ticks: logTicks };
    const margin = y1 > y0 ? 0.08 * (y1 - y0) : Math.abs(y1) * 0.1 || 1;
    y0 = panel.low ?? y0 - margin;
    y1 = panel.high ?? Math.max(y1 + margin, y0 + margin);
    return { x0, x1, y0, y1, scale: (value) => value, ticks };
  };

  /** Path through the values that are there, anew in every stage (evaluations: over all of them); a lone value becomes a dot. */
  const path = (values, { axes, stage: stages, label }, x, y) => {
    let d = "", stage = -1;
    values.forEach((value, i) => {
      if (value === null) return;
      const place = `${x(axes[axis][i]).toFixed(1)} ${y(value).toFixed(1)}`;
      d += stages[i] === stage || (label && d) ? `L${place}` : `M${place}h.01`;
      stage = stages[i];
    });
    return d;
  };

  /** Where each stage begins and ends on the axis, its evaluations included: [{name, from, to}]. */
  const spans = () => {
    const rows = data.stage.map((stage, i) => ({ stage, at: data.axes[axis][i] }));
    const points = (panels.get("success")?.points ?? []).map((point) => ({ stage: point.stage, at: point[axis] }));
    const found = [];
    for (const { stage, at } of [...rows, ...points].sort((a, b) => a.stage - b.stage || a.at - b.at)) {
      const last = found.at(-1);
      if (last && last.stage === stage) last.to = at;
      else found.push({ stage, name: data.stages[stage], from: last ? last.to : at, to: at });
    }
    return found;
  };

  const drawAxes = (root, panel, frame) => {
    const { left, right, top, bottom, x, y, ends } = frame;
    for (const value of ends.ticks(ends.y0, ends.y1, (bottom - top) / PER_Y_TICK)) {
      root.append(svg("line", { class: "gridline", x1: left, x2: right, y1: y(value), y2: y(value) }));
      root.append(svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, written(value, panel.unit).replace(" %", "")));
    }
    const across = ticks(ends.x0, ends.x1, (right - left) / PER_X_TICK).filter((value) => axis === "minutes" || Number.isInteger(value));
    for (const value of across)
      root.append(svg("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, written(value, "")));
    const last = across.length ? x(across.at(-1)) : left, unit = axis === "minutes" ? "min" : "it.";
    if (right - last > 42) root.append(svg("text", { x: right, y: bottom + 18, "text-anchor": "end" }, unit));
    else root.lastChild.textContent += ` ${unit}`;
  };

  const drawStages = (root, frame) => {
    const { left, right, top, bottom, x } = frame;
    spans().forEach((span, i) => {
      const from = Math.max(left, Math.min(right, x(span.from))), to = Math.max(left, Math.min(right, x(span.to)));
      const begins = i > 0 && x(span.from) > left + 1 && x(span.from) < right - 1;
      if (begins) root.append(svg("line", { class: "split", x1: from, x2: from, y1: top - 12, y2: bottom }));
      if (to - from > 7 * span.name.length) root.append(svg("text", { x: from + (begins ? 6 : 0), y: top - 6 }, span.name));
    });
  };

  const drawPoint = (root, point, x, y) => {
    const cx = x(point[axis]);
    root.append(svg("line", { class: "error", x1: cx, x2: cx, y1: y(point.low), y2: y(point.high) }));
    for (const end of [point.low, point.high]) root.append(svg("line", { class: "error", x1: cx - 4, x2: cx + 4, y1: y(end), y2: y(end) }));
    root.append(svg("circle", { class: `point ${point.kind}`, cx, cy: y(point.y), r: point.kind === "during" ? 3.5 : 5 }));
  };

  /** The values of a curve that has few. */
  const drawValues = (root, panel, series, i, { x, y }) =>
    series.raw.forEach((value, k) => {
      if (value !== null) root.append(svg("circle", { class: "value", fill: colourOf(series, i), cx: x(panel.axes[axis][k]), cy: y(value), r: 3.5 }));
    });

  const draw = (plot) => {
    const panel = panels.get(plot.dataset.panel), width = plot.clientWidth, height = plot.clientHeight;
    if (width === 0) return; // within a closed <details>; the observer calls again when it opens
    const ends = domain(panel);
    const labels = ends.ticks(ends.y0, ends.y1, (height - 48) / PER_Y_TICK).map((v) => written(v, panel.unit).replace(" %", "").length);
    const frame = { left: 14 + 6.6 * Math.max(1, ...labels), right: width - 10, top: 22, bottom: height - 26, ends };
    frame.x = (value) => frame.left + ((value - ends.x0) / (ends.x1 - ends.x0)) * (frame.right - frame.left);
    const [y0, y1] = [ends.scale(ends.y0), ends.scale(ends.y1)];
    frame.y = (value) => frame.bottom - ((ends.scale(value) - y0) / (y1 - y0)) * (frame.bottom - frame.top);
    const root = svg("svg", { width, height, "aria-hidden": "true" });
    drawAxes(root, panel, frame);
    drawStages(root, frame);
    panel.series.forEach((series, i) => {
      const smoothed = series.smooth.some((value, k) => value !== series.raw[k]);
      if (smoothed) root.append(svg("path", { class: "raw", stroke: colourOf(series, i), d: path(series.raw, data, frame.x, frame.y) }));
      const kind = series.watched ? "smooth watched" : "smooth";
      root.append(svg("path", { class: kind, stroke: colourOf(series, i), d: path(series.smooth, places(panel), frame.x, frame.y) }));
      if (panel.axes) drawValues(root, panel, series, i, frame);
    });
    for (const point of panel.points) drawPoint(root, point, frame.x, frame.y);
    const cursor = svg("g");
    root.append(cursor);
    plot.replaceChildren(root);
    plot.chart = { panel, frame, cursor };
  };

  /** Names of the curves under a chart that has more than one, or evaluations, or whose title does not say what they are. */
  const legend = (plot) => {
    const panel = panels.get(plot.dataset.panel);
    if (panel.series.length < 2 && !panel.points.length && !panel.named) return;
    const list = html("ul", { class: "names" });
    panel.series.forEach((series, i) => {
      const swatch = html("i", series.watched ? { class: "watched" } : {});
      swatch.style.background = colourOf(series, i);
      list.append(html("li", {}, swatch, series.name));
    });
    const kinds = { before: "evaluation before a stage", during: "evaluation during", after: "evaluation after a stage", evaluate: "mmrl evaluate" };
    for (const [kind, words] of Object.entries(kinds)) {
      if (!panel.points.some((point) => point.kind === kind)) continue;
      const mark = svg("svg", { width: 12, height: 16 });
      mark.append(svg("line", { class: "error", x1: 6, x2: 6, y1: 0, y2: 16 }), svg("circle", { class: `point ${kind}`, cx: 6, cy: 8, r: kind === "during" ? 3 : 4 }));
      list.append(html("li", {}, mark, words));
    }
    plot.after(list);
  };

  // ------------------------------------------------------------------ reading values off a chart

  /** What can be read at each x of a chart, in order: training rows with a value, and evaluations. */
  const stops = (panel) => {
    const { stage, axes } = places(panel);
    const rows = stage.map((_, i) => ({ i, x: axes[axis][i] })).filter(({ i }) => panel.series.some((s) => s.raw[i] !== null));
    const points = panel.points.map((point) => ({ point, x: point[axis] }));
    return [...rows, ...points].sort((a, b) => a.x - b.x);
  };

  const describe = (panel, stop) => {
    if (stop.point) {
      const { point } = stop;
      return [
        pair(`evaluation ${point.label}`, ""),
        pair("success", written(point.y, "%")),
        pair("95 % interval", `${written(point.low, "%").replace(" %", "")}–${written(point.high, "%")}`),
        pair("episodes", String(point.episodes)),
      ];
    }
    const { i } = stop, unit = panel.unit && panel.unit !== "%" ? ` ${panel.unit}` : "";
    const lines = panel.series.filter((s) => s.raw[i] !== null).map((s) => pair(s.name, written(s.raw[i], panel.unit) + unit));
    const { stage, iteration, axes, label } = places(panel), name = data.stages[stage[i]];
    const told = label && label[i] !== "during" ? `${label[i]} ${name}` : `${name}, iteration ${iteration[i]}`;
    return [pair(told, `${axes.minutes[i].toFixed(1)} min`), ...lines];
  };

  const show = (plot, stop) => {
    const { panel, frame, cursor } = plot.chart, x = frame.x(stop.x);
    plot.chart.stop = stop;
    cursor.replaceChildren(svg("line", { class: "cursor", x1: x, x2: x, y1: frame.top, y2: frame.bottom }));
    if (!stop.point)
      panel.series.forEach((series, k) => {
        if (series.raw[stop.i] !== null) cursor.append(svg("circle", { class: "mark", fill: colourOf(series, k), cx: x, cy: frame.y(series.raw[stop.i]), r: 4.5 }));
      });
    tip.replaceChildren(...describe(panel, stop));
    tip.hidden = false;
    const box = plot.getBoundingClientRect(), onLeft = x + tip.offsetWidth + 24 > box.width && x > box.width / 2;
    const place = Math.max(4, Math.min(box.left + (onLeft ? x - tip.offsetWidth - 12 : x + 12), innerWidth - tip.offsetWidth - 4));
    tip.style.left = `${scrollX + place}px`;
    tip.style.top = `${scrollY + box.top + frame.top}px`;
  };

  const hide = (plot) => {
    tip.hidden = true;
    if (plot.chart) plot.chart.cursor.replaceChildren();
  };

  const hover = (plot, event) => {
    const { panel, frame } = plot.chart, at = event.clientX - plot.getBoundingClientRect().left;
    // an evaluation sits where a training row does, so it wins within a few pixels
    const distance = (stop) => Math.abs(frame.x(stop.x) - at) - (stop.point ? 6 : 0);
    const nearest = stops(panel).reduce((best, stop) => (best && distance(best) <= distance(stop) ? best : stop), null);
    if (nearest) show(plot, nearest);
  };

  const keyboard = (plot, event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide(plot);
    if (!move || !plot.chart) return;
    event.preventDefault();
    const all = stops(plot.chart.panel), old = plot.chart.stop;
    const now = old ? all.findIndex((stop) => stop.i === old.i && stop.point === old.point) : move > 0 ? -1 : all.length;
    show(plot, all[Math.max(0, Math.min(all.length - 1, now + move))]);
  };

  for (const plot of plots) {
    legend(plot);
    plot.addEventListener("pointermove", (event) => hover(plot, event));
    plot.addEventListener("pointerleave", () => hide(plot));
    plot.addEventListener("blur", () => hide(plot));
    plot.addEventListener("keydown", (event) => keyboard(plot, event));
    draw(plot);
    const size = () => `${plot.clientWidth} ${plot.clientHeight}`;
    let drawn = size();
    new ResizeObserver(() => {
      if (size() !== drawn) { drawn = size(); draw(plot); }
    }).observe(plot);
  }
  for (const choice of document.querySelectorAll("input[name=axis]"))
    choice.addEventListener("change", () => { axis = choice.value; plots.forEach(draw); });

  // ------------------------------------------------------------------ rollouts

  const clips = [...document.querySelectorAll(".clip")], filters = document.querySelector("#rollouts .filters");
  if (!filters) return;
  const filter = () => {
    const wanted = [...new FormData(filters)].filter(([, value]) => value);
    for (const clip of clips) clip.hidden = !wanted.every(([name, value]) => clip.dataset[name] === value);
    document.getElementById("count").textContent = `${clips.filter((clip) => !clip.hidden).length} of ${clips.length} rollouts shown`;
  };
  filters.addEventListener("change", filter);
  filter();

  /** An animated picture cannot be stopped, but a still of it can take its place. */
  const still = (image) => {
    if (image.nextElementSibling) return image.nextElementSibling;
    const canvas = html("canvas", { width: image.naturalWidth, height: image.naturalHeight, role: "img", "aria-label": image.alt, class: image.className });
    canvas.getContext("2d").drawImage(image, 0, 0);
    image.after(canvas);
    return canvas;
  };
  const button = document.getElementById("pause");
  let paused = false;
  const settle = (image) => {
    if (!image.complete || !image.naturalWidth) return;
    if (paused) still(image).hidden = false;
    else if (image.nextElementSibling) image.nextElementSibling.hidden = true;
    image.hidden = paused;
  };
  const images = clips.map((clip) => clip.querySelector("img")).filter(Boolean);
  const pause = (value) => {
    paused = value;
    button.textContent = paused ? "Play" : "Pause";
    button.setAttribute("aria-pressed", String(paused));
    images.forEach(settle);
  };
  for (const image of images) {
    const arrived = () => { if (image.naturalWidth <= 128) image.classList.add("small"); settle(image); };
    if (image.complete) arrived();
    else image.addEventListener("load", arrived);
  }
  button.addEventListener("click", () => pause(!paused));
  pause(matchMedia("(prefers-reduced-motion: reduce)").matches);
})();
