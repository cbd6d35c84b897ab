"use strict";
// The curves of the group under the pointer.
const paths = document.querySelectorAll("[data-of]");
for (const row of document.querySelectorAll(".graph li")) {
  row.addEventListener("pointerenter", () => {
    for (const path of paths) path.classList.toggle("on", path.dataset.of.split(" ").includes(row.dataset.at));
  });
  row.addEventListener("pointerleave", () => paths.forEach((path) => path.classList.remove("on")));
}
// The slider of the history.
const slider = document.getElementById("step");
if (slider) {
  const frames = JSON.parse(document.getElementById("frames").textContent);
  const rows = [...document.querySelectorAll("#widths li")].map((row) => {
    const number = row.querySelector(".number");
    const before = number.textContent.split(" of ")[1];
    return { now: row.querySelector(".now"), number, before, size: Number(before.replaceAll(",", "")) };
  });
  const show = () => {
    const [step, total, x, widths] = frames[slider.value];
    document.getElementById("at").textContent = step;
    document.getElementById("total").textContent = total;
    document.getElementById("cursor").setAttribute("d", `M${x} 0V100`);
    slider.setAttribute("aria-valuetext", `step ${step}, ${total}`);
    rows.forEach(({ now, number, before, size }, at) => {
      now.style.width = `${(100 * widths[at]) / size}%`;
      number.textContent = `${widths[at].toLocaleString("en-US")} of ${before}`;
    });
  };
  slider.addEventListener("input", show);
  show();
}
