// A slider to try cuts on a figure. Without this script, figures are still complete: their tables hold the same numbers.
for (const box of document.querySelectorAll(".try")) {
  const [input, output] = [box.querySelector("input"), box.querySelector("output")];
  const tries = JSON.parse(box.dataset.tries), line = box.closest("figure").querySelector(".moved");
  const say = () => {
    const [value, , alone, all] = tries[input.value];
    const text = box.dataset.words.replace("{}", value) + " " + alone + (all ? "; " + all : "");
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
  };
  const show = () => {
    say();
    line.setAttribute("d", "M" + tries[input.value][1] + " 18V150");
    line.removeAttribute("visibility");
  };
  input.addEventListener("input", show);
  if (box.dataset.hint) output.textContent = box.dataset.hint;
  else say();
  box.hidden = false;
}
