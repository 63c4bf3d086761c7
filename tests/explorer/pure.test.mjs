// Functions of the explorer that need no page. The module and an exploration come from pytest.
import assert from "node:assert/strict";
import test from "node:test";
import {gunzipSync} from "node:zlib";

const given = JSON.parse(process.env.EXPLORATION);
const url = `data:text/javascript;base64,${Buffer.from(given.module).toString("base64")}`;
const cx = await import(url);
const raw = gunzipSync(Buffer.from(given.data, "base64"));
const data = cx.unpack(given, raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length));
const state = {word: 0, layer: 1, heads: "all", after: 1, of: "difference"};
const near = (a, b, by) => assert.ok(Math.abs(a - b) <= by, `${a} is not ${b}`);

test("the mean of all heads is that of the single ones", () => {
	const each = [...Array(data.heads).keys()].map((head) => [1, head]);
	const [mean, single] = ["all", each].map((heads) => cx.mapOf(data, 1, 2, 1, heads));
	mean.forEach((value, place) => near(value, single[place], Math.max(...mean) / 60));
	near(cx.sum(mean), cx.layerMass(data, 1, 2)[1], 0.02);
});

test("a head that was left out has no map until it comes", () => {
	const less = {...data, kept: new Map(), live: new Map()};
	assert.equal(cx.mapOf(less, 0, 1, 1, [[2, 1]]), null);
	const values = Float32Array.from({length: less.looks * less.patches}, (_, place) => place);
	less.live.set(cx.headKey(less, 1, 2, 1), values);
	assert.equal(cx.mapOf(less, 1, 1, 1, [[2, 1]])[3], less.patches + 3);
});

test("colours end at the largest value, or at the 99th percentile", () => {
	const values = Float32Array.from({length: 101}, (_, place) => place);
	assert.equal(cx.topOf([values], "largest"), 100);
	assert.equal(cx.topOf([values], "p99"), 99);
	assert.ok(cx.topOf([new Float32Array(4)], "p99") > 0);
});

test("one hue, which gets lighter in equal steps and never turns back", () => {
	for (const [over, way] of [["photo", 1], ["light", -1], ["dark", 1]]) {
		const colours = cx.ramp(55, over);
		const light = [...Array(256).keys()].map((step) => 0.2126 * colours[4 * step] +
			0.7152 * colours[4 * step + 1] + 0.0722 * colours[4 * step + 2]);
		light.slice(1).forEach((one, step) => assert.ok(way * (one - light[step]) >= -1.5));
	}
	assert.deepEqual([...cx.paint([0], 1)].slice(3), [0]);
	const [more, less] = [1, -1].map((value) => cx.paint([value], 1));
	assert.ok(more[0] > more[2] && less[0] < less[2]);
});

test("numbers in words", () => {
	assert.deepEqual([0, 0.5, -0.25, -0.001, 1, null].map((one) => cx.number(one)),
		[".00", ".50", "−.25", ".00", "1.00", "–"]);
	assert.equal(cx.number(0.00001, 4), "1e−5");
	assert.deepEqual([0.2, -0.2, 0.001].map((one) => cx.signed(one)), ["+.20", "−.20", ".00"]);
});

test("alternative text names the largest patch", () => {
	const map = new Float32Array(data.patches).fill(0.01);
	map[7] = 0.2;
	const text = cx.altText("before", map, data, state);
	assert.match(text, /before, layer 1, mean of all heads, as “word0” is written/);
	assert.match(text, /\.200 .* in row 2, column 3\.$/);
});

test("Python of a view quotes what was asked", () => {
	const asked = {...data, question: 'a "cup"\\\n?'};
	const text = cx.python(asked, {...state, heads: [[1, 0], [2, 2]]});
	assert.ok(text.includes(String.raw`"a \"cup\"\\\n?"`));
	assert.ok(text.includes("told.draw(word=0, layer=1, heads=[(1, 0), (2, 2)])"));
});

test("a border runs around the patches, not between them", () => {
	assert.equal(cx.border([0, 1], [2, 2]), "M0 0h1M0 1h1M0 0v1M1 0h1M1 1h1M2 0v1");
	assert.equal(cx.border([], [2, 2]), "");
});

test("tables have a row for each thing that is drawn", () => {
	const maps = {before: new Float32Array(20), after: new Float32Array(20), difference: new Float32Array(20)};
	const all = cx.tablesOf(data, {at: state, maps}, ["a", "b", "c"], [0, 1]);
	const sizes = Object.fromEntries(Object.entries(all).map(([name, [, rows]]) => [name, rows.length]));
	assert.deepEqual(sizes, {Words: 3, Patches: 20, Heads: 4, Layers: 8, "Logit lens": 8});
	for (const [titles, rows] of Object.values(all)) rows.forEach((row) => assert.equal(row.length, titles.length));
});
