import { useEffect, useRef, useState } from "preact/hooks";

import type { Viewer } from "../mesh";
import { calm } from "../theme";

const STEP = Math.PI / 18;

/** A mesh to look at from all sides: by dragging, by the arrow keys, or turning by itself. */
export function MeshView({ url, name }: { url: string; name: string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const viewer = useRef<Viewer | null>(null);
  const [state, setState] = useState<"loading" | "shown" | string>("loading");
  const [turning, setTurning] = useState(!calm.matches);

  useEffect(() => {
    const leaving = new AbortController();
    setState("loading");
    import("../mesh")
      .then(({ view }) => (canvas.current ? view(canvas.current, url, leaving.signal) : null))
      .then((found) => {
        if (!found) return;
        if (leaving.signal.aborted) return found.close();
        viewer.current = found;
        setState("shown");
      })
      .catch((error: unknown) => {
        if (!leaving.signal.aborted) setState(error instanceof Error ? error.message : String(error));
      });
    return () => {
      leaving.abort();
      viewer.current?.close();
      viewer.current = null;
    };
  }, [url]);

  useEffect(() => viewer.current?.turning(turning), [turning, state]);

  const keys = (event: KeyboardEvent): void => {
    const known: Record<string, () => void> = {
      ArrowLeft: () => viewer.current?.turn(-STEP, 0),
      ArrowRight: () => viewer.current?.turn(STEP, 0),
      ArrowUp: () => viewer.current?.turn(0, STEP),
      ArrowDown: () => viewer.current?.turn(0, -STEP),
      "+": () => viewer.current?.zoom(0.9),
      "=": () => viewer.current?.zoom(0.9),
      "-": () => viewer.current?.zoom(1.1),
      Home: () => viewer.current?.reset(),
      " ": () => setTurning(!turning),
    };
    const act = known[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (event.key.startsWith("Arrow")) setTurning(false);
    act();
  };

  const broken = state !== "loading" && state !== "shown";
  return (
    <div class="mesh">
      {!broken && (
        <canvas
          ref={canvas}
          tabIndex={0}
          role="img"
          aria-label={`${name} in three dimensions. Arrow keys turn it, plus and minus zoom, space starts and stops its turning.`}
          data-state={state}
          onKeyDown={keys}
          onPointerDown={() => setTurning(false)}
        />
      )}
      {state === "loading" && <p class="over" role="status">Loading the mesh…</p>}
      {broken && <p class="muted" role="status">{state}</p>}
      {state === "shown" && (
        <div class="row mesh-tools">
          <button type="button" aria-pressed={turning} onClick={() => setTurning(!turning)}>{turning ? "Stop turning" : "Let it turn"}</button>
          <button type="button" onClick={() => viewer.current?.zoom(0.85)} aria-label="Nearer">+</button>
          <button type="button" onClick={() => viewer.current?.zoom(1.18)} aria-label="Farther">−</button>
          <span class="muted small">Drag to turn</span>
        </div>
      )}
    </div>
  );
}
