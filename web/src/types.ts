// What the HTTP API says, as far as this page reads it. Everything in it that came from a machine is foreign text.

export type Status = "pending" | "processing" | "done" | "failed";

export interface TimeLeft {
  low_s: number;
  expected_s: number;
  high_s: number;
  sure: boolean;
  runs: number;
}

export interface Progress {
  percent: number;
  step: string | null;
  message: string;
  node_id: string | null;
  node_title: string | null;
  value: number | null;
  maximum: number | null;
  nodes_done: number;
  nodes_total: number;
  queue_position: number | null;
  elapsed_s: number | null;
  preview: string | null;
}

export interface Fault {
  code: string;
  message: string;
  hint: string | null;
}

export interface InputFile {
  n: number;
  name: string;
  kind: string;
  url: string;
  thumbnail: string | null;
}

export interface OutputFile extends InputFile {
  file: string;
  media_type: string;
  size_bytes: number | null;
  sha256: string | null;
}

export interface Job {
  id: string;
  number: number;
  name: string;
  workflow: string;
  job_type: string;
  status: Status;
  reason: string | null;
  prompt: string | null;
  priority: number;
  user: string;
  project: string;
  created_at: string | null;
  started_at: string | null;
  ended_at: string | null;
  duration_s: number | null;
  attempts: number;
  progress: Progress | null;
  time_left: TimeLeft | null;
  cost_usd: string | null;
  seeds: Record<string, number | string>;
  machine: { server_type: string | null; id: string | null } | null;
  error: Fault | null;
  inputs: InputFile[];
  outputs: OutputFile[];
}

export interface NodeTime {
  node_id: string;
  title: string;
  class_type: string;
  started_s: number;
  seconds: number | null;
  cached: boolean;
}

export interface Attempt {
  token: number;
  run: number;
  started_at: string | null;
  ended_at: string | null;
  outcome: string | null;
  error_code: string | null;
}

export interface JobEvent {
  number: number;
  at: string;
  kind: string;
  data: Record<string, unknown> | null;
}

export interface JobDetail extends Job {
  request: {
    workflow: string | Record<string, unknown>;
    prompt: string | null;
    seed: number | string | null;
    sets: Record<string, unknown>;
    inputs: Record<string, unknown>;
  };
  runs: Attempt[];
  timeline: NodeTime[];
  events: JobEvent[];
}

export type Counts = Record<Status, number>;

export interface JobPage {
  jobs: Job[];
  counts: Counts;
  next: number | null;
}

export interface Pause {
  scope: string;
  reason: string;
  message: string;
  since: string | null;
  until: string | null;
}

export interface Queue {
  counts: Counts;
  paused: Pause[];
  workers: number;
}

export interface Machine {
  /** Our own; a machine that somebody else started has only the provider's. */
  id: string | null;
  server_id: string | null;
  server_type: string;
  state: string;
  whose: string;
  purpose: string;
  usd_per_hour: string | null;
  spent_usd: string | null;
  ready_at: string | null;
  stops_at: string | null;
  jobs: { id: string; workflow: string }[];
  busy: boolean;
  why: string;
}

export interface Machines {
  machines: Machine[];
  listed: boolean;
  why: string | null;
}

export interface Spent {
  usd: string;
  busy_s: number;
  idle_s: number;
  jobs?: number;
}

export interface Bucket {
  at: string;
  usd: string;
  busy_s: number;
  idle_s: number;
}

export interface BudgetState {
  name: string;
  scope: string;
  hard: string | null;
  soft: string | null;
  spent: string;
  committed: string | null;
  left: string | null;
  ends_at: string | null;
}

export interface Money {
  today: Spent;
  month: Spent;
  committed_usd: string | null;
  budgets: BudgetState[];
  hours: Bucket[];
  days: Bucket[];
  forecast_month_usd: string | null;
}

export interface WorkflowInput {
  name: string;
  kind: string;
  required: boolean;
  description: string;
  minimum: number | null;
  maximum: number | null;
  default: unknown;
}

export interface Workflow {
  name: string;
  description: string;
  inputs: WorkflowInput[];
  seeds: unknown[];
  outputs: { name: string; kind: string; description: string }[];
  usual: { low_s: number; expected_s: number; high_s: number } | null;
}

export interface Workflows {
  workflows: Workflow[];
}

export interface Estimate {
  known: boolean;
  runs: number;
  server_type: string;
  usd_per_hour: string;
  seconds: { low: number; expected: number; high: number } | null;
  usd: { low: string; expected: string; high: string } | null;
  notes: string[];
}

export interface Session {
  kind: string;
  name: string;
  version: string;
}
