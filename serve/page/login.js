// Exchanges the token for a session cookie, which scripts cannot read.
const said = document.getElementById("said");

document.getElementById("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  said.textContent = "";
  try {
    const answer = await fetch("/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token: document.getElementById("token").value }),
    });
    if (answer.ok) location.replace("/");
    else said.textContent = (await answer.json()).error;
  } catch {
    said.textContent = "The service does not answer. Is it running?";
  }
});
