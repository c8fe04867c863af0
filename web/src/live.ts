// The live connection: Server-Sent Events over one reader per page, again and again, and what was missed in between.

import { parse } from "./api";
import { get } from "./api";
import { heardJob, heardProgress, link, loadAll, machines, money, session } from "./store";
import type { Job, Machine, Money, Progress, Session, TimeLeft } from "./types";

/** Milliseconds between attempts, the last one for ever. */
const WAITS = [500, 1000, 2000, 5000, 10_000];
/** A page nobody looks at gives its connection back: browsers keep six to one server. */
const HIDDEN_MS = 60_000;

let source: EventSource | null = null;
let last = "";
let failures = 0;
let again = 0;
let hiding = 0;

interface Told {
  kind: string;
  job: Job | null;
}

interface Going {
  id: string;
  progress: Progress;
  time_left: TimeLeft | null;
  cost_usd: string | null;
}

export function connect(): void {
  window.clearTimeout(again);
  source?.close();
  const stream = new EventSource(last ? `/events?after=${encodeURIComponent(last)}` : "/events");
  source = stream;
  stream.onopen = () => {
    failures = 0;
    link.value = "live";
    void loadAll();
  };
  stream.onerror = () => {
    link.value = "lost";
    if (stream.readyState === EventSource.CLOSED) retry(stream);
  };
  on<Told>(stream, "job", (told) => {
    if (told.job) heardJob(told.kind, told.job);
  });
  on<Going>(stream, "progress", (told) => heardProgress(told.id, told.progress, told.time_left, told.cost_usd));
  on<{ machines: Machine[]; listed?: boolean; why?: string | null }>(stream, "machines", (told) => {
    const before = machines.peek();
    machines.value = {
      machines: told.machines,
      listed: told.listed ?? before?.listed ?? true,
      why: told.why ?? (told.listed === undefined ? (before?.why ?? null) : null),
    };
  });
  on<Money>(stream, "money", (told) => {
    money.value = told;
  });
}

function on<T>(stream: EventSource, name: string, heard: (data: T) => void): void {
  stream.addEventListener(name, (event) => {
    const message = event as MessageEvent<string>;
    if (message.lastEventId) last = message.lastEventId;
    heard(parse(message.data) as T);
  });
}

/** The browser has given up (an answer that is no stream): ask whether we are still logged in, then try again. */
function retry(stream: EventSource): void {
  stream.close();
  if (source !== stream) return;
  source = null;
  const wait = WAITS[Math.min(failures++, WAITS.length - 1)] as number;
  again = window.setTimeout(() => {
    void get<Session>("/session")
      .then((found) => {
        session.value = found;
      })
      .catch(() => undefined)
      .finally(() => {
        if (session.peek() !== "none") connect();
      });
  }, wait);
}

/** Log in by the cookie that is there, or show how to get one; live from then on. */
export async function begin(): Promise<void> {
  try {
    session.value = await get<Session>("/session");
  } catch {
    if (session.peek() === "unknown") {
      link.value = "lost";
      again = window.setTimeout(() => void begin(), 2000);
    }
    return;
  }
  connect();
}

document.addEventListener("visibilitychange", () => {
  window.clearTimeout(hiding);
  if (document.hidden) {
    hiding = window.setTimeout(() => {
      source?.close();
      source = null;
      window.clearTimeout(again);
      link.value = "connecting";
    }, HIDDEN_MS);
  } else if (!source && typeof session.peek() === "object") {
    connect();
  }
});
