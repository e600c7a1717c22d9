(() => {
  const section = document.getElementById("pictures");
  if (!section) return;
  let row = [], at = 0; // the pictures that stand beside the enlarged one, and its place among them

  const enlarge = (place) => {
    at = place;
    const figure = row[at], image = figure.querySelector("img"), { prompt = "", when = "" } = figure.dataset;
    const { width, height } = { width: Number(image.getAttribute("width")), height: Number(image.getAttribute("height")) };
    const screen = html("span", { class: "screen" }, html("img", { src: image.src, alt: image.alt, width, height, class: image.className }));
    screen.style.setProperty("--shape", width / height);
    const scores = [...figure.querySelectorAll(".outcome, .score")].map((line) => line.textContent.replace(/\s+/g, " ").trim());
    const about = [when, ...scores, `${width} × ${height}`].filter(Boolean).join(" · ");
    const turn = row.length > 1 ? "← → for those beside it" : "";
    enlarged.replaceChildren(screen, html("p", { class: "prompt" }, prompt), html("p", { class: "small" }, about, html("span", { class: "muted" }, turn)));
    if (!enlarged.open) enlarged.showModal();
  };

  section.addEventListener("click", (event) => {
    const figure = event.target.closest(".enlarge")?.closest(".shot");
    if (!figure) return;
    const beside = figure.closest("tr, .strip") ?? figure.parentElement;
    row = [...beside.querySelectorAll(figure.matches(".source") ? ".shot.source" : ".shot:not(.source)")].filter((each) => each.querySelector("img"));
    enlarge(row.indexOf(figure));
  });
  enlarged.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !row.length) return;
    event.preventDefault();
    enlarge((at + move + row.length) % row.length);
  });
  enlarged.addEventListener("close", () => { row = []; });
})();
