// Runs what it is given, line by line, in one context.
(() => {
  const fs = require("fs"), vm = require("vm"), util = require("util"), path = require("path");
  const { createRequire } = require("module");
  const given = require("readline").createInterface({ input: fs.createReadStream(null, { fd: 0 }), terminal: false });
  globalThis.require = createRequire(path.join(process.cwd(), "session"));
  const mark = (text) => fs.writeSync(1, "\x1e" + text + "\x1f");
  let interrupt = null, count = 0, before = Promise.resolve();
  process.on("SIGINT", () => interrupt && interrupt(new Error("interrupted")));
  const told = (error) => (error instanceof Error ? error.stack || String(error) : util.inspect(error));
  process.on("uncaughtException", (error) => console.error(told(error)));
  process.on("unhandledRejection", (error) => console.error(told(error)));
  const run = async (line) => {
    const [name, code = ""] = line.trim().split(" ");
    let error = "";
    count += 1;
    mark(name + " begin");
    try {
      const source = Buffer.from(code, "base64").toString();
      let value = vm.runInThisContext(source, { filename: "session", breakOnSigint: true });
      if (value && typeof value.then === "function") {
        value = await Promise.race([value, new Promise((_, reject) => { interrupt = reject; })]);
      }
      if (value !== undefined) console.log(util.inspect(value));
    } catch (thrown) {
      error = told(thrown);
    }
    interrupt = null;
    mark(name + " end " + Buffer.from(JSON.stringify({ error, count })).toString("base64"));
  };
  given.on("line", (line) => { before = before.then(() => run(line)); });
  given.on("close", () => before.then(() => process.exit(0)));
  mark("ready");
})();
