import { notices } from "../store";
import { Asking } from "./dialog";

/** What has just happened: seen for a while, and read aloud when the reader is free. */
export function Notices() {
  return (
    <>
      <div class="notices" role="status" aria-live="polite" aria-label="What has just happened">
        {notices.value.map((one) => (
          <p key={one.key} class={one.bad ? "notice bad" : "notice"}>{one.text}</p>
        ))}
      </div>
      <Asking />
    </>
  );
}
