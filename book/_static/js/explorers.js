/* Two figures that answer to the reader: <temperature-explorer> and <loss-explorer>.

   They are custom elements, so that a page needs no more than the tag, and the text inside the tag
   is what is seen wherever this script does not run. Every number stands in a <data> element,
   rounded for the eye, with all its digits in the attribute `value`. Logarithms are natural. */
(() => {
  "use strict";

  // --- arithmetic ------------------------------------------------------------------------------
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = (values) => sum(values) / values.length;
  const length = (values) => Math.hypot(...values);

  /* log softmax(z / T); subtracting the largest logit first keeps every exponential at most 1. */
  function logSoftmax(logits, temperature = 1) {
    const top = Math.max(...logits);
    const scaled = logits.map((z) => (z - top) / temperature);
    const normalizer = Math.log(sum(scaled.map(Math.exp)));
    return scaled.map((z) => z - normalizer);
  }

  const softmax = (logits, temperature = 1) => logSoftmax(logits, temperature).map(Math.exp);
  const expectation = (p, values) => sum(p.map((share, i) => (share > 0 ? share * values[i] : 0)));

  function entropy(logits, temperature) {
    const logs = logSoftmax(logits, temperature);
    return -expectation(logs.map(Math.exp), logs);
  }

  /* dH/dT = Var(z) / T^3, the variance taken under the softened distribution. */
  function entropySlope(logits, temperature) {
    const p = softmax(logits, temperature);
    const center = expectation(p, logits);
    return expectation(p, logits.map((z) => (z - center) ** 2)) / temperature ** 3;
  }

  function divergence(teacher, student, temperature) {
    const p = logSoftmax(teacher, temperature);
    const q = logSoftmax(student, temperature);
    return Math.max(0, expectation(p.map(Math.exp), p.map((log, i) => log - q[i])));
  }

  /* The gradient of D(teacher_T || student_T) with respect to the student's logits. */
  function softGradient(teacher, student, temperature) {
    const p = softmax(teacher, temperature);
    return softmax(student, temperature).map((q, i) => (q - p[i]) / temperature);
  }

  /* The limit of T^2 times that gradient as T grows. */
  function matchingGradient(teacher, student) {
    const gap = student.map((z, i) => z - teacher[i]);
    return gap.map((d) => (d - mean(gap)) / gap.length);
  }

  // 0.1, 0.11, 0.13, ..., 100: twenty to a factor of ten, each used exactly as it is shown.
  const TEMPERATURES = Array.from({ length: 61 }, (_, i) => Number((10 ** (i / 20 - 1)).toPrecision(2)));

  // --- pieces of a page ------------------------------------------------------------------------
  const SVG = new Set(["svg", "path", "line", "circle", "text"]);

  function make(tag, attributes = {}, ...children) {
    const node = SVG.has(tag)
      ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const squared = () => [make("i", {}, "T"), make("sup", {}, "2")];

  function round(x) {
    const size = Math.abs(x);
    const text = size === 0 ? "0"
      : size < 1e-3 || size >= 1e4 ? size.toExponential(1).replace("e-", "e−").replace("e+", "e")
      : size.toFixed(size < 1 ? 3 : size < 10 ? 2 : size < 100 ? 1 : 0);
    return (x < 0 ? "−" : "") + text;
  }

  const power = (n) => "10" + String(n).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

  function number(name) {
    const node = make("data", { "data-name": name });
    node.show = (x, text = round(x)) => {
      node.value = String(x);
      node.textContent = text;
    };
    return node;
  }

  /* A slider, and beside it the value it stands for, as `say` writes it. A name that is a string
     is not shown; one that is a list of nodes is. */
  function slider(key, name, { min, max, step, value }, say) {
    const input = make("input", { type: "range", name: key, min, max, step });
    const shown = make("span", { class: "explorer-value", "aria-hidden": "true" });
    input.value = value;
    const speak = () => {
      shown.textContent = say(input.valueAsNumber);
      input.setAttribute("aria-valuetext", shown.textContent);
    };
    input.addEventListener("input", speak);
    speak();
    if (typeof name === "string") input.setAttribute("aria-label", name);
    const labeled = typeof name === "string" ? input : make("label", {}, make("span", {}, ...name), input);
    return { input, node: make("div", { class: "explorer-slider" }, labeled, shown) };
  }

  function temperatureSlider(value) {
    const range = { min: 0, max: TEMPERATURES.length - 1, step: 1, value: TEMPERATURES.indexOf(value) };
    return slider("temperature", ["temperature ", make("i", {}, "T")], range,
      (index) => String(TEMPERATURES[index]));
  }

  /* A field for a number; what is no number, or too large for sums of it, changes nothing. */
  function field(name, label, value) {
    const input = make("input", { type: "number", name, "aria-label": label, step: "any",
      min: -1e6, max: 1e6, inputmode: "text", autocomplete: "off" });
    let last = value;
    input.value = value;
    input.read = () => {
      const sound = input.value !== "" && input.checkValidity();
      if (sound) last = input.valueAsNumber;
      input.setAttribute("aria-invalid", String(!sound));
      return last;
    };
    return input;
  }

  function table(caption, heads, rows) {
    const head = heads.map((words) => make("th", { scope: "col" }, ...[words].flat()));
    return make("table", { class: "explorer-table" }, make("caption", {}, ...[caption].flat()),
      make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  }

  function row(name, ...cells) {
    return make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((c) => make("td", {}, ...[c].flat())));
  }

  function bar(kind) {
    const fill = make("span", { class: `explorer-fill ${kind}` });
    const node = make("span", { class: "explorer-bar", "aria-hidden": "true" }, fill);
    node.from = (left, width) => {
      fill.style.left = `${100 * left}%`;
      fill.style.width = `${100 * width}%`;
    };
    return node;
  }

  /* A drawing of quantities against the temperature; `lines` maps a style to a label and its place. */
  const FRAME = { left: 46, right: 308, top: 12, bottom: 128 };
  function plot(label, axis, lines) {
    const { left, right, top, bottom } = FRAME;
    const x = (i) => left + ((right - left) * (Math.log10(TEMPERATURES[i]) + 1)) / 3;
    const svg = make("svg", { viewBox: "0 0 320 164", role: "img", "aria-label": label, class: "explorer-plot" });
    svg.append(make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    for (const [i, t] of [[0, "0.1"], [20, "1"], [40, "10"], [60, "100"]]) {
      svg.append(make("line", { class: "axis", x1: x(i), x2: x(i), y1: bottom, y2: bottom + 4 }));
      svg.append(make("text", { x: x(i), y: bottom + 16, "text-anchor": "middle" }, t));
    }
    svg.append(make("text", { x: (left + right) / 2, y: bottom + 32, "text-anchor": "middle" }, "temperature T"));
    svg.append(make("text", { x: left, y: 9, "text-anchor": "start" }, axis));
    const here = make("line", { class: "here", y1: top, y2: bottom });
    const ticks = [0, 1].map(() => make("text", { x: left - 4, "text-anchor": "end" }));
    svg.append(here, ...ticks);
    const drawn = Object.fromEntries(Object.entries(lines).map(([kind, name]) => {
      const path = make("path", { class: `curve ${kind}` });
      const dot = make("circle", { class: `dot ${kind}`, r: 3.5 });
      const text = make("text", { class: kind, "text-anchor": "end" }, name);
      svg.append(path, dot, text);
      return [kind, { path, dot, text }];
    }));
    /* `heights` maps a style to one height between 0 and 1 for each temperature. */
    svg.draw = (index, heights, [low, high]) => {
      const y = (h) => bottom - (bottom - top - 6) * Math.min(1, Math.max(0, h));
      here.setAttribute("x1", x(index));
      here.setAttribute("x2", x(index));
      ticks[0].textContent = low;
      ticks[0].setAttribute("y", bottom + 3);
      ticks[1].textContent = high;
      ticks[1].setAttribute("y", y(1) + 3);
      for (const [kind, { path, dot, text }] of Object.entries(drawn)) {
        const points = heights[kind].map((h, i) => `${x(i).toFixed(1)} ${y(h).toFixed(1)}`);
        path.setAttribute("d", `M${points.join("L")}`);
        dot.setAttribute("cx", x(index));
        dot.setAttribute("cy", y(heights[kind][index]));
        const [place, shift] = { raw: [46, 15], matching: [60, 14] }[kind] ?? [60, -6];
        text.setAttribute("x", x(place));
        text.setAttribute("y", y(heights[kind][place]) + shift);
      }
    };
    return svg;
  }

  function define(tag, build) {
    customElements.define(tag, class extends HTMLElement {
      connectedCallback() {
        if (this.querySelector(":scope > .explorer")) return;
        const root = make("div", { class: "explorer" });
        build(root);
        this.prepend(root);
      }
    });
  }

  // --- what a temperature does to one distribution ------------------------------------------------
  const CLASSES = ["dog", "wolf", "cat", "horse", "truck"];
  const EXAMPLES = {
    "a dog, not far from a wolf": [8, 6, 3, 1, -4],
    "a dog and a wolf tied": [5, 5, 2, 0, -3],
    "a teacher that is sure": [20, 0, 0, 0, 0],
    "a teacher that knows nothing": [1, 1, 1, 1, 1],
    "logits in the thousands": [10000, 9998, 5000, 0, -10000],
  };

  define("temperature-explorer", (root) => {
    const names = Object.keys(EXAMPLES);
    const choice = make("select", { name: "example" }, ...[...names, "your own"].map((n) => make("option", {}, n)));
    const temperature = temperatureSlider(1);
    const fields = CLASSES.map((name, i) => field(`logit-${i}`, `logit of ${name}`, EXAMPLES[names[0]][i]));
    const shares = CLASSES.map((_, i) => number(`p-${i}`));
    const bars = CLASSES.map(() => bar("soft"));
    const bits = number("entropy");
    const share = number("share");
    const slope = number("slope");
    const chart = plot("Entropy of the softened distribution against the temperature: it never falls.",
      "entropy, as a share of its largest value", { soft: "" });
    const status = make("p", { role: "status" });

    function update() {
      const logits = fields.map((f) => f.read());
      const index = temperature.input.valueAsNumber;
      const t = TEMPERATURES[index];
      const p = softmax(logits, t);
      p.forEach((x, i) => {
        shares[i].show(x);
        bars[i].from(0, x);
      });
      const most = Math.log(logits.length);
      const nats = entropy(logits, t);
      bits.show(nats / Math.LN2);
      share.show(nats / most, `${(100 * nats / most).toFixed(1)} %`);
      slope.show(entropySlope(logits, t));
      chart.draw(index, { soft: TEMPERATURES.map((u) => entropy(logits, u) / most) }, ["0", "1"]);
      const winner = p.indexOf(Math.max(...p));
      status.textContent = `At T = ${t}, ${CLASSES[winner]} has probability ${shares[winner].textContent} `
        + `and the entropy is ${bits.textContent} bits, ${share.textContent} of what ${logits.length} classes can have.`;
    }

    choice.addEventListener("change", () => {
      (EXAMPLES[choice.value] ?? []).forEach((z, i) => { fields[i].value = z; });
      update();
    });
    temperature.input.addEventListener("input", update);
    for (const f of fields) {
      f.addEventListener("input", () => {
        choice.value = "your own";
        update();
      });
    }
    root.append(
      make("p", { class: "explorer-title" }, "What the temperature does to a teacher's answer"),
      make("div", { class: "explorer-slider" }, make("label", {}, make("span", {}, "the teacher sees "), choice)),
      temperature.node,
      table("The softened distribution. The logits can be edited.", ["class", "logit", "probability"],
        CLASSES.map((name, i) => row(name, fields[i], make("span", { class: "explorer-pair" }, shares[i], bars[i])))),
      make("dl", { class: "explorer-numbers" },
        make("dt", {}, "entropy"), make("dd", {}, bits, " bits"),
        make("dt", {}, "share of log", make("sub", {}, "2"), " 5"), make("dd", {}, share),
        make("dt", {}, "its slope, Var / ", make("i", {}, "T"), make("sup", {}, "3")),
        make("dd", {}, slope, " nats per unit of ", make("i", {}, "T"))),
      chart, status);
    update();
  });

  // --- the two terms of the loss, and how they pull ------------------------------------------------
  const THREE = CLASSES.slice(0, 3);
  let built = 0;

  define("loss-explorer", (root) => {
    const teacher = THREE.map((name, i) => field(`teacher-${i}`, `teacher's logit of ${name}`, [6, 4, -4][i]));
    const student = THREE.map((name, i) => slider(`student-${i}`, `student's logit of ${name}`,
      { min: -10, max: 10, step: 0.5, value: [1, -2, 3][i] },
      (x) => x.toFixed(1).replace("-", "−")));
    const group = `label-${(built += 1)}`; // radio buttons of one name exclude each other
    const labels = THREE.map((name) => make("input", { type: "radio", name: group, "aria-label": `the label is ${name}` }));
    labels[0].checked = true;
    const temperature = temperatureSlider(4);
    const alpha = slider("alpha", ["weight ", make("i", {}, "α"), " of the soft term"],
      { min: 0, max: 1, step: 0.05, value: 0.9 }, (x) => x.toFixed(2));
    const terms = Object.fromEntries(["hard", "raw", "scaled", "total", "unscaled"].map((n) => [n, number(n)]));
    const kinds = ["hard", "raw", "scaled", "matching", "total"];
    const parts = Object.fromEntries(kinds.map((kind) =>
      [kind, THREE.map((_, i) => ({ value: number(`${kind}-${i}`), bar: bar(kind) }))]));
    const chart = plot("Length of the soft term's gradient against the temperature, both axes logarithmic. Without the "
      + "factor T squared it falls like one over T squared; with it, it levels off at that of logit matching.",
      "length of the soft gradient (α = 1)", { matching: "logit matching", raw: "without T²", scaled: "with T²" });
    const status = make("p", { role: "status" });

    function update() {
      const t = TEMPERATURES[temperature.input.valueAsNumber];
      const a = alpha.input.valueAsNumber;
      const from = teacher.map((f) => f.read());
      const to = student.map((s) => s.input.valueAsNumber);
      const truth = labels.findIndex((l) => l.checked);
      const soft = divergence(from, to, t);
      const logs = logSoftmax(to);
      const hard = -logs[truth];
      terms.hard.show(hard);
      terms.raw.show(soft);
      terms.scaled.show(t ** 2 * soft);
      terms.total.show((1 - a) * hard + a * t ** 2 * soft);
      terms.unscaled.show((1 - a) * hard + a * soft);

      const raw = softGradient(from, to, t);
      const limit = matchingGradient(from, to);
      const pull = {
        hard: logs.map((log, i) => (1 - a) * (Math.exp(log) - (i === truth))),
        raw: raw.map((g) => a * g),
        scaled: raw.map((g) => a * t ** 2 * g),
        matching: limit.map((g) => a * g),
      };
      pull.total = pull.hard.map((g, i) => g + pull.scaled[i]);
      const largest = Math.max(...Object.values(pull).flat().map(Math.abs)) || 1;
      for (const kind of kinds) {
        parts[kind].forEach((part, i) => {
          const g = pull[kind][i];
          part.value.show(g);
          part.bar.from(0.5 + Math.min(0, g / largest) / 2, Math.abs(g / largest) / 2);
        });
      }

      const every = TEMPERATURES.map((u) => length(softGradient(from, to, u)));
      const sizes = { raw: every, scaled: every.map((g, i) => g * TEMPERATURES[i] ** 2),
        matching: every.map(() => length(limit)) };
      const all = Object.values(sizes).flat().filter((g) => g > 0);
      const low = Math.floor(Math.log10(Math.max(Math.min(1, ...all), 1e-9)));
      const high = Math.ceil(Math.log10(Math.max(1, ...all)));
      const height = (g) => (g > 0 ? (Math.log10(g) - low) / (high - low || 1) : 0);
      chart.draw(temperature.input.valueAsNumber,
        Object.fromEntries(Object.entries(sizes).map(([kind, all]) => [kind, all.map(height)])),
        [power(low), power(high)]);

      status.textContent = `At T = ${t} the soft term pulls with ${round(length(pull.raw))} without the factor T², `
        + `with ${round(length(pull.scaled))} with it; matching centered logits would pull with `
        + `${round(length(pull.matching))}, and the label pulls with ${round(length(pull.hard))}.`;
    }

    for (const input of [temperature.input, alpha.input, ...teacher, ...student.map((s) => s.input)])
      input.addEventListener("input", update);
    for (const label of labels) label.addEventListener("change", update);
    const alphaSign = () => make("i", {}, "α");
    root.append(
      make("p", { class: "explorer-title" }, "The two terms of the loss, and how they pull on the student"),
      temperature.node, alpha.node,
      table("Logits of the teacher, logits of the student, and the label.", ["class", "label", "teacher", "student"],
        THREE.map((name, i) => row(name, labels[i], teacher[i], student[i].node))),
      make("dl", { class: "explorer-numbers" },
        make("dt", {}, "hard term, cross-entropy"), make("dd", {}, terms.hard, " nats"),
        make("dt", {}, "soft term, divergence"), make("dd", {}, terms.raw, " nats"),
        make("dt", {}, "soft term × ", ...squared()), make("dd", {}, terms.scaled, " nats"),
        make("dt", {}, "loss, with ", ...squared()), make("dd", {}, terms.total, " nats"),
        make("dt", {}, "loss, if ", ...squared(), " is left out"), make("dd", {}, terms.unscaled, " nats")),
      table(["Gradient with respect to each logit of the student; 1 − ", alphaSign(), " and ", alphaSign(), " included."],
        ["class", "hard", "soft, no T²", "soft, T²", "logit matching", "hard + soft, T²"],
        THREE.map((name, i) => row(name, ...kinds.map((kind) => [parts[kind][i].value, parts[kind][i].bar])))),
      chart, status);
    update();
  });
})();
