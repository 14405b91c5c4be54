// Exchanges the token for a session cookie, which scripts cannot read, and goes on to the page that was asked for: ?to=PAGE.
const said = document.getElementById("said");

// No page of another site, whoever made the address.
function wanted() {
  const to = new URL(new URLSearchParams(location.search).get("to") ?? "/", location.origin);
  return to.origin === location.origin ? to.href : "/";
}

document.getElementById("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  said.textContent = "";
  try {
    const answer = await fetch("/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token: document.getElementById("token").value }),
    });
    if (answer.ok) location.replace(wanted());
    else said.textContent = (await answer.json()).error;
  } catch {
    said.textContent = "The service does not answer. Is it running?";
  }
});
