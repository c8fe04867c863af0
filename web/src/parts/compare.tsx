import { useState } from "preact/hooks";

import type { InputFile, OutputFile } from "../types";

/** Two pictures over each other, with an edge between them that can be moved. */
export function Compare({ before, after }: { before: InputFile; after: OutputFile }) {
  const [open, setOpen] = useState(false);
  const [at, setAt] = useState(50);
  return (
    <details class="compare" onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>Compare them</summary>
      {open && (
        <div class="over-each-other">
          <img src={after.url} alt={`After: ${after.name}`} />
          <img src={before.url} alt={`Before: ${before.name}`} class="upper" style={{ clipPath: `inset(0 ${100 - at}% 0 0)` }} />
          <input type="range" min={0} max={100} value={at} aria-label="How much of the picture that went in is shown" onInput={(event) => setAt(Number(event.currentTarget.value))} />
        </div>
      )}
    </details>
  );
}
