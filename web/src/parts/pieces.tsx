// Small pieces that several pages show.

import { useState } from "preact/hooks";

import { doing, standing, timeLeft } from "../format";
import { ageOf } from "../store";
import type { Job, Progress } from "../types";

export function Badge({ job }: { job: Job }) {
  const word = standing(job);
  return <span class={`badge ${word.replace(" ", "-")}`}>{word}</span>;
}

export function ProgressLine({ job, label }: { job: Job; label: string }) {
  const progress = job.progress;
  const percent = Math.round(progress?.percent ?? 0);
  const known = progress !== null && (progress.step === "running" || percent > 0);
  return (
    <div class="progress">
      <progress max={100} {...(known ? { value: percent } : {})} aria-label={label} />
      <p>
        <span class="doing">{doing(progress)}{nodes(progress)}</span>
        <span class="numbers">
          {known ? `${percent} %` : ""}
          <Left job={job} before={known ? " · " : ""} />
        </span>
      </p>
    </div>
  );
}

const nodes = (progress: Progress | null): string =>
  progress && progress.step === "running" && progress.nodes_total > 1
    ? ` · node ${Math.min(progress.nodes_done + 1, progress.nodes_total)} of ${progress.nodes_total}`
    : "";

export function Left({ job, before = "" }: { job: Job; before?: string }) {
  const words = timeLeft(job.time_left, ageOf(job.id));
  return words ? <>{before}{words}</> : null;
}

/** A picture that says nothing if it cannot be had. */
export function Picture({ src, alt, class: named }: { src: string; alt: string; class?: string }) {
  const [bad, setBad] = useState("");
  if (bad === src) return <span class={`nopicture ${named ?? ""}`} aria-hidden="true" />;
  return <img src={src} alt={alt} class={named} loading="lazy" decoding="async" onError={() => setBad(src)} />;
}

/** What a job looks like: what it is painting now, what came out, or what went in. */
export function Thumbnail({ job }: { job: Job }) {
  const preview = job.status === "processing" ? job.progress?.preview : null;
  const out = job.outputs.find((one) => one.thumbnail)?.thumbnail;
  const given = job.inputs.find((one) => one.thumbnail)?.thumbnail;
  const src = preview ?? out ?? given;
  if (src) return <Picture src={src} alt="" class={preview ? "thumb now" : "thumb"} />;
  const kind = job.outputs[0]?.kind ?? "image";
  return (
    <span class="thumb none" aria-hidden="true">
      <svg viewBox="0 0 24 24" width="26" height="26" fill="none" stroke="currentColor" stroke-width="1.3" stroke-linejoin="round">
        {kind === "mesh" ? <path d="M12 3l8 4.5v9L12 21l-8-4.5v-9zM12 12l8-4.5M12 12v9M12 12L4 7.5" /> : <path d="M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4" />}
      </svg>
    </span>
  );
}

export function Meter({ value, max, label, tone }: { value: number; max: number; label: string; tone?: string | undefined }) {
  return <progress class={`meter ${tone ?? ""}`} max={max > 0 ? max : 1} value={Math.max(0, Math.min(value, max))} aria-label={label} />;
}
