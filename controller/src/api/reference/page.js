// Shows /openapi.json. Text only ever becomes text nodes, so nothing in the description can become markup.
"use strict";

const METHODS = ["get", "post", "put", "patch", "delete"];

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// `code` in a description becomes a code element; everything else stays text.
function prose(text) {
  const parts = String(text || "").split("`");
  return parts.map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function refName(schema) {
  return schema && schema.$ref ? schema.$ref.split("/").pop() : null;
}

// What a schema is called in a table: a type, a list, or the name of another schema.
function typeOf(schema) {
  if (!schema) return ["anything"];
  const carried = schema.properties && schema.properties.data && schema.properties.data.contentSchema;
  if (carried) return ["events of ", ...typeOf(carried)];
  const name = refName(schema);
  if (name) return [element("a", { href: "#schema-" + name }, name)];
  const choices = schema.oneOf || schema.anyOf;
  if (choices) return choices.flatMap((choice, index) => (index ? [" or ", ...typeOf(choice)] : typeOf(choice)));
  if (schema.allOf) return schema.allOf.flatMap((part, index) => (index ? [" and ", ...typeOf(part)] : typeOf(part)));
  if (schema.enum) return [schema.enum.map((word) => JSON.stringify(word)).join(" | ")];
  const types = [].concat(schema.type || "anything");
  return types.flatMap((type, index) => {
    const before = index ? [" or "] : [];
    if (type === "array") return [...before, "list of ", ...typeOf(schema.items)];
    if (type === "object" && schema.additionalProperties) return [...before, "object of ", ...typeOf(schema.additionalProperties)];
    return [...before, schema.format ? type + " (" + schema.format + ")" : type];
  });
}

function fields(schema) {
  const table = element("table");
  const required = new Set(schema.required || []);
  for (const [name, property] of Object.entries(schema.properties || {})) {
    const bounds = [];
    if (property.minimum !== undefined) bounds.push("from " + property.minimum);
    if (property.maximum !== undefined) bounds.push("to " + property.maximum);
    if (property.default !== undefined) bounds.push("default " + JSON.stringify(property.default));
    table.append(element("tr", {},
      element("td", {}, element("code", {}, name), required.has(name) ? " *" : ""),
      element("td", {}, ...typeOf(property), bounds.length ? element("span", { class: "quiet" }, " " + bounds.join(", ")) : null,
        property.description ? element("div", {}, ...prose(property.description)) : null)));
  }
  return table;
}

function schemaBody(schema) {
  const parts = [];
  for (const part of [schema, ...(schema.allOf || []), ...(schema.oneOf || []), ...(schema.anyOf || [])]) {
    if (part.properties) parts.push(part === schema ? null : element("p", { class: "quiet" }, ...prose(part.description || part.title)), fields(part));
    else if (part.$ref || part !== schema) parts.push(element("p", {}, ...typeOf(part)));
    else if (part.enum || (part.type && part.type !== "object")) parts.push(element("p", {}, ...typeOf(part)));
  }
  return parts;
}

function exampleOf(api, media) {
  if (!media) return undefined;
  if (media.example !== undefined) return media.example;
  const schema = media.schema && media.schema.$ref ? api.components.schemas[refName(media.schema)] : media.schema;
  if (!schema) return undefined;
  if (schema.example !== undefined) return schema.example;
  return schema.examples && schema.examples[0];
}

function quoted(text) {
  return "'" + text.replaceAll("'", "'\\''") + "'";
}

function curl(api, method, path, operation, key) {
  const open = operation.security && operation.security.some((one) => Object.keys(one).length === 0);
  const line = ["curl -s"];
  if (method !== "get") line.push("-X " + method.toUpperCase());
  line.push(quoted(location.origin + path));
  if (!open) line.push("-H " + quoted("authorization: Bearer " + (key || "<key>")));
  const body = exampleOf(api, operation.requestBody && operation.requestBody.content["application/json"]);
  if (body !== undefined) line.push("-H 'content-type: application/json'", "-d " + quoted(JSON.stringify(body)));
  return line.join(" \\\n  ");
}

function endpoint(api, path, method, operation, keyInput) {
  const id = operation.operationId || method + path;
  const parts = [element("h3", {}, element("span", { class: "method" }, method.toUpperCase()), path)];
  if (operation.summary) parts.push(element("p", {}, ...prose(operation.summary)));
  if (operation.description && operation.description !== operation.summary) parts.push(element("p", {}, ...prose(operation.description)));
  if (operation.parameters && operation.parameters.length) {
    const table = element("table");
    for (const parameter of operation.parameters) {
      table.append(element("tr", {},
        element("td", {}, element("code", {}, parameter.name), parameter.required ? " *" : ""),
        element("td", {}, element("span", { class: "quiet" }, parameter.in + " "), ...typeOf(parameter.schema),
          parameter.description ? element("div", {}, ...prose(parameter.description)) : null)));
    }
    parts.push(element("h4", {}, "Parameters"), table);
  }
  if (operation.requestBody) {
    for (const [type, media] of Object.entries(operation.requestBody.content)) {
      parts.push(element("h4", {}, "Body"), element("p", {}, element("code", {}, type), " ", ...typeOf(media.schema)));
    }
  }
  parts.push(element("h4", {}, "Answers"));
  const answers = element("table");
  for (const [status, answer] of Object.entries(operation.responses)) {
    const types = Object.values(answer.content || {}).flatMap((media) => typeOf(media.schema));
    answers.append(element("tr", {}, element("td", {}, status),
      element("td", {}, ...types, element("div", {}, ...prose(answer.description)))));
  }
  parts.push(answers);
  const line = element("pre");
  const show = () => { line.textContent = curl(api, method, path, operation, keyInput.value); };
  keyInput.addEventListener("input", show);
  show();
  parts.push(element("h4", {}, "Try it"), line);
  return element("article", { id: "operation-" + id }, ...parts);
}

async function main() {
  const reference = document.getElementById("reference");
  const index = document.getElementById("index");
  const answer = await fetch("/openapi.json");
  const api = await answer.json();
  document.title = api.info.title + " API " + api.info.version;
  const key = element("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false" });
  reference.replaceChildren(
    element("h1", {}, api.info.title + " API ", element("span", { class: "quiet" }, api.info.version)),
    element("p", {}, ...prose(api.info.description)),
    element("p", {}, element("label", { for: "key" }, "API key for the lines below (it stays in this page) "), key));
  for (const tag of api.tags) {
    const found = [];
    for (const [path, item] of Object.entries(api.paths)) {
      for (const method of METHODS) {
        if (item[method] && (item[method].tags || [])[0] === tag.name) found.push([path, method, item[method]]);
      }
    }
    if (!found.length) continue;
    index.append(element("h2", {}, tag.name));
    reference.append(element("h2", {}, tag.name), element("p", {}, ...prose(tag.description)));
    for (const [path, method, operation] of found) {
      const article = endpoint(api, path, method, operation, key);
      reference.append(article);
      index.append(element("a", { href: "#" + article.id }, element("span", { class: "method" }, method.toUpperCase()), path));
    }
  }
  reference.append(element("h2", {}, "schemas"));
  index.append(element("h2", {}, "schemas"));
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    reference.append(element("article", { id: "schema-" + name }, element("h3", {}, name),
      schema.description ? element("p", {}, ...prose(schema.description)) : null, ...schemaBody(schema)));
    index.append(element("a", { href: "#schema-" + name }, name));
  }
  if (location.hash) {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target) target.scrollIntoView();
  }
}

main().catch((error) => {
  document.getElementById("reference").replaceChildren(element("p", {}, "The description cannot be shown: " + error));
});
