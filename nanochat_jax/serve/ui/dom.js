// Helpers that create elements. All text is inserted as text nodes, so the model's output can never become HTML.

export const $ = id => document.getElementById(id);

export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

export function button(label, className, action) {
  const node = element("button", className, label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

export function icon(label, path, action) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(svg.namespaceURI, "path"));
  svg.firstChild.setAttribute("d", path);
  const node = button(svg, "icon", action);
  node.setAttribute("aria-label", label);
  node.title = label.split(":")[0];
  return node;
}

export function sentence(text) {
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

export async function copy(text, source) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // the clipboard API works only on localhost and over HTTPS
    const area = element("textarea", "unseen", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  source.textContent = "Copied";
  setTimeout(() => { source.textContent = "Copy"; }, 1500);
}
