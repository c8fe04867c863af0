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
        This page opens with a one-time address. <code>comfyctl serve</code> prints one when it starts, in the terminal
        where it runs; each works once and only for a short time.
      </p>
      <p>Open that address in this browser. If it was used already, start <code>comfyctl serve</code> again and it prints the next.</p>
      <p><button type="button" onClick={again}>Try again</button></p>
    </main>
  );
}
