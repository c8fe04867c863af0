import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { ApiError, ask, newKey, wordsOf } from "../api";
import { between, labelled, plural, usd, workflowName } from "../format";
import { Drop } from "../parts/drop";
import { go, jobPage } from "../route";
import { loadWorkflows, tell, workflows } from "../store";
import type { Estimate, Job, Workflow, WorkflowInput } from "../types";

const LARGEST_SEED = 2n ** 64n - 1n;
const TRIES = 3;

export function NewJob({ chosen }: { chosen: string }) {
  useEffect(() => {
    void loadWorkflows();
  }, []);
  const all = workflows.value?.workflows;
  const workflow = all?.find((one) => one.name === chosen) ?? all?.[0];
  return (
    <div class="single narrow">
      <h1>New job</h1>
      {!all && <p class="muted" role="status">Loading the workflows…</p>}
      {all && !workflow && <p class="muted">No workflow is known to this server.</p>}
      {all && workflow && (
        <>
          <label class="field">
            <span class="name">Workflow</span>
            <select value={workflow.name} onChange={(event) => go(`#/new/${encodeURIComponent(event.currentTarget.value)}`)}>
              {all.map((one) => <option key={one.name} value={one.name}>{workflowName(one.name)}</option>)}
            </select>
            <span class="help">{workflow.description}</span>
          </label>
          <Form key={workflow.name} workflow={workflow} />
        </>
      )}
    </div>
  );
}

/** What most people leave as it is. */
const extra = (input: WorkflowInput): boolean => input.kind === "number" && !input.required;

interface Values {
  [name: string]: string;
}

function Form({ workflow }: { workflow: Workflow }) {
  const inputs = useMemo(() => workflow.inputs.filter((one) => one.name !== "seed"), [workflow]);
  const [values, setValues] = useState<Values>({});
  const [sending, setSending] = useState<Record<string, boolean>>({});
  const [seed, setSeed] = useState("");
  const [faults, setFaults] = useState<Values>({});
  const [busy, setBusy] = useState(false);
  // One key as long as the job asked for is the same: a double click or a lost answer runs one job.
  const key = useRef({ body: "", key: "" });
  const form = useRef<HTMLFormElement>(null);
  const settings = useRef<HTMLDetailsElement>(null);
  const pasted = inputs.find((one) => one.kind === "image")?.name;
  const seeded = workflow.seeds.length > 0 || workflow.inputs.some((one) => one.name === "seed");
  const uploading = Object.values(sending).some(Boolean);

  const set = (name: string, value: string): void => {
    setValues((before) => ({ ...before, [name]: value }));
    setFaults(({ [name]: _gone, ...rest }) => rest);
  };

  const submit = async (): Promise<void> => {
    if (busy || uploading) return;
    const found = check(inputs, values, seed);
    setFaults(found);
    if (Object.keys(found).length) return focusFirst(form.current);
    const body = bodyOf(workflow, inputs, values, seed);
    if (key.current.body !== body) key.current = { body, key: newKey() };
    setBusy(true);
    try {
      const job = await send(body, key.current.key);
      key.current = { body: "", key: "" };
      tell(`Job ${job.number} is in the queue.`);
      go(jobPage(job.id));
    } catch (error) {
      setFaults(placed(error, inputs));
      focusFirst(form.current);
    } finally {
      setBusy(false);
    }
  };

  const field = (one: WorkflowInput) => (
    <Field
      key={one.name}
      input={one}
      value={values[one.name] ?? ""}
      fault={faults[one.name]}
      pastes={one.name === pasted}
      onValue={(value) => set(one.name, value)}
      onSending={(is) => setSending((before) => ({ ...before, [one.name]: is }))}
    />
  );
  const extras = inputs.filter(extra);
  useEffect(() => {
    if (settings.current && extras.some((one) => faults[one.name])) settings.current.open = true;
  }, [faults]);

  return (
    <form ref={form} noValidate onSubmit={(event) => { event.preventDefault(); void submit(); }}>
      {inputs.filter((one) => !extra(one)).map(field)}
      {extras.length > 0 && (
        <details class="settings" ref={settings}>
          <summary>More settings</summary>
          <div class="pair">{extras.map(field)}</div>
        </details>
      )}
      {seeded && <Seed value={seed} fault={faults["seed"]} onValue={(value) => { setSeed(value); setFaults(({ seed: _gone, ...rest }) => rest); }} />}
      <Cost workflow={workflow} />
      {faults[""] && <p class="error box" role="alert" tabIndex={-1}>{faults[""]}</p>}
      <p><button type="submit" class="primary large" aria-disabled={busy || uploading}>{busy ? "Sending…" : uploading ? "Still sending the picture…" : "Run it"}</button></p>
    </form>
  );
}

function Field({ input, value, fault, pastes, onValue, onSending }: {
  input: WorkflowInput;
  value: string;
  fault: string | undefined;
  pastes: boolean;
  onValue: (value: string) => void;
  onSending: (is: boolean) => void;
}) {
  const id = `in-${input.name}`;
  const label = labelled(input.name);
  const told = [`${id}-help`, fault ? `${id}-wrong` : ""].filter(Boolean).join(" ");
  const common = { id, required: input.required, "aria-describedby": told, "aria-invalid": fault !== undefined } as const;
  const usual = input.default === null || input.default === undefined ? "" : String(input.default);
  const file = input.kind === "image" || input.kind === "file";
  return (
    <div class="field">
      <label class="name" for={id}>{label}{!input.required && <small> optional</small>}</label>
      {file && (
        <Drop
          id={id}
          label={label}
          picture={input.kind === "image"}
          required={input.required}
          describedBy={told}
          invalid={fault !== undefined}
          pastes={pastes}
          onChange={(upload, is) => { onValue(upload); onSending(is); }}
        />
      )}
      {input.kind === "number" && (
        <input
          {...common}
          type="number"
          inputMode="decimal"
          step="any"
          {...(input.minimum === null ? {} : { min: input.minimum })}
          {...(input.maximum === null ? {} : { max: input.maximum })}
          placeholder={usual}
          value={value}
          onInput={(event) => onValue(event.currentTarget.value)}
        />
      )}
      {!file && input.kind !== "number" && (
        <textarea {...common} rows={input.name === "prompt" ? 3 : 2} placeholder={usual} value={value} onInput={(event) => onValue(event.currentTarget.value)} />
      )}
      <span class="help" id={`${id}-help`}>{input.description}{limits(input)}</span>
      {fault && <span class="error" id={`${id}-wrong`}>{fault}</span>}
    </div>
  );
}

function limits({ kind, minimum, maximum }: WorkflowInput): string {
  if (kind !== "number" || (minimum === null && maximum === null)) return "";
  if (minimum !== null && maximum !== null) return ` (${minimum} to ${maximum})`;
  return minimum !== null ? ` (${minimum} or more)` : ` (${maximum ?? ""} or less)`;
}

function Seed({ value, fault, onValue }: { value: string; fault: string | undefined; onValue: (value: string) => void }) {
  const random = (): void => onValue(String(crypto.getRandomValues(new Uint32Array(1))[0] ?? 0));
  return (
    <div class="field">
      <label class="name" for="in-seed">Seed<small> optional</small></label>
      <div class="row">
        <input id="in-seed" inputMode="numeric" value={value} placeholder="random" aria-describedby={fault ? "in-seed-help in-seed-wrong" : "in-seed-help"} aria-invalid={fault !== undefined} onInput={(event) => onValue(event.currentTarget.value.trim())} />
        <button type="button" onClick={random}>Roll one</button>
      </div>
      <span class="help" id="in-seed-help">The same seed and inputs give the same result. Left empty, every run is another.</span>
      {fault && <span class="error" id="in-seed-wrong">{fault}</span>}
    </div>
  );
}

function Cost({ workflow }: { workflow: Workflow }) {
  const [estimate, setEstimate] = useState<Estimate | null | "asking">("asking");
  const [why, setWhy] = useState("");
  useEffect(() => {
    const leaving = new AbortController();
    ask<Estimate>("POST", "/costs/estimate", { json: { workflow: workflow.name }, signal: leaving.signal })
      .then(setEstimate)
      .catch((error: unknown) => {
        if (leaving.signal.aborted) return;
        setEstimate(null);
        setWhy(wordsOf(error));
      });
    return () => leaving.abort();
  }, [workflow.name]);
  return <p class="estimate" role="status">{estimate === "asking" ? "Working out what it will take…" : words(estimate, why, workflow)}</p>;
}

function words(estimate: Estimate | null, why: string, workflow: Workflow): string {
  const usual = workflow.usual ? `It usually takes ${between(workflow.usual.low_s, workflow.usual.high_s)}.` : "";
  if (!estimate) return usual || `What it will take cannot be told: ${why}`;
  if (!estimate.known || !estimate.seconds || !estimate.usd) {
    return `It has not run here before, so nobody can say what it will take. A ${estimate.server_type} machine costs ${usd(estimate.usd_per_hour)} an hour.`;
  }
  const { seconds, usd: money } = estimate;
  const cost = usd(money.low) === usd(money.high) ? `about ${usd(money.expected)}` : `${usd(money.low)} to ${usd(money.high)}`;
  return `Will take ${between(seconds.low, seconds.high)} and cost ${cost} on a ${estimate.server_type} machine, going by ${plural(estimate.runs, "run")} so far.`;
}

// -- checking and sending --------------------------------------------------------------------------------

function check(inputs: WorkflowInput[], values: Values, seed: string): Values {
  const found: Values = {};
  for (const input of inputs) {
    const value = (values[input.name] ?? "").trim();
    const file = input.kind === "image" || input.kind === "file";
    if (!value) {
      if (input.required) found[input.name] = file ? `Choose a ${input.kind === "image" ? "picture" : "file"}.` : "Write something here.";
    } else if (input.kind === "number") {
      const fault = checkNumber(input, Number(value));
      if (fault) found[input.name] = fault;
    }
  }
  if (seed && (!/^\d{1,20}$/.test(seed) || BigInt(seed) > LARGEST_SEED)) found["seed"] = "A seed is a whole number from 0 to 18446744073709551615.";
  return found;
}

function checkNumber({ minimum, maximum }: WorkflowInput, value: number): string {
  if (!Number.isFinite(value)) return "This is no number.";
  if (minimum !== null && value < minimum) return `At least ${minimum}.`;
  return maximum !== null && value > maximum ? `At most ${maximum}.` : "";
}

function bodyOf(workflow: Workflow, inputs: WorkflowInput[], values: Values, seed: string): string {
  const body: Record<string, unknown> = { workflow: workflow.name };
  const rest: Record<string, unknown> = {};
  for (const { name, kind } of inputs) {
    const value = values[name] ?? "";
    if (!value.trim()) continue;
    if ((name === "image" && kind === "image") || (name === "prompt" && kind === "text")) body[name] = value;
    else rest[name] = kind === "number" ? Number(value) : value;
  }
  if (Object.keys(rest).length) body["inputs"] = rest;
  const text = JSON.stringify(body);
  // A seed may have 64 bits, more than a number of this language holds: its digits go in as they are.
  return seed ? `${text.slice(0, -1)},"seed":${BigInt(seed)}}` : text;
}

/** Ask for the job; a lost answer is asked for again under the same key. */
async function send(body: string, key: string): Promise<Job> {
  for (let tried = 1; ; tried++) {
    try {
      return await ask<Job>("POST", "/jobs", { body, headers: { "Idempotency-Key": key } });
    } catch (error) {
      if (!(error instanceof ApiError && error.lost) || tried === TRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, 500 * tried));
    }
  }
}

/** The server's words, next to the field they are about if that can be told. */
function placed(error: unknown, inputs: WorkflowInput[]): Values {
  const text = wordsOf(error);
  if (!(error instanceof ApiError)) return { "": text };
  const about = fieldOf(error);
  const name = [...inputs.map((one) => one.name), "seed"].find((one) => one === about);
  return { [name ?? ""]: text };
}

function fieldOf({ details, message }: ApiError): string {
  if (Array.isArray(details)) {
    const loc: unknown = (details[0] as { loc?: unknown[] } | undefined)?.loc?.at(-1);
    return String(loc ?? "");
  }
  if (details && typeof details === "object") {
    const known = details as Record<string, unknown>;
    for (const name of ["field", "input", "name", "target"]) if (typeof known[name] === "string") return known[name];
    const missing: unknown = known["missing"];
    if (Array.isArray(missing)) return String(missing[0] ?? "");
  }
  return /^(?:input |the )?["'“‘`]?(\w+)["'”’`]?\b/i.exec(message)?.[1] ?? "";
}

function focusFirst(form: HTMLFormElement | null): void {
  requestAnimationFrame(() => form?.querySelector<HTMLElement>('[aria-invalid="true"], .error.box')?.focus());
}
