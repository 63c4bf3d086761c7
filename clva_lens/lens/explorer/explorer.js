// The explorer: one module, for a page that opens from disk and for a widget of a notebook.
// Pure functions come first. Text of others (questions, answers, names) is only ever set as text.

// -- arrays

const KINDS = {u8: Uint8Array, u32: Uint32Array, f32: Float32Array};
const KINDS_OF_HEADS = ["", "sensitive", "insensitive"];

// What was said, with its arrays by name, and the places of the single heads that are there.
export function unpack(said, buffer) {
	const parts = {};
	for (const [name, kind, shape, start] of said.sections) {
		parts[name] = new KINDS[kind](buffer, start, shape.reduce((a, b) => a * b, 1));
	}
	const [looks, count, heads, mapWords] = said.size;
	const kept = new Map();
	parts["heads.key"].forEach((key, place) => kept.set(key, place));
	const patches = said.grid[0] * said.grid[1];
	return {...said, parts, kept, patches, looks, count, heads, mapWords, each: Array.from({length: heads}, (_, head) => head), texts: said.words,
		live: new Map(), tops: new Map(), masses: new Map()};
}

export const headKey = (data, word, layer, head) =>
	(Math.min(word, data.mapWords - 1) * data.count + layer) * data.heads + head;

// The map of `heads` (a class, or places [layer, head]) in a look; null if a head is not there.
export function mapOf(data, look, word, layer, heads) {
	const {parts, patches, levels, looks, count, mapWords} = data;
	const out = new Float32Array(patches);
	if (typeof heads === "string") {
		const row = (look * count + layer) * mapWords + Math.min(word, mapWords - 1);
		add(out, parts[heads], row * patches, parts[heads + ".scale"][row], levels, 1);
		return out;
	}
	for (const [l, h] of heads) {
		const key = headKey(data, word, l, h), live = data.live.get(key), place = data.kept.get(key);
		if (live) {
			for (let i = 0; i < patches; i++) out[i] += live[look * patches + i] / heads.length;
		} else if (place === undefined) {
			return null;
		} else {
			const row = look * (parts.heads.length / looks / patches) + place;
			add(out, parts.heads, row * patches, parts["heads.scale"][row], levels, heads.length);
		}
	}
	return out;
}

function add(out, codes, start, scale, levels, parts) {
	const unit = scale / (levels * levels) / parts;
	for (let i = 0; i < out.length; i++) {
		const code = codes[start + i];
		out[i] += unit * code * code;
	}
}

// Each head's attention on the image as a word is written, layer by layer.
export function massOf(data, look, word) {
	const {masses, count, heads, mapWords} = data, w = Math.min(word, mapWords - 1);
	const all = count * heads, key = look * mapWords + w;
	if (!masses.has(key)) {
		masses.set(key, Float32Array.from({length: all}, (_, n) =>
			data.parts.mass[(look * all + n) * mapWords + w] / 255));
	}
	return masses.get(key);
}

// What the matrix of heads shows: before, after, or the difference.
export function headValues(data, at) {
	const [before, after] = [0, at.after].map((look) => massOf(data, look, at.word));
	return at.of === "difference" ? minus(after, before) : at.of === "after" ? after : before;
}

// The attention on the image of each layer, the mean over its heads.
export const layerMass = (data, look, word) => data.layers.map((_, layer) =>
	sum(massOf(data, look, word).subarray(layer * data.heads, (layer + 1) * data.heads)) / data.heads);

// The layer whose map a method changes most; without one, that with most on the image.
export function liveliest(data) {
	const moved = data.layers.map((_, l) => {
		const [a, b] = [0, data.looks - 1 && 1].map((look) => mapOf(data, look, 0, l, "all"));
		return sum(data.looks > 1 ? minus(b, a).map(Math.abs) : a);
	});
	return moved.indexOf(Math.max(...moved));
}

export const minus = (a, b) => a.map((value, place) => value - b[place]);
export const sum = (values) => values.reduce((a, b) => a + b, 0);

// Where colours end: at the largest value of some maps, or at their 99th percentile.
export function topOf(maps, rule) {
	const all = new Float32Array(sum(maps.map((one) => one.length)));
	let start = 0;
	for (const one of maps) { all.set(one, start); start += one.length; }
	all.sort();
	return all[rule === "p99" ? Math.floor(0.99 * (all.length - 1)) : all.length - 1] || 1e-9;
}

// Where the largest value is: its row and column, from 0, and how many times the mean it is.
export function peakOf(map, columns) {
	let at = 0;
	map.forEach((value, place) => { if (value > map[at]) at = place; });
	const mean = sum(map) / map.length;
	return {row: Math.floor(at / columns), column: at % columns, value: map[at],
		times: mean ? map[at] / mean : 0};
}

// -- words for numbers

export function number(value, digits = 2) {
	if (value === null || value === undefined || Number.isNaN(value)) return "–";
	const size = Math.abs(value);
	const text = digits > 2 && size && size < 0.5 * 10 ** -digits ? value.toExponential(0)
		: value.toFixed(digits);
	return text.replace(/^-(0\.0*)$/, "$1").replace(/^(-?)0\./, "$1.").replace("-", "−");
}

export const signed = (value, digits) =>
	(value > 0 && /[1-9]/.test(number(value, digits)) ? "+" : "") + number(value, digits);

// The heads that are meant, in words.
export function headsText(data, state) {
	const layer = `layer ${data.layers[state.layer]}`;
	if (typeof state.heads === "string") {
		return `${layer}, mean of ${state.heads === "all" ? "all" : `its ${state.heads}`} heads`;
	}
	const named = state.heads.map(([l, h]) => `${data.layers[l]}.${h}`);
	if (named.length === 1) return `layer ${named[0].replace(".", ", head ")}`;
	return `mean of ${named.length} heads (layer.head): ${named.join(", ")}`;
}

// What a map shows, for those who do not see it.
export function altText(name, map, data, state) {
	if (!map) return `${name}: this head is not in the page.`;
	const peak = peakOf(map, data.grid[1]);
	return `${name}, ${headsText(data, state)}, as “${data.texts[state.word]}” is written: ` +
		`${number(sum(map))} of the attention lies on these patches; most, ${number(peak.value, 3)} ` +
		`(${peak.times.toFixed(1)} times uniform), in row ${peak.row + 1}, column ${peak.column + 1}.`;
}

// What is the same before and after is said once.
const joined = (texts) => [...new Set(texts)].join(" → ");

const quoted = (text) => JSON.stringify(String(text));

// The present view, as Python makes it.
export function python(data, state) {
	const [word, layer] = [`word=${state.word}`, `layer=${data.layers[state.layer]}`];
	const heads = typeof state.heads === "string" ? quoted(state.heads)
		: `[${state.heads.map(([l, h]) => `(${data.layers[l]}, ${h})`).join(", ")}]`;
	const chosen = `${word}, ${layer}, heads=${heads}`;
	return ["import clva_lens as cl", "", `model = cl.load(${quoted(data.model)})`,
		`prompt = model.prompt("photo.jpg", ${quoted(data.question)})  # your photo`,
		`told = cl.explore(model, prompt, [${data.names.slice(1).join(", ")}])`,
		`told.draw(${chosen})`,
		`told.map(${chosen}, look=${state.after})  # [row, column], fractions of attention`, ""]
		.join("\n");
}

// -- colours

// sRGB of a colour in OKLCH: equal steps of lightness look equal.
export function oklch(lightness, chroma, hue) {
	const a = chroma * Math.cos(hue * Math.PI / 180), b = chroma * Math.sin(hue * Math.PI / 180);
	const [l, m, s] = [
		lightness + 0.39634 * a + 0.2158 * b,
		lightness - 0.10556 * a - 0.06385 * b,
		lightness - 0.08948 * a - 1.29149 * b,
	].map((one) => one ** 3);
	return [
		4.07674 * l - 3.30771 * m + 0.23097 * s,
		-1.26844 * l + 2.60976 * m - 0.34132 * s,
		-0.0042 * l - 0.70342 * m + 1.70761 * s,
	].map((one) => {
		const light = one <= 0.0031308 ? 12.92 * one : 1.055 * one ** (1 / 2.4) - 0.055;
		return Math.round(255 * Math.min(1, Math.max(0, light)));
	});
}

const MORE = 55, LESS = 245; // hues
const STEPS = 256;

// 256 colours of one hue with their opacities: over a photo, or over paper, light or dark.
export function ramp(hue, over = "photo") {
	const out = new Uint8ClampedArray(4 * STEPS);
	for (let step = 0; step < STEPS; step++) {
		const t = step / (STEPS - 1);
		const [from, to] = {photo: [0.62, 0.84], light: [0.985, 0.52], dark: [0.22, 0.8]}[over];
		const colour = oklch(from + (to - from) * t, over === "photo" ? 0.17 : 0.005 + 0.155 * t, hue);
		out.set([...colour, over === "photo" ? 255 * t ** 0.75 : 255], 4 * step);
	}
	return out;
}

const RAMPS = {};
const rampOf = (hue, over) => (RAMPS[hue + over] ??= ramp(hue, over));

// The pixels of a map, one a patch; values below 0 have the other hue.
export function paint(map, top, over = "photo") {
	const out = new Uint32Array(map.length);
	const [more, less] = [MORE, LESS].map((hue) => new Uint32Array(rampOf(hue, over).buffer));
	for (let i = 0; i < map.length; i++) {
		const step = Math.min(STEPS - 1, Math.round(Math.abs(map[i]) / top * (STEPS - 1)));
		out[i] = (map[i] < 0 ? less : more)[step];
	}
	return new Uint8ClampedArray(out.buffer);
}

// All colours, from 0 or from below it, to 1.
const scaleOf = (both, over) => paint(Float32Array.from({length: STEPS}, (_, n) =>
	both ? 2 * n / (STEPS - 1) - 1 : n / (STEPS - 1)), 1, over);

// The border of a set of patches, as the path of an SVG whose unit is a patch.
export function border(patches, [rows, columns]) {
	const inside = new Set(patches);
	const is = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && inside.has(r * columns + c);
	let path = "";
	for (const at of patches) {
		const r = Math.floor(at / columns), c = at % columns;
		if (!is(r - 1, c)) path += `M${c} ${r}h1`;
		if (!is(r + 1, c)) path += `M${c} ${r + 1}h1`;
		if (!is(r, c - 1)) path += `M${c} ${r}v1`;
		if (!is(r, c + 1)) path += `M${c + 1} ${r}v1`;
	}
	return path;
}

// -- elements

const SVG = "http://www.w3.org/2000/svg", STRETCHED = {preserveAspectRatio: "none"};

function fill(element, given, children) {
	for (const [name, value] of Object.entries(given ?? {})) {
		if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
		else if (name === "place") element.place = value;
		else element.setAttribute(name, value);
	}
	element.append(...children.flat().filter((one) => one || one === 0)); // strings become text
	return element;
}
const h = (tag, given, ...children) => fill(document.createElement(tag), given, children);
const s = (tag, given, ...children) => fill(document.createElementNS(SVG, tag), given, children);
const button = (text, onclick) => h("button", {onclick}, text);
const within = (value, end) => Math.max(0, Math.min(end, value));
const ARROWS = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]};

// Arrow keys walk over real buttons, one of which is in the order of tabs.
function rove(box, buttons, columns, moved) {
	let now = 0;
	const to = (place) => {
		if (place !== now) [buttons[now].tabIndex, buttons[place].tabIndex, now] = [-1, 0, place];
	};
	buttons.forEach((one, n) => { one.tabIndex = n ? -1 : 0; });
	box.addEventListener("keydown", (event) => {
		const at = buttons.indexOf(event.target.closest("button")), by = ARROWS[event.key];
		if (at < 0 || !by) return;
		event.preventDefault();
		const next = within(at + by[0] * columns + by[1], buttons.length - 1);
		to(next);
		buttons[next].focus();
		moved?.(next);
	});
	return to;
}

function canvas(columns, rows, pixels) {
	const made = h("canvas", {width: columns, height: rows, "aria-hidden": "true"});
	const put = (all, y = 0) => made.getContext("2d").putImageData(new ImageData(all, columns), 0, y);
	if (pixels) put(pixels);
	return {made, put};
}

const labelled = (text, ...inputs) => h("label", null, h("span", null, text), inputs);

function choice(text, options, changed) {
	const select = h("select", {onchange: () => changed(select.value)},
		options.map(([value, shown]) => h("option", {value}, shown)));
	return {element: labelled(text, select), select};
}

function slider(text, end, step, changed) {
	const input = h("input", {type: "range", min: 0, max: end, step, oninput: () => changed(Number(input.value))});
	const output = h("output");
	return {element: labelled(text, input, output), input, output};
}

// -- the parts of one exploration: each has elements, and draws the view it is given

function wordsPart({data, set, pair}) {
	const chips = data.texts.map((text, word) => h("button", {class: "chip", title: text,
		onclick: () => set({word}),
		onpointerenter: (event) => { if (event.pointerType === "mouse") set({word}); }},
	h("span", {class: "word"}, text), h("small"),
	h("i")));
	const element = h("div", {class: "words", role: "toolbar",
		"aria-label": "words of the answer"}, chips);
	const focus = rove(element, chips, 1, (word) => set({word}));
	return {element, draw({at}) {
		chips.forEach((chip, word) => {
			chip.ariaPressed = word === at.word;
			chip.children[1].textContent = joined(pair(at).map((look) => number(data.probabilities[look][0][word])));
			chip.lastChild.style.width = `${86 * data.probabilities[at.after][0][word]}%`;
		});
		focus(at.word);
	}};
}

// What stands under a map: chances and margins, each beside what it is without any look.
function facts(data, kind, at) {
	const look = kind === "before" ? 0 : at.after;
	const read = (values, of) => kind === "difference" ? signed(of(values[look]) - of(values[0]))
		: (values === data.probabilities ? number : signed)(of(values[look]));
	const both = (values) => [0, 1].map((blind) => read(values, (one) => one[blind][at.word])).join(", blind ");
	const out = [["p(word)", both(data.probabilities)]];
	if (data.margins[0][0][at.word] !== null) out.push(["yes − no", both(data.margins)]);
	if (data.knocked[0][at.layer] !== null && !at.word) {
		out.push([`… layer ${data.layers[at.layer]} blind`, read(data.knocked, (one) => one[at.layer])]);
	}
	return out;
}

function mapsPart(cx) {
	const {data, set, shown} = cx, [rows, columns] = data.grid;
	const figures = shown.map((kind) => {
		const map = canvas(columns, rows), name = h("b"), mass = h("span"), list = h("dl");
		map.made.className = "heat";
		const image = h("img", {alt: "", src: data.photo, onload: () => {
			frame.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
		}});
		const lines = [s("path", {class: "halo"}), s("path")];
		const cross = h("i", {class: "cross"});
		cross.style.width = `${100 / columns}%`;
		cross.style.height = `${100 / rows}%`;
		const frame = h("div", {class: "frame", tabindex: 0, role: "application",
			onpointermove: point, onpointerdown: point, onpointerleave: () => set({patch: null}), onkeydown: step},
		image, map.made, s("svg", {viewBox: `0 0 ${columns} ${rows}`, ...STRETCHED,
			"aria-hidden": "true", class: "outline"}, lines), cross);
		const element = h("figure", {class: kind}, h("figcaption", null, name, mass), frame, list);
		return {kind, map, frame, lines, cross, name, mass, list, element};
	});
	const bars = shown.slice(0, 2).map((_, n) => h("span", {class: "bar"}, h("span"),
		canvas(STEPS, 1, scaleOf(n, "photo")).made, h("span")));
	const status = h("p", {class: "status", role: "status"}), missing = h("p", {class: "missing"});

	function point(event) {
		const box = event.currentTarget.getBoundingClientRect();
		set({patch: [within(Math.floor((event.clientY - box.top) / box.height * rows), rows - 1),
			within(Math.floor((event.clientX - box.left) / box.width * columns), columns - 1)]});
	}

	function step(event) {
		const by = ARROWS[event.key];
		if (!by) return;
		event.preventDefault();
		const [row, column] = cx.at().patch ?? [rows >> 1, columns >> 1];
		set({patch: [within(row + by[0], rows - 1), within(column + by[1], columns - 1)]});
	}

	function figure(one, {at, maps, top}) {
		const map = maps[one.kind], difference = one.kind === "difference";
		one.map.put(map ? paint(map, top) : new Uint8ClampedArray(4 * rows * columns));
		one.map.made.style.opacity = at.opacity;
		one.map.made.style.imageRendering = at.smooth ? "auto" : "pixelated";
		const path = border(data.outlines[at.outline] ?? [], data.grid);
		one.lines.forEach((line) => line.setAttribute("d", path));
		const name = cx.name(one.kind, at);
		one.name.textContent = one.name.title = name;
		one.mass.textContent = map ? `${(difference ? signed : number)(sum(map))} on it` : "";
		one.frame.ariaLabel = altText(name, map, data, at);
		one.list.replaceChildren(...facts(data, one.kind, at).map(([key, value]) =>
			h("div", null, h("dt", null, key), h("dd", null, value))));
	}

	// The patch that is pointed at: weights, and how many times uniform they are.
	function readout({at, maps}) {
		figures.forEach(({cross}) => {
			cross.hidden = !at.patch;
			if (at.patch) [cross.style.left, cross.style.top] = [`${100 * at.patch[1] / columns}%`, `${100 * at.patch[0] / rows}%`];
		});
		if (!maps.before) return "";
		if (!at.patch) return `${headsText(data, at)}. Point at a patch.`;
		const [row, column] = at.patch, place = row * columns + column;
		const said = shown.slice(0, 2).map((kind) => {
			const map = maps[kind], mean = sum(map) / map.length;
			return `${number(map[place], 4)} (${mean ? (map[place] / mean).toFixed(1) : 0}× uniform)`;
		});
		if (maps.difference) said[1] += `, ${signed(maps.difference[place], 4)}`;
		return `row ${row + 1}, column ${column + 1}: ${said.join(" → ")}`;
	}

	return {elements: [h("div", {class: "maps"}, figures.map((one) => one.element)), missing,
		h("div", {class: "legend"}, bars, status)], draw(seen) {
		const {at, maps, top} = seen;
		figures.forEach((one) => figure(one, seen));
		missing.textContent = maps.before ? "" : cx.link.ask ? "Asking the kernel for this head …"
			: "Of later words this page has the strongest heads only; show() in a notebook has all.";
		const end = number(top, 3);
		const ends = [["0", `${end} (${cx.scales[at.scale]})`], [`−${end}`, `+${end}`]];
		bars.forEach((bar) => { bar.hidden = !maps.before; });
		bars.forEach((bar, n) => [0, 2].forEach((child) => { bar.children[child].textContent = ends[n][child / 2]; }));
	}, point(seen) { status.textContent = readout(seen); }};
}

function controlsPart({data, set, to, at: now, looks, scales}) {
	const layer = slider("layer", data.count - 1, 1, to);
	const opacity = slider("opacity", 1, 0.05, (value) => set({opacity: value}));
	const heads = choice("heads", [["all", "all (mean)"], ["sensitive", "sensitive"], ["insensitive", "insensitive"],
		["", "picked"]], (value) => set({heads: value || now().heads}));
	const scale = choice("colours end at", Object.entries(scales), (value) => set({scale: value}));
	const names = Object.keys(data.outlines);
	const outline = choice("outline", [["", "none"], ...names.map((one) => [one, one])],
		(value) => set({outline: value}));
	const method = choice("method", data.names.map((one, n) => [n, one]).slice(1), (value) => set({after: Number(value)}));
	const smooth = h("input", {type: "checkbox", onchange: () => set({smooth: smooth.checked})});
	const element = h("div", {class: "controls"}, layer.element, heads.element, looks > 2 && method.element,
		scale.element, names.length > 0 && outline.element, opacity.element, labelled("smooth", smooth));
	return {element, draw({at}) {
		layer.input.value = at.layer;
		layer.input.ariaValueText = `layer ${data.layers[at.layer]}`;
		layer.output.textContent = data.layers[at.layer];
		heads.select.lastChild.hidden = !at.picked;
		heads.select.value = at.picked ? "" : at.heads;
		opacity.input.value = at.opacity;
		smooth.checked = at.smooth;
		scale.select.value = at.scale;
		outline.select.value = names.includes(at.outline) ? at.outline : "";
		method.select.value = at.after;
	}};
}

function stripPart({data, pair, to, name, looks, allLayers}) {
	const [rows, columns] = data.grid;
	const thumbs = data.layers.map((name, place) => {
		const map = canvas(columns, rows * Math.min(looks, 2));
		return {map, element: h("button", {onclick: () => to(place)}, map.made,
			h("small", null, String(name)))};
	});
	const key = h("p", {class: "key"}), buttons = thumbs.map((one) => one.element);
	const strip = h("div", {class: "strip", role: "toolbar", "aria-label": "layers"}, buttons);
	const focus = rove(strip, buttons, 1, to);
	let drawn;
	return {element: h("div", null, key, strip), draw({at, kind}) {
		const now = `${kind} ${at.word} ${at.after}`;
		if (now !== drawn) {
			const top = allLayers(kind, at);
			thumbs.forEach(({map, element}, l) => {
				const maps = pair(at).map((look) => mapOf(data, look, at.word, l, kind));
				maps.forEach((one, n) => map.put(paint(one, top, "dark"), n * rows));
				const masses = maps.map((one) => number(sum(one))).join(" → ");
				element.ariaLabel = `layer ${data.layers[l]}: ${masses} on the image`;
			});
			key.textContent = looks > 1 ? `Layers: above ${name("before", at)}, below ${name("after", at)}` : "Layers";
			drawn = now;
		}
		buttons.forEach((one, l) => { one.ariaPressed = l === at.layer; });
		focus(at.layer);
	}};
}

function chartsPart({data, pair, shown, to}) {
	const element = h("div", {class: "charts"}), lens = h("p", {class: "lens"});
	const wide = 220, high = 88, count = data.count;
	const x = (n, all) => 4 + (wide - 8) * (all > 1 ? n / (all - 1) : 0.5);

	function drag(event) {
		if (event.type === "pointermove" && !event.buttons) return;
		const box = event.currentTarget.getBoundingClientRect();
		const share = ((event.clientX - box.left) / box.width * wide - 4) / (wide - 8);
		to(within(Math.round(share * (count - 1)), count - 1));
	}

	// Curves over the layers: each has a class, its values, and whether its value is said.
	function chart(name, curves, range, place) {
		const all = curves.flatMap(([, line]) => line).filter((one) => one !== null);
		const [low, top] = range ?? [Math.min(0, ...all), Math.max(0.1, ...all)];
		const y = (value) => 4 + (high - 8) * (top - value) / (top - low);
		const paths = curves.map(([kind, line]) => s("path", {class: kind, d: line.map((value, n) => value === null ? ""
			: `${n && line[n - 1] !== null ? "L" : "M"}${x(n, line.length).toFixed(1)} ${y(value).toFixed(1)}`).join("")}));
		const read = (mark) => curves.filter(([kind]) => (kind.split(" ")[1] ?? "") === mark)
			.map(([, line]) => number(line[place])).join(" → ");
		const text = read("") + (read("dashed") && `, – – ${read("dashed")}`);
		return h("figure", {class: "chart"}, h("figcaption", null, name, h("b", null, text)), h("div", null,
			[top, low].map((one) => h("small", null, number(one, range ? 0 : 1))),
			s("svg", {viewBox: `0 0 ${wide} ${high}`, ...STRETCHED, role: "img",
				"aria-label": `${name}, by layer; in layer ${data.layers[place]}: ${text}`,
				onpointerdown: drag, onpointermove: drag},
			s("path", {class: "zero", d: `M0 ${y(0)}H${wide}`}),
			s("path", {class: "cursor", d: `M${x(place, count)} 0V${high}`}), paths)));
	}

	return {element, lens, draw({at}) {
		const two = pair(at).map((look, n) => [look, shown[n]]);
		const each = (values) => two.map(([look, name]) => [name, values(look)]);
		const made = [["attention on the image", each((look) => layerMass(data, look, at.word)), [0, 1]],
			["r with anchors (dashed: negative)", two.flatMap(([look, name]) =>
				[[name, data.curves[look][2]], [`${name} dashed`, data.curves[look][3]]]), [-1, 1]]];
		if (data.knocked[0].some((one) => one !== null)) {
			made.push(["yes − no, one layer blind", two.flatMap(([look, name]) => [[name, data.knocked[look]],
				[`${name} level`, data.layers.map(() => data.margins[look][0][0])]])]);
		}
		if (data.lens[0].some(([margin]) => margin !== null)) {
			made.push(["yes − no, logit lens", each((look) => data.lens[look].map(([margin]) => margin))]);
		}
		element.replaceChildren(...made.map(([name, curves, range]) => chart(name, curves, range, at.layer)));
		const place = data.lensLayers.indexOf(data.layers[at.layer]);
		const said = pair(at).map((look) => place < 0 ? ""
			: `“${data.lensWords[look][place]}” (p ${number(data.lens[look][place][1])})`);
		lens.textContent = said[0] && `Logit lens: after layer ${data.layers[at.layer]} the answer would begin ${joined(said)}.`;
	}};
}

function headsPart({data, link, set, pair, shown, looks, at: now}) {
	const grid = canvas(data.heads, data.count);
	const cells = data.layers.map((name, l) => data.each.map((head) => h("button", {role: "gridcell", place: [l, head],
		"aria-selected": "false", "aria-label": `layer ${name}, head ${head}`})));
	const every = Math.ceil(data.count / 16);
	const sides = data.layers.map((name, l) => h("button", {role: "rowheader", place: [l],
		"aria-label": `layer ${name}, all heads`}));
	const placeOf = (event) => event.target.closest("button")?.place ?? [];

	function choose(event) {
		const [l, head] = placeOf(event), {heads, picked} = now();
		if (head === undefined) return l !== undefined && set({layer: l, heads: "all"});
		const before = event.shiftKey && picked ? heads : [];
		const others = before.filter(([a, b]) => a !== l || b !== head);
		set({layer: l, heads: others.length && others.length < before.length ? others : [...others, [l, head]]});
	}

	function tell(event) {
		const [l, head] = placeOf(event), at = now();
		if (head === undefined) return;
		const values = pair(at).map((look) => `${number(massOf(data, look, at.word)[l * data.heads + head])} on the image, ` +
			(KINDS_OF_HEADS[data.classes[look][l][head]] || "no class"));
		const here = link.ask || data.kept.has(headKey(data, at.word, l, head));
		const text = `layer ${data.layers[l]}, head ${head}: ${joined(values)}${here ? "" : "; no map in this page"}`;
		said.textContent = text;
		event.target.ariaLabel = text;
	}

	const table = h("div", {class: "cells", role: "grid", "aria-multiselectable": "true", onclick: choose,
		"aria-label": "heads by layer: attention on the image", onpointerover: tell, onfocusin: tell,
		onkeydown: (event) => {
			if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(event); }
		}}, data.layers.map((_, l) => h("div", {role: "row"}, sides[l], cells[l])));
	table.style.setProperty("--heads", data.heads);
	table.style.setProperty("--layers", data.count);
	rove(table, data.layers.flatMap((_, l) => [sides[l], ...cells[l]]), data.heads + 1);
	const of = choice("show", shown.map((one) => [one, one]), (value) => set({of: value}));
	const said = h("p", {class: "head"}, "Choose a head to see its map; with shift, the mean of several.");
	const [low, high, colours] = [h("span"), h("span"), canvas(STEPS, 1)];
	const element = h("div", {class: "matrix"},
		h("div", {class: "over"}, h("h3", null, "Attention of each head"), looks > 1 && of.element),
		h("div", {class: "stack"}, grid.made, table),
		h("p", {class: "axis"}, h("span", null, "↓ layer  → head"), h("span", {class: "keys"},
			h("i", {class: "sensitive"}), "sensitive", h("i", {class: "insensitive"}), "insensitive")),
		h("span", {class: "bar"}, low, colours.made, high), said);
	let drawn, classes;

	function colour(at, over) {
		const difference = at.of === "difference";
		const values = headValues(data, at);
		const top = difference ? Math.max(0.05, topOf([values.map(Math.abs)])) : 1;
		grid.put(paint(values, top, over));
		colours.put(scaleOf(difference, over));
		low.textContent = difference ? `−${number(top)}` : "0";
		high.textContent = `${difference ? "+" : ""}${number(top)} of its attention on the image`;
	}

	return {element, draw({at, over}) {
		const key = `${at.word} ${at.after} ${at.of} ${over}`, look = at.of === "before" ? 0 : at.after;
		if (key !== drawn) colour(at, over);
		if (look !== classes) {
			cells.forEach((row, l) => row.forEach((cell, head) => {
				cell.className = KINDS_OF_HEADS[data.classes[look][l][head]] ?? "";
			}));
		}
		[drawn, classes] = [key, look];
		table.querySelectorAll("[aria-selected=true]").forEach((one) => { one.ariaSelected = "false"; });
		if (at.picked) at.heads.forEach(([l, head]) => { cells[l][head].ariaSelected = "true"; });
		sides.forEach((side, l) => {
			side.className = l === at.layer ? "now" : "";
			side.textContent = l % every && l !== at.layer ? "" : data.layers[l];
		});
		of.select.value = at.of;
	}};
}

// -- what can be taken away

// Every view as rows and columns: by name, the titles and the rows.
export function tablesOf(data, {at, maps}, names, pair) {
	const read = (values, word) => pair.flatMap((look) => [0, 1].map((blind) => number(values[look][blind][word], 3)));
	const both = (what) => names.slice(0, 2).flatMap((name) => [`${what}, ${name}`, `${what}, ${name}, blind`]);
	const heads = data.each, masses = headValues(data, at), look = at.of === "before" ? 0 : at.after;
	const byLook = (layers, row) => layers.flatMap((layer, l) => pair.map((one) => [layer, data.names[one], ...row(one, l)]));
	return {
		"Words": [["word", ...both("p"), ...both("yes − no")], data.texts.map((text, word) =>
			[text, ...read(data.probabilities, word), ...read(data.margins, word)])],
		"Patches": [["row", "column", ...names], Array.from(maps.before ?? [], (_, place) => [Math.floor(place / data.grid[1]) + 1,
			place % data.grid[1] + 1, ...Object.values(maps).slice(0, names.length).map((map) => number(map[place], 5))])],
		"Heads": [["layer", ...heads.map((head) => `head ${head}`)], data.layers.map((layer, l) => [layer, ...heads.map((head) =>
			`${number(masses[l * data.heads + head])} ${KINDS_OF_HEADS[data.classes[look][l][head]]?.slice(0, 3) ?? ""}`)])],
		"Layers": [["layer", "look", "entropy (nats)", "r, positive anchor", "r, negative anchor", "yes − no, blind here"],
			byLook(data.layers, (one, l) => [...[1, 2, 3].map((curve) => number(data.curves[one][curve][l])), number(data.knocked[one][l])])],
		"Logit lens": [["layer", "look", "likeliest token", "p", "yes − no"], byLook(data.lensLayers, (one, l) =>
			[data.lensWords[one][l], number(data.lens[one][l][1]), number(data.lens[one][l][0])])],
	};
}

// The maps with what stands under them, as one SVG.
function drawing(cx, {at, maps, top}, ratio) {
	const {data, shown} = cx, [rows, columns] = data.grid;
	const size = 300, gap = 16, tall = Math.round(size / ratio), wide = shown.length * (size + gap) + gap, high = tall + 150;
	const label = (x, y, text, given) => s("text", {x, y, ...given}, text);
	const panel = (kind, n) => {
		const x = gap + n * (size + gap), pixels = maps[kind] ? paint(maps[kind], top) : [];
		const grid = {transform: `translate(${x} 52) scale(${size / columns} ${tall / rows})`};
		const box = {x, y: 52, width: size, height: tall, ...STRETCHED};
		return [s("image", {...box, href: data.photo, filter: "url(#grey)"}),
			maps[kind] && at.smooth ? s("image", {...box, opacity: at.opacity, href: canvas(columns, rows, pixels).made.toDataURL()})
				: s("g", grid, Array.from(maps[kind] ?? [], (_, place) => s("rect", {x: place % columns,
					y: Math.floor(place / columns), width: 1, height: 1, fill: `rgb(${pixels.slice(4 * place, 4 * place + 3).join()})`,
					"fill-opacity": (pixels[4 * place + 3] / 255 * at.opacity).toFixed(3)}))),
			s("path", {...grid, d: border(data.outlines[at.outline] ?? [], data.grid), fill: "none", stroke: "#fff",
				"stroke-width": 2, "vector-effect": "non-scaling-stroke"}),
			label(x, 46, cx.name(kind, at), {"font-weight": 600}),
			...facts(data, kind, at).map(([key, value], m) => label(x, tall + 70 + 17 * m, `${key}: ${value}`))];
	};
	const grey = "0.13 0.44 0.04 0 0 ".repeat(3) + "0 0 0 1 0";
	return s("svg", {xmlns: SVG, viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, "font-family": "system-ui, sans-serif", "font-size": 12},
		s("filter", {id: "grey"}, s("feColorMatrix", {type: "matrix", values: grey})),
		s("rect", {width: wide, height: high, fill: "#fff"}), label(gap, 24, data.question, {"font-size": 15}),
		shown.flatMap(panel), label(gap, high - 14, `${data.model}: ${headsText(data, at)}, as “${data.texts[at.word]}” ` +
			`is written; colours end at ${number(top, 3)}`));
}

function toolsPart(cx, root, seen) {
	const {data} = cx, dialog = h("dialog");
	const save = (name, href) => h("a", {href, download: name}).click();

	function open(name, ...content) {
		dialog.ariaLabel = name;
		dialog.replaceChildren(h("form", {method: "dialog"}, h("h3", null, name), h("button", null, "Close")), ...content);
		dialog.showModal();
	}

	function code() {
		const text = python(data, cx.at()), said = h("span", {role: "status"});
		const copy = () => navigator.clipboard.writeText(text).then(() => { said.textContent = " Copied."; },
			() => { said.textContent = " Select the text, and copy it."; });
		open("This view in Python", h("pre", {tabindex: 0}, text), button("Copy", copy), said);
	}

	function tables() {
		const at = cx.at(), all = tablesOf(data, seen(), cx.shown.map((kind) => cx.name(kind, at)), cx.pair(at));
		const body = h("div", {class: "table", tabindex: 0, role: "region", "aria-label": "table"});
		const show = (name) => {
			const [titles, lines] = all[name];
			body.replaceChildren(h("table", null, h("caption", null, `${name}: ${headsText(data, at)}`),
				h("thead", null, h("tr", null, titles.map((one) => h("th", {scope: "col"}, one)))),
				h("tbody", null, lines.map((line) => h("tr", null, line.map((one, n) =>
					n ? h("td", null, String(one)) : h("th", {scope: "row"}, String(one))))))));
		};
		show("Words");
		open("Tables", choice("view", Object.keys(all).map((one) => [one, one]), show).element, body);
	}

	function picture(kind) {
		const {naturalWidth, naturalHeight} = root.querySelector("img"), image = new Image();
		const text = new XMLSerializer().serializeToString(drawing(cx, seen(), naturalWidth / naturalHeight));
		image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
		if (kind === "svg") return save("explorer.svg", image.src);
		image.onload = () => {
			const large = h("canvas", {width: 2 * image.width, height: 2 * image.height});
			large.getContext("2d").drawImage(image, 0, 0, large.width, large.height);
			save("explorer.png", large.toDataURL());
		};
	}

	return {dialog, element: h("div", {class: "tools"}, button("Tables", tables), button("Copy as Python", code),
		button("PNG", () => picture("png")), button("SVG", () => picture("svg")))};
}

// -- one exploration

function view(data, which, link) {
	const {state} = link, looks = data.looks;
	const root = h("section", {class: "cx", "aria-label": `explorer: ${data.question}`});
	let now;
	const cx = {data, which, link, looks,
		shown: looks > 1 ? ["before", "after", "difference"] : ["before"],
		scales: {p99: "99 % of this view", largest: "its largest value", layers: "99 % of any layer"},
		set: (change) => { Object.assign(state, change); link.draw(); },
		at: () => ({...state, picked: typeof state.heads !== "string",
			word: Math.min(state.word, data.texts.length - 1), after: Math.min(state.after, looks - 1)}),
		pair: (at) => looks > 1 ? [0, at.after] : [0],
		name: (kind, at) => ({before: data.names[0], after: data.names[at.after]})[kind] ?? kind,
		// Another layer: the heads of a class move there; heads that were picked are let go.
		to: (layer) => cx.set({layer, heads: cx.at().picked ? "all" : state.heads}),
		allLayers(kind, at) {
			const key = `${kind} ${at.word} ${at.after}`;
			if (!data.tops.has(key)) {
				data.tops.set(key, Math.max(...cx.pair(at).flatMap((look) =>
					data.layers.map((_, l) => topOf([mapOf(data, look, at.word, l, kind)], "p99")))));
			}
			return data.tops.get(key);
		}};

	function seen() {
		const at = cx.at(), kind = at.picked ? "all" : at.heads;
		// Asked before anything is drawn, or the browser would lay out twice.
		const over = getComputedStyle(root).getPropertyValue("--over").trim() || "light";
		const [before, after] = [0, at.after].map((look) => mapOf(data, look, at.word, at.layer, at.heads));
		if (!before) need(at);
		const top = !before ? 1 : at.scale === "layers" ? cx.allLayers(kind, at) : topOf([before, after], at.scale);
		return {at, kind, top, over, maps: {before, after, difference: before && minus(after, before)}};
	}

	// Ask the kernel for heads that are not here.
	function need({word, heads}) {
		const absent = heads.map(([l, head]) => [l, head, headKey(data, word, l, head)])
			.filter(([, , key]) => !data.kept.has(key) && !data.live.has(key));
		link.ask?.({which, word, heads: absent.map(([l, head]) => [l, head])});
	}

	const parts = [wordsPart, mapsPart, controlsPart, stripPart, chartsPart, headsPart].map((part) => part(cx));
	const [words, maps, controls, strip, charts, heads] = parts;
	const tools = toolsPart(cx, root, () => now);
	const answers = data.names.map((name, look) => h("span", {class: look ? "after" : "before"},
		h("i", null, name), ` “${data.answers[look]}”`));
	root.append(h("header", null, h("div", null, h(which ? "h2" : "h1", null, data.question || "a processor's output"),
		h("p", {class: "answers", tabindex: 0}, h("span", null, data.model), answers)), tools.element), words.element,
	h("div", {class: "body"}, h("div", {class: "left"}, maps.elements, strip.element, charts.element),
		h("div", {class: "right"}, heads.element, controls.element, charts.lens)), tools.dialog);
	let drawn;
	return {root, draw() {
		now = seen();
		const key = JSON.stringify([{...now.at, patch: 0}, now.over, data.live.size]);
		if (key !== drawn) parts.forEach((part) => part.draw(now));
		drawn = key;
		maps.point(now);
	}};
}

// -- the doors

// Show explorations in an element; `ask` gets single heads from a kernel, if there is one.
export function mount(element, datas, ask = null) {
	const first = datas[0];
	const link = {ask, state: {word: 0, layer: liveliest(first), heads: "all", after: Math.min(1, first.looks - 1),
		opacity: 0.9, smooth: false, outline: Object.keys(first.outlines)[0] ?? "", scale: "p99", of: "before",
		patch: null}};
	const views = datas.map((data, which) => view(data, which, link));
	link.draw = () => views.forEach((one) => one.draw());
	element.replaceChildren(...views.map((one) => one.root));
	element.classList.toggle("clva-lens-two", views.length > 1);
	const scheme = matchMedia("(prefers-color-scheme: dark)");
	scheme.addEventListener("change", link.draw);
	link.draw();
	return {link, close: () => scheme.removeEventListener("change", link.draw)};
}

async function read(said, bytes) {
	const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
	return unpack(said, await new Response(stream).arrayBuffer());
}

async function boot(element) {
	const {explorations} = JSON.parse(element.textContent);
	const datas = await Promise.all(explorations.map((said) =>
		read(said, Uint8Array.from(atob(said.data), (one) => one.charCodeAt(0)))));
	mount(document.getElementById("clva-lens"), datas);
	document.documentElement.dataset.ready = "";
}

// The widget's door, as anywidget asks for it.
async function render({model, el}) {
	const data = model.get("data"), asked = new Set();
	const datas = await Promise.all(model.get("said").map((said, n) => read(said, data[n])));
	// Its theme and style are known once it is in the page.
	for (let n = 0; n < 60 && !el.isConnected; n++) await new Promise(requestAnimationFrame);
	const themes = {dark: "[data-jp-theme-light=false], .vscode-dark, .dark, [theme=dark]",
		light: "[data-jp-theme-light=true], .vscode-light, [theme=light]"};
	for (const theme in themes) if (el.closest(themes[theme])) el.dataset.theme = theme;
	const {link, close} = mount(el, datas, (message) => {
		const key = JSON.stringify(message);
		if (!asked.has(key)) model.send(message);
		asked.add(key);
	});
	const take = ({which, word, heads}, [buffer]) => {
		const to = datas[which], size = to.looks * to.patches, start = buffer.byteOffset ?? 0;
		const values = new Float32Array((buffer.buffer ?? buffer).slice(start, start + 4 * size * heads.length));
		heads.forEach(([l, head], n) => to.live.set(headKey(to, word, l, head), values.subarray(n * size, (n + 1) * size)));
		link.draw();
	};
	model.on("msg:custom", take);
	return () => { model.off("msg:custom", take); close(); };
}

export default {render};

const told = globalThis.document?.getElementById("clva-lens-data");
if (told) boot(told);
