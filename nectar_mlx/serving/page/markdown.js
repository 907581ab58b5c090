// A little of Markdown as elements: paragraphs, headings, lists, code, bold and italics. All text is inserted as text,
// never as HTML; there are no links and no images.

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/;

function inline(parent, text) {
  let match;
  while ((match = INLINE.exec(text))) {
    parent.append(text.slice(0, match.index));
    const [whole, code, bold, italic] = match;
    const element = document.createElement(code !== undefined ? "code" : bold !== undefined ? "strong" : "em");
    element.textContent = code ?? bold ?? italic;
    parent.append(element);
    text = text.slice(match.index + whole.length);
  }
  parent.append(text);
}

function filled(name, text) {
  const element = document.createElement(name);
  inline(element, text);
  return element;
}

export function render(text) {
  const result = document.createDocumentFragment();
  let list = null, paragraph = null, code = null;
  for (const line of text.split("\n")) {
    if (line.startsWith("```")) {
      if (code) code = null;
      else {
        const block = document.createElement("pre");
        block.tabIndex = 0; // it may be wider than the page: the arrow keys move it
        code = document.createElement("code");
        block.append(code);
        result.append(block);
      }
      list = paragraph = null;
      continue;
    }
    if (code) {
      code.append(`${line}\n`);
      continue;
    }
    const item = /^\s*(?:[-*•]|(\d+)[.)])\s+(.*)$/.exec(line);
    const heading = /^#{1,6}\s+(.*)$/.exec(line);
    if (item) {
      const kind = item[1] ? "OL" : "UL";
      if (list?.tagName !== kind) {
        list = document.createElement(kind);
        if (item[1]) list.start = Number(item[1]);
        result.append(list);
      }
      list.append(filled("li", item[2]));
      paragraph = null;
    } else if (heading) {
      result.append(filled("h3", heading[1]));
      list = paragraph = null;
    } else if (line.trim() === "") {
      list = paragraph = null;
    } else if (paragraph) {
      paragraph.append(document.createElement("br"));
      inline(paragraph, line);
    } else {
      paragraph = filled("p", line);
      result.append(paragraph);
      list = null;
    }
  }
  return result;
}
