// What the page knows, as signals. Jobs have a signal each, so that one's progress redraws one card.

import { batch, computed, signal, type Signal } from "@preact/signals";

import { ask, get, hooks, jobUrl, wordsOf } from "./api";
import { standing, titleOf } from "./format";
import type { Counts, Job, JobPage, Machines, Money, Progress, Queue, Session, Status, TimeLeft, Workflows } from "./types";

export type Link = "connecting" | "live" | "lost";

export const session = signal<Session | "unknown" | "none">("unknown");
export const link = signal<Link>("connecting");
export const counts = signal<Counts>({ pending: 0, processing: 0, done: 0, failed: 0 });
export const queue = signal<Queue | null>(null);
export const machines = signal<Machines | null>(null);
export const money = signal<Money | null>(null);
export const workflows = signal<Workflows | null>(null);
/** Milliseconds; moves once a second while somebody looks. */
export const now = signal(Date.now());
/** What is told aloud and shown for a while: finished jobs, failed orders. */
export const notices = signal<{ key: number; text: string; bad: boolean }[]>([]);
/** The id of the job whose page wants to know of durable events, and how many there were. */
export const touched = signal<{ id: string; count: number }>({ id: "", count: 0 });

export const today = computed(() => money.value?.today ?? null);

const PAGE = 30;
/** The largest page the server gives. */
const MOST = 500;
const NOTICE_MS = 7000;

hooks.loggedOut = () => {
  session.value = "none";
};

let noticed = 0;

export function tell(text: string, bad = false): void {
  const key = ++noticed;
  notices.value = [...notices.value.slice(-3), { key, text, bad }];
  setTimeout(() => {
    notices.value = notices.value.filter((one) => one.key !== key);
  }, bad ? NOTICE_MS * 2 : NOTICE_MS);
}

// -- jobs ------------------------------------------------------------------------------------------------

const jobs = new Map<string, Signal<Job>>();
const heardAt = new Map<string, number>();

/** The signal of a job that is in some list. */
export const jobOf = (id: string): Signal<Job> | undefined => jobs.get(id);

/** Seconds since the server last told the job's time left. */
export const ageOf = (id: string): number => Math.max(0, (now.value - (heardAt.get(id) ?? now.value)) / 1000);

/**
 * The jobs with some status, as many as were asked to be shown, kept in order as events come in.
 *
 * Each load asks for all of them: one that overtakes another (the connection comes back while somebody asks for more)
 * brings what the other would have brought, and takes away no row that was shown.
 */
class JobList {
  readonly ids = signal<string[]>([]);
  /** Whether there are more than are shown. */
  readonly more = signal(false);
  readonly state = signal<"new" | "loading" | "ready" | "failed">("new");
  private asked = 0;
  private most = PAGE;
  /** Jobs that events told of since the last load was asked for: what it brings of them may be older. */
  private readonly heard = new Set<string>();

  constructor(
    private statuses: readonly Status[],
    private readonly order: (a: Job, b: Job) => number,
  ) {}

  /** Show these statuses from now on. */
  of(statuses: readonly Status[]): void {
    this.statuses = statuses;
  }

  /** Begin again with one page. */
  clear(): void {
    this.ids.value = [];
    this.most = PAGE;
  }

  /** Show a page more than is shown now. */
  async grow(): Promise<void> {
    this.most = Math.max(this.most, this.ids.value.length + PAGE);
    await this.load();
  }

  async load(): Promise<void> {
    const turn = ++this.asked;
    this.heard.clear();
    if (!this.ids.value.length) this.state.value = "loading";
    try {
      const page = await this.fetch(Math.max(this.most, this.ids.value.length));
      if (turn !== this.asked) return;
      batch(() => {
        page.jobs.filter((job) => !this.heard.has(job.id)).forEach(keep);
        counts.value = page.counts;
        this.ids.value = this.sorted(page.jobs.map((job) => job.id).filter((id) => this.wants(jobs.get(id)?.value)));
        this.more.value = page.next !== null;
        this.heard.forEach((id) => this.put(jobs.get(id)?.value));
        this.state.value = "ready";
      });
    } catch (error) {
      if (turn !== this.asked) return;
      this.state.value = "failed";
      if (session.value !== "none") tell(wordsOf(error), true);
    }
  }

  private async fetch(most: number): Promise<JobPage> {
    if (this.statuses.includes("pending") && !filter.value.workflow) return this.nextOnes(most);
    const pages = await Promise.all(this.statuses.map((status) => this.one(status, most)));
    const found = pages.flatMap((page) => page.jobs).sort((a, b) => b.number - a.number);
    const next = pages.find((page) => page.next !== null)?.next ?? found[most]?.number ?? null;
    return { jobs: found.slice(0, most), counts: (pages[0] as JobPage).counts, next };
  }

  /** The newest so many with one status, of as many pages as that takes. */
  private async one(status: Status, most: number): Promise<JobPage> {
    const jobs: Job[] = [];
    for (let before: number | null = null; ; ) {
      const query = new URLSearchParams({ status, limit: String(Math.min(MOST, most - jobs.length)) });
      if (filter.value.workflow) query.set("workflow", filter.value.workflow);
      if (before !== null) query.set("before", String(before));
      const page = await get<JobPage>(`/jobs?${query}`);
      jobs.push(...page.jobs);
      if (page.next === null || jobs.length >= most) return { ...page, jobs };
      before = page.next;
    }
  }

  /** Those that wait are told in the order in which they will be begun: as one page, which grows. */
  private async nextOnes(most: number): Promise<JobPage> {
    const limit = Math.min(MOST, most);
    const page = await get<JobPage>(`/jobs?order=queue&limit=${limit}`);
    const all = page.jobs.length >= page.counts.pending || limit === MOST;
    return { ...page, next: all ? null : (page.jobs.at(-1)?.number ?? null) };
  }

  /** Put a job in, move it or take it out, whatever its status now says. */
  place(job: Job): void {
    this.heard.add(job.id);
    this.put(job);
  }

  private put(job: Job | undefined): void {
    if (!job) return;
    const has = this.ids.value.includes(job.id);
    if (!this.wants(job) || !matches(job)) {
      if (has) this.ids.value = this.ids.value.filter((id) => id !== job.id);
      return;
    }
    const last = jobs.get(this.ids.value.at(-1) ?? "")?.value;
    if (!has && this.more.value && last && this.order(job, last) > 0) return; // on a page not opened yet
    this.ids.value = this.sorted(has ? this.ids.value : [...this.ids.value, job.id]);
  }

  private wants(job: Job | undefined): boolean {
    return job !== undefined && this.statuses.includes(job.status);
  }

  private sorted(ids: string[]): string[] {
    const known = ids.flatMap((id) => jobs.get(id)?.value ?? []);
    return known.sort(this.order).map((job) => job.id);
  }
}

export const running = new JobList(["processing"], (a, b) => a.number - b.number);
export const waiting = new JobList(["pending"], (a, b) => a.priority - b.priority || a.number - b.number);
export const finished = new JobList(["done", "failed"], (a, b) => b.number - a.number);
const LISTS = [running, waiting, finished];

export type Tab = "all" | Status;
export const filter = signal<{ tab: Tab; workflow: string }>({ tab: "all", workflow: "" });

const matches = (job: Job): boolean => !filter.value.workflow || job.workflow === filter.value.workflow;

export function setFilter(to: Partial<{ tab: Tab; workflow: string }>): void {
  const before = filter.value;
  filter.value = { ...before, ...to };
  const past: Status[] = filter.value.tab === "done" ? ["done"] : filter.value.tab === "failed" ? ["failed"] : ["done", "failed"];
  finished.of(past);
  finished.clear();
  if (before.workflow === filter.value.workflow) {
    void finished.load();
  } else {
    for (const list of LISTS) {
      list.clear();
      void list.load();
    }
  }
}

function keep(job: Job): void {
  const known = jobs.get(job.id);
  if (job.time_left) heardAt.set(job.id, Date.now());
  if (known) known.value = job;
  else jobs.set(job.id, signal(job));
}

/** Take in what the durable log says of a job. */
export function heardJob(kind: string, job: Job): void {
  const before = jobs.get(job.id)?.peek();
  batch(() => {
    keep(job);
    for (const list of LISTS) list.place(job);
    touched.value = { id: job.id, count: touched.value.count + 1 };
  });
  const ended = job.status === "done" || job.status === "failed";
  if (ended && ["done", "failed", "cancelled", "quarantined"].includes(kind) && before?.status !== job.status) {
    tell(`Job ${job.number} ${standing(job)}: ${titleOf(job).slice(0, 80)}`, job.status === "failed" && job.reason !== "cancelled");
  }
  soon();
}

/** Take in how far a job is. */
export function heardProgress(id: string, progress: Progress, left: TimeLeft | null, cost: string | null): void {
  const known = jobs.get(id);
  if (!known || known.peek().status !== "processing") return;
  heardAt.set(id, Date.now());
  known.value = { ...known.peek(), progress, time_left: left, cost_usd: cost ?? known.peek().cost_usd };
}

// -- asking ----------------------------------------------------------------------------------------------

let counting = 0;

/** Count the queue again in a moment; a hundred events ask once. */
function soon(): void {
  if (counting) return;
  counting = window.setTimeout(() => {
    counting = 0;
    void loadQueue();
  }, 700);
}

async function quietly<T>(path: string, into: Signal<T | null>): Promise<void> {
  try {
    into.value = await get<T>(path);
  } catch {
    // what is shown stays; the connection's own word says that something is wrong
  }
}

export async function loadQueue(): Promise<void> {
  await quietly("/queue", queue);
  if (queue.value) counts.value = queue.value.counts;
}

export const loadMachines = (): Promise<void> => quietly("/machines", machines);
export const loadMoney = (): Promise<void> => quietly("/costs/now", money);
export const loadWorkflows = (): Promise<void> => quietly("/workflows", workflows);

/** Everything that may have changed while nobody told us. */
export async function loadAll(): Promise<void> {
  touched.value = { id: "", count: touched.value.count + 1 };
  await Promise.all([...LISTS.map((list) => list.load()), loadQueue(), loadMachines(), loadMoney()]);
}

/** Give an order about a job; says so if it was refused. True if it was obeyed. */
export async function order(method: string, job: Job, rest: string, json?: unknown): Promise<Job | null> {
  try {
    const answer = await ask<Job>(method, jobUrl(job.id, rest), json === undefined ? {} : { json });
    batch(() => {
      keep(answer);
      for (const list of LISTS) list.place(answer);
    });
    soon();
    return answer;
  } catch (error) {
    tell(`Job ${job.number}: ${wordsOf(error)}`, true);
    return null;
  }
}

setInterval(() => {
  if (!document.hidden) now.value = Date.now();
}, 1000);
