// The API's routes and every field, made of /openapi.json.

import {$, ask, element} from "/page/common.js";

const nameOf = reference => reference.split("/").pop();

// What a schema is, in words; names of other schemas lead to them.
function kind(schema) {
  if (schema.$ref) {
    const name = nameOf(schema.$ref);
    return [element("a", {href: `#${name}`, textContent: name})];
  }
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map(value => JSON.stringify(value)).join(" or ")];
  const options = (schema.anyOf ?? []).filter(option => option.type !== "null");
  if (options.length) return options.flatMap((o, i) => i ? [" or ", ...kind(o)] : kind(o));
  if (schema.type === "array" && schema.items) return ["list of ", ...kind(schema.items)];
  return [schema.type ?? "any"];
}

const LIMITS = [["minimum", "at least"], ["exclusiveMinimum", "above"], ["maximum", "at most"],
  ["minLength", "at least this long:"], ["maxLength", "at most this long:"]];

function limits(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  return parts.flatMap(part => LIMITS.filter(([name]) => name in part)
    .map(([name, words]) => `${words} ${part[name]}`)).join(", ");
}

function fieldRow([name, schema], required) {
  const note = limits(schema) + (required.includes(name) ? " (required)" : "");
  return element("tr", {},
    element("td", {}, element("code", {textContent: name})),
    element("td", {}, ...kind(schema), element("div", {className: "dim", textContent: note})),
    element("td", {textContent: schema.description ?? ""}));
}

function fieldTable({properties = {}, required = []}) {
  const rows = Object.entries(properties).map(entry => fieldRow(entry, required));
  const head = ["field", "is", "what it does"].map(textContent => element("th", {textContent}));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...rows));
  return element("div", {className: "scroll"}, table);
}

function schemaOf(content) {
  const schema = content?.["application/json"]?.schema;
  return schema?.$ref && nameOf(schema.$ref);
}

function routeSection(path, method, route) {
  const takes = schemaOf(route.requestBody?.content);
  const gives = schemaOf(route.responses?.[200]?.content);
  const words = [[takes, "takes "], [gives, "gives "]].filter(([name]) => name)
    .flatMap(([name, verb], i) => [i ? ", " : "", verb, ...kind({$ref: name})]);
  return element("section", {},
    element("h2", {}, element("code", {textContent: `${method.toUpperCase()} ${path}`})),
    element("div", {textContent: route.description ?? ""}), element("div", {}, ...words));
}

function schemaSection([name, schema]) {
  return element("section", {id: name}, element("h3", {textContent: name}),
    element("p", {className: "dim", textContent: schema.description ?? ""}), fieldTable(schema));
}

const {paths, components: {schemas}} = await (await ask("/openapi.json")).json();
const routes = Object.entries(paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, route]) => routeSection(path, method, route)));
$("reference").replaceChildren(
  element("div", {className: "card"}, ...routes),
  element("div", {className: "card"}, ...Object.entries(schemas).map(schemaSection)));
