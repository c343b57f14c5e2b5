// Return the faults of the page in the current window, one sentence each.
(width) => {
  const faults = [];
  const visible = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const name = (element) => {
    const classes = [...element.classList].map((each) => `.${each}`).join("");
    const parent = element.parentElement?.closest("[id]");
    return `${parent ? `#${parent.id} ` : ""}${element.localName}${classes}`;
  };
  const luminance = ([r, g, b]) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  };

  // Structure
  const headings = document.querySelectorAll("h1").length;
  if (headings !== 1) faults.push(`the page has ${headings} h1`);
  if (!document.title.trim()) faults.push("the page has no title");
  if (!document.documentElement.lang) faults.push("the page has no lang");

  // Signatures that Sphinx could not parse
  for (const signature of document.querySelectorAll("dt.sig"))
    if (/[~<]/.test(signature.textContent)) faults.push(`signature of ${signature.id} is not parsed`);

  // Images
  for (const image of document.images) {
    const source = image.getAttribute("src");
    if (!image.complete || image.naturalWidth === 0) {
      faults.push(`image ${source} does not load`);
      continue;
    }
    if (!image.alt.trim()) faults.push(`image ${source} has no alternative text`);
    if (!visible(image) || !image.closest("article")) continue;

    // Plots have dark text, so their background must be light in the dark theme, too.
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d");
    const behind = [];
    for (let box = image; box; box = box.parentElement) behind.unshift(getComputedStyle(box).backgroundColor);
    for (const color of behind) {
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
    }
    context.drawImage(image, 0, 0, 1, 1, 0, 0, 1, 1);
    if (luminance(context.getImageData(0, 0, 1, 1).data) < 0.7) faults.push(`image ${source} has a dark background`);
  }

  // Widths: wide content scrolls inside its own box.
  const scrolls = (element) => {
    for (let box = element.parentElement; box && box.localName !== "body"; box = box.parentElement)
      if (/auto|scroll/.test(getComputedStyle(box).overflowX)) return true;
    return false;
  };
  const page = document.scrollingElement.scrollWidth;
  if (page > width) faults.push(`the page is ${page} px wide in a window of ${width} px`);
  for (const element of document.querySelectorAll("article *")) {
    const box = element.getBoundingClientRect();
    if (box.width > 1 && (box.right > width + 1 || box.left < -1) && visible(element) && !scrolls(element)) {
      faults.push(`${name(element)} reaches from ${Math.round(box.left)} to ${Math.round(box.right)} px`);
      break;
    }
  }

  // Sizes of text, but for superscripts, subscripts and the scripts of formulas
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const small = new Map();
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const parent = text.parentElement;
    if (!text.data.trim() || parent.closest("math, sup, sub, svg, script, style, noscript") || !visible(parent)) continue;
    const size = parseFloat(getComputedStyle(parent).fontSize);
    if (size < 12) small.set(name(parent), size);
  }
  for (const [element, size] of [...small].slice(0, 3)) faults.push(`text of ${element} has ${size.toFixed(1)} px`);
  return faults;
};
