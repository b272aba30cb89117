// The stability explorer of the chapter "Stability of learned optimizers".
//
// Two parameters, no noise: phi <- A phi with A = I - H^(-q) (alpha I + (1 - d) P) H.
// Sliders set the nominal term alpha, the weight decay d and the preconditioning q; the
// page shows the eigenvalues of A against the unit circle and the run beside it. The
// same quantities in Python are l2olib.stability; a test compares the two.
"use strict";

(() => {
  const STYLE = new URL("explorer.css", document.currentScript.src).href;
  const START = [2, -2];
  const STEPS = 40;
  const STAR = [[1.11, 0.596], [0.596, 0.486]];
  const CASES = {
    rotating: { hessian: STAR, blackbox: [[0.1, 1.2], [-1.6, 0.3]] },
    symmetric: { hessian: STAR, blackbox: [[1.1, 0.9], [0.9, -0.5]] },
    "counterexample to Theorem 1": {
      hessian: [[1, 0.5], [0.5, 1]],
      blackbox: [[1, 3.25], [0, 0.5]],
    },
    "none: gradient descent": { hessian: STAR, blackbox: [[0, 0], [0, 0]] },
  };
  const SLIDERS = {
    nominal: { label: "Nominal term", symbol: "α", max: 2 },
    decay: { label: "Weight decay", symbol: "d", max: 1 },
    preconditioning: { label: "Preconditioning", symbol: "q", max: 1 },
  };
  // The positions of the static figure above the explorer.
  const POSITIONS = {
    "P alone": { nominal: 0, decay: 0, preconditioning: 0 },
    "+ nominal": { nominal: 0.6, decay: 0, preconditioning: 0 },
    "+ decay": { nominal: 0.6, decay: 0.5, preconditioning: 0 },
    "+ preconditioning": { nominal: 0.6, decay: 0.5, preconditioning: 0.5 },
  };

  // --- 2 x 2 matrices as nested arrays

  const combine = (f) => (a, b) => a.map((row, i) => row.map((v, j) => f(v, b[i][j])));
  const add = combine((v, w) => v + w);
  const subtract = combine((v, w) => v - w);
  const scale = (a, factor) => a.map((row) => row.map((v) => v * factor));
  const transpose = (a) => [[a[0][0], a[1][0]], [a[0][1], a[1][1]]];
  const multiply = (a, b) =>
    a.map((row) => [0, 1].map((j) => row[0] * b[0][j] + row[1] * b[1][j]));
  const apply = (a, v) => a.map((row) => row[0] * v[0] + row[1] * v[1]);
  const IDENTITY = [[1, 0], [0, 1]];

  // Eigenvalues as [[re, im], [re, im]], the larger real part first.
  function eigenvalues([[a, b], [c, d]]) {
    const middle = (a + d) / 2;
    const square = ((a - d) / 2) ** 2 + b * c;
    const root = Math.sqrt(Math.abs(square));
    return square >= 0
      ? [[middle + root, 0], [middle - root, 0]]
      : [[middle, root], [middle, -root]];
  }

  // f(H) of a symmetric matrix, by the two eigenvalues and the projections on them.
  function functionOf(matrix, f) {
    const [[high], [low]] = eigenvalues(matrix);
    if (high - low < 1e-12) return scale(IDENTITY, f(high));
    const onHigh = scale(subtract(matrix, scale(IDENTITY, low)), 1 / (high - low));
    return add(scale(onHigh, f(high)), scale(subtract(IDENTITY, onHigh), f(low)));
  }

  // --- the model

  function gain({ hessian, blackbox }, { nominal, decay, preconditioning }) {
    const sum = add(scale(IDENTITY, nominal), scale(blackbox, 1 - decay));
    return multiply(functionOf(hessian, (h) => h ** -preconditioning), sum);
  }

  function analyse(problem, setting) {
    const update = gain(problem, setting);
    const dynamics = subtract(IDENTITY, multiply(update, problem.hessian));
    const values = eigenvalues(dynamics);
    const certificate = subtract(
      add(update, transpose(update)),
      multiply(transpose(update), multiply(problem.hessian, update)),
    );
    const path = [START];
    while (path.length <= STEPS && Math.hypot(...path.at(-1)) < 1e3) {
      path.push(apply(dynamics, path.at(-1)));
    }
    return {
      ...problem,
      ...setting,
      eigenvalues: values,
      radius: Math.max(...values.map(([re, im]) => Math.hypot(re, im))),
      descentMargin: eigenvalues(certificate)[1][0],
      path,
    };
  }

  // --- the picture

  const pair = (points) => ({ x: points.map((p) => p[0]), y: points.map((p) => p[1]) });
  const circle = Array.from({ length: 121 }, (_, i) => [
    Math.cos((i * Math.PI) / 60),
    Math.sin((i * Math.PI) / 60),
  ]);

  function layout(title, reach, element) {
    const style = getComputedStyle(element);
    const axis = {
      range: [-reach, reach],
      fixedrange: true,
      zeroline: false,
      gridcolor: "rgba(128, 128, 128, 0.25)",
    };
    return {
      title: { text: title, font: { size: 15 } },
      font: { color: style.color, family: style.fontFamily, size: 13 },
      paper_bgcolor: "rgba(0, 0, 0, 0)",
      plot_bgcolor: "rgba(0, 0, 0, 0)",
      margin: { l: 35, r: 10, t: 40, b: 30 },
      dragmode: false,
      showlegend: false,
      xaxis: { ...axis, constrain: "domain" },
      yaxis: { ...axis, scaleanchor: "x", constrain: "domain" },
    };
  }

  function spectrumTraces(state, color) {
    const outside = state.eigenvalues.map(([re, im]) => Math.hypot(re, im) >= 1);
    return [
      { ...pair(circle), mode: "lines", line: { color, width: 1 }, hoverinfo: "skip" },
      {
        ...pair(state.eigenvalues),
        mode: "markers",
        marker: {
          size: 12,
          color: outside.map((out) => (out ? "#D55E00" : "#0072B2")),
          symbol: outside.map((out) => (out ? "x" : "circle")),
        },
        hovertemplate: "%{x:.3f} %{y:+.3f} i<extra></extra>",
      },
    ];
  }

  function runTraces(state) {
    const toEllipse = functionOf(state.hessian, (h) => h ** -0.5);
    const levels = [0.3, 1.2, 3, 7, 12].map((loss) => ({
      ...pair(circle.map((p) => apply(scale(toEllipse, Math.sqrt(2 * loss)), p))),
      mode: "lines",
      line: { color: "rgba(128, 128, 128, 0.6)", width: 1 },
      hoverinfo: "skip",
    }));
    const run = {
      ...pair(state.path),
      mode: "lines+markers",
      line: { color: "#0072B2", width: 1.5 },
      marker: { size: 5 },
      text: state.path.map((_, t) => `step ${t}`),
      hovertemplate: "%{text}<extra></extra>",
    };
    const target = {
      x: [0], y: [0], mode: "markers",
      marker: { symbol: "star", size: 11, color: "#E69F00" },
      hovertemplate: "minimum<extra></extra>",
    };
    return [...levels, run, target];
  }

  function describe(state) {
    const [[re, im], [other]] = state.eigenvalues;
    const values = im
      ? `${re.toFixed(3)} ± ${im.toFixed(3)} i`
      : `${re.toFixed(3)} and ${other.toFixed(3)}`;
    const verdict = state.radius < 1 ? "stable" : "not stable";
    const descent =
      state.descentMargin >= 0
        ? "No step can raise the loss (Theorem 27B)."
        : "Some steps can raise the loss.";
    return `Eigenvalues ${values}; spectral radius ${state.radius.toFixed(3)}: ${verdict}. ${descent}`;
  }

  // --- the page

  function element(tag, properties = {}, children = []) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function mount(host) {
    const inputs = {};
    const rows = Object.entries(SLIDERS).map(([name, { label, symbol, max }]) => {
      const id = `stability-${name}`;
      inputs[name] = element("input", {
        id, type: "range", min: 0, max, step: 0.01, value: 0,
      });
      const shown = element("output", { className: "value" });
      inputs[name].addEventListener("input", draw);
      return element("div", { className: "control" }, [
        element("label", { htmlFor: id, textContent: `${label} ${symbol}` }),
        inputs[name],
        shown,
      ]);
    });
    const choice = element("select", { id: "stability-case" },
      Object.keys(CASES).map((name) => element("option", { textContent: name })));
    choice.addEventListener("change", draw);
    const buttons = Object.entries(POSITIONS).map(([name, setting]) => {
      const button = element("button", { type: "button", textContent: name });
      button.addEventListener("click", () => {
        for (const key in setting) inputs[key].value = setting[key];
        draw();
      });
      return button;
    });
    const summary = element("output", { className: "summary" });
    summary.setAttribute("aria-live", "polite");
    const plots = ["Eigenvalues of A and the unit circle",
      "Trajectory over the level lines of the loss"].map((name) => {
      const plot = element("div", { className: "plot" });
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `${name}; the sentence below says what it shows`);
      return plot;
    });
    host.replaceChildren(
      element("fieldset", {}, [
        element("legend", { textContent: "Stability explorer" }),
        element("div", { className: "control" }, [
          element("label", { htmlFor: choice.id, textContent: "Blackbox term P" }),
          choice,
        ]),
        ...rows,
        element("div", { className: "buttons" }, buttons),
        element("div", { className: "plots" }, plots),
        summary,
      ]),
    );

    function draw() {
      const setting = {};
      for (const name in inputs) {
        setting[name] = Number(inputs[name].value);
        inputs[name].nextElementSibling.textContent = setting[name].toFixed(2);
      }
      const state = analyse(CASES[choice.value], setting);
      const color = getComputedStyle(host).color;
      const options = { displayModeBar: false, responsive: true };
      Plotly.react(plots[0], spectrumTraces(state, color),
        layout("eigenvalues of A", 2.6, host), options);
      Plotly.react(plots[1], runTraces(state), layout("run from (2, −2)", 4, host), options);
      summary.textContent = describe(state);
      host.dataset.state = JSON.stringify(state);
    }

    draw();
    // Colours follow the theme of the page.
    new MutationObserver(draw).observe(document.documentElement, {
      attributeFilter: ["data-theme"],
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    const host = document.querySelector("div.stability-explorer");
    if (!host || !window.Plotly) return;
    const style = element("link", { rel: "stylesheet", href: STYLE });
    style.addEventListener("load", () => mount(host));
    document.head.append(style);
  });
})();
