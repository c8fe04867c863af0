import { begin } from "../live";
import { session } from "../store";

/** What somebody sees whose address was used before, or whose session has ended. Shows no data. */
export function LoggedOut() {
  const again = (): void => {
    session.value = "unknown";
    void begin();
  };
  return (
    <main class="alone">
      <h1><b>comfy</b>ctl</h1>
      <h2>You need a fresh address</h2>
      <p>
        This page opens with a one-time address, printed by <code>comfyctl serve</code> when it starts. Each logs in one
        browser, once, within ten minutes.
      </p>
      <p>
        On the computer where the service runs, <code>comfyctl page</code> prints a fresh one. Open it here, and this page
        shows your jobs again.
      </p>
      <p><button type="button" onClick={again}>Try again</button></p>
    </main>
  );
}
