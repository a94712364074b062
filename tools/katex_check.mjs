// Which formulas does strict KaTeX refuse? stdin: JSON [[where, tex, display], ...]; stdout: JSON, one line a refused one.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(new URL("../.node/", import.meta.url)); // where `make test` installs it
const katex = require("katex");
const refused = [];
for (const [where, tex, displayMode] of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    katex.renderToString(tex, { displayMode, strict: "error", throwOnError: true });
  } catch (e) {
    refused.push(`${where}: ${e.message}`);
  }
}
console.log(JSON.stringify(refused));
