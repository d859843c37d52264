// One question about a recipe. POST /generate answers with plain text, as it is written.

const form = document.getElementById("suggest");
const button = form.querySelector("button");
const suggestion = document.getElementById("suggestion");
const problem = document.getElementById("suggest-error");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  button.disabled = true;
  problem.hidden = true;
  suggestion.textContent = "";
  suggestion.hidden = false;
  suggestion.setAttribute("aria-busy", "true");
  try {
    for await (const text of ask(new FormData(form).get("prompt"))) suggestion.append(text);
  } catch (error) {
    suggestion.hidden = !suggestion.textContent;
    // Plain text has no form for an error: an answer that breaks off is a read that fails.
    problem.textContent = error instanceof TypeError ? "The connection was lost." : error.message;
    problem.hidden = false;
  }
  suggestion.setAttribute("aria-busy", "false");
  button.disabled = false;
});

async function* ask(prompt) {
  const response = await fetch(form.dataset.url, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/plain" },
    body: JSON.stringify({ prompt, recipe: form.dataset.recipe }),
  });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered ${response.status}.`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}
