// Lets a cut be tried on a figure's slider. Without it the figures are whole: their tables hold the same numbers.
for (const box of document.querySelectorAll(".try")) {
  const [input, output] = [box.querySelector("input"), box.querySelector("output")];
  const tries = JSON.parse(box.dataset.tries), line = box.closest("figure").querySelector(".moved");
  const show = () => {
    const [value, x, alone, all] = tries[input.value];
    const text = box.dataset.words.replace("{}", value) + " " + alone + (all ? "; " + all : "");
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
    line.setAttribute("d", "M" + x + " 18V150");
    line.removeAttribute("visibility");
  };
  input.addEventListener("input", show);
  output.textContent = box.dataset.hint;
  box.hidden = false;
}
