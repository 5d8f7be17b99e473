/* A folded solution opens when its title is clicked. (sphinx-togglebutton 0.4.5 listens on the
   whole title but throws unless the click lands on its button.) Links in a title stay links. */
document.addEventListener("click", (event) => {
  const title = event.target.closest(".toggle > .admonition-title");
  if (!title || event.target.closest("a, button")) return;
  event.stopPropagation();
  title.querySelector(".toggle-button").click();
}, true);
