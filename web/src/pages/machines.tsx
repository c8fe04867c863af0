import { useState } from "preact/hooks";

import { ask, wordsOf } from "../api";
import { clock, moment, plural, usd, workflowName } from "../format";
import { askPerson } from "../parts/dialog";
import { jobPage } from "../route";
import { loadMachines, machines, now, tell } from "../store";
import type { Machine } from "../types";

const GONE = new Set(["stopped", "never"]);
const bills = (machine: Machine): boolean => !GONE.has(machine.state);

const idOf = (machine: Machine): string => machine.id ?? machine.server_id ?? "";

async function stop(machine: Machine): Promise<void> {
  const jobs = machine.jobs.length;
  const sure = await askPerson(
    `Stop the ${machine.server_type} machine?`,
    machine.whose === "not ours"
      ? "It was not started from here: somebody else may be working on it. Whatever runs on it is lost."
      : jobs
      ? `${plural(jobs, "job")} ${jobs === 1 ? "is" : "are"} on it and will have to start again elsewhere. Nothing more is billed once it is gone.`
      : "Nothing runs on it. Nothing more is billed once it is gone.",
    "Stop the machine",
    "Let it run",
  );
  if (!sure) return;
  tell(`The ${machine.server_type} machine is being stopped.`);
  try {
    const after = await ask<Machine>("POST", `/machines/${encodeURIComponent(idOf(machine))}/stop`, { json: { confirm: true } });
    if (GONE.has(after.state)) tell(`The ${machine.server_type} machine is gone; it no longer bills.`);
  } catch (error) {
    tell(wordsOf(error), true);
  }
  await loadMachines();
}

function StopButton({ machine }: { machine: Machine }) {
  const [busy, setBusy] = useState(false);
  if (!bills(machine) || machine.state === "stopping" || !idOf(machine)) return null;
  const go = (): void => {
    if (busy) return;
    setBusy(true);
    void stop(machine).finally(() => setBusy(false));
  };
  return (
    <button type="button" class="danger-text" aria-disabled={busy} onClick={go}>
      Stop<span class="hidden"> the {machine.server_type} machine {machine.server_id}</span>
    </button>
  );
}

function StopsAt({ machine }: { machine: Machine }) {
  if (!machine.stops_at || !bills(machine)) return null;
  const left = (Date.parse(machine.stops_at) - now.value) / 1000;
  return <span title={moment(machine.stops_at)}>{left > 0 ? `stops in ${clock(left)}` : "stops now"}</span>;
}

const stateWord = (machine: Machine): string => (machine.state === "ready" ? (machine.busy ? "busy" : "idle") : machine.state);

function MachineCard({ machine, whole }: { machine: Machine; whole: boolean }) {
  const word = stateWord(machine);
  return (
    <li class="card machine">
      <div class="about">
        <h3>{machine.server_type} <span class={`badge ${word}`}>{word}</span></h3>
        <p class="meta">
          <span>{usd(machine.usd_per_hour)} an hour</span>
          <span>{usd(machine.spent_usd)} spent</span>
          <StopsAt machine={machine} />
        </p>
        {machine.jobs.length > 0 && (
          <p class="meta">
            {machine.jobs.slice(0, whole ? 20 : 3).map((job) => (
              <a key={job.id} href={jobPage(job.id)}>{job.workflow ? workflowName(job.workflow) : `job ${job.id.slice(0, 8)}`}</a>
            ))}
          </p>
        )}
        {whole && (
          <p class="meta">
            {machine.purpose && <span>for {machine.purpose}</span>}
            {machine.whose && <span>{machine.whose}</span>}
            {machine.server_id && <span class="id">{machine.server_id}</span>}
            {machine.ready_at && <span>ready since {moment(machine.ready_at)}</span>}
          </p>
        )}
        {machine.why && <p class="why">{machine.why}</p>}
      </div>
      <div class="actions"><StopButton machine={machine} /></div>
    </li>
  );
}

function Unlisted() {
  const all = machines.value;
  if (!all || all.listed) return null;
  return <p class="warn">The provider did not list its machines; this is what our own books say. {all.why}</p>;
}

export function MachinesGlance() {
  const all = machines.value;
  const open = all?.machines.filter(bills) ?? [];
  const hourly = open.reduce((sum, machine) => sum + Number(machine.usd_per_hour ?? 0), 0);
  return (
    <section aria-label="Machines">
      <h2><a href="#/machines">Machines</a>{open.length > 0 && <small>{usd(hourly)} an hour</small>}</h2>
      <Unlisted />
      {open.length ? (
        <ul class="stack">{open.slice(0, 8).map((machine) => <MachineCard key={idOf(machine)} machine={machine} whole={false} />)}</ul>
      ) : (
        <p class="muted">{all ? "None is running; nothing bills." : "Loading…"}</p>
      )}
    </section>
  );
}

export function MachinesPage() {
  const all = machines.value;
  const open = all?.machines.filter(bills) ?? [];
  const gone = all?.machines.filter((machine) => !bills(machine)) ?? [];
  return (
    <div class="single">
      <h1>Machines</h1>
      <Unlisted />
      <h2 class="hidden">Running</h2>
      {open.length ? (
        <ul class="stack">{open.map((machine) => <MachineCard key={idOf(machine)} machine={machine} whole />)}</ul>
      ) : (
        <p class="muted">{all ? "None is running; nothing bills. The next job that needs one rents it." : "Loading…"}</p>
      )}
      {gone.length > 0 && (
        <details>
          <summary>{plural(gone.length, "machine")} stopped lately</summary>
          <ul class="stack">{gone.map((machine) => <MachineCard key={idOf(machine)} machine={machine} whole />)}</ul>
        </details>
      )}
    </div>
  );
}
