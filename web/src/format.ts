// Numbers and times as people read them.

import type { Job, Progress, TimeLeft } from "./types";

/** Dollars: cents from ten cents on, else as many digits as say something. */
export function usd(amount: string | number | null | undefined): string {
  if (amount === null || amount === undefined || amount === "") return "–";
  const value = Number(amount);
  if (!Number.isFinite(value)) return "–";
  const digits = value === 0 || Math.abs(value) >= 0.1 ? 2 : Math.abs(value) >= 0.01 ? 3 : 4;
  return `${value < 0 ? "−" : ""}$${Math.abs(value).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })}`;
}

/** A sum of bills: cents; what has begun to cost is never shown as nothing. */
export function total(amount: string | number | null | undefined): string {
  const value = Number(amount ?? Number.NaN);
  return value > 0 && value < 0.01 ? "< $0.01" : value >= 0.01 && value < 0.1 ? `$${value.toFixed(2)}` : usd(amount);
}

/** Seconds as "45 s", "3 min 20 s", "2 h 5 min", "3 d 4 h". */
export function span(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const s = Math.max(0, seconds);
  if (s < 0.05) return "0 s";
  if (s < 10) return `${s.toFixed(1)} s`;
  const whole = Math.round(s);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return pair(Math.floor(whole / 60), "min", whole % 60, "s");
  const minutes = Math.round(whole / 60);
  if (minutes < 1440) return pair(Math.floor(minutes / 60), "h", minutes % 60, "min");
  const hours = Math.round(minutes / 60);
  return pair(Math.floor(hours / 24), "d", hours % 24, "h");
}

const pair = (a: number, of: string, b: number, rest: string): string => (b ? `${a} ${of} ${b} ${rest}` : `${a} ${of}`);

/** A countdown, "12:05" or "1:02:05". */
export function clock(seconds: number): string {
  const s = Math.max(0, Math.round(seconds));
  const two = (n: number): string => String(n).padStart(2, "0");
  const [h, m] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

/** Time left in words: a range until it is sure. `age` is how many seconds ago it was told. */
export function timeLeft(left: TimeLeft | null, age = 0): string {
  if (!left) return "";
  const expected = left.expected_s - age;
  if (left.sure) return expected < 8 ? "almost done" : `about ${rough(expected)} left`;
  const [low, high] = [Math.max(0, left.low_s - age), Math.max(0, left.high_s - age)];
  if (high < 10) return "almost done";
  return `${between(low, high)} left`;
}

/** "2–4 min", "30–50 s", "40 s – 3 min". */
export function between(low: number, high: number): string {
  const [a, b] = [parts(low), parts(high)];
  if (a.n === b.n && a.unit === b.unit) return `about ${a.n} ${a.unit}`;
  if (low < 5) return `up to ${b.n} ${b.unit}`;
  return a.unit === b.unit ? `${a.n}–${b.n} ${b.unit}` : `${a.n} ${a.unit} – ${b.n} ${b.unit}`;
}

function parts(seconds: number): { n: number; unit: string } {
  if (seconds < 55) return { n: Math.max(5, Math.round(seconds / 5) * 5), unit: "s" };
  if (seconds < 5400) return { n: Math.max(1, Math.round(seconds / 60)), unit: "min" };
  return { n: Math.round(seconds / 360) / 10, unit: "h" };
}

export const rough = (seconds: number): string => {
  const { n, unit } = parts(seconds);
  return `${n} ${unit}`;
};

/** "5 min ago", or the day for what is older. */
export function ago(at: string | null, now: number): string {
  if (!at) return "";
  const then = Date.parse(at);
  const seconds = (now - then) / 1000;
  if (seconds < 10) return "just now";
  if (seconds < 55) return `${Math.round(seconds / 10) * 10} s ago`;
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(then).toLocaleDateString(undefined, { day: "numeric", month: "short" });
}

export const moment = (at: string | null): string =>
  at ? new Date(at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" }) : "–";

export function bytes(size: number | null): string {
  if (size === null) return "";
  if (size < 1000) return `${size} bytes`;
  if (size < 1e6) return `${(size / 1e3).toFixed(0)} KB`;
  if (size < 1e9) return `${(size / 1e6).toFixed(1)} MB`;
  return `${(size / 1e9).toFixed(2)} GB`;
}

const STEPS: Record<string, string> = {
  placing: "Looking for a machine",
  launching: "Renting a machine",
  booting: "The machine is starting",
  checking: "Checking the machine",
  uploading: "Sending the inputs",
  queued: "Next on the machine",
  running: "Running",
  fetching: "Fetching the results",
  stopping: "Finishing",
  finished: "Finished",
};

/** What a job is doing, in a line. */
export function doing(progress: Progress | null): string {
  if (!progress) return "Starting";
  if (progress.step === "queued" && progress.queue_position) return `${progress.queue_position} ahead on the machine`;
  if (progress.step === null) return progress.message || "Running";
  if (progress.step !== "running") return STEPS[progress.step] ?? (progress.message || progress.step);
  const title = progress.node_title || progress.message || "Running";
  const steps = progress.maximum && progress.maximum > 1 ? `, step ${progress.value ?? 0} of ${progress.maximum}` : "";
  return `${title}${steps}`;
}

/** How a job stands, as a word. */
export function standing(job: Job): string {
  if (job.status === "pending") return "waiting";
  if (job.status === "processing") return "running";
  if (job.status === "done") return "done";
  if (job.reason === "cancelled") return "cancelled";
  return job.reason === "quarantined" ? "set aside" : "failed";
}

const MADE_UP = /_\d{14}_[0-9a-f]+$/;

/** What a person knows a job by: its prompt, or the name of its job file; a name that was made up says nothing. */
export const titleOf = (job: Job): string =>
  job.prompt || (job.name && !MADE_UP.test(job.name) ? job.name : `${labelled(job.workflow)} ${job.number}`);

export const workflowName = (name: string): string => name.replace(/^wf_/, "").replaceAll("_", " ");

/** A name out of a program, as the beginning of a line. */
export const labelled = (name: string): string => {
  const words = workflowName(name);
  return words.charAt(0).toUpperCase() + words.slice(1);
};

export const plural = (n: number, one: string, more = `${one}s`): string => `${n.toLocaleString("en-US")} ${n === 1 ? one : more}`;
