import { useEffect } from "preact/hooks";

import { ago, plural, span, standing, titleOf, usd, workflowName } from "../format";
import { Actions } from "../parts/actions";
import { Badge, ProgressLine, Thumbnail } from "../parts/pieces";
import { jobPage } from "../route";
import { counts, filter, finished, jobOf, loadWorkflows, now, running, setFilter, waiting, workflows, type Tab } from "../store";
import type { Job } from "../types";
import { MachinesGlance } from "./machines";
import { MoneyGlance } from "./money";

const TABS: { tab: Tab; text: string }[] = [
  { tab: "all", text: "All" },
  { tab: "processing", text: "Running" },
  { tab: "pending", text: "Waiting" },
  { tab: "done", text: "Done" },
  { tab: "failed", text: "Failed" },
];

export function Jobs() {
  useEffect(() => {
    if (!workflows.peek()) void loadWorkflows();
  }, []);
  const { tab } = filter.value;
  const nothing = running.ids.value.length + waiting.ids.value.length + finished.ids.value.length === 0;
  const settled = [running, waiting, finished].every((list) => list.state.value === "ready");
  return (
    <div class="columns">
      <div class="wide">
        <h1 class="hidden">Jobs</h1>
        <Filters />
        {(tab === "all" || tab === "processing") && <Section title="Running" list={running} always={tab === "processing"} />}
        {(tab === "all" || tab === "pending") && <Section title="Waiting" list={waiting} always={tab === "pending"} />}
        {(tab === "all" || tab === "done" || tab === "failed") && (
          <Section title={tab === "failed" ? "Failed" : tab === "done" ? "Done" : "Finished"} list={finished} always={tab !== "all"} />
        )}
        {tab === "all" && nothing && settled && (
          <div class="empty">
            <h2>No jobs yet</h2>
            <p>Choose a workflow, drop a picture, and see it become something else.</p>
            <p><a class="button primary" href="#/new">Make the first one</a></p>
          </div>
        )}
      </div>
      <aside aria-label="Machines and money">
        <MachinesGlance />
        <MoneyGlance />
      </aside>
    </div>
  );
}

function Filters() {
  const { tab, workflow } = filter.value;
  const names = workflows.value?.workflows.map((one) => one.name) ?? [];
  const count = (of: Tab): string => (of === "all" ? "" : ` ${counts.value[of].toLocaleString("en-US")}`);
  return (
    <div class="filters" role="group" aria-label="Which jobs to show">
      {TABS.map((one) => (
        <button key={one.tab} type="button" class="tab" aria-pressed={tab === one.tab} onClick={() => setFilter({ tab: one.tab })}>
          {one.text}<small>{count(one.tab)}</small>
        </button>
      ))}
      {names.length > 1 && (
        <label class="inline push">
          <span class="hidden">Workflow</span>
          <select value={workflow} onChange={(event) => setFilter({ workflow: event.currentTarget.value })}>
            <option value="">Every workflow</option>
            {names.map((name) => <option key={name} value={name}>{workflowName(name)}</option>)}
          </select>
        </label>
      )}
    </div>
  );
}

function Section({ title, list, always }: { title: string; list: typeof running; always: boolean }) {
  const ids = list.ids.value;
  const state = list.state.value;
  if (!ids.length && !always) return state === "loading" ? <p class="muted" role="status">Loading…</p> : null;
  return (
    <section aria-label={title}>
      <h2>{title}</h2>
      {ids.length ? <ul class="jobs">{ids.map((id) => <JobCard key={id} id={id} />)}</ul> : <p class="muted">{state === "loading" ? "Loading…" : "None."}</p>}
      {list.more.value && (
        <p class="more"><button type="button" onClick={() => void list.grow()}>Show more</button></p>
      )}
    </section>
  );
}

function JobCard({ id }: { id: string }) {
  const job = jobOf(id)?.value;
  if (!job) return null;
  const title = titleOf(job);
  return (
    <li class={`card job ${job.status}`}>
      <Thumbnail job={job} />
      <div class="about">
        <h3><a href={jobPage(job.id)}>{title}</a></h3>
        <p class="meta">
          {job.status !== "processing" && <Badge job={job} />}
          <span>#{job.number} {workflowName(job.workflow)}</span>
          <Facts job={job} />
        </p>
        {job.status === "processing" && <ProgressLine job={job} label={`Progress of job ${job.number}`} />}
        {job.status === "failed" && job.error && standing(job) !== "cancelled" && <p class="error">{job.error.message}</p>}
      </div>
      <Actions job={job} />
    </li>
  );
}

function Facts({ job }: { job: Job }) {
  if (job.status === "processing") {
    return (
      <>
        {job.machine?.server_type && <span>{job.machine.server_type}</span>}
        {job.cost_usd && <span>{usd(job.cost_usd)} so far</span>}
        {job.attempts > 1 && <span>{plural(job.attempts, "attempt")}</span>}
      </>
    );
  }
  if (job.status === "pending") {
    return (
      <>
        {job.priority !== 50 && <span>priority {job.priority}</span>}
        <span>added {ago(job.created_at, now.value)}</span>
      </>
    );
  }
  return (
    <>
      {job.duration_s !== null && standing(job) === "done" && <span>took {span(job.duration_s)}</span>}
      {job.cost_usd && <span>{usd(job.cost_usd)}</span>}
      <span>{ago(job.ended_at, now.value)}</span>
    </>
  );
}
