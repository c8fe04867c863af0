import { useEffect, useRef, useState } from "preact/hooks";

import { ApiError, get, getText, jobUrl, wordsOf } from "../api";
import { ago, bytes, labelled, moment, plural, span, standing, titleOf, usd, workflowName } from "../format";
import { Actions } from "../parts/actions";
import { Media } from "../parts/media";
import { Badge, Picture, ProgressLine } from "../parts/pieces";
import { Timeline } from "../parts/timeline";
import { Compare } from "../parts/compare";
import { jobOf, now, touched } from "../store";
import type { Job, JobDetail } from "../types";

/** While a job runs, its node timeline is asked for this often; everything else comes by itself. */
const LOOK_MS = 4000;

export function JobPage({ id }: { id: string }) {
  const { detail, fault } = useDetail(id);
  const live = jobOf(detail?.id ?? id)?.value;
  if (fault && !detail) {
    return (
      <div class="empty">
        <h1>{fault.status === 404 ? "There is no such job" : "The job cannot be shown"}</h1>
        <p>{fault.words}</p>
        <p><a href="#/">Back to the jobs</a></p>
      </div>
    );
  }
  if (!detail) return <p class="muted single" role="status">Loading…</p>;
  // The list's copy hears progress at once; what only the detail has stays.
  const fresh = live && detail.status === live.status ? { ...detail, progress: live.progress, time_left: live.time_left, cost_usd: live.cost_usd } : detail;
  return <Shown job={fresh} />;
}

function useDetail(id: string): { detail: JobDetail | null; fault: ApiError | null } {
  const [detail, setDetail] = useState<JobDetail | null>(null);
  const [fault, setFault] = useState<ApiError | null>(null);
  const { id: about, count } = touched.value;
  const last = useRef(-1);
  const whole = useRef<string | null>(null);
  const ours = about === "" || about === id || about === whole.current;
  if (ours) last.current = count;
  const status = detail?.status;

  useEffect(() => {
    const leaving = new AbortController();
    const look = (): void => {
      get<JobDetail>(jobUrl(id), leaving.signal)
        .then((found) => {
          whole.current = found.id;
          setDetail(found);
          setFault(null);
        })
        .catch((error: unknown) => {
          if (!leaving.signal.aborted) setFault(error instanceof ApiError ? error : new ApiError(wordsOf(error), 0));
        });
    };
    look();
    const timer = status === "processing" ? window.setInterval(() => { if (!document.hidden) look(); }, LOOK_MS) : 0;
    return () => {
      leaving.abort();
      window.clearInterval(timer);
    };
  }, [id, last.current, status]);
  return { detail, fault };
}

function Shown({ job }: { job: JobDetail }) {
  return (
    <article class="single">
      <p class="back"><a href="#/">Jobs</a></p>
      <header class="title">
        <h1>{titleOf(job)}</h1>
        <p class="meta">
          <Badge job={job} />
          <span>#{job.number} {workflowName(job.workflow)}</span>
          {job.machine?.server_type && <span>{job.machine.server_type}</span>}
          <span>{job.ended_at ? ago(job.ended_at, now.value) : `asked for ${ago(job.created_at, now.value)}`}</span>
        </p>
        <Actions job={job} open />
      </header>
      {job.status === "processing" && <ProgressLine job={job} label={`Progress of job ${job.number}`} />}
      {job.error && standing(job) !== "cancelled" && (
        <div class="error box" role="alert">
          <p><b>{job.error.message}</b></p>
          {job.error.hint && <p>{job.error.hint}</p>}
          <p class="small"><code>{job.error.code}</code></p>
        </div>
      )}
      <Pictures job={job} />
      <Facts job={job} />
      <Timeline nodes={job.timeline} running={job.status === "processing"} />
      <More job={job} />
    </article>
  );
}

function Pictures({ job }: { job: JobDetail }) {
  const preview = job.status === "processing" ? job.progress?.preview : null;
  const before = job.inputs.find((one) => one.kind === "image" && one.thumbnail);
  const after = job.outputs.find((one) => one.kind === "image");
  if (!job.inputs.length && !job.outputs.length && !preview) return null;
  return (
    <section aria-labelledby="in-out">
      <h2 id="in-out">{job.outputs.length ? "What went in, what came out" : preview ? "What is coming" : "What went in"}</h2>
      <ul class="media">
        {job.inputs.map((one) => <Media key={`in${one.n}`} file={one} role="in" />)}
        {preview && (
          <li><figure><Picture src={preview} alt={`Preview while ${job.progress?.node_title ?? "it"} runs`} /><figcaption><b>Preview</b></figcaption></figure></li>
        )}
        {job.outputs.map((one) => <Media key={`out${one.n}`} file={one} role="out" />)}
      </ul>
      {before && after && <Compare before={before} after={after} />}
    </section>
  );
}

function Facts({ job }: { job: JobDetail }) {
  const given: [string, string][] = [...Object.entries(job.request.inputs), ...Object.entries(job.request.sets)]
    .filter(([, value]) => !(typeof value === "string" && value.startsWith("@")))
    .map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]);
  const rows: [string, string][] = [
    ["Cost", job.cost_usd ? `${usd(job.cost_usd)}${job.status === "processing" ? " so far" : ""}` : "–"],
    ["Took", job.duration_s !== null ? span(job.duration_s) : runningFor(job)],
    ["Asked for", moment(job.created_at)],
    ["Started", moment(job.started_at)],
    ["Ended", moment(job.ended_at)],
    ["Priority", String(job.priority)],
    ...(job.user ? [["User", job.user] as [string, string]] : []),
    ...(job.project ? [["Project", job.project] as [string, string]] : []),
    ...Object.entries(job.seeds).map(([name, seed]): [string, string] => [`Seed ${name}`, String(seed)]),
    ...given.filter(([name]) => name !== "prompt"),
  ];
  return (
    <section aria-labelledby="facts">
      <h2 id="facts">Facts</h2>
      <dl class="facts">
        {rows.map(([name, value]) => <div key={name}><dt>{labelled(name)}</dt><dd>{value}</dd></div>)}
      </dl>
    </section>
  );
}

const runningFor = (job: Job): string =>
  job.status === "processing" && job.started_at ? `${span(Math.round(Math.max(10, (now.value - Date.parse(job.started_at)) / 1000)))} so far` : "–";

function More({ job }: { job: JobDetail }) {
  return (
    <section aria-labelledby="more">
      <h2 id="more">In detail</h2>
      {job.runs.length > 0 && (
        <details open={job.runs.length > 1}>
          <summary>{plural(job.runs.length, "attempt")}</summary>
          <div class="scroll" tabIndex={0} role="region" aria-label="Attempts, as a table">
            <table>
              <thead><tr><th scope="col">Attempt</th><th scope="col">Started</th><th scope="col">Ended</th><th scope="col">Outcome</th></tr></thead>
              <tbody>
                {job.runs.map((run) => (
                  <tr key={run.token}><th scope="row">{run.run || run.token}</th><td>{moment(run.started_at)}</td><td>{moment(run.ended_at)}</td><td>{run.outcome ?? "under way"}{run.error_code ? ` (${run.error_code})` : ""}</td></tr>
                ))}
              </tbody>
            </table>
          </div>
        </details>
      )}
      <Log job={job} />
      {job.outputs.length > 0 && (
        <details>
          <summary>Files and their checksums</summary>
          <ul class="files">
            {job.outputs.map((one) => (
              <li key={one.n}><a href={`${one.url}?download=1`} download>{one.file}</a> <span class="muted">{bytes(one.size_bytes)}</span> <code class="hash">{one.sha256}</code></li>
            ))}
          </ul>
        </details>
      )}
      {job.status === "done" && <p><a href={jobUrl(job.id, "/manifest")}>Manifest</a>: everything that went into the result, for programs.</p>}
    </section>
  );
}

function Log({ job }: { job: JobDetail }) {
  const [open, setOpen] = useState(false);
  const [text, setText] = useState("");
  const newest = job.events.at(-1)?.number;
  useEffect(() => {
    if (!open) return;
    getText(jobUrl(job.id, "/log"))
      .then(setText)
      .catch((error: unknown) => setText(wordsOf(error)));
  }, [open, job.id, newest]);
  return (
    <details onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>Log</summary>
      <pre tabIndex={0} role="region" aria-label="Log">{text || "Loading…"}</pre>
    </details>
  );
}

