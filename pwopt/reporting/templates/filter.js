(() => {
  const field = document.querySelector(".filter input"), output = document.querySelector(".filter output");
  const rows = [...document.querySelectorAll("#layer-table tbody tr")];
  const texts = rows.map(row => [...row.cells].slice(0, 2).map(c => c.textContent + " " + [...c.querySelectorAll("[title]")].map(e => e.title).join(" ")).join(" ").toLowerCase());
  field.closest(".filter").hidden = false;
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, i) => { const on = words.every(w => texts[i].includes(w)); row.hidden = !on; count += on; });
    output.textContent = words.length ? count + " of " + rows.length : "";
  });
})();
