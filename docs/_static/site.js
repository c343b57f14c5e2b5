// Names of the regions of a page, which screen readers list.
const REGIONS = {
  ".sidebar-drawer": "Site navigation",
  ".toc-drawer": "Contents of this page",
  ".content-icon-container": "Source and theme",
};
for (const [selector, label] of Object.entries(REGIONS)) {
  const region = document.querySelector(selector);
  region?.setAttribute("aria-label", label);
  if (region?.localName === "div") region.setAttribute("role", "region");
}

// Captions of the navigation are headings without a level.
for (const caption of document.querySelectorAll(".caption[role=heading]")) caption.ariaLevel = "2";

// Wide code, tables and formulas scroll with the keys, too.
function focusWideBoxes() {
  for (const box of document.querySelectorAll("article pre, article .table-wrapper, article .math-block")) {
    const wide = box.scrollWidth > box.clientWidth;
    if (wide) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

focusWideBoxes();
addEventListener("resize", focusWideBoxes);

// Plots link to their full size, since a phone shows them small.
for (const image of document.querySelectorAll("article img")) {
  if (image.closest("a")) continue;
  const link = document.createElement("a");
  link.href = image.src;
  image.replaceWith(link);
  link.append(image);
}
