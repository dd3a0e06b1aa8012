// Renders the subset of Markdown that models write. Strings are inserted as text nodes and never parsed as HTML. In the
// text, each tool call is represented by one character from Unicode's private use area.
//
// Arabic and Hebrew are written from right to left. page.css gives each paragraph the direction of its first letter. A
// list, quotation or table gets the attribute dir, because its direction also decides the side of its bullets, its bar
// or its first column. Code always runs from left to right.

import { button, copy, element } from "./dom.js";

export const TOOL = 0xE000;
const DEEPEST = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/, HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/, QUOTE = /^ {0,3}> ?/, ITEM = /^( *)([-*+]|\d{1,9}[.)])( +)(?=\S)/;
const DIVIDER = /^\|?( *:?-+:? *\|)+( *:?-+:?)?$/;

export function markdown(text, tools = [], depth = 0) {
  const lines = text.split("\n"), out = document.createDocumentFragment();
  const starts = i => FENCE.test(lines[i]) || HEADING.test(lines[i]) || RULE.test(lines[i]) || QUOTE.test(lines[i])
    || ITEM.test(lines[i]) || isTable(lines, i);
  let match;
  for (let i = 0; i < lines.length;) {
    if (!lines[i].trim()) { i++; continue; }
    if (depth < DEEPEST && (match = FENCE.exec(lines[i]))) {
      const end = new RegExp("^ {0,3}" + match[1][0] + "{" + match[1].length + ",}\\s*$"), code = [];
      for (i++; i < lines.length && !end.test(lines[i]); i++) code.push(lines[i]);
      i++;
      out.append(codeBlock(match[2], code.join("\n"), tools));
    } else if ((match = HEADING.exec(lines[i]))) {
      out.append(inline(element("h" + Math.min(match[1].length + 1, 5)), match[2].trim().replace(/ #+$/, ""), tools));
      i++;
    } else if (RULE.test(lines[i])) {
      out.append(element("hr"));
      i++;
    } else if (depth < DEEPEST && QUOTE.test(lines[i])) {
      const quoted = [];
      for (; i < lines.length && QUOTE.test(lines[i]); i++) quoted.push(lines[i].replace(QUOTE, ""));
      out.append(directed("auto", element("blockquote", "", markdown(quoted.join("\n"), tools, depth + 1))));
    } else if (depth < DEEPEST && ITEM.test(lines[i])) {
      i = list(lines, i, out, tools, depth);
    } else if (isTable(lines, i)) {
      i = table(lines, i, out, tools);
    } else {
      const first = i;
      while (++i < lines.length && lines[i].trim() && (depth >= DEEPEST || !starts(i)));
      out.append(inline(element("p"), lines.slice(first, i).join("\n"), tools));
    }
  }
  return out;
}

// With "auto", the first letter in the node decides. Parts that have a direction of their own, such as code, do not count.
function directed(direction, node) {
  node.dir = direction;
  return node;
}

function codeBlock(language, code, tools) {
  const text = withTools(element("code"), code, tools), pre = element("pre", "", text);
  pre.tabIndex = 0;
  const button_ = button("Copy", "", () => copy(text.textContent, button_));
  return directed("ltr", element("div", "code", element("div", "", element("span", "", language || "text"), button_), pre));
}

// Renders the list that begins at line i. The list ends before an item of the other kind (numbered or bulleted).
// Returns the index of the line after the list.
function list(lines, i, out, tools, depth) {
  const first = ITEM.exec(lines[i]), ordered = /\d/.test(first[2]), indent = first[1].length;
  const node = directed("auto", element(ordered ? "ol" : "ul"));
  if (ordered && parseInt(first[2]) !== 1) node.start = parseInt(first[2]);
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || match[1].length !== indent || /\d/.test(match[2]) !== ordered || RULE.test(lines[i])) break;
    const width = match[0].length, item = [lines[i].slice(width)];
    for (i++; i < lines.length; i++) {
      const margin = lines[i].search(/\S/);
      if (margin < 0) {
        if (i + 1 < lines.length && lines[i + 1].search(/\S/) > indent) item.push("");
        else break;
      } else if (margin > indent) item.push(lines[i].slice(Math.min(margin, width)));
      else if (ITEM.test(lines[i]) || FENCE.test(lines[i]) || HEADING.test(lines[i]) || QUOTE.test(lines[i]) || RULE.test(lines[i])) break;
      else item.push(lines[i].trim());  // a continuation line without indentation
    }
    node.append(element("li", "", markdown(item.join("\n"), tools, depth + 1)));
    while (i + 1 < lines.length && !lines[i].trim() && ITEM.exec(lines[i + 1])?.[1].length === indent) i++;
  }
  out.append(node);
  return i;
}

const isTable = (lines, i) => i + 1 < lines.length && lines[i].includes("|") && DIVIDER.test(lines[i + 1].trim());

function table(lines, i, out, tools) {
  const cells = line => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (tag, line) => element("tr", "", ...cells(line).map(cell => inline(element(tag), cell.trim(), tools)));
  const body = element("tbody"), head = element("thead", "", row("th", lines[i]));
  for (i += 2; i < lines.length && lines[i].includes("|"); i++) body.append(row("td", lines[i]));
  out.append(directed("auto", element("div", "wide", element("table", "", head, body))));
  return i;
}

// Formulas contain asterisks too, so neither 2*3*4 nor 2 * 3 * 4 is treated as emphasis.
const INLINE = new RegExp([
  "\\\\([\\\\`*_{}\\[\\]()#+.!~|>-])",                                            // 1 an escaped character
  "(`{1,20})([^`](?:.{0,999}?[^`])?)\\2(?!`)",                                         // 2, 3 code
  "!?\\[([^\\]\\n]{0,999})\\]\\(\\s*<?([^)\\s>]{1,2000})>?(?:\\s+\"[^\"\\n]{0,200}\")?\\s*\\)",  // 4, 5 a link
  "(https?:\\/\\/[^\\s<>()\\[\\]]{0,1999}[^\\s<>()\\[\\].,;:!?'\"*_])",            // 6 a bare URL
  "(?<![\\w*])\\*\\*(?=[^\\s*])(.{1,999}?)(?<=[^\\s*])\\*\\*(?![\\w*])",           // 7 strong
  "(?<![\\w_])__(?=[^\\s_])(.{1,999}?)(?<=[^\\s_])__(?![\\w_])",                   // 8 strong
  "(?<![\\w*])\\*(?=[^\\s*])(.{1,999}?)(?<=[^\\s*])\\*(?![\\w*])",                 // 9 emphasis
  "(?<![\\w_])_(?=[^\\s_])(.{1,999}?)(?<=[^\\s_])_(?![\\w_])",                     // 10 emphasis
  "~~(?=[^\\s~])(.{1,999}?)(?<=[^\\s~])~~",                                        // 11 strikethrough
].join("|"), "gs");

function inline(node, text, tools, depth = 0) {
  let end = 0;
  for (const match of depth < DEEPEST ? text.matchAll(INLINE) : []) {
    withTools(node, text.slice(end, match.index), tools);
    end = match.index + match[0].length;
    const [, escaped, , code, label, target, address, strong, strong_, em, em_, struck] = match;
    if (escaped) node.append(escaped);
    else if (code) node.append(directed("ltr", withTools(element("code"), code, tools)));
    else if (target) node.append(link(label || target, target, tools, depth));
    else if (address) node.append(link(address, address, tools, DEEPEST));
    else if (strong || strong_) node.append(inline(element("strong"), strong || strong_, tools, depth + 1));
    else if (em || em_) node.append(inline(element("em"), em || em_, tools, depth + 1));
    else node.append(inline(element("del"), struck, tools, depth + 1));
  }
  return withTools(node, text.slice(end), tools);
}

// Links only to web pages and email addresses. Any other target, such as javascript:, is shown as plain text.
function link(label, target, tools, depth) {
  let url = null;
  try { url = new URL(target); } catch { /* not a URL */ }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return document.createTextNode(`${label} (${target})`);
  const node = inline(element("a"), label, tools, depth + 1);
  node.href = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  node.title = url.href;
  return node;
}

function withTools(node, text, tools) {
  for (const piece of text.split(/([\uE000-\uF8FF])/)) {
    const tool = piece.length === 1 ? tools[piece.charCodeAt(0) - TOOL] : undefined;
    if (tool) node.append(tool);
    else if (piece) node.append(piece);
  }
  return node;
}
