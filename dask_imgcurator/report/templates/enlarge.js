// Enlarges a picture, with all its data, by a click, Enter or Space; Escape or a click closes it.
const large = document.body.appendChild(document.createElement("dialog"));
large.className = "large";
large.addEventListener("click", () => large.close());

const enlarge = (image) => {
  const close = document.createElement("button"), picture = new Image(), text = document.createElement("div");
  close.textContent = "Close";
  picture.src = image.src;
  picture.alt = image.alt;
  text.append(...image.closest("figure").querySelector("figcaption").cloneNode(true).childNodes);
  // A card's title holds the text that the card shortens.
  for (const short of text.querySelectorAll("[title]")) short.textContent = short.title;
  large.setAttribute("aria-label", image.alt);
  large.replaceChildren(close, picture, text);
  large.showModal();
};

for (const image of document.querySelectorAll(".wall img")) {
  const box = image.closest(".veil")?.querySelector("input");
  const open = (event) => {
    if (box && !box.checked) return; // this click lifts the veil
    event.preventDefault();
    enlarge(image);
  };
  const offer = () => {
    if (box && !box.checked) {
      image.removeAttribute("tabindex");
      image.removeAttribute("role");
    } else {
      image.tabIndex = 0;
      image.setAttribute("role", "button");
    }
  };
  image.addEventListener("click", open);
  image.addEventListener("keydown", (event) => ["Enter", " "].includes(event.key) && open(event));
  box?.addEventListener("change", offer);
  offer();
}
