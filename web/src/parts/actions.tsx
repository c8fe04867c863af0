// The buttons of a job. What throws work away asks first.

import { useState } from "preact/hooks";

import { titleOf } from "../format";
import { go, jobPage } from "../route";
import { order, tell } from "../store";
import type { Job } from "../types";
import { askPerson } from "./dialog";

async function cancel(job: Job): Promise<void> {
  const started = job.status === "processing";
  const sure = await askPerson(
    `Cancel job ${job.number}?`,
    `“${titleOf(job).slice(0, 120)}” ${started ? "is running; what it has done so far is lost." : "has not started yet."}`,
    "Cancel the job",
  );
  if (sure && (await order("DELETE", job, ""))) tell(`Job ${job.number} is cancelled.`);
}

export function Actions({ job, open = false }: { job: Job; open?: boolean }) {
  const [busy, setBusy] = useState(false);
  // Not `disabled`: a button that is would lose the focus, which a question gives back to it.
  const doing = (work: () => Promise<unknown>) => () => {
    if (busy) return;
    setBusy(true);
    void work().finally(() => setBusy(false));
  };
  const again = doing(async () => {
    const made = await order("POST", job, "/again", {});
    if (!made) return;
    tell(`Job ${made.number} runs it again with another seed.`);
    if (open) go(jobPage(made.id));
  });
  const retry = doing(async () => {
    if (await order("POST", job, "/retry", {})) tell(`Job ${job.number} will be tried again.`);
  });
  const first = doing(async () => {
    if (await order("PATCH", job, "", { first: true })) tell(`Job ${job.number} is next.`);
  });
  const about = <span class="hidden"> job {job.number}</span>;
  return (
    <div class="actions">
      {job.status === "pending" && (
        <>
          <button type="button" aria-disabled={busy} onClick={first}>Move to the front{about}</button>
          {open && <Priority job={job} />}
        </>
      )}
      {(job.status === "pending" || job.status === "processing") && (
        <button type="button" class="danger-text" aria-disabled={busy} onClick={doing(() => cancel(job))}>Cancel{about}</button>
      )}
      {job.status === "failed" && <button type="button" aria-disabled={busy} onClick={retry}>Try again{about}</button>}
      {(job.status === "done" || job.status === "failed") && (
        <button type="button" aria-disabled={busy} onClick={again}>Another seed{about}</button>
      )}
    </div>
  );
}

function Priority({ job }: { job: Job }) {
  const set = (text: string): void => {
    const priority = Number(text);
    if (!Number.isInteger(priority) || priority < 1 || priority > 999 || priority === job.priority) return;
    void order("PATCH", job, "", { priority }).then((done) => done && tell(`Job ${job.number} has priority ${priority}.`));
  };
  return (
    <label class="inline">
      Priority <input type="number" min={1} max={999} value={job.priority} title="1 is first, 999 last" onChange={(event) => set(event.currentTarget.value)} />
    </label>
  );
}
