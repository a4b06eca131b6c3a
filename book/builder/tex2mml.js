// Turn TeX into MathML: reads [[tex, display], ...] as JSON, writes the list of <math> elements as JSON.
const { init } = require(process.argv[2]);
const { readFileSync } = require("fs");

init({ loader: { load: ["input/tex", "adaptors/liteDOM"] } }).then(async (MathJax) => {
  const elements = [];
  for (const [tex, display] of JSON.parse(readFileSync(0, "utf8")))
    elements.push(await MathJax.tex2mmlPromise(tex, { display }));
  process.stdout.write(JSON.stringify(elements));
});
