import { ask, wordsOf } from "../api";
import { session, tell } from "../store";

async function logOut(): Promise<void> {
  try {
    await ask("POST", "/session/logout", { json: {} });
    session.value = "none";
  } catch (error) {
    tell(wordsOf(error), true);
  }
}

export function Footer() {
  const who = session.value;
  if (typeof who !== "object") return null;
  return (
    <footer>
      <span>comfyctl {who.version}</span>
      <a href="/openapi.json">API</a>
      {who.kind === "session" && <button type="button" class="plain" onClick={() => void logOut()}>Log out</button>}
    </footer>
  );
}
