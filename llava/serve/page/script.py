"""The page's own script: after a question, the conversation shows it and what is answered."""

SCRIPT = """
(() => {
  const logs = new WeakMap();
  /* Gradio would follow the end, where the report is, and the answer above it would leave a small screen. */
  const settle = log => {
    const state = logs.get(log) ?? {questions: 0, held: false};
    const asked = log.querySelectorAll(".user-row");
    state.held ||= asked.length > state.questions;
    state.held ||= log.querySelector(".avg-waiting") !== null;
    state.questions = asked.length;
    logs.set(log, state);
    if (!state.held || !asked.length) return;
    const question = asked[asked.length - 1], answer = question.nextElementSibling;
    let top = question.getBoundingClientRect().top;
    if (answer) top = Math.max(top, answer.getBoundingClientRect().top - log.clientHeight / 2);  // however long the question
    log.scrollTop += top - log.getBoundingClientRect().top;
  };
  const settleAll = () => document.querySelectorAll("#avg-sides [role=log]").forEach(settle);
  new MutationObserver(settleAll).observe(document, {childList: true, characterData: true, subtree: true});
  document.addEventListener("load", settleAll, true);  // of an image, which moves what is below it
  const release = event => {
    const state = logs.get(event.target.closest?.("#avg-sides [role=log]"));
    if (state) state.held = false;
  };
  for (const kind of ["wheel", "touchmove", "mousedown", "keydown"]) {
    document.addEventListener(kind, release, {capture: true, passive: true});
  }
})();
"""
